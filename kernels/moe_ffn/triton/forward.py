"""The forward of moe_ffn in one launch: norm, first product and activation, second product.

moe_linear is the same without a first layer: its last phase multiplies norm(x), or x by token.

A row tile passes through three phases: 0 normalises rows into scratch, 1 computes tiles of the
hidden activations, 2 computes tiles of y. With a sub-norm, a phase between 1 and 2 normalises rows
of the hidden activations. The kernel is persistent: programs take tickets in the
order of :class:`vlmo.kernels.moe_ffn.schedule.Banded`, and a task waits until the previous phase
has finished the same row tile. A task only waits for tasks with earlier tickets, so the program
with the earliest unfinished ticket never waits, and there is no deadlock for any number of resident
programs.

A launch can also have the tasks of a single phase; then nothing waits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .descriptors import operands_nt
from .device import (
    count_tiles,
    find_tile,
    gate,
    gate_and_value,
    inside_tile,
    leave,
    locate,
    normalise,
    of_stream,
    prefetch_tile,
    quarters,
    signal,
    sub_normalise,
    tokens_of,
    wait,
    width_of,
)
from .products import first_sums, last_sums, operand_rows, preactivation, product_nt


@triton.jit(do_not_specialize=["bound", "band"])
def moe_ffn_fwd_kernel(
    X,  # [T, D]; with streams E pointers, like TOKEN_SCALE and RESIDUAL
    NORMED,  # [T, D] grouped scratch; None without norm
    PRE,  # [T, P] grouped, P = max F or, gated, max 2 F; None if not saved
    HIDDEN,  # [T, max F] grouped scratch; None in moe_linear
    SUB_NORMED,  # [T, max F] grouped scratch; None without a sub-norm
    Y,  # [T, O]
    W1,  # E pointers, like all tuples in capitals
    W2,
    B1,
    B2,
    NORM_WEIGHT,
    NORM_BIAS,
    SUB_NORM_WEIGHT,
    SUB_NORM_BIAS,
    LAYER_SCALE,  # [O]
    TOKEN_SCALE,  # [T]
    RESIDUAL,  # [T, O]
    rows,
    COUNTERS,  # [2 + phases * bound on row tiles]: ticket, finished programs, phases but the last
    bound,
    band,
    norm_eps,
    sub_norm_eps,
    C: tl.constexpr,
):
    LAST: tl.constexpr = len(C.tasks) - 1
    tiles = count_tiles(rows, C)
    total = 0
    for p in tl.static_range(len(C.tasks)):
        total += tiles * C.tasks[p]
    normed_rows = COUNTERS + 2
    hidden_rows = normed_rows + bound
    sub_normed_rows = hidden_rows + bound
    DESCRIBED: tl.constexpr = C.descriptors
    hidden_operands = (
        operands_nt(NORMED, "dim", W1, "pre", rows, C)
        if DESCRIBED and C.tasks[1] > 0 and NORMED is not None
        else ()
    )
    # What the last phase multiplies, and the phase that computes it.
    BY_TOKEN: tl.constexpr = C.linear and NORMED is None
    BEFORE: tl.constexpr = 0 if C.linear else LAST - 1
    if C.linear:
        MULTIPLIED = X if NORMED is None else NORMED
    else:
        MULTIPLIED = HIDDEN if SUB_NORMED is None else SUB_NORMED
    output_operands = (
        operands_nt(MULTIPLIED, "hidden", W2, "out", rows, C)
        if DESCRIBED and C.tasks[LAST] > 0 and not BY_TOKEN
        else ()
    )

    ticket = tl.atomic_add(COUNTERS, 1, sem="relaxed")
    while ticket < total:
        phase, tile, part = locate(ticket, tiles, band, C)
        expert, start, begin, end = find_tile(rows, tile, C)
        if phase == 0:
            if C.tasks[0] > 0:
                norm_rows(
                    *(X, NORMED, NORM_WEIGHT, NORM_BIAS),
                    *(rows, part, expert, start, begin, end, norm_eps, C),
                )
                signal(normed_rows + tile)
        elif phase == 1:
            if C.tasks[1] > 0:
                if part * C.block_f < width_of(expert, C):
                    hidden_tile(
                        *(X if NORMED is None else NORMED, PRE, HIDDEN, W1, B1, normed_rows + tile),
                        *(hidden_operands, rows, part, expert, start, begin, end),
                        *(NORMED is None, C),
                    )
                signal(hidden_rows + tile)
        elif phase < LAST:
            if SUB_NORMED is not None and C.tasks[2] > 0:
                sub_norm_rows(
                    *(HIDDEN, SUB_NORMED, SUB_NORM_WEIGHT, SUB_NORM_BIAS, hidden_rows + tile),
                    *(part, expert, start, end, sub_norm_eps, C),
                )
                signal(sub_normed_rows + tile)
        else:
            if C.tasks[LAST] > 0:
                output_tile(
                    *(MULTIPLIED, Y, W2, B2, LAYER_SCALE, TOKEN_SCALE, RESIDUAL),
                    *(normed_rows + BEFORE * bound + tile, output_operands),
                    *(rows, part, expert, start, begin, end, BEFORE, BY_TOKEN, C),
                )
        # Not earlier: a ticket taken during a task would wait, and so would its dependents.
        ticket = tl.atomic_add(COUNTERS, 1, sem="relaxed")
    leave(COUNTERS, 2 + LAST * bound)


@triton.jit
def norm_rows(
    X,
    NORMED,
    NORM_WEIGHT,
    NORM_BIAS,
    rows,
    part,
    expert,
    start,
    begin,
    end,
    norm_eps,
    C: tl.constexpr,
):
    """Phase 0: block_r rows."""
    grouped = start + part * C.block_r + tl.arange(0, C.block_r)
    token = tokens_of(rows, grouped, expert, begin, end, C)
    x = of_stream(X, expert, begin, C.dim, C)
    normalise(x, NORMED, NORM_WEIGHT, NORM_BIAS, token, grouped, end, expert, norm_eps, C)


@triton.jit
def hidden_tile(
    NORMED,
    PRE,
    HIDDEN,
    W1,
    B1,
    normed_rows,
    operands,
    rows,
    part,
    expert,
    start,
    begin,
    end,
    BY_TOKEN: tl.constexpr,
    C: tl.constexpr,
):
    """Phase 1: block_t rows, block_f hidden columns."""
    width = width_of(expert, C)
    first = part * C.block_f
    grouped = start + tl.arange(0, C.block_t)
    acc = quarters(
        preactivation(
            *(operands, NORMED, W1, B1, normed_rows),
            *(rows, first, expert, start, begin, end, BY_TOKEN, C),
        )
    )

    QUARTER: tl.constexpr = C.block_f // 4
    local = tl.arange(0, C.block_t)[:, None]
    pre_base = start.to(tl.int64) * C.max_pre
    hidden_base = start.to(tl.int64) * C.max_hidden
    for i in tl.static_range(4):
        columns = first + i * QUARTER + tl.arange(0, QUARTER)
        inside = inside_tile(grouped, end, columns, width, C)
        h, value = gate_and_value(acc[i], C)
        if PRE is not None:
            pre = PRE + pre_base + local * C.max_pre + columns[None, :]
            tl.store(pre, h.to(PRE.dtype.element_ty), mask=inside)
            if C.gated:
                tl.store(pre + width, value.to(PRE.dtype.element_ty), mask=inside)
        h = gate(h, C)
        if C.gated:
            h *= value
        hidden = HIDDEN + hidden_base + local * C.max_hidden + columns[None, :]
        tl.store(hidden, h.to(HIDDEN.dtype.element_ty), mask=inside)


@triton.jit
def sub_norm_rows(
    HIDDEN,
    SUB_NORMED,
    SUB_NORM_WEIGHT,
    SUB_NORM_BIAS,
    hidden_rows,
    part,
    expert,
    start,
    end,
    sub_norm_eps,
    C: tl.constexpr,
):
    """The phase of the sub-norm: sub_r * sub_steps rows."""
    BLOCK_H: tl.constexpr = C.block_h
    if C.tasks[1] > 0:
        wait(hidden_rows, C.tasks[1])
    for step in range(C.sub_steps):
        grouped = start + (part * C.sub_steps + step) * C.sub_r + tl.arange(0, C.sub_r)
        sub_normalise(
            *(HIDDEN, SUB_NORMED, SUB_NORM_WEIGHT, SUB_NORM_BIAS),
            *(grouped, end, expert, sub_norm_eps, BLOCK_H, C),
        )


@triton.jit
def output_tile(
    HIDDEN,
    Y,
    W2,
    B2,
    LAYER_SCALE,
    TOKEN_SCALE,
    RESIDUAL,
    hidden_rows,
    operands,
    rows,
    part,
    expert,
    start,
    begin,
    end,
    BEFORE: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    C: tl.constexpr,
):
    """The last phase: block_t rows, block_n columns of y."""
    width = width_of(expert, C)
    first = part * C.block_n
    grouped = start + tl.arange(0, C.block_t)
    h_rows = operand_rows(rows, start, expert, begin, end, BY_TOKEN, C)
    w_rows = tl.minimum(first + tl.arange(0, C.block_n), C.out - 1)
    acc = first_sums(B2, expert, w_rows, C)
    token = tokens_of(rows, grouped, expert, begin, end, C)
    if RESIDUAL is not None:
        residual_rows = of_stream(RESIDUAL, expert, begin, C.out, C)
        prefetch_tile(residual_rows + token * C.out, first, C.out, C.block_n)
    if C.tasks[BEFORE] > 0:
        wait(hidden_rows, C.tasks[BEFORE])
    acc = product_nt(
        *(operands, HIDDEN, h_rows, W2, w_rows, acc, expert, start, first),
        *(width, C.max_hidden, width, C.even_hidden, C),
    )
    acc = quarters(last_sums(acc, B2, expert, w_rows, C))

    QUARTER: tl.constexpr = C.block_n // 4
    token = tokens_of(rows, grouped, expert, begin, end, C)
    out = token[:, None] * C.out
    if TOKEN_SCALE is not None:
        token_scale = tl.load(of_stream(TOKEN_SCALE, expert, begin, 1, C) + token).to(tl.float32)
    for i in tl.static_range(4):
        columns = first + i * QUARTER + tl.arange(0, QUARTER)
        inside = inside_tile(grouped, end, columns, C.out, C)
        y = acc[i]
        if LAYER_SCALE is not None:
            scale = tl.load(LAYER_SCALE + columns, mask=columns < C.out, other=0.0)
            y *= scale.to(tl.float32)[None, :]
        if TOKEN_SCALE is not None:
            y *= token_scale[:, None]
        if RESIDUAL is not None:
            residual = tl.load(residual_rows + out + columns[None, :], mask=inside, other=0.0)
            if Y.dtype.element_ty == tl.float64:
                y = y.to(tl.float64) + residual
            else:
                y += residual.to(tl.float32)
        tl.store(Y + out + columns[None, :], y.to(Y.dtype.element_ty), mask=inside)
