"""Modules that were wrapped, replaced or hooked keep their effect in the model."""

import copy
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from test_model import make_batch
from vlmo import VLMo, VLMoConfig, save_checkpoint
from vlmo.kernels import nn as multiway
from vlmo.tasks.losses import compute_losses

TINY = VLMoConfig(
    dim=24,
    depth=3,
    heads=2,
    vl_start=2,
    image_size=32,
    patch_size=16,
    max_text_length=6,
    text_capacity=8,
    vocab_size=30,
    drop_path=0.3,
    absolute_position=True,
    tasks=("mlm", "itc", "itm"),
)
LAYERS = ("qkv", "proj", "fc1", "fc2", "norm1", "norm2_text", "norm2_vl")
EMBEDDINGS = ("word_embeddings", "position_embeddings", "token_type_embeddings")


class Wrapper(nn.Module):
    """As adapters are: ``weight`` and ``bias`` are those of the layer, ``forward`` does more."""

    def __init__(self, base: Any):
        super().__init__()
        self.base_layer = base

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x)


class Lora(Wrapper):
    def __init__(self, base: nn.Linear):
        super().__init__(base)
        self.a = nn.Parameter(torch.randn(3, base.in_features))
        self.b = nn.Parameter(torch.randn(base.out_features, 3) * 0.1)

    def forward(self, x):
        return self.base_layer(x) + x @ self.a.T @ self.b.T


@pytest.fixture
def model() -> VLMo:
    torch.manual_seed(0)
    return VLMo(TINY)


def replace(model: VLMo, make, names=LAYERS) -> VLMo:
    """A copy whose layers of these names went through ``make``."""
    changed = copy.deepcopy(model)
    for name, module in list(changed.named_modules()):
        parent, _, last = name.rpartition(".")
        kinds = (nn.Linear, nn.LayerNorm, nn.Embedding, Wrapper)
        if last in names and isinstance(module, kinds):
            setattr(changed.get_submodule(parent), last, make(module))
    return changed


def outputs(model: VLMo, seed: int = 1) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    batch = make_batch()
    return model(compute_losses, batch, generator=torch.Generator().manual_seed(seed))


def assert_same(actual, expected) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("names", [LAYERS, ("fc1",), ("norm2_imag",), ("norm2_vl",), EMBEDDINGS])
@pytest.mark.parametrize("training", [True, False])
def test_wrapper_that_does_nothing_changes_nothing(model, names, training):
    model.train(training)
    wrapped = replace(model, Wrapper, names)
    expected, actual = outputs(model), outputs(wrapped)
    assert_same(actual, expected)
    expected["loss"].backward()
    actual["loss"].backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = {
        name.replace(".base_layer", ""): p.grad
        for name, p in wrapped.named_parameters()
        if p.grad is not None
    }
    assert_same(found, gradients)


def test_padded_methods_call_wrappers(model):
    wrapped, batch = replace(model.eval(), Wrapper), make_batch()
    for name, arguments in (
        ("fuse", (batch["text_ids"], batch["text_masks"], batch["image"])),
        ("encode_text", (batch["text_ids"], batch["text_masks"])),
        ("encode_image", (batch["image"],)),
    ):
        expected, actual = (getattr(m, name)(*arguments) for m in (model, wrapped))
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", ["qkv", "proj", "fc1", "fc2"])
def test_adapter_acts_as_its_merged_weights(model, layer):
    adapted = replace(model.eval(), Lora, (layer,))

    def merged(adapter: Lora) -> nn.Linear:
        linear = copy.deepcopy(adapter.base_layer)
        with torch.no_grad():
            linear.weight += adapter.b @ adapter.a
        return linear

    result = outputs(adapted)
    assert_same(result, outputs(replace(adapted, merged, (layer,))))
    assert not torch.allclose(result["loss"], outputs(model)["loss"])
    result["loss"].backward()
    adapters = [module for module in adapted.modules() if isinstance(module, Lora)]
    assert len(adapters) == (7 if layer.startswith("fc") else 3)
    assert all(m.a.grad is not None and m.a.grad.abs().sum() > 0 for m in adapters)


def test_every_hook_fires(model):
    seen = set()
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.LayerNorm, nn.Embedding))
    ]
    for name in names:
        hook = lambda module, inputs, output, name=name: seen.add(name)  # noqa: E731
        model.get_submodule(name).register_forward_hook(hook)
    expected = outputs(copy.deepcopy(model))
    assert seen == set(names)
    assert expected["loss"].isfinite()


def test_hook_may_change_an_output(model):
    model.eval()
    before = outputs(model)["loss"]
    handle = model.transformer.blocks[0].mlp_text.fc2.register_forward_hook(lambda *a: -9 * a[2])
    assert not torch.allclose(outputs(model)["loss"], before)
    handle.remove()
    torch.testing.assert_close(outputs(model)["loss"], before)


def test_global_hooks_and_replaced_forwards_are_seen(model):
    linear, calls = model.transformer.blocks[1].mlp_imag.fc1, []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, *_: calls.append(module is linear)
    )
    outputs(model)
    handle.remove()
    assert any(calls)
    called = []
    forward = linear.forward

    def noted(x):
        called.append(x.shape)
        return forward(x)

    linear.forward = noted
    outputs(model)
    assert called


def test_dynamic_quantisation(model):
    model.eval()
    expected = outputs(model)["itm_logits"]
    quantised = torch.ao.quantization.quantize_dynamic(
        copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8
    )
    actual = outputs(quantised)["itm_logits"]
    assert not torch.equal(actual, expected)
    torch.testing.assert_close(actual, expected, rtol=0.1, atol=0.1)


def test_sharding_of_one_expert_alone(model, tmp_path):
    expected = outputs(model.eval())
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        fully_shard(model.transformer.blocks[0].mlp_text, mesh=mesh)
        fully_shard(model.transformer.blocks[2].mlp_vl.fc1, mesh=mesh)
        actual = outputs(model)
        assert_same(actual, expected)
        actual["loss"].backward()
    finally:
        dist.destroy_process_group()


def test_wrapped_models_are_not_saved_under_foreign_keys(model, tmp_path):
    path = tmp_path / "model.safetensors"
    adapted = replace(model, Lora, ("fc1",))
    with pytest.raises(ValueError, match=r"model: its state dict has .*mlp_text.*merge adapters"):
        save_checkpoint(adapted, path)
    linear = model.transformer.blocks[0].mlp_text.fc1
    nn.utils.parametrizations.weight_norm(linear)
    with pytest.raises(ValueError, match="remove parametrizations"):
        save_checkpoint(model, path)
    assert not path.exists()
    nn.utils.parametrize.remove_parametrizations(linear, "weight")
    save_checkpoint(model, path)
    assert path.exists()


def fused_calls(model: nn.Module) -> int:
    """Calls of moe_ffn in one forward."""
    with mock.patch.object(multiway, "moe_ffn", wraps=multiway.moe_ffn) as moe_ffn:
        outputs(model)
    return moe_ffn.call_count


def test_plain_blocks_stay_fused(model):
    fused = fused_calls(model)
    linear = model.transformer.blocks[0].mlp_text.fc1
    model.transformer.blocks[0].mlp_text.fc1 = Wrapper(linear)
    assert 0 < fused_calls(model) < fused
    model.transformer.blocks[0].mlp_text.fc1 = linear
    assert fused_calls(model) == fused
