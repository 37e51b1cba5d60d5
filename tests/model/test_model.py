"""The model's behaviour beyond parity: backends, stochastic depth, the ablation, bad input."""

from typing import Any

import pytest
import torch

from vlmo import VLMo, VLMoConfig
from vlmo.kernels import routing, use_backend
from vlmo.kernels.attention import api as attention_api
from vlmo.model.layout import Run
from vlmo.tasks.losses import compute_losses
from vlmo.tasks.negatives import draw_negatives

TINY = VLMoConfig(
    dim=24,
    depth=3,
    heads=2,
    vl_start=2,
    image_size=32,
    max_text_length=6,
    text_capacity=8,
    vocab_size=30,
    drop_path=0.0,
)


def make_batch(size: int = 4) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 30, (size, 6))
    mask = torch.arange(6) < torch.randint(3, 7, (size, 1))
    labels = torch.where((torch.rand(size, 6) < 0.4) & mask, ids, -100)
    labels[0, 1] = ids[0, 1]
    return {
        "text_ids": ids * mask,
        "text_masks": mask.long(),
        "text_ids_mlm": ids * mask,
        "text_labels_mlm": labels,
        "image": torch.randn(size, 3, 32, 32),
        "image_0": torch.randn(size, 3, 32, 32),
        "image_1": torch.randn(size, 3, 32, 32),
        "answers": torch.arange(size) % 2,
        "vqa_targets": torch.rand(size, 7),
    }


@pytest.mark.parametrize(
    "tasks", [("mlm", "itc", "itm"), ("textmlm",), ("irtr",), ("vqa",), ("nlvr2",), ("irtr", "itc")]
)
def test_every_task_gives_a_finite_loss_and_gradients(tasks):
    model = VLMo(TINY.replace(tasks=tasks, vqa_labels=7))
    output = model(compute_losses, make_batch())
    losses = [value for key, value in output.items() if key.endswith("_loss")]
    assert len(losses) == len(tasks)
    torch.testing.assert_close(output["loss"], torch.stack(losses).sum())
    output["loss"].backward()
    assert model.transformer.blocks[0].norm1.weight.grad.isfinite().all()
    assert model.relative_position_bias_table.grad.isfinite().all()


def test_backend_of_the_config_and_of_the_context():
    batch = make_batch()
    named = VLMo(TINY.replace(kernels="reference", tasks=("irtr",)))
    anyone = VLMo(TINY.replace(tasks=("irtr",)))
    anyone.load_state_dict(named.state_dict())
    torch.testing.assert_close(
        anyone(compute_losses, batch)["loss"], named(compute_losses, batch)["loss"]
    )
    with pytest.raises(NotImplementedError, match="backend 'cuda' cannot run"):
        VLMo(TINY.replace(kernels="cuda", tasks=("irtr",)))(compute_losses, batch)
    with use_backend("cuda"), pytest.raises(NotImplementedError, match="backend 'cuda'"):
        anyone(compute_losses, batch)
    with use_backend("cuda"):  # the model's own choice comes first
        named(compute_losses, batch)


def test_padding_does_not_change_the_text():
    """Ids behind the mask are not seen."""
    model, batch = VLMo(TINY.replace(tasks=("irtr",))).eval(), make_batch()
    with torch.no_grad():
        model.relative_position_bias_table.normal_()
    expected = model.encode_text(batch["text_ids"], batch["text_masks"]).embedding
    other = torch.where(batch["text_masks"].bool(), batch["text_ids"], 7)
    actual = model.encode_text(other, batch["text_masks"]).embedding
    torch.testing.assert_close(actual, expected)
    fused = model.fuse(batch["text_ids"], batch["text_masks"], batch["image"]).pooled
    again = model.fuse(other, batch["text_masks"], batch["image"]).pooled
    torch.testing.assert_close(again, fused)


def check_survival(factors: torch.Tensor, runs: list[slice]) -> None:
    """timm's rule at rate 0.5: 0 or 2, equal within a run of tokens, drawn apart between runs."""
    assert set(factors.unique().tolist()) == {0.0, 2.0}
    assert abs(factors.mean() - 1) < 0.1
    for run in runs:
        assert (factors[:, run] == factors[:, run][:, :1]).all()
    firsts = factors[:, [run.start for run in runs]]
    assert len(runs) == 1 or (firsts[:, 0] != firsts[:, 1]).any()


@pytest.mark.parametrize("packed", [False, True])
def test_stochastic_depth_drops_branches_by_sample_and_modality(packed):
    model, device = VLMo(TINY), torch.device("cpu")
    if packed:
        layout = model.pack([Run(2000, torch.full((2000,), 2), 4000, 3, True)], device)
    else:
        layout = model._padded(torch.zeros(2000, 5, 24), 2, 3, None, vl=True)
    check_survival(layout.drop_path(0.5, device).view(2000, 5), [slice(0, 5)])
    below = layout.drop_path_of_experts(0.5, False, device).view(2000, 5)
    check_survival(below, [slice(0, 2), slice(2, 5)])
    above = layout.drop_path_of_experts(0.5, True, device).view(2000, 5)
    check_survival(above, [slice(0, 5)])


def test_stochastic_depth_grows_with_the_block_and_ends_with_training():
    model = VLMo(TINY.replace(drop_path=0.3))
    rates = [block.drop_path for block in model.transformer.blocks]
    assert rates == pytest.approx([0, 0.15, 0.3])
    image = make_batch()["image"]
    assert not torch.equal(model.encode_image(image).cls, model.encode_image(image).cls)
    model.eval()
    assert torch.equal(model.encode_image(image).cls, model.encode_image(image).cls)


@pytest.mark.heavy
def test_training_with_stochastic_depth_keeps_the_expectation():
    model, batch = VLMo(TINY.replace(tasks=("irtr",), drop_path=0.2)), make_batch(2)
    model.text_embeddings.dropout.p = 0.0
    with torch.no_grad():
        for block in model.transformer.blocks:
            block.gamma_1.fill_(0.02)  # nearly linear, so that means compare
            block.gamma_2.fill_(0.02)
    model.eval()
    expected = model.encode_image(batch["image"]).cls
    model.train()
    with torch.no_grad():
        mean = torch.stack([model.encode_image(batch["image"]).cls for _ in range(400)]).mean(0)
    torch.testing.assert_close(mean, expected, rtol=0.05, atol=0.01)


def test_separate_attention():
    """Below the VL blocks text and image have their own projections; above they share."""
    model = VLMo(TINY.replace(separate_attention=True))
    assert [b.attn_text is not None for b in model.transformer.blocks] == [True, True, False]
    batch = make_batch()
    shared = VLMo(TINY)
    state = shared.state_dict()
    for number in (0, 1):
        prefix = f"transformer.blocks.{number}.attn"
        copies = {k: v for k, v in state.items() if k.startswith(prefix + ".")}
        state |= {k.replace(prefix, prefix + "_text"): v for k, v in copies.items()}
    model.load_state_dict(state)
    torch.manual_seed(1)
    expected = shared(compute_losses, batch)["loss"]
    torch.manual_seed(1)
    torch.testing.assert_close(
        model(compute_losses, batch)["loss"], expected
    )  # equal weights: the same function

    with torch.no_grad():
        model.transformer.blocks[0].attn_text.proj.weight.zero_()
    changed = model.encode_text(batch["text_ids"], batch["text_masks"]).embedding
    same = shared.encode_text(batch["text_ids"], batch["text_masks"]).embedding
    assert not torch.allclose(changed, same)
    torch.testing.assert_close(
        model.encode_image(batch["image"]).embedding, shared.encode_image(batch["image"]).embedding
    )


def test_rectangular_use_of_the_second_nlvr2_image_type():
    model = VLMo(TINY.replace(tasks=("nlvr2",)))
    types = model.token_type_embeddings.weight
    assert types.shape[0] == 3
    torch.testing.assert_close(types[2], types[1])


def test_hard_negatives_are_never_their_own():
    logits = torch.randn(32, 32) * 3
    for _ in range(20):
        drawn = draw_negatives(logits)
        assert drawn.shape == (32,)
        assert (drawn != torch.arange(32)).all()


def test_hard_negatives_follow_the_softmax():
    logits = torch.tensor([[5.0, 1.0, 0.0]]).expand(3, 3).clone()
    draws = torch.stack([draw_negatives(logits)[0] for _ in range(4000)])
    share = (draws == 1).float().mean()
    assert abs(share - 1 / (1 + torch.tensor(-1.0).exp())) < 0.03
    assert (draws != 0).all()


def test_hard_negatives_survive_a_softmax_without_mass_off_the_diagonal():
    assert (draw_negatives(torch.eye(4) * 1e4) != torch.arange(4)).all()


@pytest.mark.heavy
def test_compiled_model_equals_eager():
    model, batch = VLMo(TINY.replace(tasks=("irtr",))), make_batch()
    compiled = torch.compile(model.encode_image, fullgraph=True, backend="aot_eager")
    expected = model.encode_image(batch["image"]).embedding
    torch.testing.assert_close(compiled(batch["image"]).embedding, expected)
    fuse = torch.compile(model.fuse, fullgraph=True, backend="aot_eager")
    arguments = (batch["text_ids"], batch["text_masks"], batch["image"])
    torch.testing.assert_close(fuse(*arguments).pooled, model.fuse(*arguments).pooled)


def test_autocast_training_step():
    model, batch = VLMo(TINY), make_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(compute_losses, batch)["loss"]
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("size", ["base", "base_plus", "large"])
def test_presets(size):
    config = getattr(VLMoConfig, size)()
    with torch.device("meta"):
        model = VLMo(config)
    heads = ("mlm_score", "itm_score", "itc_", "logit", "pooler")
    count = sum(p.numel() for n, p in model.named_parameters() if not n.startswith(heads))
    # what the official README reports, in millions: transformer, text embeddings and table
    assert count / 1e6 == pytest.approx({"base": 175, "base_plus": 167, "large": 562}[size], abs=1)


BAD_CALLS: dict[str, dict[str, Any]] = {
    r"image: shape \(4, 3, 48, 48\) is not \(batch, 3, 32, 32\)": dict(
        image=torch.zeros(4, 3, 48, 48)
    ),
    r"image: shape \(4, 1, 32, 32\)": dict(image=torch.zeros(4, 1, 32, 32)),
    "image: 3 images for 4 texts": dict(image=torch.zeros(3, 3, 32, 32)),
    r"text_ids: shape \(4, 5\) is not \(4, 6\)": dict(text_ids=torch.zeros(4, 5).long()),
    r"text_mask: shape \(4, 7\) is not \(4, 6\)": dict(text_mask=torch.ones(4, 7)),
    r"image_type: 2 is not within 1\.\.1": dict(image_type=2),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_input(message):
    batch = make_batch()
    arguments = dict(
        text_ids=batch["text_ids"], text_mask=batch["text_masks"], image=batch["image"]
    )
    with pytest.raises(ValueError, match=message):
        VLMo(TINY).fuse(**(arguments | BAD_CALLS[message]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(tasks=("itm", "mim")), r"tasks: \['mim'\] are not among"),
        (dict(heads=5), "dim: 24 is not a multiple of heads 5"),
        (dict(image_size=40), "image_size: 40 is not a multiple of patch_size 16"),
        (dict(vl_start=4), r"vl_start: 4 is not within 0\.\.depth"),
        (dict(drop_path=1.0), "drop_path: 1.0 is not within"),
        (dict(dim=0), "dim: 0 is not a positive integer"),
        (dict(dim=24.0), "dim: 24.0 is not a positive integer"),
        (dict(vocab_size=-1), "vocab_size: -1 is not a positive integer"),
        (dict(image_size=0), "image_size: 0 is not a positive integer"),
        (dict(mlp_ratio=0.01), "mlp_ratio: 0.01 times dim 24 is below 1"),
        (dict(mlp_ratio=float("nan")), "mlp_ratio: nan times dim"),
        (dict(layer_scale=float("inf")), "layer_scale: inf is not finite"),
        (dict(max_text_length=9), "max_text_length: 9 exceeds text_capacity 8"),
    ],
)
def test_bad_config(changes, message):
    with pytest.raises(ValueError, match=message):
        TINY.replace(**changes)


def test_itm_without_itc_is_refused():
    with pytest.raises(ValueError, match="itm without itc"):
        VLMo(TINY.replace(tasks=("itm",)))(compute_losses, make_batch())


def test_vqa_targets_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"vqa_targets: shape \(4, 7\) is not \(4, 9\)"):
        VLMo(TINY.replace(tasks=("vqa",), vqa_labels=9))(compute_losses, make_batch())


@pytest.mark.parametrize("tasks", [("mlm", "itc", "itm"), ("textmlm",), ("vqa",)])
def test_layers_do_not_check_a_layout_that_is_right_by_construction(tasks, monkeypatch):
    """On a GPU every check of values is several small kernels, in every layer."""
    checked = []
    for module in (attention_api, routing):
        monkeypatch.setattr(module, "check_values", lambda name, *_: checked.append(name))
    model = VLMo(TINY.replace(tasks=tasks, vqa_labels=7))
    model(compute_losses, make_batch() | {"answers": torch.zeros(4, dtype=torch.int64)})[
        "loss"
    ].backward()
    assert not checked


def test_a_layout_groups_its_rows_once(monkeypatch):
    calls = []
    real = routing.routing_index

    def noted(*call):
        calls.append(call)
        return real(*call)

    monkeypatch.setattr(routing, "routing_index", noted)
    model = VLMo(TINY.replace(tasks=("vqa",), vqa_labels=7))
    assert model.config.first_vl_block == 2
    model(compute_losses, make_batch() | {"answers": torch.zeros(4, dtype=torch.int64)})
    assert len(calls) == 1  # two layers below the first VL block share it; above, one expert
