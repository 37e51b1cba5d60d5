"""csrc/common in the emulator: products of tiles in every layout, and the activations."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sm70 import Kernel, compile_cuda

pytestmark = pytest.mark.heavy

CSRC = Path(__file__).parents[2] / "csrc"


@pytest.fixture(scope="module")
def products():
    """A kernel by name, translated when it is first asked for."""
    cubin = compile_cuda(Path(__file__).with_name("products.cu"), include_dirs=[CSRC])
    kernels = {}

    def get(name):
        if name not in kernels:
            kernels[name] = Kernel(cubin, name, strict=True)
        return kernels[name]

    return get


EVEN_DEPTHS = (8, 24, 32, 72, 136)


@pytest.mark.parametrize("shape", [(128, 128), (72, 40), (8, 128)], ids=str)
@pytest.mark.parametrize(
    ("layouts", "depth"),
    [
        *(("k_by_k", depth) for depth in EVEN_DEPTHS),
        *(("k_by_mn", depth) for depth in EVEN_DEPTHS),
        *(("mn_by_mn", depth) for depth in (*EVEN_DEPTHS, 1, 7, 33)),  # tokens come in any number
    ],
)
def test_product_is_exact(layouts, depth, shape, products):
    """Of whole numbers: a wrong, missing or doubled product shows."""
    rows, columns = shape
    rng = np.random.default_rng(depth)
    a, b = (rng.integers(-8, 9, (n, depth)).astype(np.float16) for n in shape)
    of_a, of_b = layouts.split("_by_")
    operands = [
        np.ascontiguousarray(values if layout == "k" else values.T)
        for values, layout in ((a, of_a), (b, of_b))
    ]
    c = np.full((rows, columns), np.nan, np.float32)
    products(layouts).launch(1, 128, [*operands, c, rows, columns, depth])
    np.testing.assert_array_equal(c, a.astype(np.float32) @ b.astype(np.float32).T)


ACTIVATIONS = """
#include "common/activation.cuh"

template <Activation kKind>
__device__ void apply(const float* x, float* value, float* with_slope, float* slope) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  value[i] = activate<kKind>(x[i]);
  const Activated both = activate_with_slope<kKind>(x[i]);
  with_slope[i] = both.value;
  slope[i] = both.slope;
}

extern "C" __global__ void activations(const float* x, int kind, float* value, float* with_slope,
                                       float* slope) {
  if (kind == 0) apply<Activation::kGelu>(x, value, with_slope, slope);
  if (kind == 1) apply<Activation::kGeluTanh>(x, value, with_slope, slope);
  if (kind == 2) apply<Activation::kSwiglu>(x, value, with_slope, slope);
  if (kind == 3) apply<Activation::kGeglu>(x, value, with_slope, slope);
}
"""


@pytest.fixture(scope="module")
def activations():
    return Kernel(compile_cuda(ACTIVATIONS, include_dirs=[CSRC]), strict=True)


def gelu(x):
    return x * torch.erfc(-x / 2**0.5) / 2  # without cancellation, as 1 + erf would have


def gelu_tanh(x):
    u = (8 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)
    return x * torch.sigmoid(u)


@pytest.mark.parametrize(
    ("kind", "function", "relative"),
    [
        # The header promises 1.8e-5 of the polynomial; float and exp2 add a little.
        (0, gelu, 2.2e-5),
        (1, gelu_tanh, 1e-5),
        (2, torch.nn.functional.silu, 2e-6),
        (3, gelu, 2.2e-5),
    ],
)
def test_activation_and_slope(kind, function, relative, activations):
    x = np.linspace(-8, 8, 64 * 256, dtype=np.float32)
    x[:4] = 0.0, -0.0, 1e-30, np.nan
    value, with_slope, slope = (np.empty_like(x) for _ in range(3))
    activations.launch(64, 256, [x, kind, value, with_slope, slope])
    for result in (value, with_slope, slope):
        assert np.isnan(result[3])
        assert np.isfinite(np.delete(result, 3)).all()

    exact = torch.from_numpy(np.delete(x, 3)).double().requires_grad_()
    expected = function(exact)
    (expected_slope,) = torch.autograd.grad(expected.sum(), exact)
    expected = expected.detach().numpy()
    for result in (value, with_slope):
        error = np.abs(np.delete(result, 3) - expected)
        assert (error <= relative * np.abs(expected)).all(), (error / np.abs(expected)).max()
    # A slope lies between -0.13 and 1.13; half precision rounds it to 2e-4 of its size.
    assert np.abs(np.delete(slope, 3) - expected_slope.numpy()).max() < 2e-5
