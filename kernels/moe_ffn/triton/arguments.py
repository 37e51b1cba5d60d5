"""Prepares the launches of a call: compile-time constants, the band."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ... import target
from ..._backends import triton as triton_target
from ..._backends.triton import tf32_allowed
from ..._backends.triton_device import INTERPRETED, odd
from ..call import GATED
from ..plan import Problem, common_dtype
from ..rows import Rows
from ..schedule import TILE_OVERHEAD
from .device import Config, Passed
from .tiles import Tile

# Estimated cost of a task without products, in steps of a main loop; it only affects the choice of
# the band.
ROWS_COST = 2
# The interpreter runs programs sequentially; a few suffice to test the division of work.
_INTERPRETED_PROGRAMS = 5


def pointers(tensors: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
    """One contiguous tensor per expert, all in one dtype; None if the call has none."""
    if not tensors:
        return None
    dtype = tensors[0].dtype
    for tensor in tensors:
        if tensor.dtype != dtype or not tensor.is_contiguous():
            break
    else:
        return tuple(tensors)
    common = common_dtype(tensors)
    return tuple([tensor.to(common).contiguous() for tensor in tensors])


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def by_token(
    tensor: Tensor | None, streams: Sequence[Tensor]
) -> Tensor | tuple[Tensor, ...] | None:
    """A tensor with a row for each token, or the streams in its place."""
    return pointers(streams) if streams else contiguous(tensor)


def passed(rows: Rows) -> Passed:
    """Rows in the form that the kernels take; a compiled kernel serves all lengths."""
    if rows.offsets is not None:
        return Passed(None, None, None, 0, rows.tokens, rows.offsets)
    return _segments(rows)


@functools.lru_cache(maxsize=256)
def _segments(rows: Rows) -> Passed:
    ends = itertools.accumulate(length * rows.sequences for length in rows.lengths)
    return Passed(
        starts=tuple(map(odd, rows.starts)),
        lengths=tuple(map(odd, rows.lengths)),
        ends=tuple(map(odd, ends)),
        length=odd(rows.length),
        tokens=None,
        offsets=None,
    )


def make_config(
    dim: int,
    hidden: tuple[int, ...],
    norm: str,
    activation: str,
    precision: str,
    rounds: bool,
    tile: Tile,
    descriptors: bool = False,
    sub_norm: bool = False,
    linear: int = 0,
    streams: bool = False,
) -> Config:
    """Compile-time constants of a kernel; the kernel's launcher sets its phases.

    ``linear`` is O of moe_linear.
    """
    out = linear or dim
    gated = activation in GATED
    halves = 2 if gated else 1
    block_d = 1 << (dim - 1).bit_length()
    return Config(
        dim=dim,
        out=out,
        widest=max(dim, out),
        linear=linear > 0,
        hidden=hidden,
        max_hidden=max(hidden),
        norm=norm,
        activation=activation,
        gated=gated,
        halves=halves,
        max_pre=0 if linear else max(hidden) * halves,
        sub_norm=sub_norm,
        precision=precision,
        rounds=rounds,
        tasks=(),
        even_dim=dim % tile.block_k == 0,
        even_hidden=all(f % tile.block_k == 0 for f in hidden),
        even=all(
            size % block == 0
            for size in (dim, out, *hidden)
            for block in (tile.block_t, tile.block_n, tile.block_k)
        ),
        block_t=tile.block_t,
        block_n=tile.block_n,
        block_f=tile.block_n // halves,
        block_k=tile.block_k,
        block_d=block_d,
        block_o=1 << (out - 1).bit_length(),
        block_r=max(1, min(tile.block_t, 16384 // block_d)),
        row_steps=1,
        block_h=1 << (max(hidden) - 1).bit_length(),
        sub_r=1,
        sub_steps=1,
        num_warps=tile.num_warps,
        descriptors=descriptors,
        streams=streams,
        overhead=TILE_OVERHEAD,
    )


def config_of(problem: Problem, precision: str, tile: Tile, descriptors: bool = False) -> Config:
    rounds = problem.dtype != torch.float32
    facts = (problem.dim, problem.hidden, problem.norm, problem.activation, precision, rounds)
    linear = problem.out if problem.linear else 0
    kind = (problem.sub_norm, linear, problem.streams)
    return make_config(*facts, tile, descriptors, *kind)


def uses_descriptors(tile: Tile, w1: Sequence[Tensor], w2: Sequence[Tensor]) -> bool:
    """Whether a kernel reads operands through tensor descriptors, see :class:`Tile`.

    Raises:
        NotImplementedError: the tile asks for them, and Triton is too old.
    """
    if not tile.descriptors or w2[0].dtype == torch.float32:
        return False
    if len(w1) > len(w2):  # a block has rows of gate and value, which are separate tensors
        return False
    triton_target.require_descriptors()
    sizes = [size for weight in w2 for size in weight.shape]
    return all(size % 8 == 0 for size in sizes) and all(
        weight.data_ptr() % 16 == 0 for weight in (*w1, *w2)
    )


def precision() -> str:
    """Triton's name for the precision of float32 products that PyTorch's settings allow."""
    return "tf32" if tf32_allowed() else "ieee"


def workers_on(device: torch.device, tile: Tile) -> int:
    """Number of resident programs."""
    if INTERPRETED:
        return _INTERPRETED_PROGRAMS
    return target.multiprocessors(device) * tile.programs
