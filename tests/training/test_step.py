"""A training step: exact for any number of micro-batches and ranks, and its cost."""

import dataclasses
from typing import Any

import pytest
import torch

import test_model
from counting import OnDevice, counting
from harness.official import pretraining
from vlmo import BEiT3Config, VLMo, VLMoConfig
from vlmo.data import HOST_KEYS, to_device
from vlmo.device import autocast_dtype
from vlmo.model.models import Config, build
from vlmo.tasks import losses
from vlmo.tasks.losses import compute_losses
from vlmo.tasks.negatives import PendingNegatives
from vlmo.training import step

TINY = test_model.TINY.replace(vqa_labels=7)
ABSOLUTE = TINY.replace(relative_position_bias=False, absolute_position=True, layer_scale=None)
TASKS = [("mlm", "itc", "itm"), ("textmlm",), ("irtr",), ("vqa",), ("nlvr2",), ("irtr", "itc")]
BEIT3 = BEiT3Config(
    dim=TINY.dim,
    depth=3,
    heads=TINY.heads,
    image_size=TINY.image_size,
    patch_size=TINY.patch_size,
    max_text_length=TINY.max_text_length,
    vocab_size=TINY.vocab_size,
    vqa_labels=TINY.vqa_labels,
    drop_path=TINY.drop_path,
)
BEIT3_TASKS = [("irtr",), ("vqa",), ("nlvr2",), ("irtr", "nlvr2")]
CONFIGS: dict[str, Config] = {
    **{"-".join(tasks): TINY.replace(tasks=tasks) for tasks in TASKS},
    **{f"beit3-{'-'.join(tasks)}": BEIT3.replace(tasks=tasks) for tasks in BEIT3_TASKS},
}


def model_of(config: Config) -> Any:
    """A model in which everything matters: the official one starts with a bias of zero."""
    torch.manual_seed(0)
    model = build(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or parameter.dim() == 2:
                parameter.normal_(std=0.2)
    return model


def batch_of(rows: int, config: Config = TINY, seed: int = 0) -> dict:
    random = torch.Generator().manual_seed(seed)
    length, side = config.max_text_length, config.image_size
    lengths = torch.randint(3, length + 1, (rows,), generator=random)
    masks = torch.arange(length) < lengths[:, None]
    ids = torch.randint(1, config.vocab_size, (rows, length), generator=random) * masks
    chosen = (torch.rand(rows, length, generator=random) < 0.4) & masks
    labels = torch.where(chosen, ids, -100)
    labels[0, 1] = ids[0, 1]
    pictures = torch.randint(0, 256, (3, rows, 3, side, side), generator=random).to(torch.uint8)
    return {
        "text_ids": ids,
        "text_masks": masks.long(),
        "text_lengths": lengths,
        "text_ids_mlm": torch.where(chosen, 3, ids),
        "text_labels_mlm": labels,
        "mlm_tokens": (labels.flatten() >= 0).nonzero()[:, 0],
        "image": pictures[0],
        "image_0": pictures[1],
        "image_1": pictures[2],
        "answers": torch.arange(rows) % 2,
        "vqa_targets": torch.rand(rows, config.vqa_labels, generator=random),
    }


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(actual: dict, expected: dict, tolerance: float = 2e-5) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = (actual[name] - value).abs().max()
        # Softmax cancels the bias of keys; its gradient is rounding.
        least = 0.1 if "k_proj" in name and name.endswith("bias") else 1e-3
        assert error <= tolerance * value.abs().max().clamp(min=least), f"{name}: {error:.1e}"


@pytest.mark.parametrize("config", [TINY, ABSOLUTE, TINY.replace(separate_attention=True)])
def test_a_packed_step_equals_the_official_composition(config):
    """Losses and every gradient, with captions of different lengths."""
    model, batch = model_of(config), batch_of(6)
    padded = batch | {"image": batch["image"].float() / 127.5 - 1}
    torch.manual_seed(5)
    expected = pretraining(model, padded)
    expected["loss"].backward()
    wanted = gradients(model)
    model.zero_grad()
    torch.manual_seed(5)
    output = model(compute_losses, batch)
    output["loss"].backward()
    assert_same({name: output[name] for name in expected}, expected)
    assert_same(gradients(model), wanted)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("micro_batch", [4, 2])
def test_parts_equal_the_whole(name, micro_batch):
    """Losses and gradients; contrast and hard negatives span all parts."""
    model, batch = model_of(CONFIGS[name]), batch_of(8)
    expected = step.backward(model, batch, seed=(1, 2))
    wanted = gradients(model)
    model.zero_grad()
    actual = step.backward(model, batch, micro_batch=micro_batch, seed=(1, 2))
    assert_same(actual, expected)
    assert_same(gradients(model), wanted)


def test_parts_see_the_same_dropout_in_both_passes(monkeypatch):
    model, batch = model_of(TINY.replace(tasks=("irtr",), drop_path=0.5)), batch_of(8)
    seen = []
    encode = losses.encode_streams

    def recording(*args):
        found = encode(*args)
        seen.append(found[0])
        return found

    monkeypatch.setattr(losses, "encode_streams", recording)
    step.backward(model, batch, micro_batch=4, seed=(1, 2))
    assert len(seen) == 4
    for first, second in zip(seen[:2], seen[2:], strict=True):
        assert torch.equal(first.image, second.image)
        assert torch.equal(first.text, second.text)
    assert not torch.equal(seen[0].image, seen[1].image)


def test_a_step_follows_from_its_seed():
    model, batch = model_of(TINY.replace(drop_path=0.3)), batch_of(6)
    losses: list[float] = []
    for seed in ((1, 2), (1, 2), (1, 3)):
        torch.manual_seed(len(losses))
        losses.append(step.backward(model, batch, seed=seed)["loss"].item())
    assert losses[0] == losses[1] != losses[2]


def test_checkpointing_changes_nothing():
    batch = batch_of(6)
    results = []
    for checkpointing in (False, True):
        config = TINY.replace(drop_path=0.3, checkpointing=checkpointing)
        model = model_of(config)
        results.append((step.backward(model, batch, seed=(0, 1)), gradients(model)))
    assert_same(results[1][0], results[0][0])
    assert_same(results[1][1], results[0][1])


def test_masked_words_may_be_absent():
    model, batch = model_of(TINY), batch_of(4)
    batch["text_labels_mlm"] = torch.full_like(batch["text_labels_mlm"], -100)
    batch["mlm_tokens"] = torch.empty(0, dtype=torch.long)
    losses = step.backward(model, batch)
    assert losses["mlm_loss"] == 0
    assert losses["loss"].isfinite()


@pytest.mark.parametrize("scale", [0.0, 0.25])
def test_the_gradient_scale_of_contrast_reaches_the_encoders_only(scale):
    grads = []
    for value in (1.0, scale):
        model = model_of(TINY.replace(tasks=("irtr",), itc_grad_scale=value))
        step.backward(model, batch_of(6))
        grads.append(gradients(model))
    for name, gradient in grads[0].items():
        factor = 1.0 if name == "logit_scale" else scale
        torch.testing.assert_close(grads[1][name], factor * gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("config", [TINY, ABSOLUTE, TINY.replace(separate_attention=True)])
def test_unused_parameters(tasks, config):
    model = model_of(config.replace(tasks=tasks))
    step.backward(model, batch_of(4))
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert losses.unused_parameters(model.config) == without


@pytest.mark.parametrize("tasks", BEIT3_TASKS)
def test_unused_parameters_of_beit3(tasks):
    """Their gradients are zeros, or there are none."""
    model = model_of(BEIT3.replace(tasks=tasks))
    step.backward(model, batch_of(4))
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert losses.unused_parameters(model.config) == without


@pytest.mark.parametrize("task", ["captioning", "classification"])
def test_unused_parameters_of_tasks_without_a_loss(task):
    model, batch = model_of(BEIT3.replace(tasks=(task,))), batch_of(4)
    texts = batch["text_ids"], batch["text_masks"], batch["image"]
    if task == "captioning":
        output = model.caption_logits(*texts, batch["text_labels_mlm"] >= 0)
    else:
        output = model.class_logits(batch["image"])
    output.logsumexp(1).sum().backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert losses.unused_parameters(model.config) == without
    with pytest.raises(ValueError, match=rf"tasks: \('{task}',\) of BEiT-3 are not all tasks with"):
        model(compute_losses, batch)


@pytest.mark.parametrize("tasks", BEIT3_TASKS)
def test_padding_changes_nothing(tasks):
    """A step removes padding that all texts have; here it is compared with the padded model."""
    model, batch = model_of(BEIT3.replace(tasks=tasks)), batch_of(4)
    output = model(compute_losses, batch)
    texts = batch["text_ids"], batch["text_masks"]
    wanted = {}
    if "irtr" in tasks:
        image = model.encode_image(batch["image"]).embedding
        logits = model.logit_scale.exp() * image @ model.encode_text(*texts).embedding.T
        wanted["irtr_i2t_logits"] = logits
    if "vqa" in tasks:
        wanted["vqa_logits"] = model.vqa_logits(*texts, batch["image"])
    if "nlvr2" in tasks:
        wanted["nlvr2_logits"] = model.nlvr2_logits(*texts, batch["image_0"], batch["image_1"])
    assert_same({name: output[name] for name in wanted}, wanted)


@pytest.mark.parametrize("name", ["text_lengths", "mlm_tokens"])
def test_host_copies_are_worked_out_if_they_are_missing(name):
    model, batch = model_of(TINY), batch_of(4)
    expected = step.backward(model, batch)
    del batch[name]
    assert_same(step.backward(model, batch), expected, 0)


def test_bad_batches():
    model, batch = model_of(TINY), batch_of(4)
    with pytest.raises(ValueError, match="micro_batch: 3 does not divide the 4 rows"):
        step.backward(model, batch, micro_batch=3)
    gap = batch["text_masks"].clone()
    gap[1, :2] = torch.tensor([0, 1])
    del batch["text_lengths"]
    with pytest.raises(ValueError, match="text_masks: text 1 has padding before its last token"):
        model(compute_losses, batch | {"text_masks": gap})
    with pytest.raises(ValueError, match="text_lengths: text 2 has no token"):
        model(compute_losses, batch | {"text_lengths": torch.tensor([3, 3, 0, 3])})
    with pytest.raises(ValueError, match="text_lengths: text 3 has more tokens than text_ids, 6"):
        model(compute_losses, batch | {"text_lengths": torch.tensor([3, 3, 1, 7])})
    with pytest.raises(ValueError, match=r"text_lengths: shape \(3,\) for 4 texts"):
        model(compute_losses, batch | {"text_lengths": torch.tensor([3, 3, 1])})
    labels = torch.full_like(batch["text_labels_mlm"], 1)
    with pytest.raises(ValueError, match="text_labels_mlm: a label stands on padding"):
        model(
            compute_losses,
            {k: v for k, v in batch.items() if k != "mlm_tokens"} | {"text_labels_mlm": labels},
        )


@pytest.mark.parametrize("tasks", [("mlm", "itc", "itm"), ("irtr",)])
def test_a_single_pair_has_nothing_to_be_compared_with(tasks):
    """Its loss would be 0, and its only negative the right one."""
    model, batch = model_of(TINY.replace(tasks=tasks)), batch_of(1)
    with pytest.raises(ValueError, match="batch: 1 pair leaves nothing for"):
        step.backward(model, batch)
    with pytest.raises(ValueError, match="logits: 1 column holds no negative"):
        PendingNegatives(torch.ones(1, 1), torch.ones(1, 1), batch)
    for alone in (("mlm",), ("vqa",), ("nlvr2",)):
        assert step.backward(model_of(TINY.replace(tasks=alone)), batch)["loss"].isfinite()


@pytest.mark.gpu
@pytest.mark.parametrize("micro_batch", [None, 4])
def test_a_step_on_a_gpu(micro_batch):
    """In 16 bits near the CPU's losses, and no operation waits, once all is compiled.

    Hard negatives are awaited by an event, which the mode that raises here does not count.
    """
    batch, device = batch_of(8), torch.device("cuda")
    expected = step.backward(model_of(TINY), batch)
    model = model_of(TINY).to(device)
    there = to_device(batch, device)
    options = {"micro_batch": micro_batch, "autocast": autocast_dtype(device)}
    step.backward(model, there, **options)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = step.backward(model, there, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name in ("itc_loss", "mlm_loss"):
        torch.testing.assert_close(losses[name].cpu(), expected[name], rtol=0.05, atol=0.01)
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


BASE = VLMoConfig.base(dim=8, heads=1, vocab_size=50, drop_path=0.0)  # its numbers of tokens


@pytest.mark.parametrize(("joined", "passes"), [(True, 2), (False, 3)])
def test_what_a_pretraining_step_costs_beside_the_official_one(monkeypatch, joined, passes):
    """Per sample of base at 224 pixels with captions of n tokens, and the same losses."""
    monkeypatch.setattr(losses, "_joins", lambda device: joined)
    rows = 3
    model, batch = model_of(BASE), batch_of(rows, BASE)
    batch["text_lengths"].clamp_(max=12)  # captions are short
    kept = torch.arange(40) < batch["text_lengths"][:, None]
    for name in ("text_ids", "text_masks", "text_ids_mlm"):
        batch[name] *= kept
    batch["text_labels_mlm"].masked_fill_(~kept, -100)
    batch["mlm_tokens"] = (batch["text_labels_mlm"].flatten() >= 0).nonzero()[:, 0]
    on_device = {
        name: value if name in HOST_KEYS else value.as_subclass(OnDevice)
        for name, value in batch.items()
    }
    torch.manual_seed(5)
    with counting() as ours:
        output = model(compute_losses, on_device)
    torch.manual_seed(5)
    with counting() as official:
        expected = pretraining(model, on_device)
    assert_same({name: output[name].detach() for name in expected}, expected)

    assert official == {
        "token_layers": rows * 14_694,
        "images_embedded": rows * 5,
        "launches": 2 * (4 * 12 + 2 * 14),
        "waits": 2 * rows,
    }
    # Streams: 12 blocks on either, the eleventh twice; MLM and matching: four pairs through 11. The
    # twelfth has first tokens and masked ones only. The wrong texts are those that were drawn.
    words, wrong = int(batch["text_lengths"].sum()), negative_words(model, batch)
    read = rows * (4 + 3) + len(batch["mlm_tokens"])
    assert ours == {
        "token_layers": rows * 197 * (12 + 44) + (12 + 33) * words + 11 * wrong + read,
        "images_embedded": rows,
        "launches": 2 * passes * 12,
        "waits": 1,
    }
    assert ours["token_layers"] < 0.85 * official["token_layers"]


def negative_words(model: VLMo, batch: dict) -> int:
    torch.manual_seed(5)
    patches = model.embed_image(batch["image"])
    output = losses.contrast(model, losses.encode_streams(model, batch, patches)[0])
    pending = PendingNegatives(output["itc_i2t_logits"], output["itc_t2i_logits"], batch)
    return sum(pending.all().text_lengths)


def test_settings_of_a_run_are_not_recorded(tmp_path):
    from vlmo import save_checkpoint
    from vlmo.checkpoint.io import config_of

    config = TINY.replace(checkpointing=True, itc_grad_scale=0.5, kernels="reference")
    save_checkpoint(VLMo(config), tmp_path / "model.pt")
    found = config_of(tmp_path / "model.pt")
    assert found == dataclasses.replace(TINY)


class Wrapper(torch.nn.Module):
    """Names every parameter anew, as torch.compile and PEFT do."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.inner_model = model

    def forward(self, *batch, **options):
        return self.inner_model(*batch, **options)


def test_temperatures_learn_inside_any_wrapper():
    """Of a batch in parts, the scales of contrast get their gradients from the whole batch."""
    model, batch = model_of(TINY.replace(tasks=("mlm", "itc", "itm"))), batch_of(4)
    step.backward(model, batch, micro_batch=2)
    expected = gradients(model)
    assert "logit_scale" in expected
    model.zero_grad()
    step.backward(Wrapper(model), batch, micro_batch=2)
    torch.testing.assert_close(gradients(model), expected)


def test_a_step_of_something_else_is_refused():
    with pytest.raises(TypeError, match="model: no VLMo or BEiT-3 is in this Linear"):
        step.backward(torch.nn.Linear(2, 2), batch_of(4))
