"""Linear layers by oneDNN with a fused GELU, where that is faster than PyTorch's own choice.

For float32 on x86 PyTorch uses MKL, which is slower on AMD, and a separate GELU (1576 rows at base
size on two cores of an EPYC with AVX-512: fc1 with GELU takes 37 ms by oneDNN instead of 45 ms).
However, oneDNN sums a whole row in one chain: its float32 error is 1.4 times MKL's at 768 columns
and 2.2 times at 3072, so it is used for short rows only. The gradients of weights, and
``dh1 @ w1``, are not faster.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from .._backends.cpu import is_x86

_LONGEST = 1024  # columns in float32: see above
_GELU = {"gelu": "none", "gelu_tanh": "tanh"}  # oneDNN's names of the approximation


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``."""
    if _takes(weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def linear_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """:func:`linear` with the result written to ``out``."""
    if _takes(weight):
        out.copy_(linear(x, weight, bias))  # faster than addmm despite the copy
    elif bias is None:
        torch.mm(x, weight.T, out=out)
    else:
        torch.addmm(bias, x, weight.T, out=out)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """:func:`linear` followed by the activation "gelu" or "gelu_tanh"."""
    approximate = _GELU[activation]
    if _takes(weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], approximate)
    return torch.ops.aten.gelu_(F.linear(x, weight, bias), approximate=approximate)


def _takes(weight: Tensor) -> bool:
    """Whether oneDNN is accurate enough and faster for this weight."""
    if weight.dtype == torch.bfloat16:
        return _here() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32 and weight.shape[1] <= _LONGEST and _here()


@functools.cache
def _here() -> bool:
    """Whether PyTorch has the operation, which is private but used by torch.compile on x86."""
    built = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return is_x86() and built
