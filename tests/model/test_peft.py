"""PEFT's adapters on VLMo: they take effect, train, merge, and are saved; none is ignored."""

import copy
import os
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install -e '.[test]'")

from test_model import make_batch  # noqa: E402
from test_wrappers import EMBEDDINGS, TINY, fused_calls, outputs  # noqa: E402
from vlmo import VLMo, load_checkpoint, save_checkpoint  # noqa: E402
from vlmo.checkpoint.formats import CheckpointError  # noqa: E402

LINEAR = ["qkv", "proj", "fc1", "fc2"]
BLOCKS, EXPERTS, HEADS = 3, 7, 8  # blocks; experts of all blocks; linear layers of the heads
# Each with the number of modules that it adapts. "proj" is the patches' convolution too.
ADAPTERS = {
    "all-linear": (
        lambda: peft.LoraConfig(r=3, target_modules="all-linear"),
        2 * BLOCKS + 2 * EXPERTS + HEADS,
    ),
    "LoRA": (lambda: peft.LoraConfig(r=3, target_modules=LINEAR), 2 * BLOCKS + 2 * EXPERTS + 1),
    "LoRA on embeddings": (lambda: peft.LoraConfig(r=3, target_modules=[*EMBEDDINGS]), 4),
    "DoRA": (
        lambda: peft.LoraConfig(r=3, target_modules=[*LINEAR, *EMBEDDINGS], use_dora=True),
        2 * BLOCKS + 2 * EXPERTS + 1 + 4,
    ),
    "modules to save": (
        lambda: peft.LoraConfig(
            r=3, target_modules=["qkv"], modules_to_save=["itm_score", "norm2_text", "pooler"]
        ),
        BLOCKS + 1 + BLOCKS + 1,
    ),
    "IA3": (
        lambda: peft.IA3Config(target_modules=LINEAR, feedforward_modules=["fc2"]),
        2 * BLOCKS + 2 * EXPERTS + 1,
    ),
}
on_every_adapter = pytest.mark.parametrize("kind", ADAPTERS)


def base_model(**changes) -> VLMo:
    torch.manual_seed(0)
    return VLMo(TINY.replace(drop_path=0.0, **changes)).eval()


def adapted_model(kind: str, **changes) -> Any:
    """With adapters that are not at their initial value, which does nothing."""
    model = peft.get_peft_model(base_model(**changes), ADAPTERS[kind][0]()).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def assert_same(actual, expected, tolerance=1e-4) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=tolerance, atol=tolerance, msg=name)


def differs(actual, expected) -> bool:
    # Not the loss: what the adapters change in its terms may cancel.
    logits = "itc_i2t_logits"
    return not torch.allclose(actual[logits], expected[logits], rtol=1e-3, atol=1e-3)


@on_every_adapter
def test_an_adapter_acts_and_learns(kind):
    make, count = ADAPTERS[kind]
    model, expected = peft.get_peft_model(base_model(), make()).eval(), outputs(base_model())
    assert_same(outputs(model), expected)
    tuners = (peft.tuners.tuners_utils.BaseTunerLayer, peft.utils.AuxiliaryTrainingWrapper)
    assert sum(isinstance(module, tuners) for module in model.modules()) == count
    model = adapted_model(kind)
    result = outputs(model)
    assert differs(result, expected)
    result["loss"].backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            grad = parameter.grad
            assert grad is not None and grad.isfinite().all() and grad.any(), name
        else:
            assert parameter.grad is None, name


@on_every_adapter
def test_an_adapter_is_switched_off_saved_and_merged(kind, tmp_path):
    model, base = adapted_model(kind), base_model()
    expected = outputs(model)
    with model.disable_adapter():
        assert_same(outputs(model), outputs(base))
    assert_same(outputs(model), expected)

    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(base_model(), tmp_path / "adapter").eval()
    assert_same(outputs(again), expected)

    path = tmp_path / "model.safetensors"
    for wrapped in (model, model.base_model.model):
        with pytest.raises(ValueError, match=r"merge adapters \(PEFT: merge_and_unload\)"):
            save_checkpoint(wrapped, path)
    merged = model.merge_and_unload()
    assert type(merged) is VLMo
    assert_same(outputs(merged), expected)
    assert fused_calls(merged) == fused_calls(base)
    save_checkpoint(merged, path)
    load_checkpoint(base, path, strict=True)
    assert_same(outputs(base), expected)


@pytest.mark.parametrize("kind", ["LoRA", "LoRA on embeddings"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_every_backend_runs_adapters(kind, backend):
    expected, actual = (outputs(adapted_model(kind, kernels=name)) for name in (None, backend))
    assert_same(actual, expected)
    assert differs(actual, outputs(base_model(kernels=backend)))


@pytest.mark.parametrize("kind", ["LoRA", "LoRA on embeddings", "DoRA"])
@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
def test_adapters_in_bfloat16(kind, how):
    model, batch = adapted_model(kind), make_batch()
    expected = model.fuse(batch["text_ids"], batch["text_masks"], batch["image"]).image
    if how == "bfloat16":
        model, batch["image"] = model.bfloat16(), batch["image"].bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        actual = model.fuse(batch["text_ids"], batch["text_masks"], batch["image"]).image
    error = (actual.float() - expected).norm() / expected.norm()
    base = base_model().fuse(batch["text_ids"], batch["text_masks"], batch["image"].float()).image
    assert error < 0.03 < (base - expected).norm() / expected.norm()
    actual.float().square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is None or p.grad.isfinite().all() for p in trained)
    assert sum(p.grad is not None and bool(p.grad.any()) for p in trained) > len(trained) // 3


@pytest.mark.parametrize(
    "tasks", [("mlm", "itc", "itm"), ("textmlm",), ("irtr",), ("vqa",), ("nlvr2",)], ids="-".join
)
def test_training_moves_the_adapters_alone(tasks):
    """With drop path and dropout, as models are trained."""
    torch.manual_seed(0)
    base = VLMo(TINY.replace(tasks=tasks, vqa_labels=7, drop_path=0.1))
    before = copy.deepcopy(base.state_dict())
    model = peft.get_peft_model(base, peft.LoraConfig(r=3, target_modules=LINEAR)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.02)
    first = outputs(model.eval())["loss"].item()
    for _ in range(8):
        loss = outputs(model.train())["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert outputs(model.eval())["loss"].item() < first
    after = {name.replace(".base_layer", ""): t for name, t in base.state_dict().items()}
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


def test_blocks_without_an_adapter_stay_fused():
    fused = fused_calls(base_model())
    config = peft.LoraConfig(r=3, target_modules=["qkv", "proj", "mlp_vl.fc1"])
    assert 0 < fused_calls(peft.get_peft_model(base_model(), config)) < fused
    config = peft.LoraConfig(r=3, target_modules=["qkv", "proj"])
    assert fused_calls(peft.get_peft_model(base_model(), config)) == fused


def test_the_example_of_the_documentation(tmp_path, monkeypatch):
    from test_docs import ALL, PEFT

    (example,) = [snippet for snippet in ALL["training.md"] if PEFT in snippet.text]
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "pretrain_base"
    folder.mkdir(parents=True)
    save_checkpoint(base_model(), folder / "model.safetensors")
    exec(compile(example.text, example.place, "exec"), {})
    merged = base_model()
    load_checkpoint(merged, tmp_path / "runs" / "merged.safetensors", strict=True)
    assert_same(outputs(merged), outputs(base_model()))
    assert (tmp_path / "runs" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_checkpoint_is_not_loaded_into_a_model_with_adapters(tmp_path):
    path = tmp_path / "model.safetensors"
    save_checkpoint(base_model(), path)
    model = adapted_model("LoRA")
    before = outputs(model)
    for wrapped in (model, model.base_model.model):
        with pytest.raises(CheckpointError, match="of its 98 tensors belong to the model"):
            load_checkpoint(wrapped, path)
    assert_same(outputs(model), before)
