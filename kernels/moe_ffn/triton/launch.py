"""Launches the kernels: one forward, and two backward as planned in plan.py.

``tiles.SEPARATE`` makes several launches of the forward and of the first of the backward.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..._backends import triton_launch
from ..call import LISTS, Call, pre_shape
from ..counters import take_counters
from ..plan import Gradients, Needed, Problem, RowsPlan, WeightsPlan, plan_rows, plan_weights
from ..rows import rows_of
from ..schedule import band_of
from . import arguments, tiles
from .backward_rows import moe_ffn_bwd_rows_kernel
from .backward_weights import Work, moe_ffn_bwd_weights_kernel
from .device import Config
from .forward import moe_ffn_fwd_kernel
from .tiles import Overheads, Tile

# Elements of each tensor that a task without products holds in registers (with twice as many the
# kernel spills on sm_80), and rows per task; more rows give fewer partial sums.
_HELD = 4096
_ROWS_PER_TASK = 64
# Rows of hidden activations in a task of the sub-norm.
_SUB_NORM_ROWS = 16
# Plans kept for later calls. One for each number of tokens, if texts differ in length.
_PLANS = 1024


class _Forward(NamedTuple):
    """The launches of a forward, without their tensors: configuration and number of programs."""

    launches: tuple[tuple[Config, int], ...]
    bound: int
    band: int


@functools.lru_cache(_PLANS)
def _plan_forward(
    problem: Problem,
    precision: str,
    tile: Tile,
    workers: int,
    overheads: Overheads,
    separate: bool,
    descriptors: bool,
) -> _Forward:
    config = arguments.config_of(problem, precision, tile, descriptors)
    dim, bound = problem.dim, problem.tiles(tile.block_t)
    config, sub_tasks = _with_sub_norm(config, tile, 2 * _HELD)
    tasks = (
        0 if problem.norm == "none" else -(-tile.block_t // config.block_r),
        0 if problem.linear else -(-config.max_hidden // config.block_f),
        *sub_tasks,
        -(-problem.out // tile.block_n),
    )
    first = None if problem.linear else dim
    depths = (None, first, *(None for _ in sub_tasks), config.max_hidden)
    band = band_of(
        *(bound, tasks, workers, depths),
        step=config.block_k,
        rows_cost=arguments.ROWS_COST,
        overheads=overheads[1:2] if problem.linear else overheads[:2],
    )
    launches = _launches(config, tasks, separate, bound, workers)
    return _Forward(launches, bound, band)


def _with_sub_norm(config: Config, tile: Tile, held: int) -> tuple[Config, tuple[int, ...]]:
    """The configuration with rows of the sub-norm, and the tasks of its phase if there is one."""
    if not config.sub_norm:
        return config, ()
    sub_r = max(1, min(tile.block_t, _SUB_NORM_ROWS, held // config.block_h))
    sub_steps = max(1, min(tile.block_t, _SUB_NORM_ROWS) // sub_r)
    config = config._replace(sub_r=sub_r, sub_steps=sub_steps)
    return config, (-(-tile.block_t // (sub_r * sub_steps)),)


def _launches(
    config: Config, tasks: tuple[int, ...], separate: bool, bound: int, workers: int
) -> tuple[tuple[Config, int], ...]:
    """Configuration and number of programs of one launch, or of one for each phase."""
    each = [tasks]
    if separate:
        phases = [phase for phase, count in enumerate(tasks) if count]
        each = [tuple(n * (p == phase) for p, n in enumerate(tasks)) for phase in phases]
    return tuple((config._replace(tasks=t), min(workers, bound * sum(t))) for t in each)


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """y [T, O], and the pre-activation in grouped order; one launch."""
    x, dtype, tokens = call.x, call.w2[0].dtype, call.tokens
    y = x.new_empty(call.out, dtype=call.result_dtype)
    pre = x.new_empty(pre_shape(call), dtype=dtype)
    if tokens == 0:
        return y, pre

    device, rows = x.device, rows_of(call)
    row = tiles.choose(device, dtype)
    tile, workers = row.forward, arguments.workers_on(device, row.forward)
    w1, w2, *others = map(arguments.pointers, call[1:9])
    assert w2 is not None
    plan = _plan_forward(
        *(Problem.of(call, rows), arguments.precision(), tile, workers),
        *(tiles.overheads(device, dtype), tiles.are_separate(device, dtype, tokens)),
        arguments.uses_descriptors(tile, w1 or (), w2),
    )
    normed = None if call.norm == "none" else x.new_empty((tokens, x.shape[1]), dtype=dtype)
    of_hidden = (tokens, plan.launches[0][0].max_hidden)
    hidden = x.new_empty(of_hidden, dtype=dtype) if call.w1 else None
    sub_normed = x.new_empty(of_hidden, dtype=dtype) if call.sub_norm_weight else None
    tensors = (
        *(arguments.by_token(x, call.streams), normed, pre if call.save_pre else None),
        *(hidden, sub_normed, y),
        *(w1, w2, *others),
        arguments.contiguous(call.layer_scale),
        arguments.by_token(call.token_scale, call.token_scales),
        arguments.by_token(call.residual, call.residuals),
        arguments.passed(rows),
    )
    for config, programs in plan.launches:
        with take_counters(device, 2 + (len(config.tasks) - 1) * plan.bound) as counters:
            triton_launch.launch(
                *(moe_ffn_fwd_kernel, device, programs, tile, *tensors),
                *(counters, plan.bound, plan.band, call.norm_eps, call.sub_norm_eps, config),
            )
    return y, pre


class _Backward(NamedTuple):
    """The launches of a backward, without their tensors."""

    rows: RowsPlan
    rows_launches: tuple[tuple[Config, int], ...]  # configuration and number of programs
    sub_norm_lines: int  # partial sums of the sub-norm
    band: int
    weights: WeightsPlan
    weights_config: Config
    work: Work
    weights_programs: int


@functools.lru_cache(_PLANS)
def _plan_backward(
    problem: Problem,
    needed: Needed,
    precision: str,
    recomputes: bool,
    keeps_dh2: bool,
    rows_tile: Tile,
    rows_workers: int,
    weights_tile: Tile,
    weights_workers: int,
    overheads: Overheads,
    separate: bool,
    rows_descriptors: bool,
    weights_descriptors: bool,
) -> _Backward:
    tile = rows_tile
    config = arguments.config_of(problem, precision, tile, rows_descriptors)
    block_r = max(1, min(tile.block_t, _HELD // max(config.block_d, config.block_o)))
    row_steps = max(1, min(tile.block_t, _ROWS_PER_TASK) // block_r)
    config, sub_tasks = _with_sub_norm(config, tile, _HELD)
    rows = plan_rows(
        *(problem, needed),
        block_t=tile.block_t,
        block_f=config.block_f,
        block_n=tile.block_n,
        row_tasks=-(-tile.block_t // (block_r * row_steps)),
        keeps_normed=problem.norm != "none" and _reads_normed(problem, needed, recomputes),
        keeps_dh2=keeps_dh2,
        dpre_lines=sum(sub_tasks) or 1,
    )
    first = rows.tasks[1]
    if sub_tasks and recomputes:
        first *= 2  # tasks that recompute the pre-activation
    tasks = (rows.tasks[0], first, *sub_tasks, *rows.tasks[2:])
    depths = (*rows.depths[:2], *(None for _ in sub_tasks), *rows.depths[2:])
    band = band_of(
        *(rows.bound, tasks, rows_workers, depths),
        step=config.block_k,
        rows_cost=arguments.ROWS_COST,
        overheads=overheads[3:4] if problem.linear else overheads[2:4],
    )
    config = config._replace(block_r=block_r, row_steps=row_steps)

    tile = weights_tile
    weights = plan_weights(
        *(problem, needed, rows),
        block_t=tile.block_t,
        block_n=tile.block_n,
        workers=weights_workers,
    )
    of_bias = weights.sum_blocks[1] if weights.scratch[2] is not None else 0
    work = Work(
        w1_tiles=weights.w1_tiles,
        w2_tiles=weights.w2_tiles,
        whole=weights.whole,
        workers=weights.workers,
        **needed.lists,
        sum_blocks=weights.sum_blocks + weights.sub_norm_blocks * problem.sub_norm,
        dpre_rows=sum(sub_tasks) or 1,
        dbranch_rows=rows.tasks[0],
        norm_rows=rows.tasks[3],
        rows_block_t=rows_tile.block_t,
        scale_signals=sum(weights.w2_tiles) + of_bias,
        scale_rows=weights.scale_lines,
    )
    return _Backward(
        rows=rows,
        rows_launches=_launches(config, tasks, separate, rows.bound, rows_workers),
        sub_norm_lines=rows.bound * sum(sub_tasks),
        band=band,
        weights=weights,
        weights_config=arguments.config_of(problem, precision, tile, weights_descriptors)._replace(
            overhead=overheads.weights
        ),
        work=work,
        weights_programs=min(weights_workers, weights.tickets),
    )


def _reads_normed(problem: Problem, needed: Needed, recomputes: bool) -> bool:
    """Whether the backward multiplies with norm(x)."""
    if problem.linear:
        return needed.wants("w2") or needed.layer_scale
    return needed.wants("w1") or recomputes


def backward(dy: Tensor, pre: Tensor, call: Call, needs: Sequence[bool]) -> list[Tensor]:
    """The gradients flagged in ``needs``, in the order of the schema; the others are empty.

    The launch of the rows computes dx and the operands of all sums over tokens (backward_rows.py),
    that of the weights the gradients that are sums over tokens (backward_weights.py).
    """
    gradients = Gradients.empty(call, needs)
    if call.tokens:
        _launch(dy.contiguous(), pre if pre.numel() else None, call, gradients)
    return gradients.result(call)


def _launch(dy: Tensor, pre: Tensor | None, call: Call, gradients: Gradients) -> None:
    x, dtype, needed = call.x, call.w2[0].dtype, gradients.needed
    by_token = arguments.by_token(x, call.streams)
    token_scale = arguments.by_token(call.token_scale, call.token_scales)
    device, rows, row = x.device, rows_of(call), tiles.choose(x.device, dtype)
    recomputes = pre is None and len(call.w1) > 0
    tile = row.recompute if recomputes else row.rows
    scaled = call.layer_scale is not None or token_scale is not None
    w1, w2, b1, b2, *norms = map(arguments.pointers, call[1:9])
    assert w2 is not None
    plan = _plan_backward(
        *(Problem.of(call, rows), needed, arguments.precision()),
        *(recomputes, scaled or dy.dtype != dtype),
        *(tile, arguments.workers_on(device, tile)),
        *(row.weights, arguments.workers_on(device, row.weights)),
        *(tiles.overheads(device, dtype), tiles.are_separate(device, dtype, call.tokens)),
        *(arguments.uses_descriptors(each, w1 or (), w2) for each in (tile, row.weights)),
    )
    made, bound, passed = plan.rows.allocate(call), plan.rows.bound, arguments.passed(rows)
    layer_scale = arguments.contiguous(call.layer_scale)
    dhidden, again, sum_sub_norm = _sub_norm_scratch(call, needed, plan, recomputes)
    tensors = (
        *(dy, by_token, pre, *made[:6], dhidden, again, *made[6:], sum_sub_norm),
        *(gradients.x if needed.x else None, w1, w2, b1, *norms),
        *(layer_scale, token_scale, passed),
    )
    for config, programs in plan.rows_launches:
        with take_counters(device, 2 + (len(config.tasks) - 1) * bound) as counters:
            triton_launch.launch(
                *(moe_ffn_bwd_rows_kernel, device, programs, tile, *tensors),
                *(counters, bound, plan.band, call.norm_eps, call.sub_norm_eps, config),
            )
    if not needed.sums:
        return
    scratch = plan.weights.allocate(call)
    # An absent tensor is replaced by one of the same dtype, which is not read.
    partial = x.new_empty(1, dtype=torch.float32) if scratch.partial is None else scratch.partial
    given = made.dbranch if made.dbranch is not None else made.dh2
    dbranch = dy if given is None else given
    dpre = dbranch if made.dpre is None else made.dpre
    normed = by_token if call.norm == "none" else dpre if made.normed is None else made.normed
    hidden = dpre if made.hidden is None else made.hidden
    sums = (made.sum_dpre, made.sum_dbranch, made.sum_norm, sum_sub_norm)
    with take_counters(device, 3 + plan.weights.workers) as counters:
        triton_launch.launch(
            *(moe_ffn_bwd_weights_kernel, device, plan.weights_programs, row.weights),
            *(dpre, normed, dbranch, hidden if call.w1 else normed),
            *(partial if tensor is None else tensor for tensor in sums),
            *(partial, scratch.sum_scale, scratch.sum_bias),
            *(tuple(gradients.lists[name]) or None for name in LISTS),
            *(gradients.scale, w2, b2, layer_scale, passed, counters),
            *(call.norm == "none", given is None, plan.weights_config, plan.work),
        )


def _sub_norm_scratch(
    call: Call, needed: Needed, plan: _Backward, recomputes: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dh2 W2 [T, max F], the recomputed pre-activation [T, P] and the sums; None if not needed."""
    if not call.sub_norm_weight:
        return None, None, None
    x, config = call.x, plan.rows_launches[0][0]
    dhidden = x.new_empty((call.tokens, config.max_hidden), dtype=call.w1[0].dtype)
    again = dhidden.new_empty((call.tokens, config.max_pre)) if recomputes else None
    sums = None
    if needed.wants("sub_norm_weight", "sub_norm_bias"):
        shape = (plan.sub_norm_lines, 2 * config.max_hidden)
        sums = x.new_empty(shape, dtype=torch.float32)
    return dhidden, again, sums
