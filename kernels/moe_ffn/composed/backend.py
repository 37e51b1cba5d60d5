"""The composed backend of moe_ffn: what it can run, and its entry points.

Triton is imported when the first kernel is launched.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._backends import triton as triton_target
from ..call import Call, Facts

_MAX_DIM = 16384  # the passes of the norms hold a whole row in registers


def why_not(device: torch.device, facts: Facts) -> str | None:
    """The reason why :func:`forward` cannot run, or None."""
    if not facts.counted:
        return (
            "the number of tokens of each expert is known on the device only, and a product needs "
            "it on the host."
        )
    if facts.sub_norm and max(facts.hidden) > _MAX_DIM:
        return f"hidden width {max(facts.hidden)} of a sub-norm is above {_MAX_DIM}."
    if facts.width > _MAX_DIM:
        return f"model dimension {facts.width} is above {_MAX_DIM}."
    return triton_target.why_not(device, facts.dtype)


def pre_shape(call: Call) -> tuple[int, int]:
    """Shape [T, P (+ D)] of the saved tensor; (0, 0) if nothing is saved.

    It contains h1 = W1_e norm_e(x) of all rows, then with a layer scale h2 = W2_e act(h1 + b1_e).
    """
    if not call.save_pre or not call.w1:
        return (0, 0)
    tokens, dim = call.tokens, call.x.shape[1]
    columns = max(call.pre_columns)
    return (tokens, columns + (0 if call.layer_scale is None else dim))


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """y [T, O], and the tensor saved for the backward, in the shape :func:`pre_shape`."""
    from .launch import forward

    kept = call.x.new_empty(pre_shape(call), dtype=call.w2[0].dtype)
    return forward(call, kept), kept


def backward(dy: Tensor, pre: Tensor, call: Call, needs: Sequence[bool]) -> list[Tensor]:
    """The gradients flagged in ``needs``, in the order of the schema; the others are empty."""
    from .launch import backward

    return backward(dy, pre, call, needs)
