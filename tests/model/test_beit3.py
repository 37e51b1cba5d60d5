"""BEiT-3 beyond parity: heads, attention of captions, stochastic depth, wrappers, bad input."""

import copy
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from test_beit3_parity import TINY, batch_of, randomise
from test_wrappers import Wrapper
from vlmo.kernels import use_backend
from vlmo.model.beit3 import BEiT3, BEiT3Config, Padded

SIZE = 3
HEADS = {
    "irtr": ["logit_scale", "language_head.weight", "vision_head.weight"],
    "captioning": ["mlm_head.weight", "mlm_head.bias"],
    "vqa": [
        *(f"pooler.{layer}.{part}" for layer in ("dense", "norm") for part in ("weight", "bias")),
        *(f"head.{number}.{part}" for number in (0, 1, 3) for part in ("weight", "bias")),
    ],
    "nlvr2": [
        f"head.{layer}.{part}"
        for layer in ("norm1", "dense1", "norm2", "dense2")
        for part in ("weight", "bias")
    ],
    "classification": ["fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"],
}


def model_of(*tasks: str, **changes: Any) -> Any:
    model = BEiT3(TINY.replace(tasks=tasks, vqa_labels=9, classes=11, **changes))
    randomise(model, 0.1)
    return model


def outputs(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """Features of all passes; with PEFT, those of the model inside."""
    text, mask, image = batch["text_ids"], batch["text_mask"], batch["image"]
    return [
        model.encode_image(image, masked=batch["masked"]).tokens,
        model.encode_text(text, mask).tokens,
        *model.fuse(text, mask, image),
        *model.fuse(text, mask, image, causal=True),
    ]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return batch_of(TINY, SIZE)


@pytest.mark.parametrize("task", HEADS)
def test_keys_of_the_heads(task):
    """The names are those of unilm's ``modeling_finetune.py``."""
    keys = {name for name in model_of(task).state_dict() if not name.startswith("beit3.")}
    assert keys == set(HEADS[task])


def test_retrieval(batch):
    model = model_of("irtr")
    image = model.encode_image(batch["image"])
    text = model.encode_text(batch["text_ids"], batch["text_mask"])
    for out, head in ((image, model.vision_head), (text, model.language_head)):
        assert out.embedding is not None
        projected = out.tokens[:, 0] @ head.weight.T
        torch.testing.assert_close(out.embedding, projected / projected.norm(dim=1, keepdim=True))
    assert model_of().encode_image(batch["image"]).embedding is None


def test_vqa(batch):
    model = model_of("vqa")
    inputs = batch["text_ids"], batch["text_mask"], batch["image"]
    assert model.beit3.encoder.layer_norm is None
    cls = F.layer_norm(
        model.fuse(*inputs).image[:, 0],
        (32,),
        model.pooler.norm.weight,
        model.pooler.norm.bias,
        eps=1e-5,
    )
    pooled = torch.tanh(F.linear(cls, model.pooler.dense.weight, model.pooler.dense.bias))
    logits = model.vqa_logits(*inputs)
    assert logits.shape == (SIZE, 9)
    torch.testing.assert_close(logits, model.head(pooled))


def test_nlvr2(batch):
    model, other = model_of("nlvr2"), torch.randn_like(batch["image"])
    text, mask = batch["text_ids"], batch["text_mask"]
    passes = [model.fuse(text, mask, image) for image in (batch["image"], other)]
    first = torch.cat([t[:, 0] for fused in passes for t in (fused.image, fused.text)], dim=1)
    logits = model.nlvr2_logits(text, mask, batch["image"], other)
    assert logits.shape == (SIZE, 2)
    torch.testing.assert_close(logits, model.head(first))
    assert not torch.allclose(model.nlvr2_logits(text, mask, other, batch["image"]), logits)


def test_classification(batch):
    model = model_of("classification")
    assert model.beit3.encoder.layer_norm is None
    mean = model.encode_image(batch["image"]).tokens[:, 1:].mean(1)
    logits = model.class_logits(batch["image"])
    assert logits.shape == (SIZE, 11)
    torch.testing.assert_close(logits, model.head(model.fc_norm(mean)))


def test_captioning(batch):
    model = model_of("captioning")
    text, mask, image = batch["text_ids"], batch["text_mask"], batch["image"]
    chosen = mask & (torch.arange(mask.shape[1]) % 2 == 1)
    logits = model.caption_logits(text, mask, image, chosen)
    assert logits.shape == (int(chosen.sum()), TINY.vocab_size)
    features = model.fuse(text, mask, image, causal=True).text[chosen]
    torch.testing.assert_close(logits, model.mlm_head(features))


def test_captions_see_the_image_and_earlier_words_only(batch):
    model = model_of()
    mask = torch.ones_like(batch["text_mask"])
    changed = batch["text_ids"].clone()
    changed[:, 4] = (changed[:, 4] + 1) % TINY.vocab_size
    before, after = (
        model.fuse(text, mask, batch["image"], causal=True) for text in (batch["text_ids"], changed)
    )
    torch.testing.assert_close(after.text[:, :4], before.text[:, :4])
    differs = (after.text - before.text).abs().amax((0, 2)) > 1e-3
    assert differs.tolist() == [False] * 4 + [True] * 3
    torch.testing.assert_close(after.image, model.encode_image(batch["image"]).tokens)
    image = model.fuse(changed, mask, batch["image"].flip(3), causal=True)
    assert not torch.allclose(image.text[:, 0], after.text[:, 0], atol=1e-3)


def test_padding_does_not_change_other_tokens(batch):
    model = model_of("irtr")
    text, mask, image = batch["text_ids"], batch["text_mask"], batch["image"]
    changed = torch.where(mask, text, (text + 7) % TINY.vocab_size)
    short = text[:1, :2], mask[:1, :2]  # the first text has two tokens
    assert not mask[0, 2:].any()
    for run in (
        lambda ids, mask: model.encode_text(ids, mask).tokens,
        lambda ids, mask: model.fuse(ids, mask, image).text,
    ):
        torch.testing.assert_close(run(changed, mask)[mask], run(text, mask)[mask])
    alone = model.encode_text(*short).tokens
    torch.testing.assert_close(alone, model.encode_text(text[:1], mask[:1]).tokens[:, :2])
    fused = [model.fuse(*t, image[:1]) for t in (short, (text[:1], mask[:1]))]
    torch.testing.assert_close(fused[0].image, fused[1].image)


def test_mask_of_integers_and_images_of_bytes(batch):
    image = torch.randint(256, batch["image"].shape, dtype=torch.uint8)
    inputs = batch["text_ids"], batch["text_mask"]
    scaled = image.float() / 255 * 2 - 1
    model = model_of("irtr")
    expected = model.fuse(*inputs, scaled).text
    torch.testing.assert_close(model.fuse(inputs[0], inputs[1].long(), image).text, expected)
    classifier = model_of("classification")
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    normalised = (image.float() / 255 - mean) / std
    torch.testing.assert_close(classifier.class_logits(image), classifier.class_logits(normalised))


def test_stochastic_depth_drops_a_whole_branch_of_a_sequence(batch):
    model = model_of(drop_path=0.5).train()
    layer = model.beit3.encoder.layers[-1]
    layout = Padded.of(torch.empty(64, 2, 32), torch.empty(64, 3, 32), None)
    x = torch.randn(64, 5, 32)
    torch.manual_seed(1)
    actual = layer(x, layout)
    torch.manual_seed(1)
    attention, network = (layout.drop_path(0.5, x.device)[..., None] for _ in range(2))
    routing = layout.routing
    branch = layer.self_attn(x, layout, layer.self_attn_layer_norm, None) - x
    middle = x + attention * branch
    expected = middle + network * layer.ffn(layer.final_layer_norm(middle, routing), routing)
    torch.testing.assert_close(actual, expected)
    for kept in (attention, network):
        assert set(kept.unique().tolist()) == {0.0, 2.0}
        assert (kept == kept[:, :1]).all()
        assert 10 < (kept[:, 0] == 0).sum() < 54
    rates = [layer.drop_path for layer in model.beit3.encoder.layers]
    assert rates == [0.0, 0.25, 0.5]
    model.eval()
    assert_same(outputs(model, batch), outputs(model, batch))


def test_checkpointing_gives_the_same_gradients(batch):
    model = model_of()
    again = model_of(checkpointing=True)
    again.load_state_dict(model.state_dict())
    for one in (model, again):
        torch.stack([out.square().sum() for out in outputs(one, batch)]).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(again.get_parameter(name).grad, parameter.grad)


def test_backend_of_the_config_and_of_the_context(batch):
    named = model_of(kernels="reference")
    with pytest.raises(NotImplementedError, match="backend 'cuda' cannot run"):
        outputs(model_of(kernels="cuda"), batch)
    with use_backend("cuda"):  # the model's own choice comes first
        outputs(named, batch)


@pytest.mark.parametrize("kernels", [None, "reference"])
def test_autocast(batch, kernels):
    model = model_of(kernels=kernels)
    expected = outputs(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        actual = outputs(model, batch)
    for one, other in zip(actual, expected, strict=True):
        assert 0 < (one - other).norm() / other.norm() < 0.05
    torch.stack([out.float().sum() for out in actual]).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.heavy
def test_compiles_once_for_all_lengths_of_texts(batch):
    model = model_of()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model.fuse, backend=backend, fullgraph=True, dynamic=True)
    for length in (4, 5, 7):
        text, mask = (batch[name][:, :length].contiguous() for name in ("text_ids", "text_mask"))
        inputs = text, mask, batch["image"]
        assert_same([*compiled(*inputs)], [*model.fuse(*inputs)])
        assert_same([*compiled(*inputs, causal=True)], [*model.fuse(*inputs, causal=True)])
    assert len(graphs) == 2


@pytest.mark.heavy
def test_export(batch):
    model = model_of()
    inputs = batch["text_ids"], batch["text_mask"], batch["image"]

    class Fuse(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, *inputs: Tensor) -> list[Tensor]:
            return [*self.model.fuse(*inputs)]

    exported = torch.export.export(Fuse(), inputs).module()
    assert_same(exported(*inputs), [*model.fuse(*inputs)])


@pytest.mark.parametrize(
    "layer", ["q_proj", "out_proj", "inner_attn_ln", "final_layer_norm", "fc1", "ffn_layernorm"]
)
def test_wrapped_layers_are_called(batch, layer):
    model = model_of()
    wrapped = copy.deepcopy(model)
    seen: list[nn.Module] = []
    wrappers = 0
    for name, module in list(wrapped.named_modules()):
        if layer in name.split(".") and isinstance(module, (nn.Linear, nn.LayerNorm)):
            parent, _, last = name.rpartition(".")
            wrapper = Wrapper(module)
            wrapper.register_forward_hook(lambda module, *_: seen.append(module))
            setattr(wrapped.get_submodule(parent), last, wrapper)
            wrappers += 1
    assert wrappers == 2 * TINY.depth
    assert_same(outputs(wrapped, batch), outputs(model, batch))
    # Three of the four passes have the modality of a wrapper.
    assert len(seen) == 3 * wrappers and len(set(seen)) == wrappers


def test_adapters_act_learn_and_merge(batch):
    base = model_of()
    before = [out.detach() for out in outputs(base, batch)]
    config = peft.LoraConfig(r=3, target_modules="all-linear")
    adapted: Any = peft.get_peft_model(copy.deepcopy(base), config)
    assert_same(outputs(adapted, batch), before)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert len(trained) == 2 * 12 * TINY.depth
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    changed = outputs(adapted, batch)
    assert not torch.allclose(changed[-1], before[-1], atol=1e-2)
    torch.stack([out.square().sum() for out in changed]).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in trained)
    assert_same(outputs(adapted.merge_and_unload(), batch), changed)


@pytest.mark.parametrize("task", HEADS)
def test_reset_parameters_after_the_meta_device(task):
    config = TINY.replace(tasks=(task,))
    with torch.device("meta"):
        model = BEiT3(config)
    assert all(t.is_meta for t in model.state_dict().values())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.reset_parameters()
    expected = BEiT3(config)
    for name, parameter in model.named_parameters():
        wanted = expected.get_parameter(name)
        assert parameter.isfinite().all(), name
        varies = [bool((t != t.flatten()[0]).any()) for t in (parameter, wanted)]
        assert varies[0] == varies[1], name
        assert parameter.abs().max() <= 2 * wanted.abs().max(), name


def test_initial_values():
    model: Any = BEiT3(TINY.replace(dim=128, vocab_size=500, tasks=("nlvr2", "irtr")))
    model.requires_grad_(False)
    weight = model.beit3.encoder.layers[0].ffn["A"].fc1.weight
    assert weight.abs().max() <= 0.02
    assert weight.std() == pytest.approx(0.02 * 0.54, rel=0.02)  # of a normal cut at one deviation
    assert model.beit3.text_embed.weight.std() == pytest.approx(128**-0.5, rel=0.02)
    assert model.beit3.encoder.embed_positions["B"].weight.std() == pytest.approx(1, rel=0.05)
    assert model.head.dense2.weight.abs().max() <= 2e-5
    assert model.logit_scale.exp() == pytest.approx(1 / 0.07)
    assert not model.beit3.vision_embed.cls_token.any()


def test_configurations():
    assert BEiT3Config.large().replace(image_size=480).grid == 30
    cases: list[tuple[dict[str, Any], str]] = [
        (dict(tasks=("mlm",)), r"tasks: \['mlm'\] are not among"),
        (dict(tasks=("irtr", "vqa")), "tasks: vqa excludes the others of"),
        (dict(depth=0), "depth: 0 is not a positive integer"),
        (dict(classes=2.5), r"classes: 2\.5 is not a positive integer"),
        (dict(mlp_ratio=0.0), r"mlp_ratio: 0\.0 times dim 768 is below 1"),
        (dict(heads=7), "dim: 768 is not a multiple of heads 7"),
        (dict(image_size=225), "image_size: 225 is not a multiple of patch_size 16"),
        (dict(drop_path=1.0), r"drop_path: 1\.0 is not within"),
        (dict(text_positions=65), "max_text_length: 64 exceeds the 63 usable rows of text_pos"),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            BEiT3Config(**changes)


def test_bad_input(batch):
    model, text, mask, image = model_of(), batch["text_ids"], batch["text_mask"], batch["image"]
    longer = torch.cat([text, text], dim=1)
    for call, message in (
        (lambda: model.encode_text(longer, longer > 0), r"text_ids: shape \(3, 14\) is not"),
        (lambda: model.encode_text(text[:, :0], mask[:, :0]), r"not \(batch, 1 to 7 tokens\)"),
        (lambda: model.encode_text(text, mask[:, :3]), r"text_mask: shape \(3, 3\) is not \(3, 7"),
        (lambda: model.encode_image(image[..., :16]), r"image: shape .* is not \(batch, 3, 32, 32"),
        (lambda: model.encode_image(image * 100), "image: .* is not scaled to -1..1"),
        (lambda: model.fuse(text, mask, image[:2]), "image: 2 images for 3 texts"),
        (
            lambda: model.encode_image(image, masked=batch["masked"][:, :4]),
            r"masked: shape \(3, 4\) is not \(3, 16\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
