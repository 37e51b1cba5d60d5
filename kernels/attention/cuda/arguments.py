"""Arguments of the CUDA kernels, which mirror the structures of csrc field by field."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import target
from ..call import LOG2_E, Call

WARP = 32
COLUMNS = 32  # of a column tile, kColumns
KEPT_BYTES = 128  # shared memory for the description of a CTA's sequence
CODES_BYTES = 8 * COLUMNS  # of the codes and positions of a tile's keys
STAGGERED = 4  # CTAs per multiprocessor from which on half of the first CTAs start later
SMALLEST_SCALE = 2.0**-100  # below it, float16 products do not contribute to a score
MAX_SPAN = 2**31  # bytes that a sequence may span, because its offsets are 32-bit


class Operand(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("sequence", "token", "head")),
    ]


class Bias(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("table", "matrix", "narrow", "affine")),
        *((name, ctypes.c_int32) for name in ("size", "pitch", "entries", "in_shared")),
    ]


class CallArgument(ctypes.Structure):
    """``Call`` of csrc/attention/parts.cuh."""

    _fields_ = [
        *((name, Operand) for name in ("q", "k", "v")),
        ("bias", Bias),
        *((name, ctypes.c_void_p) for name in ("offsets", "key_lengths", "key_mask", "positions")),
        ("lse", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        *(
            (n, ctypes.c_int32)
            for n in (
                *("value_token", "value_head"),
                *("batch", "heads", "length", "head_dim", "causal", "stagger"),
            )
        ),
    ]


class Prepared(NamedTuple):
    """A call with every tensor in the form that the kernels read."""

    q: Tensor
    k: Tensor
    v: Tensor
    table: Tensor | None  # [H, entries rounded up to 4] float32, divided by the scale
    indices: tuple[Tensor, ...]  # matrix, short, affine
    offsets: Tensor | None
    key_lengths: Tensor | None
    key_mask: Tensor | None
    positions: Tensor | None
    scale: float
    batch: int
    length: int
    causal: bool

    @property
    def tensors(self) -> list[Tensor | None]:
        sequences = (self.offsets, self.key_lengths, self.key_mask, self.positions)
        return [self.q, self.k, self.v, self.table, *self.indices, *sequences]


def prepare(call: Call) -> Prepared:
    # The kernels use a table divided by the scale, and compute row maxima before scaling.
    q, scale, sign = call.q, abs(call.scale), sign_of(call.scale)
    if sign <= 0:
        q, scale = q * sign, scale if sign else 1.0
    table: Tensor | None = None
    indices: tuple[Tensor, ...] = ()
    if call.table is not None:
        assert call.matrix is not None and call.affine is not None and call.short is not None
        table = F.pad((call.table.float() / scale).t(), (0, -len(call.table) % 4)).contiguous()
        indices = (call.matrix, call.short, call.affine)
    batch, length = q.shape[0], q.shape[1]
    if call.offsets is not None:
        batch, length = call.offsets.numel() - 1, call.max_length
    return Prepared(
        q=readable(q, length),
        k=readable(call.k, length),
        v=readable(call.v, length),
        table=table,
        indices=indices,
        offsets=as_int32(call.offsets),
        key_lengths=as_int32(call.key_lengths),
        key_mask=None if call.key_mask is None else call.key_mask.contiguous(),
        positions=as_int32(call.positions),
        scale=scale,
        batch=batch,
        length=length,
        causal=call.causal,
    )


def sign_of(scale: float) -> int:
    """-1, 0 or 1; also 0 for a scale so small that a score equals its bias."""
    return 0 if abs(scale) < SMALLEST_SCALE else 1 if scale > 0 else -1


def readable(tensor: Tensor, length: int) -> Tensor:
    """The tensor, or a copy with K a multiple of 8 if 16-byte loads cannot read it.

    Heads are the outermost dimension of the copy if a sequence of ``length`` tokens would otherwise
    span too many bytes.
    """
    aligned = tensor.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in tensor.stride()[:-1])
    near = tensor.stride(-3) * tensor.element_size() * length < MAX_SPAN
    if tensor.shape[-1] % 8 == 0 and tensor.stride(-1) == 1 and aligned and near:
        return tensor
    tensor = F.pad(tensor, (0, -tensor.shape[-1] % 8))
    if tensor.shape[-2] * tensor.shape[-1] * tensor.element_size() * length < MAX_SPAN:
        return tensor.contiguous()
    return tensor.transpose(-3, -2).contiguous().transpose(-3, -2)


def as_int32(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(torch.int32).contiguous()


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def operand(tensor: Tensor) -> Operand:
    """``tensor`` is [B, N, H, K], or [T, H, K] packed."""
    strides = tensor.stride()[:-1] if tensor.dim() == 4 else (0, *tensor.stride()[:-1])
    return Operand(tensor.data_ptr(), *strides)


def call_argument(
    call: Prepared, lse: Tensor, shared_bytes: int, programs: int = 0
) -> CallArgument:
    """Arguments common to all kernels.

    Args:
        lse: [..., H]; delta has the same last two strides.
        shared_bytes: shared memory that a CTA needs without a table.
        programs: number of CTAs of a kernel whose CTAs start staggered.
    """
    bias = Bias()
    if call.table is not None:
        matrix, short, affine = call.indices
        bias = Bias(
            *(pointer(t) for t in (call.table, matrix, short, affine)),
            size=matrix.shape[1],
            pitch=short.shape[1],
            entries=call.table.shape[1],
            in_shared=shared_bytes + table_bytes(call) <= shared_limit(call.q.device),
        )
    return CallArgument(
        *(operand(t) for t in (call.q, call.k, call.v)),
        bias,
        *(pointer(t) for t in (call.offsets, call.key_lengths, call.key_mask, call.positions)),
        pointer(lse),
        scale=call.scale * LOG2_E,
        value_token=lse.stride(-2),
        value_head=lse.stride(-1),
        batch=call.batch,
        heads=call.q.shape[-2],
        length=call.length,
        head_dim=call.q.shape[-1],
        causal=call.causal,
        stagger=stagger(call.q.device, programs),
    )


def stagger(device: torch.device, programs: int) -> int:
    """The CTA from which on an equal number of CTAs start later; 0 for none, in short launches."""
    first = target.multiprocessors(device)
    return first if programs >= STAGGERED * first else 0


def shared_limit(device: torch.device) -> int:
    """Maximum shared memory of a CTA, in bytes."""
    return (64 if target.compute_capability(device) == (7, 5) else 96) * 1024


def table_bytes(call: Prepared) -> int:
    return 0 if call.table is None else 4 * call.table.shape[1]


def column_tile_bytes(dim: int) -> int:
    """``ColumnTile<dim>::kBytes``."""
    return COLUMNS * 2 * dim


def padded_dim(head_dim: int) -> int:
    """The head dim of the kernel variant: ``head_dim`` rounded up."""
    return next(dim for dim in (64, 128) if head_dim <= dim)
