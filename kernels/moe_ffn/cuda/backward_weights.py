"""The host's side of csrc/moe_ffn/moe_ffn_bwd_weights.cu: the gradients that sum over tokens."""

from __future__ import annotations

import ctypes
import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from ..._backends import cuda as cuda_target
from ..call import LISTS, Call
from ..counters import take_counters
from ..rows import Rows
from ..schedule import Split
from . import arguments as host

CUBIN = "moe_ffn_bwd_weights"
_COUNTERS = 3  # tickets, leavers, contributions to dlayer_scale; then one for each share


class GradientArgument(ctypes.Structure):
    """``Gradient`` of moe_ffn_bwd_weights.cu."""

    _fields_ = [(name, ctypes.c_void_p) for name in LISTS]


class BackwardWeightsArgument(ctypes.Structure):
    """``BackwardWeights`` of moe_ffn_bwd_weights.cu."""

    _fields_ = [
        ("call", host.CallArgument),
        ("gradients", GradientArgument * host.MAX_EXPERTS),
        ("dpre", ctypes.c_void_p),
        ("normed", ctypes.c_void_p),
        ("dbranch", ctypes.c_void_p),
        ("hidden", ctypes.c_void_p),
        ("sum_dpre", ctypes.c_void_p),
        ("sum_dbranch", ctypes.c_void_p),
        ("sum_norm", ctypes.c_void_p),
        ("partial", ctypes.c_void_p),
        ("sum_scale", ctypes.c_void_p),
        ("sum_bias", ctypes.c_void_p),
        ("dlayer_scale", ctypes.c_void_p),
        ("workers", ctypes.c_int32),
        ("sum_blocks", ctypes.c_int32 * 4),
        ("dbranch_lines", ctypes.c_int32),
        ("norm_lines", ctypes.c_int32),
        ("dnorm_is_half", ctypes.c_int32),
        ("dlayer_scale_is_half", ctypes.c_int32),
    ]


class Operands(NamedTuple):
    """What the kernel of the rows left, in grouped order; None where no gradient needs it."""

    dpre: Tensor | None  # [T, P]
    normed: Tensor | None  # [T, D]
    dbranch: Tensor | None  # [T, D]
    hidden: Tensor | None  # [T, max F]
    # Partial sums of the row tiles, float32: one line of dpre each, of the others several
    sum_dpre: Tensor | None  # [row tiles, P]
    sum_dbranch: Tensor | None  # [row tiles * dbranch_lines, D]
    sum_norm: Tensor | None  # [row tiles * norm_lines, 2 D]: of the weight, then of the bias
    dbranch_lines: int = host.TILE // host.NORM_ROWS
    norm_lines: int = host.TILE // host.NORM_ROWS

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:7]


class Gradients(NamedTuple):
    """Where the gradients go; an empty tensor is not wanted."""

    lists: dict[str, list[Tensor]]  # by the names of LISTS, one of each expert or none at all
    dlayer_scale: Tensor | None  # [D]

    def wants(self, name: str) -> bool:
        return any(gradient.numel() for gradient in self.lists[name])

    @property
    def scale(self) -> Tensor | None:
        """That of the layer scale, if there is one and it is wanted."""
        scale = self.dlayer_scale
        return None if scale is None or scale.numel() == 0 else scale

    @property
    def tensors(self) -> list[Tensor | None]:
        return [*itertools.chain(*self.lists.values()), self.dlayer_scale]


def launch_weights(call: Call, rows: Rows, operands: Operands, gradients: Gradients) -> None:
    """Fill the wanted gradients; ``call`` from :func:`host.readable_call`.

    The gradients of w1, w2, b1 and b2 are float16; those of the norm are all float16 or all
    float32, that of the layer scale is either.
    """
    device, (_, dim) = call.x.device, call.x.shape
    workers, scale = host.workers_on(device), gradients.scale
    split = Split(_tiles(call, gradients), (0,) * len(call.w1), workers)
    blocks = _sum_blocks(call, operands, gradients)
    partial = _floats(call, workers, host.TILE**2, needed=split.tiles != split.whole)
    hidden_blocks = sum(_blocks(w2.shape[1]) for w2 in call.w2)
    sum_scale = _floats(call, hidden_blocks, dim, needed=scale is not None)
    sum_bias = _floats(call, len(call.w2), dim, needed=scale is not None and len(call.b2) > 0)
    assert sum_bias is None or blocks[1], "dlayer_scale needs the sums of dbranch"
    with take_counters(device, _COUNTERS + workers) as counters:
        argument = BackwardWeightsArgument(
            call=host.call_argument(
                call, rows, counters, _COUNTERS + workers, bound=0, band=0, tasks=()
            ),
            gradients=_gradient_arguments(gradients.lists),
            **{
                name: host.pointer(tensor)
                for name, tensor in zip(Operands._fields, operands.tensors, strict=False)
            },
            partial=host.pointer(partial),
            sum_scale=host.pointer(sum_scale),
            sum_bias=host.pointer(sum_bias),
            dlayer_scale=host.pointer(scale),
            workers=workers,
            sum_blocks=(ctypes.c_int32 * 4)(*blocks),
            dbranch_lines=operands.dbranch_lines,
            norm_lines=operands.norm_lines,
            dnorm_is_half=_norm_is_half(gradients.lists),
            dlayer_scale_is_half=host.is_half(scale),
        )
        cuda_target.launch(
            *(CUBIN, CUBIN, device),
            min(workers, split.total + sum(blocks)),
            host.THREADS,
            0,
            argument,
            [
                *host.tensors_of(call, rows),
                *(counters, partial, sum_scale, sum_bias),
                *(*operands.tensors, *gradients.tensors),
            ],
        )


def _tiles(call: Call, gradients: Gradients) -> tuple[int, ...]:
    """Tiles of dw1 and dw2 of each expert, as the kernel counts them."""
    across = _blocks(call.x.shape[1])
    of_w1, of_w2 = (gradients.lists[name] for name in ("w1", "w2"))
    return tuple(
        (_blocks(w1.shape[0]) * across if dw1.numel() else 0)
        + (_blocks(w2.shape[1]) * across if dw2.numel() or gradients.scale is not None else 0)
        for w1, w2, dw1, dw2 in zip(call.w1, call.w2, of_w1, of_w2, strict=True)
    )


def _sum_blocks(call: Call, operands: Operands, gradients: Gradients) -> tuple[int, int, int, int]:
    """Column blocks of the sums of dpre, dbranch, norm weights and norm biases."""
    of_dim = len(call.w1) * _blocks(call.x.shape[1])
    return (
        len(call.w1) * _blocks(host.max_pre(call)) if gradients.wants("b1") else 0,
        of_dim if operands.sum_dbranch is not None else 0,
        of_dim if gradients.wants("norm_weight") else 0,
        of_dim if gradients.wants("norm_bias") else 0,
    )


def _gradient_arguments(lists: dict[str, list[Tensor]]) -> ctypes.Array[GradientArgument]:
    arguments = (GradientArgument * host.MAX_EXPERTS)()
    for name in LISTS:
        for argument, gradient in zip(arguments, lists[name], strict=False):
            setattr(argument, name, host.pointer(gradient) if gradient.numel() else None)
    return arguments


def _norm_is_half(lists: dict[str, list[Tensor]]) -> bool:
    dtypes = {t.dtype for name in LISTS[4:] for t in lists[name] if t.numel()}
    assert len(dtypes) <= 1, dtypes
    return dtypes == {torch.float16}


def _blocks(columns: int) -> int:
    return -(-columns // host.TILE)


def _floats(call: Call, lines: int, width: int, *, needed: bool) -> Tensor | None:
    return call.x.new_empty(lines, width, dtype=torch.float32) if needed else None
