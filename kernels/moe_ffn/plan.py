"""Plans a backward of moe_ffn: tasks, scratch and outputs, for both Triton and CUDA.

There are two launches. The launch of the rows computes dx and, in grouped order, the operands of
all sums over tokens; the launch of the weights computes every gradient that is a sum over tokens.
The second is omitted if no parameter needs a gradient.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .call import LISTS, Call
from .rows import Rows, bound_on_tiles
from .schedule import whole_tiles

SUM_COLUMNS = 128  # columns of a column block of the sums over row tiles


class Gradients(NamedTuple):
    """The gradients to write; those that are not needed are empty."""

    x: Tensor  # [T, D]
    lists: dict[str, list[Tensor]]  # by the names of LISTS: one per expert, or none
    layer_scale: Tensor | None  # [D]

    @classmethod
    def empty(cls, call: Call, needs: Sequence[bool]) -> Gradients:
        """Allocate the gradients; those of a parameter have one dtype for all experts.

        ``needs`` is in the order of the schema.
        """
        flags = iter(needs)
        x = _empty(call.x, next(flags), call.x.dtype)
        lists = {}
        for name in LISTS:
            tensors = getattr(call, name)
            dtype = common_dtype(tensors)
            lists[name] = [_empty(tensor, next(flags), dtype) for tensor in tensors]
        scale = call.layer_scale
        return cls(x, lists, None if scale is None else _empty(scale, next(flags), scale.dtype))

    def wants(self, *names: str) -> bool:
        """Whether a gradient of one of these parameters is needed for any expert."""
        return any(gradient.numel() for name in names for gradient in self.lists[name])

    @property
    def scale(self) -> Tensor | None:
        """The gradient of the layer scale; None if there is none or it is not needed."""
        return self.layer_scale if wanted(self.layer_scale) else None

    @property
    def sums(self) -> bool:
        """Whether any gradient that is a sum over tokens is needed."""
        return self.wants(*LISTS) or self.scale is not None

    @property
    def flat(self) -> list[Tensor]:
        """All gradients, in the order of the schema."""
        flat = [self.x, *itertools.chain(*self.lists.values())]
        return flat if self.layer_scale is None else [*flat, self.layer_scale]

    def result(self, call: Call) -> list[Tensor]:
        """All gradients in the dtypes of the call; zeros if it has no tokens."""
        leaves = [call.x, *itertools.chain(*call[1:7]), call.layer_scale]
        flat = self.flat
        if len(call.x) == 0:
            for gradient in flat:
                gradient.zero_()
        dtypes = [leaf.dtype for leaf in leaves if leaf is not None]
        return [gradient.to(dtype) for gradient, dtype in zip(flat, dtypes, strict=True)]


class RowsPlan(NamedTuple):
    """The launch of the rows: its tasks, and its outputs besides dx; None if they are not read.

    Scratch is in the dtype of the weights and in grouped order. The partial sums are float32, with
    one row per task of a row tile.
    """

    bound: int  # upper bound of the number of row tiles
    tasks: tuple[int, int, int, int]  # tasks of a row tile in each phase
    depths: tuple[int | None, ...]  # depth of each phase's products, None without products
    dbranch: Tensor | None  # [T, D]
    dh2: Tensor | None  # [T, D]
    normed: Tensor | None  # [T, D]
    hidden: Tensor | None  # [T, max F]
    dpre: Tensor  # [T, P]
    dnormed: Tensor | None  # [T, D]
    sum_dbranch: Tensor | None  # [bound * tasks[0], D]
    sum_dpre: Tensor | None  # [bound, P]
    sum_norm: Tensor | None  # [bound * tasks[3], 2 D]: for the weight, then the bias

    @property
    def tensors(self) -> dict[str, Tensor | None]:
        """The outputs of the launch by name, in the order of its arguments."""
        return dict(zip(self._fields[3:], self[3:], strict=True))


def plan_rows(
    call: Call,
    rows: Rows,
    gradients: Gradients,
    *,
    block_t: int,
    block_f: int,
    block_n: int,
    row_tasks: int,
    keeps_normed: bool,
    keeps_dh2: bool,
) -> RowsPlan:
    """Plan the launch of the rows.

    Args:
        block_t: rows of a row tile.
        block_f: hidden columns of a tile of the first product, dh2 W2.
        block_n: columns of a tile of the second product, dpre W1.
        row_tasks: tasks of a row tile in a phase without products.
        keeps_normed: whether norm(x) is written for the launch of the weights.
        keeps_dh2: whether the gradient of the second layer's output differs from dy.
    """
    tokens, dim = call.x.shape
    max_hidden, max_pre = (max(sizes) for sizes in zip(*_widths(call), strict=True))
    of_w2 = gradients.wants("w2") or gradients.scale is not None
    of_norm = gradients.wants("norm_weight", "norm_bias")
    of_dbranch = gradients.wants("b2") or (gradients.scale is not None and bool(call.b2))
    through = wanted(gradients.x) or of_norm
    of_x = call.norm != "none" and through
    keeps_dbranch = call.layer_scale is not None and of_w2

    def scratch(width: int, needed: bool) -> Tensor | None:
        return call.x.new_empty(tokens, width, dtype=call.w1[0].dtype) if needed else None

    def sums(lines: int, width: int, needed: bool) -> Tensor | None:
        return call.x.new_empty(lines, width, dtype=torch.float32) if needed else None

    bound = bound_on_tiles(call, rows, block_t)
    prepares = of_dbranch or keeps_normed or keeps_dh2 or keeps_dbranch
    tasks = (
        row_tasks if prepares else 0,
        -(-max_hidden // block_f),
        -(-dim // block_n) if through else 0,
        row_tasks if of_x else 0,
    )
    return RowsPlan(
        bound=bound,
        tasks=tasks,
        depths=(None, dim, max_pre, None),
        dbranch=scratch(dim, keeps_dbranch),
        dh2=scratch(dim, keeps_dh2),
        normed=scratch(dim, keeps_normed),
        hidden=scratch(max_hidden, of_w2),
        dpre=call.x.new_empty(tokens, max_pre, dtype=call.w1[0].dtype),
        dnormed=scratch(dim, of_x),
        sum_dbranch=sums(bound * tasks[0], dim, of_dbranch),
        sum_dpre=sums(bound, max_pre, gradients.wants("b1")),
        sum_norm=sums(bound * tasks[3], 2 * dim, of_norm),
    )


class WeightsPlan(NamedTuple):
    """The launch of the weights: its tiles, and its scratch in float32."""

    w1_tiles: tuple[int, ...]  # tiles of dw1 per expert; 0 if no gradient is needed
    w2_tiles: tuple[int, ...]
    whole: tuple[int, ...]  # tiles per expert, of dw1 and dw2, that are not divided
    workers: int  # number of equal shares of the other tiles
    sum_blocks: tuple[int, int, int, int]  # column blocks of dpre, dbranch, norm weight, norm bias
    scale_lines: int  # rows of sum_scale: column blocks of hidden units of all experts
    partial: Tensor | None  # [workers, block_t, block_n], partial tiles
    sum_scale: Tensor | None  # [scale_lines, D]
    sum_bias: Tensor | None  # [E, D]

    @property
    def tickets(self) -> int:
        return sum(self.whole) + self.workers + sum(self.sum_blocks)


def plan_weights(
    call: Call, gradients: Gradients, rows: RowsPlan, *, block_t: int, block_n: int, workers: int
) -> WeightsPlan:
    """Plan the launch of the weights after that of ``rows``, with tiles of block_t x block_n."""
    experts, dim = len(call.w1), call.x.shape[1]
    scales = gradients.scale is not None
    down, across = -(-dim // block_t), -(-dim // block_n)
    hidden_blocks = [-(-hidden // block_n) for hidden, _ in _widths(call)]
    w1_tiles = tuple(
        -(-pre // block_t) * across if wanted(gradient) else 0
        for (_, pre), gradient in zip(_widths(call), gradients.lists["w1"], strict=True)
    )
    w2_tiles = tuple(
        down * blocks if wanted(gradient) or scales else 0
        for blocks, gradient in zip(hidden_blocks, gradients.lists["w2"], strict=True)
    )
    tiles = tuple(a + b for a, b in zip(w1_tiles, w2_tiles, strict=True))
    whole = whole_tiles(tiles, workers)
    of_dim = experts * -(-dim // SUM_COLUMNS)
    sum_blocks = (
        experts * -(-rows.dpre.shape[1] // SUM_COLUMNS) if gradients.wants("b1") else 0,
        of_dim if rows.sum_dbranch is not None else 0,
        of_dim if gradients.wants("norm_weight") else 0,
        of_dim if gradients.wants("norm_bias") else 0,
    )

    def floats(*shape: int, needed: bool) -> Tensor | None:
        return call.x.new_empty(shape, dtype=torch.float32) if needed else None

    lines = sum(hidden_blocks)
    return WeightsPlan(
        w1_tiles=w1_tiles,
        w2_tiles=w2_tiles,
        whole=whole,
        workers=workers,
        sum_blocks=sum_blocks,
        scale_lines=lines,
        partial=floats(workers, block_t, block_n, needed=tiles != whole),
        sum_scale=floats(lines, dim, needed=scales),
        sum_bias=floats(experts, dim, needed=scales and bool(call.b2)),
    )


def wanted(gradient: Tensor | None) -> bool:
    """Whether a gradient exists and is needed, that is, not empty."""
    return gradient is not None and gradient.numel() > 0


def common_dtype(tensors: Sequence[Tensor]) -> torch.dtype | None:
    """The dtype in which a kernel takes the tensors of all experts, which may have several."""
    dtypes = [tensor.dtype for tensor in tensors]
    return functools.reduce(torch.promote_types, dtypes) if dtypes else None


def _widths(call: Call) -> list[tuple[int, int]]:
    """F of each expert, and the number of columns of its pre-activation: F, or 2 F if gated."""
    return [(w2.shape[1], w1.shape[0]) for w1, w2 in zip(call.w1, call.w2, strict=True)]


def _empty(tensor: Tensor, needed: bool, dtype: torch.dtype | None) -> Tensor:
    return torch.empty(tensor.shape if needed else (0,), dtype=dtype, device=tensor.device)
