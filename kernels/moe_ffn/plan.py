"""Plans a backward of moe_ffn: tasks, scratch and outputs, for both Triton and CUDA.

There are two launches. The launch of the rows computes dx and, in grouped order, the operands of
all sums over tokens; the launch of the weights computes every gradient that is a sum over tokens.
The second is omitted if no parameter needs a gradient.

A plan depends on sizes and options only, so that backends can keep it for the next call; its
``allocate`` makes the tensors of one call.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .call import LISTS, Call
from .rows import Rows, tiles_of
from .schedule import whole_tiles

SUM_COLUMNS = 128  # columns of a column block of the sums over row tiles


class Problem(NamedTuple):
    """What a plan depends on: the sizes and options of a call."""

    tokens: int
    dim: int
    out: int  # O; D but for moe_linear
    hidden: tuple[int, ...]  # E x F; D for moe_linear
    pre: tuple[int, ...]  # E x columns of the pre-activation: F, 2 F if gated, 0 for moe_linear
    lengths: tuple[int, ...] | None  # of Rows
    sequences: int
    dtype: torch.dtype  # of the weights
    norm: str
    activation: str
    biased: bool  # whether there are b2
    scaled: bool  # whether there is a layer scale
    sub_norm: bool
    linear: bool
    streams: bool = False

    @classmethod
    def of(cls, call: Call, rows: Rows) -> Problem:
        return cls(
            tokens=call.tokens,
            dim=call.x.shape[1],
            out=call.w2[0].shape[0],
            hidden=tuple([weight.shape[1] for weight in call.w2]),
            pre=call.pre_columns,
            lengths=rows.lengths,
            sequences=rows.sequences,
            dtype=call.w2[0].dtype,
            norm=call.norm,
            activation=call.activation,
            biased=bool(call.b2),
            scaled=call.layer_scale is not None,
            sub_norm=bool(call.sub_norm_weight),
            linear=not call.w1,
            streams=bool(call.streams),
        )

    def tiles(self, block_t: int) -> int:
        """The number of row tiles for segments, else an upper bound."""
        return tiles_of(self.tokens, len(self.hidden), self.lengths, self.sequences, block_t)


class Needed(NamedTuple):
    """Which gradients are needed; those without elements are not."""

    x: bool
    w1: tuple[bool, ...]  # 2 E if gate and value are separate, like b1
    w2: tuple[bool, ...]
    b1: tuple[bool, ...]
    b2: tuple[bool, ...]
    norm_weight: tuple[bool, ...]
    norm_bias: tuple[bool, ...]
    sub_norm_weight: tuple[bool, ...]
    sub_norm_bias: tuple[bool, ...]
    layer_scale: bool

    @property
    def lists(self) -> dict[str, tuple[bool, ...]]:
        return dict(zip(LISTS, self[1:-1], strict=True))

    def wants(self, *names: str) -> bool:
        """Whether a gradient of one of these parameters is needed for any expert."""
        return any(any(self.lists[name]) for name in names)

    @property
    def sums(self) -> bool:
        """Whether any gradient that is a sum over tokens is needed."""
        return self.layer_scale or self.wants(*LISTS)


class Gradients(NamedTuple):
    """The gradients to write; those that are not needed are empty."""

    x: Tensor  # [T, D], of all streams if there are
    lists: dict[str, list[Tensor]]  # by the names of LISTS: one per expert, or none
    layer_scale: Tensor | None  # [D]
    needed: Needed

    @classmethod
    def empty(cls, call: Call, needs: Sequence[bool]) -> Gradients:
        """Allocate the gradients; those of a parameter have one dtype for all experts.

        ``needs`` is in the order of the schema.
        """
        flags = iter(needs)
        x = _empty(call.x, next(flags), call.x.dtype)
        lists: dict[str, list[Tensor]] = {}
        needed: dict[str, tuple[bool, ...]] = {}
        for name in LISTS:
            tensors = getattr(call, name)
            made: list[Tensor] = []
            if tensors:
                dtype = common_dtype(tensors)
                made = [_empty(tensor, next(flags), dtype) for tensor in tensors]
            lists[name] = made
            needed[name] = tuple([gradient.numel() > 0 for gradient in made])
        scale = call.layer_scale
        if scale is not None:
            scale = _empty(scale, next(flags), scale.dtype)
        if call.streams:
            x = call.x.new_empty((call.tokens, call.x.shape[1]) if any(flags) else (0,))
        return cls(x, lists, scale, Needed(x=wanted(x), **needed, layer_scale=wanted(scale)))

    @property
    def scale(self) -> Tensor | None:
        """The gradient of the layer scale; None if there is none or it is not needed."""
        return self.layer_scale if self.needed.layer_scale else None

    @property
    def flat(self) -> list[Tensor]:
        """All gradients but those of the streams, in the order of the schema."""
        flat = [self.x, *itertools.chain(*self.lists.values())]
        return flat if self.layer_scale is None else [*flat, self.layer_scale]

    def result(self, call: Call) -> list[Tensor]:
        """All gradients in the dtypes of the call; zeros if it has no tokens.

        Those of the streams are successive rows of one tensor.
        """
        lists = [getattr(call, name) for name in LISTS]
        leaves = [call.x, *itertools.chain(*lists), call.layer_scale]
        flat = self.flat
        if call.tokens == 0:
            for gradient in flat:
                gradient.zero_()
        given = (leaf for leaf in leaves if leaf is not None)
        found = [
            gradient if gradient.dtype == leaf.dtype else gradient.to(leaf.dtype)
            for gradient, leaf in zip(flat, given, strict=True)
        ]
        if not call.streams:
            return found
        parts = self.x.split(call.counts) if self.needed.x else [self.x] * len(call.streams)
        return [*found, *parts]


class RowsScratch(NamedTuple):
    """The outputs of the launch of the rows besides dx, in the order of its arguments.

    Those that are not read are None. Scratch is in the dtype of the weights and in grouped order.
    The partial sums are float32, with one row per task of a row tile.
    """

    dbranch: Tensor | None  # [T, O]
    dh2: Tensor | None  # [T, O]
    normed: Tensor | None  # [T, D]
    hidden: Tensor | None  # [T, max F]
    dpre: Tensor | None  # [T, P]
    dnormed: Tensor | None  # [T, D]
    sum_dbranch: Tensor | None  # [bound * tasks[0], O]
    sum_dpre: Tensor | None  # [bound, P]; with a sub-norm several lines of each row tile
    sum_norm: Tensor | None  # [bound * tasks[3], 2 D]: for the weight, then the bias


class RowsPlan(NamedTuple):
    """The launch of the rows."""

    bound: int  # upper bound of the number of row tiles
    tasks: tuple[int, int, int, int]  # tasks of a row tile in each phase
    depths: tuple[int | None, ...]  # depth of each phase's products, None without products
    scratch: tuple[tuple[int, int] | None, ...]  # shapes of the first six of RowsScratch
    sums: tuple[tuple[int, int] | None, ...]  # shapes of the others

    def allocate(self, call: Call) -> RowsScratch:
        x, dtype = call.x, call.w2[0].dtype
        scratch = [s if s is None else x.new_empty(s, dtype=dtype) for s in self.scratch]
        sums = [s if s is None else x.new_empty(s, dtype=torch.float32) for s in self.sums]
        return RowsScratch(*scratch, *sums)


def plan_rows(
    problem: Problem,
    needed: Needed,
    *,
    block_t: int,
    block_f: int,
    block_n: int,
    row_tasks: int,
    keeps_normed: bool,
    keeps_dh2: bool,
    dpre_lines: int = 1,
) -> RowsPlan:
    """Plan the launch of the rows; moe_linear has no phase 1.

    Args:
        block_t: rows of a row tile.
        block_f: hidden columns of a tile of the first product, dh2 W2.
        block_n: columns of a tile of the second product, dpre W1.
        row_tasks: tasks of a row tile in a phase without products.
        keeps_normed: whether norm(x) is written for the launch of the weights.
        keeps_dh2: whether the gradient of the second layer's output differs from dy.
        dpre_lines: partial sums of dpre for each row tile.
    """
    tokens, dim, out = problem.tokens, problem.dim, problem.out
    max_hidden, max_pre = max(problem.hidden), max(problem.pre)
    of_w2 = needed.wants("w2") or needed.layer_scale
    of_norm = needed.wants("norm_weight", "norm_bias")
    of_dbranch = needed.wants("b2") or (needed.layer_scale and problem.biased)
    through = needed.x or of_norm
    of_x = problem.norm != "none" and through
    keeps_dbranch = problem.scaled and of_w2
    bound = problem.tiles(block_t)
    prepares = of_dbranch or keeps_normed or keeps_dh2 or keeps_dbranch
    tasks = (
        row_tasks if prepares else 0,
        0 if problem.linear else -(-max_hidden // block_f),
        -(-dim // block_n) if through else 0,
        row_tasks if of_x else 0,
    )
    return RowsPlan(
        bound=bound,
        tasks=tasks,
        depths=(None, None, out, None) if problem.linear else (None, out, max_pre, None),
        scratch=(
            (tokens, out) if keeps_dbranch else None,
            (tokens, out) if keeps_dh2 else None,
            (tokens, dim) if keeps_normed else None,
            (tokens, max_hidden) if of_w2 and not problem.linear else None,
            None if problem.linear else (tokens, max_pre),
            (tokens, dim) if of_x else None,
        ),
        sums=(
            (bound * tasks[0], out) if of_dbranch else None,
            (bound * dpre_lines, max_pre) if needed.wants("b1") else None,
            (bound * tasks[3], 2 * dim) if of_norm else None,
        ),
    )


class WeightsScratch(NamedTuple):
    """Scratch of the launch of the weights, in float32; None if it is not needed."""

    partial: Tensor | None  # [workers, block_t, block_n], partial tiles
    sum_scale: Tensor | None  # [scale_lines, O]
    sum_bias: Tensor | None  # [E, O]


class WeightsPlan(NamedTuple):
    """The launch of the weights: its tiles."""

    w1_tiles: tuple[int, ...]  # tiles of dw1 per expert; 0 if no gradient is needed
    w2_tiles: tuple[int, ...]
    whole: tuple[int, ...]  # tiles per expert, of dw1 and dw2, that are not divided
    workers: int  # number of equal shares of the other tiles
    sum_blocks: tuple[int, int, int, int]  # column blocks of dpre, dbranch, norm weight, norm bias
    sub_norm_blocks: tuple[int, int]  # of the sub-norm's weight and bias
    scale_lines: int  # rows of sum_scale: column blocks of hidden units of all experts
    scratch: tuple[tuple[int, ...] | None, ...]  # shapes of WeightsScratch

    @property
    def tickets(self) -> int:
        return sum(self.whole) + self.workers + sum(self.sum_blocks + self.sub_norm_blocks)

    def allocate(self, call: Call) -> WeightsScratch:
        x = call.x
        made = [s if s is None else x.new_empty(s, dtype=torch.float32) for s in self.scratch]
        return WeightsScratch(*made)


def plan_weights(
    problem: Problem, needed: Needed, rows: RowsPlan, *, block_t: int, block_n: int, workers: int
) -> WeightsPlan:
    """Plan the launch of the weights after that of ``rows``, with tiles of block_t x block_n."""
    experts, dim, scales = len(problem.hidden), problem.dim, needed.layer_scale
    out = problem.out
    down, across = -(-out // block_t), -(-dim // block_n)
    hidden_blocks = [-(-hidden // block_n) for hidden in problem.hidden]
    each = len(needed.w1) // experts
    w1_tiles = tuple(
        -(-pre // block_t) * across if any(needed.w1[each * e : each * (e + 1)]) else 0
        for e, pre in enumerate(problem.pre)
    )
    w2_tiles = tuple(
        down * blocks if need or scales else 0
        for blocks, need in zip(hidden_blocks, needed.w2, strict=True)
    )
    tiles = tuple(a + b for a, b in zip(w1_tiles, w2_tiles, strict=True))
    whole = whole_tiles(tiles, workers)
    of_dim = experts * -(-dim // SUM_COLUMNS)
    sum_blocks = (
        experts * -(-max(problem.pre) // SUM_COLUMNS) if needed.wants("b1") else 0,
        experts * -(-out // SUM_COLUMNS) if rows.sums[0] is not None else 0,
        of_dim if needed.wants("norm_weight") else 0,
        of_dim if needed.wants("norm_bias") else 0,
    )
    of_hidden = experts * -(-max(problem.hidden) // SUM_COLUMNS)
    lines = sum(hidden_blocks)
    return WeightsPlan(
        w1_tiles=w1_tiles,
        w2_tiles=w2_tiles,
        whole=whole,
        workers=workers,
        sum_blocks=sum_blocks,
        sub_norm_blocks=(
            of_hidden if needed.wants("sub_norm_weight") else 0,
            of_hidden if needed.wants("sub_norm_bias") else 0,
        ),
        scale_lines=lines,
        scratch=(
            (workers, block_t, block_n) if tiles != whole else None,
            (lines, out) if scales else None,
            (experts, out) if scales and problem.biased else None,
        ),
    )


def wanted(gradient: Tensor | None) -> bool:
    """Whether a gradient exists and is needed, that is, not empty."""
    return gradient is not None and gradient.numel() > 0


def common_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype in which a kernel takes the tensors of all experts, which may have several."""
    dtypes = {tensor.dtype for tensor in tensors}
    return dtypes.pop() if len(dtypes) == 1 else functools.reduce(torch.promote_types, dtypes)


def _empty(tensor: Tensor, needed: bool, dtype: torch.dtype) -> Tensor:
    # The contiguous format, which torch.empty_like assumes for a contiguous tensor.
    if needed and tensor.dtype == dtype and tensor.is_contiguous():
        return torch.empty_like(tensor)
    return tensor.new_empty(tensor.shape if needed else (0,), dtype=dtype)
