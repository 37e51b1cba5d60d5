"""The host's side of the backward: what to compute, where to put it, two launches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..._backends import triton_launch
from ..call import LISTS, Call
from ..counters import take_counters
from ..rows import bound_on_tiles, rows_of
from ..schedule import Split, band_of
from . import launch as host
from . import tiles
from .backward_rows import moe_ffn_bwd_rows_kernel
from .backward_weights import SUM_COLUMNS, Work, moe_ffn_bwd_weights_kernel

# Elements that a task without products holds at once of each of its tensors (with twice as many the
# kernel spills on sm_80), and the rows it goes through: the more, the fewer partial sums.
_HELD = 4096
_ROWS_PER_TASK = 64


class Gradients:
    """One backward."""

    def __init__(self, dy: Tensor, pre: Tensor, call: Call, needs: Sequence[bool]) -> None:
        self.call, self.pre = call, pre
        self.half = call.w1[0].dtype
        self.dy, self.x = dy.contiguous(), call.x.contiguous()
        self.rows = rows_of(call)
        self.tiles = tiles.choose(dy.device, self.half)

        flags, params = iter(needs), [getattr(call, name) for name in LISTS]
        leaves = (call.x, *itertools.chain(*params), call.layer_scale)
        self.dtypes = [leaf.dtype for leaf in leaves if leaf is not None]
        self.dx = self._wanted(call.x, next(flags))
        self.grads: dict[str, list[Tensor]] = {}
        for name, tensors in zip(LISTS, params, strict=True):
            dtype = host.common_dtype(tensors) if tensors else None
            self.grads[name] = [self._wanted(tensor, next(flags), dtype) for tensor in tensors]
        self.dlayer_scale = None
        if call.layer_scale is not None:
            self.dlayer_scale = self._wanted(call.layer_scale, next(flags))

    def compute(self) -> list[Tensor]:
        flat = self._flat()
        if self.dy.shape[0] == 0:
            for gradient in flat:
                gradient.zero_()
        else:
            self.launch_rows()
            if any(gradient.numel() for gradient in flat[1:]):
                self.launch_weights()
        return [gradient.to(dtype) for gradient, dtype in zip(flat, self.dtypes, strict=True)]

    def wants(self, *names: str) -> bool:
        """Whether any expert's gradient of one of these parameters is wanted."""
        return any(gradient.numel() for name in names for gradient in self.grads[name])

    def launch_rows(self) -> None:
        """dx, and everything that sums over tokens need; see backward_rows.py."""
        call, dim = self.call, self.x.shape[1]
        tile = self.tiles.rows if self.pre.numel() else self.tiles.recompute
        config = host.config_of(call, tile)
        scaled = call.layer_scale is not None or call.token_scale is not None
        normed = call.norm != "none"
        of_g = self.wants("w2") or _given(self.dlayer_scale)
        of_norm = self.wants("norm_weight", "norm_bias")
        through = _given(self.dx) or of_norm

        self.normed = self._scratch(dim, normed and (self.wants("w1") or self.pre.numel() == 0))
        self.dh2 = self._scratch(dim, scaled or self.dy.dtype != self.half)
        self.dbranch = self._scratch(dim, call.layer_scale is not None and of_g)
        self.hidden = self._scratch(config.max_hidden, of_g)
        self.dpre = self.x.new_empty(self.x.shape[0], config.max_pre, dtype=self.half)
        dnormed = self._scratch(dim, normed and through)

        block_r = max(1, min(tile.block_t, _HELD // config.block_d))
        row_steps = max(1, min(tile.block_t, _ROWS_PER_TASK) // block_r)
        row_tasks = -(-tile.block_t // (block_r * row_steps))
        of_b2 = self.wants("b2") or (_given(self.dlayer_scale) and bool(call.b2))
        prepares = of_b2 or any(t is not None for t in (self.normed, self.dh2, self.dbranch))
        config = config._replace(
            tasks=(
                row_tasks if prepares else 0,
                -(-config.max_hidden // config.block_f),
                -(-dim // tile.block_n) if through else 0,
                row_tasks if normed and through else 0,
            ),
            block_r=block_r,
            row_steps=row_steps,
        )
        bound = bound_on_tiles(call, self.rows, tile.block_t)
        self.sum_dbranch = self._sums(bound * config.tasks[0], dim, of_b2)
        self.sum_dpre = self._sums(bound, config.max_pre, self.wants("b1"))
        self.sum_norm = self._sums(bound * config.tasks[3], 2 * dim, of_norm)
        self.row_config = config

        device, workers = self.x.device, host.workers_on(self.x.device, tile)
        depths = (None, dim, config.max_pre, None)
        costs = dict(step=config.block_k, rows_cost=host.ROWS_COST)
        band = band_of(bound, config.tasks, workers, depths, **costs)
        with take_counters(device, 2 + 3 * bound) as counters:
            triton_launch.launch(
                *(moe_ffn_bwd_rows_kernel, device, min(workers, bound * sum(config.tasks)), tile),
                *(self.dy, self.x, self.pre if self.pre.numel() else None),
                *(self.dbranch, self.dh2, self.normed, self.hidden, self.dpre, dnormed),
                *(self.sum_dbranch, self.sum_dpre, self.sum_norm),
                self.dx if _given(self.dx) else None,
                *(host.pointers(t) for t in (call.w1, call.w2, call.b1)),
                *(host.pointers(t) for t in (call.norm_weight, call.norm_bias)),
                *(host.contiguous(t) for t in (call.layer_scale, call.token_scale)),
                *(host.passed(self.rows), counters, bound, band, call.norm_eps, config),
            )

    def launch_weights(self) -> None:
        """The gradients that sum over tokens; see backward_weights.py."""
        call, tile, device = self.call, self.tiles.weights, self.x.device
        config, workers = host.config_of(call, tile), host.workers_on(device, tile)
        work = self._work(config, workers)
        dim = config.dim
        split = work.w1_tiles, work.w2_tiles, work.whole
        divided = any(w1 + w2 - whole for w1, w2, whole in zip(*split, strict=True))
        shape = (workers, tile.block_t, tile.block_n) if divided else 1
        partial = self.x.new_empty(shape, dtype=torch.float32)
        sums = (self.sum_dpre, self.sum_dbranch, self.sum_norm)
        scales = _given(self.dlayer_scale)
        # Where a tensor is not there, one of the same dtype stands for it; it is not read.
        normed = self.dpre if self.normed is None else self.normed
        dbranch = self.dbranch if self.dbranch is not None else self.dh2
        tickets = sum(work.whole) + workers + sum(work.sum_blocks)
        with take_counters(device, 3 + workers) as counters:
            triton_launch.launch(
                *(moe_ffn_bwd_weights_kernel, device, min(workers, tickets), tile),
                *(self.dpre, self.x if call.norm == "none" else normed),
                self.dy if dbranch is None else dbranch,
                self.dpre if self.hidden is None else self.hidden,
                *(partial if tensor is None else tensor for tensor in sums),
                partial,
                self._sums(work.scale_rows, dim, scales),
                self._sums(len(call.w1), dim, scales and bool(call.b2)),
                *(tuple(self.grads[name]) or None for name in LISTS),
                self.dlayer_scale if scales else None,
                *(host.pointers(t) for t in (call.w2, call.b2)),
                *(host.contiguous(call.layer_scale), host.passed(self.rows), counters),
                *(call.norm == "none", dbranch is None, config, work),
            )

    def _work(self, config: host.Config, workers: int) -> Work:
        call, rows = self.call, self.row_config
        wanted = {name: tuple(g.numel() > 0 for g in self.grads[name]) for name in LISTS}
        scales = _given(self.dlayer_scale)
        down = -(-config.dim // config.block_t)
        across = -(-config.dim // config.block_n)
        w1_tiles = tuple(
            -(-weight.shape[0] // config.block_t) * across if want else 0
            for weight, want in zip(call.w1, wanted["w1"], strict=True)
        )
        hidden_blocks = [-(-f // config.block_n) for f in config.hidden]
        w2_tiles = tuple(
            down * blocks if want or scales else 0
            for blocks, want in zip(hidden_blocks, wanted["w2"], strict=True)
        )
        tile_counts = tuple(a + b for a, b in zip(w1_tiles, w2_tiles, strict=True))
        per_dim = len(call.w1) * -(-config.dim // SUM_COLUMNS.value)
        sum_blocks = (
            len(call.w1) * -(-config.max_pre // SUM_COLUMNS.value) if self.wants("b1") else 0,
            per_dim if self.sum_dbranch is not None else 0,
            per_dim if self.wants("norm_weight") else 0,
            per_dim if self.wants("norm_bias") else 0,
        )
        return Work(
            w1_tiles=w1_tiles,
            w2_tiles=w2_tiles,
            whole=Split(tile_counts, (0,) * len(tile_counts), workers).whole,
            workers=workers,
            **wanted,
            sum_blocks=sum_blocks,
            dbranch_rows=rows.tasks[0],
            norm_rows=rows.tasks[3],
            rows_block_t=rows.block_t,
            scale_signals=sum(w2_tiles) + (sum_blocks[1] if scales and call.b2 else 0),
            scale_rows=sum(hidden_blocks),
        )

    def _wanted(self, tensor: Tensor, need: bool, dtype: torch.dtype | None = None) -> Tensor:
        shape = tensor.shape if need else (0,)
        return torch.empty(shape, dtype=dtype or tensor.dtype, device=tensor.device)

    def _scratch(self, width: int, needed: bool) -> Tensor | None:
        return self.x.new_empty(self.x.shape[0], width, dtype=self.half) if needed else None

    def _sums(self, rows: int, width: int, needed: bool) -> Tensor | None:
        return self.x.new_empty(rows, width, dtype=torch.float32) if needed else None

    def _flat(self) -> list[Tensor]:
        flat = [self.dx, *(gradient for name in LISTS for gradient in self.grads[name])]
        return flat if self.dlayer_scale is None else [*flat, self.dlayer_scale]


def _given(tensor: Tensor | None) -> bool:
    """Whether a gradient exists and is wanted: it is not empty."""
    return tensor is not None and tensor.numel() > 0
