"""Parity with torchscale's BEiT-3: outputs and every gradient, in float32."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from official_beit3 import official_beit3
from vlmo.model.beit3 import BEiT3, BEiT3Config

TOLERANCE = 1e-5
# The order of float32 sums differs: in a base model, the gradient of one key's weight by 1.2e-5.
GRADIENT_TOLERANCE = 3e-5
TINY = BEiT3Config(
    dim=32,
    depth=3,
    heads=4,
    image_size=32,
    patch_size=8,
    max_text_length=7,
    text_positions=20,
    vocab_size=50,
    drop_path=0.0,
)
MODES = ("image", "masked image", "text", "fused", "fused, no padding", "masked fused", "causal")


@torch.no_grad()
def randomise(model: nn.Module, std: float) -> None:
    """Random values for every parameter, so that no two tensors agree by being constant."""
    for parameter in model.parameters():
        parameter.normal_(std=std)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.add_(1)


def batch_of(config: BEiT3Config, size: int) -> dict[str, Tensor]:
    length, patches = config.max_text_length, config.grid**2
    lengths = torch.linspace(2, length, size).long()
    return {
        "text_ids": torch.randint(config.vocab_size, (size, length)),
        "text_mask": torch.arange(length) < lengths[:, None],
        "image": torch.randn(size, 3, config.image_size, config.image_size).clamp(-3, 3),
        "masked": torch.rand(size, patches) < 0.4,
    }


def official_output(model: Any, mode: str, batch: dict[str, Tensor]) -> Tensor:
    text, image, padding = batch["text_ids"], batch["image"], ~batch["text_mask"]
    masked = batch["masked"] if "masked" in mode else None
    if "image" in mode:
        return model(None, image, None, vision_masked_position=masked)["encoder_out"]
    if mode == "text":
        return model(text, None, padding)["encoder_out"]
    if mode == "causal":
        length, patches = padding.shape[1], batch["masked"].shape[1]
        # 1 forbids attention.
        forbidden = torch.ones(patches + 1 + length, patches + 1 + length)
        forbidden[:, : patches + 1] = 0
        forbidden[patches + 1 :, patches + 1 :] = torch.ones(length, length).triu(1)
        return model(text, image, padding, forbidden)["encoder_out"]
    padded = None if "no padding" in mode else padding
    return model(text, image, padded, vision_masked_position=masked)["encoder_out"]


def own_output(model: BEiT3, mode: str, batch: dict[str, Tensor]) -> Tensor:
    text, image, mask = batch["text_ids"], batch["image"], batch["text_mask"]
    masked = batch["masked"] if "masked" in mode else None
    if "image" in mode:
        return model.encode_image(image, masked=masked).tokens
    if mode == "text":
        return model.encode_text(text, mask).tokens
    mask = torch.ones_like(mask) if "no padding" in mode else mask
    return torch.cat(model.fuse(text, mask, image, causal=mode == "causal", masked=masked), dim=1)


def check_parity(config: BEiT3Config, mode: str, *, size: int, std: float) -> None:
    official, batch = official_beit3(config), batch_of(config, size)
    randomise(official, std)
    model = BEiT3(config)
    model.beit3.load_state_dict(official.state_dict())
    expected, actual = official_output(official, mode, batch), own_output(model, mode, batch)
    assert_close("output", actual, expected, expected)

    grad = torch.randn_like(expected)
    expected.backward(grad)
    actual.backward(grad)
    wanted = {n: p.grad for n, p in official.named_parameters() if p.grad is not None}
    found = {n: p.grad for n, p in model.beit3.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    assert len(found) == count_of_gradients(config, mode)
    for name, gradient in found.items():
        # A key's bias changes all scores of a query alike: its gradient is rounding error.
        other = name.replace("k_proj", "q_proj") if name.endswith("bias") else name
        assert_close(name, gradient, wanted[name], wanted[other], GRADIENT_TOLERANCE)


def count_of_gradients(config: BEiT3Config, mode: str) -> int:
    """Parameters that a mode reads: 20 for each expert of a layer, and 2 of its final norm."""
    own = 20 * config.depth + (2 if config.final_norm else 0)
    image = 0 if mode == "text" else own + 4 + ("masked" in mode)  # cls, projection, positions
    return image + (0 if "image" in mode else own + 2)  # words, positions


def assert_close(
    name: str, actual: Tensor, expected: Tensor, like: Tensor, tolerance: float = TOLERANCE
) -> None:
    """Fail unless the error is within ``tolerance`` times the largest value of ``like``."""
    error = (actual.detach() - expected.detach()).abs().max() / like.detach().abs().max()
    assert error <= tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tasks", [(), ("vqa",)], ids=["final norm", "no final norm"])
def test_outputs_and_gradients(mode, tasks):
    check_parity(TINY.replace(tasks=tasks), mode, size=3, std=0.1)


@pytest.mark.parametrize("mode", ["fused", "causal"])
def test_outputs_and_gradients_of_the_reference_kernels(mode):
    check_parity(TINY.replace(kernels="reference"), mode, size=3, std=0.1)


@pytest.mark.slow
def test_base():
    check_parity(BEiT3Config.base(drop_path=0.0), "fused", size=2, std=0.02)


@pytest.mark.parametrize("size", ["base", "large"])
def test_keys_and_shapes(size):
    config = getattr(BEiT3Config, size)()
    with torch.device("meta"):
        official, model = official_beit3(config), BEiT3(config)
    wanted = {f"beit3.{name}": t.shape for name, t in official.state_dict().items()}
    assert {name: t.shape for name, t in model.state_dict().items()} == wanted
    assert len(wanted) == 40 * config.depth + 11
