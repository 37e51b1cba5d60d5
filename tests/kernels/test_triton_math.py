"""The shared arithmetic of the Triton kernels against float64, interpreted or on a GPU."""

import math

import pytest
import torch
import triton
import triton.language as tl

from vlmo.kernels._backends.triton_device import reciprocal, term
from vlmo.kernels.moe_ffn.triton.arguments import make_config
from vlmo.kernels.moe_ffn.triton.device import Config, gate, gate_with_slope
from vlmo.kernels.moe_ffn.triton.tiles import INTERPRETED

ACTIVATIONS = ("gelu", "gelu_tanh", "swiglu")
BLOCK = tl.constexpr(4096)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def activation_kernel(X, VALUE, SAME, SLOPE, C: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + at)
    same, slope = gate_with_slope(x, C)
    tl.store(VALUE + at, gate(x, C))
    tl.store(SAME + at, same)
    tl.store(SLOPE + at, slope)


@triton.jit
def arithmetic_kernel(X, Y, PRODUCT, RECIPROCAL):
    at = tl.arange(0, BLOCK)
    x = tl.load(X + at)
    tl.store(PRODUCT + at, term(x, tl.load(Y + at)))
    tl.store(RECIPROCAL + at, reciprocal(x))


def config_for(activation: str, dtype: torch.dtype) -> Config:
    rounds = dtype != torch.float32
    return make_config(24, (40,), "none", activation, "ieee", rounds, INTERPRETED.forward)


def activated(activation: str, dtype: torch.dtype, numbers: torch.Tensor) -> list[torch.Tensor]:
    """Values, the same with the slopes, slopes: float32, of numbers of any count."""
    count = numbers.numel()
    x = torch.zeros(-(-count // BLOCK.value) * BLOCK.value, device=DEVICE)
    x[:count] = numbers.to(DEVICE)
    outs = [torch.empty_like(x) for _ in range(3)]
    activation_kernel[(x.numel() // BLOCK.value,)](x, *outs, config_for(activation, dtype))
    return [out[:count].cpu() for out in outs]


def exactly(activation: str, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = numbers.double().requires_grad_()
    if activation == "swiglu":
        value = torch.nn.functional.silu(x)
    else:
        kind = "tanh" if activation == "gelu_tanh" else "none"
        value = torch.nn.functional.gelu(x, approximate=kind)
    (slope,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), slope


def every_number(dtype: torch.dtype) -> torch.Tensor:
    """All finite numbers of a dtype of 16 bits."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return numbers[numbers.isfinite()].float()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_activations_of_every_number(activation, dtype):
    """Wrong by a fiftieth, at most, of what rounding such a number to float16 may cost."""
    x = every_number(dtype)
    if activation == "gelu_tanh":
        x = x[x.abs() < 1e12]  # beyond, x^3 overflows and the slope is NaN, as it is in PyTorch
    value, same, slope = activated(activation, dtype, x)
    exact, exact_slope = exactly(activation, x)
    for found in (value, same):
        assert ((found.double() - exact).abs() <= 1e-5 * x.abs() + 1e-37).all()
    assert (slope.double() - exact_slope).abs().max() <= 1e-5


def test_the_tail_is_as_exact_as_its_polynomial():
    x = torch.linspace(-8, -0.001, 20001)
    exact = x.double() * torch.special.erfc(x.double() / -math.sqrt(2)) / 2
    value, same, _ = activated("gelu", torch.float16, x)
    for found in (value, same):
        assert ((found.double() - exact) / exact).abs().max() <= 2.1e-5


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_float32_keeps_its_precision(activation):
    x = torch.linspace(-12, 12, 20001)
    value, same, slope = activated(activation, torch.float32, x)
    exact, exact_slope = exactly(activation, x)
    for found in (value, same):
        assert ((found.double() - exact).abs() <= 2e-7 * x.abs()).all()
    assert (slope.double() - exact_slope).abs().max() <= 3e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "float32"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_special_numbers(activation, dtype):
    x = torch.tensor([math.nan, 0.0, -0.0, 3e38, -3e38, 1e-40, -1e-40, 90.0, -90.0])
    value, same, slope = activated(activation, dtype, x)
    for found in (value, same):
        assert found[0].isnan()
        torch.testing.assert_close(found[1:], x[1:].clamp(min=0), rtol=0, atol=1e-36)
    assert slope[0].isnan()
    torch.testing.assert_close(slope[1:3], torch.full((2,), 0.5), rtol=0, atol=1e-5)
    torch.testing.assert_close(slope[7:], torch.tensor([1.0, 0.0]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "float32"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_overflow_is_not_hidden(activation, dtype):
    """Whoever chooses the scale of the gradients looks for what is not finite."""
    for found in activated(activation, dtype, torch.tensor([math.inf])):
        assert not found.isfinite()


def test_terms_and_reciprocals():
    generator = torch.Generator().manual_seed(1)
    x = (torch.randn(BLOCK.value, generator=generator) + 3.0).to(DEVICE)
    y = torch.randn(BLOCK.value, generator=generator).to(DEVICE)
    product, inverse = torch.empty_like(x), torch.empty_like(x)
    arithmetic_kernel[(1,)](x, y, product, inverse)
    assert torch.equal(product, x * y)
    torch.testing.assert_close(inverse, 1 / x, rtol=2.4e-7, atol=0)
