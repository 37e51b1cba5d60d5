"""Launches the kernels of moe_ffn: one forward, and two backward as planned in plan.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._backends import triton_launch
from ..call import LISTS, Call, pre_shape
from ..counters import take_counters
from ..plan import Gradients, WeightsPlan, plan_rows, plan_weights, wanted
from ..rows import bound_on_tiles, rows_of
from ..schedule import band_of
from . import arguments, tiles
from .backward_rows import moe_ffn_bwd_rows_kernel
from .backward_weights import Work, moe_ffn_bwd_weights_kernel
from .forward import moe_ffn_fwd_kernel

# Elements of each tensor that a task without products holds in registers (with twice as many the
# kernel spills on sm_80), and rows per task; more rows give fewer partial sums.
_HELD = 4096
_ROWS_PER_TASK = 64


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """y [T, D], and the pre-activation in grouped order; one launch."""
    half, device = call.w1[0].dtype, call.x.device
    num_tokens, dim = call.x.shape
    y_dtype = call.w2[0].dtype if call.residual is None else call.residual.dtype
    y = call.x.new_empty(num_tokens, dim, dtype=y_dtype)
    pre = call.x.new_empty(pre_shape(call), dtype=half)
    if num_tokens == 0:
        return y, pre

    tile = tiles.choose(device, half).forward
    config, rows = arguments.config_of(call, tile), rows_of(call)
    config = config._replace(
        tasks=(
            0 if call.norm == "none" else -(-tile.block_t // config.block_r),
            -(-config.max_hidden // config.block_f),
            -(-dim // tile.block_n),
        )
    )
    bound, workers = bound_on_tiles(call, rows, tile.block_t), arguments.workers_on(device, tile)
    depths = (None, dim, config.max_hidden)
    costs = dict(step=config.block_k, rows_cost=arguments.ROWS_COST)
    band = band_of(bound, config.tasks, workers, depths, **costs)
    normed = call.x.new_empty(num_tokens, dim, dtype=half) if config.tasks[0] else None
    hidden = call.x.new_empty(num_tokens, config.max_hidden, dtype=half)
    with take_counters(device, 2 + 2 * bound) as counters:
        triton_launch.launch(
            *(moe_ffn_fwd_kernel, device, min(workers, bound * sum(config.tasks)), tile),
            *(call.x.contiguous(), normed, pre if call.save_pre else None, hidden, y),
            *(arguments.pointers(tensors) for tensors in call[1:7]),
            *(arguments.contiguous(t) for t in (call.layer_scale, call.token_scale, call.residual)),
            *(arguments.passed(rows), counters, bound, band, call.norm_eps, config),
        )
    return y, pre


class Backward:
    """The launches of a backward."""

    def __init__(self, dy: Tensor, pre: Tensor, call: Call, needs: Sequence[bool]) -> None:
        self.call, self.pre = call, pre if pre.numel() else None
        self.dy, self.x = dy.contiguous(), call.x.contiguous()
        self.rows = rows_of(call)
        self.tiles = tiles.choose(dy.device, call.w1[0].dtype)
        self.gradients = Gradients.empty(call, needs)

    def compute(self) -> list[Tensor]:
        if len(self.x):
            self.launch_rows()
            if self.gradients.sums:
                self.launch_weights()
        return self.gradients.result(self.call)

    def launch_rows(self) -> None:
        """Compute dx and the operands of all sums over tokens; see backward_rows.py."""
        call, gradients = self.call, self.gradients
        tile = self.tiles.recompute if self.pre is None else self.tiles.rows
        config = arguments.config_of(call, tile)
        block_r = max(1, min(tile.block_t, _HELD // config.block_d))
        row_steps = max(1, min(tile.block_t, _ROWS_PER_TASK) // block_r)
        scaled = call.layer_scale is not None or call.token_scale is not None
        reads_normed = gradients.wants("w1") or self.pre is None
        plan = plan_rows(
            *(call, self.rows, gradients),
            block_t=tile.block_t,
            block_f=config.block_f,
            block_n=tile.block_n,
            row_tasks=-(-tile.block_t // (block_r * row_steps)),
            keeps_normed=call.norm != "none" and reads_normed,
            keeps_dh2=scaled or self.dy.dtype != call.w1[0].dtype,
        )
        self.plan, self.row_block = plan, tile.block_t
        config = config._replace(tasks=plan.tasks, block_r=block_r, row_steps=row_steps)

        device, workers = self.x.device, arguments.workers_on(self.x.device, tile)
        costs = dict(step=config.block_k, rows_cost=arguments.ROWS_COST)
        band = band_of(plan.bound, plan.tasks, workers, plan.depths, **costs)
        programs = min(workers, plan.bound * sum(plan.tasks))
        with take_counters(device, 2 + 3 * plan.bound) as counters:
            triton_launch.launch(
                *(moe_ffn_bwd_rows_kernel, device, programs, tile),
                *(self.dy, self.x, self.pre, *plan.tensors.values()),
                gradients.x if wanted(gradients.x) else None,
                *(arguments.pointers(t) for t in (call.w1, call.w2, call.b1)),
                *(arguments.pointers(t) for t in (call.norm_weight, call.norm_bias)),
                *(arguments.contiguous(t) for t in (call.layer_scale, call.token_scale)),
                *(arguments.passed(self.rows), counters, plan.bound, band, call.norm_eps, config),
            )

    def launch_weights(self) -> None:
        """Compute the gradients that are sums over tokens; see backward_weights.py."""
        call, tile, device = self.call, self.tiles.weights, self.x.device
        rows, gradients = self.plan, self.gradients
        config, workers = arguments.config_of(call, tile), arguments.workers_on(device, tile)
        plan = plan_weights(
            *(call, gradients, rows), block_t=tile.block_t, block_n=tile.block_n, workers=workers
        )
        # An absent tensor is replaced by one of the same dtype, which is not read.
        partial = self.x.new_empty(1, dtype=torch.float32) if plan.partial is None else plan.partial
        normed = rows.dpre if rows.normed is None else rows.normed
        dbranch = rows.dbranch if rows.dbranch is not None else rows.dh2
        sums = (rows.sum_dpre, rows.sum_dbranch, rows.sum_norm)
        with take_counters(device, 3 + workers) as counters:
            triton_launch.launch(
                *(moe_ffn_bwd_weights_kernel, device, min(workers, plan.tickets), tile),
                *(rows.dpre, self.x if call.norm == "none" else normed),
                self.dy if dbranch is None else dbranch,
                rows.dpre if rows.hidden is None else rows.hidden,
                *(partial if tensor is None else tensor for tensor in sums),
                *(partial, plan.sum_scale, plan.sum_bias),
                *(tuple(gradients.lists[name]) or None for name in LISTS),
                gradients.scale,
                *(arguments.pointers(t) for t in (call.w2, call.b2)),
                *(arguments.contiguous(call.layer_scale), arguments.passed(self.rows), counters),
                *(call.norm == "none", dbranch is None, config, self._work(plan)),
            )

    def _work(self, plan: WeightsPlan) -> Work:
        rows, gradients = self.plan, self.gradients
        of_bias = plan.sum_blocks[1] if plan.sum_bias is not None else 0
        return Work(
            w1_tiles=plan.w1_tiles,
            w2_tiles=plan.w2_tiles,
            whole=plan.whole,
            workers=plan.workers,
            **{name: tuple(map(wanted, gradients.lists[name])) for name in LISTS},
            sum_blocks=plan.sum_blocks,
            dbranch_rows=rows.tasks[0],
            norm_rows=rows.tasks[3],
            rows_block_t=self.row_block,
            scale_signals=sum(plan.w2_tiles) + of_bias,
            scale_rows=plan.scale_lines,
        )
