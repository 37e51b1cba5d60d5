"""The Triton backend of shared_attention: what it can run, and its entry points.

Triton is imported when the first kernel is launched.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._backends import triton as triton_target
from ..call import Call

_MAX_HEAD_DIM = 128


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int, entries: int) -> str | None:
    """The reason why :func:`forward` cannot run, or None."""
    if head_dim > _MAX_HEAD_DIM:
        return f"head dim {head_dim} is above {_MAX_HEAD_DIM}."
    return triton_target.why_not(device, dtype)


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """out, in the shape of q, and float32 log-sum-exp of the scores, q.shape[:-1]."""
    from .launch import forward

    return forward(call)


def backward(
    dout: Tensor, out: Tensor, lse: Tensor, call: Call, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of q, k and v, and of the table if there is one (None if not needed)."""
    from .launch import backward

    return backward(dout, out, lse, call, needs)
