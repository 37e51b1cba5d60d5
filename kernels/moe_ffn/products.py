"""Matrix products of moe_ffn on the CPU, by whichever library is the fastest.

float32: on x86 PyTorch uses MKL, which reaches less than half of the peak rate of an AMD CPU with
AVX-512.
Away from Intel's CPUs, this library's own kernel (``csrc/cpu/matmul.cpp``) multiplies instead.
oneDNN is as fast, but sums a whole row in one chain: its error is 2.2 times that of MKL at 3072
columns.

bfloat16: oneDNN, with a fused GELU. Everything else is left to PyTorch.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from .._backends import cpu as cpu_target

GELU = {"gelu": "none", "gelu_tanh": "tanh"}  # ATen's names of the approximation


def copies_bias(dtype: torch.dtype) -> bool:
    """Whether a bias costs a pass of its own: PyTorch's addmm first copies it to every row."""
    return dtype == torch.float32 and not cpu_target.multiplies_itself(dtype)


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``; either may be a transposed view."""
    if cpu_target.multiplies_itself(a.dtype):
        return cpu_target.matmul(a, b)
    return a @ b


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out += a @ b``."""
    if cpu_target.multiplies_itself(a.dtype):
        out += cpu_target.matmul(a, b)
    else:
        torch.addmm(out, a, b, out=out)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``."""
    if cpu_target.multiplies_itself(weight.dtype):
        return cpu_target.matmul(x, weight.T, bias)
    if _fuses(weight.dtype):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def linear_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """:func:`linear` with the result written to ``out``."""
    if cpu_target.multiplies_itself(weight.dtype):
        cpu_target.matmul(x, weight.T, bias, out)
    elif _fuses(weight.dtype):
        out.copy_(linear(x, weight, bias))  # faster than addmm despite the copy
    elif bias is None:
        torch.mm(x, weight.T, out=out)
    else:
        torch.addmm(bias, x, weight.T, out=out)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """:func:`linear` followed by the activation "gelu" or "gelu_tanh"."""
    approximate = GELU[activation]
    if _fuses(weight.dtype):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], approximate)
    return torch.ops.aten.gelu_(linear(x, weight, bias), approximate=approximate)


@functools.cache
def _fuses(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies this dtype and PyTorch has its fused operation.

    The operation is private, but torch.compile uses it on x86.
    """
    if dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return False
    built = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return cpu_target.is_x86() and built and torch.ops.mkldnn._is_mkldnn_bf16_supported()
