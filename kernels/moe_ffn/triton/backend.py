"""The Triton backend of moe_ffn and moe_linear: what it can run, and its entry points.

Triton is imported when the first kernel is launched.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._backends import triton as triton_target
from ..call import Call, Facts, pre_shape, why_not_weight

__all__ = ["backward", "forward", "pre_shape", "why_not"]

_MAX_DIM = 16384  # the phases without products hold a whole row in registers
_MAX_SUB_NORM = 4096  # and several numbers for each of its elements


def why_not(device: torch.device, facts: Facts) -> str | None:
    """The reason why :func:`forward` cannot run, or None."""
    if facts.width > _MAX_DIM:
        return f"model dimension {facts.width} is above {_MAX_DIM}."
    if facts.linear > _MAX_DIM:
        return f"output width {facts.linear} is above {_MAX_DIM}."
    if facts.sub_norm and max(facts.hidden) > _MAX_SUB_NORM:
        return f"hidden width {max(facts.hidden)} of a sub-norm is above {_MAX_SUB_NORM}."
    return why_not_weight(facts) or triton_target.why_not(device, facts.dtype)


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """y [T, O], and the pre-activation in grouped order; one launch."""
    return _launch().forward(call)


def backward(dy: Tensor, pre: Tensor, call: Call, needs: Sequence[bool]) -> list[Tensor]:
    """The gradients flagged in ``needs``, in the order of the schema; the others are empty."""
    return _launch().backward(dy, pre, call, needs)


@functools.cache
def _launch() -> Any:
    from . import launch

    return launch
