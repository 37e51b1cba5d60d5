"""q, k and v as views of one packed tensor ``[..., 3, H, K]``, and gradients in the same layout."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._op import recorded
from ..dispatch import runs_eagerly


def unpack(packed: Tensor) -> tuple[Tensor, ...]:
    """``packed.unbind(-3)``, whose backward does not copy gradients that are packed already."""
    if recorded((packed,)) and runs_eagerly((packed,)):
        return _Unpack.apply(packed)
    return packed.unbind(-3)


def empty(t: Tensor) -> list[Tensor]:
    """Uninitialised gradients in the shape of ``t``, as views of one packed tensor."""
    return [*t.new_empty(*t.shape[:-2], 3, *t.shape[-2:]).unbind(-3)]


def packed(views: Sequence[Tensor]) -> Tensor | None:
    """The contiguous packed tensor of which these are the three views, or None."""
    first = views[0]
    heads, dim = first.shape[-2:]
    shape = (*first.shape[:-2], 3, heads, dim)
    step = heads * dim
    whole = [*itertools.accumulate(reversed(shape[1:]), operator.mul, initial=1)][::-1]
    for i, view in enumerate(views):
        if (
            view.shape != first.shape
            or view.dtype != first.dtype
            or view.stride() != (*whole[:-3], dim, 1)
            or view.storage_offset() != first.storage_offset() + i * step
            or view.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        ):
            return None
    return first.as_strided(shape, whole)


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor) -> tuple[Tensor, ...]:
        return whole.unbind(-3)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        if not any(gradient.requires_grad for gradient in gradients):
            joined = packed(gradients)
            if joined is not None:
                return joined
        return torch.stack(gradients, -3)
