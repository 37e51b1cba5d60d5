"""The backward of moe_ffn by rows, in one launch: everything but the gradients of w1 and w2.

A row tile passes through four phases, in the order of
:class:`vlmo.kernels.moe_ffn.schedule.Banded`:

0. dbranch = token_scale * dy, dh2 = layer_scale * dbranch and norm(x), to grouped scratch.
1. dpre = act'(pre) * (dh2 W2), and the recomputed hidden activations. pre is the saved
   pre-activation, or norm(x) W1^T + b1, recomputed in the same task.
2. dnormed = dpre W1; without a norm this is dx.
3. dx through the norm.

moe_linear has no phase 1: dnormed = dh2 W2.

With a sub-norm, phase 1 only multiplies: it stores dh2 W2, and pre if that is recomputed. A phase
of whole rows follows, which computes dpre through the sub-norm and the activation, and the
sub-norm of the hidden activations for the gradient of w2.

For the gradients of biases, norm parameters and layer scale, each task writes one row of partial
sums over tokens; the kernel of the weights reduces these in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..._backends.triton_device import term
from .descriptors import operands_nn, operands_nt
from .device import (
    column_sums,
    count_tiles,
    find_tile,
    gate_and_value,
    gate_with_slope,
    inside_tile,
    leave,
    locate,
    normalise,
    of_stream,
    prefetch_tile,
    quarters,
    select,
    signal,
    sub_normed,
    tokens_of,
    undo_unit_rows,
    unit_rows,
    wait,
    width_of,
)
from .products import hidden_gradient, operand_rows, preactivation, product_nn

# The pre-activation of a row or column outside the expert: every activation and slope is 0 there,
# so that nothing is added to the sums over a tile.
OUTSIDE = tl.constexpr(-30000.0)


@triton.jit(do_not_specialize=["bound", "band"])
def moe_ffn_bwd_rows_kernel(
    DY,  # [T, O]
    X,  # [T, D]; with streams E pointers, like TOKEN_SCALE
    PRE,  # [T, P] grouped, P = max F or, gated, max 2 F; None: recomputed
    # Scratch in grouped order, None if not needed
    DBRANCH,  # [T, O]
    DH2,  # [T, O]; None if it is dy
    NORMED,  # [T, D]
    HIDDEN,  # [T, max F]
    DPRE,  # [T, P]; None in moe_linear
    DNORMED,  # [T, D]
    DHIDDEN,  # [T, max F]; only with a sub-norm
    AGAIN,  # [T, P], pre if it is recomputed; only with a sub-norm
    # Partial sums, one row per task, None if not needed
    SUM_DBRANCH,  # [.., O]
    SUM_DPRE,  # [.., P]
    SUM_NORM,  # [.., 2 D]: for the norm's weight, then its bias
    SUM_SUB_NORM,  # [.., 2 max F]
    DX,  # [T, D]
    W1,  # E pointers, like all tuples in capitals
    W2,
    B1,
    NORM_WEIGHT,
    NORM_BIAS,
    SUB_NORM_WEIGHT,
    SUB_NORM_BIAS,
    LAYER_SCALE,
    TOKEN_SCALE,
    rows,
    COUNTERS,  # [2 + phases * bound on row tiles]: ticket, finished programs, phases but the last
    bound,
    band,
    norm_eps,
    sub_norm_eps,
    C: tl.constexpr,
):
    tiles = count_tiles(rows, C)
    LAST: tl.constexpr = len(C.tasks) - 1
    MULTIPLY: tl.constexpr = LAST - 1
    total = 0
    for p in tl.static_range(len(C.tasks)):
        total += tiles * C.tasks[p]
    prepared = COUNTERS + 2
    differentiated = prepared + bound
    multiplied = differentiated + bound
    projected = multiplied + bound  # only with a sub-norm
    DESCRIBED: tl.constexpr = C.descriptors
    again_operands = (
        operands_nt(NORMED, "dim", W1, "pre", rows, C)
        if DESCRIBED and C.tasks[1] > 0 and PRE is None and NORMED is not None
        else ()
    )
    dhidden_operands = (
        operands_nn(DH2, "out", W2, "out", C.block_f, rows, C)
        if DESCRIBED and C.tasks[1] > 0 and DH2 is not None
        else ()
    )
    # What the phase before the last multiplies, and the phase that computes it.
    BEFORE: tl.constexpr = 0 if C.linear else MULTIPLY - 1
    BY_TOKEN: tl.constexpr = C.linear and DH2 is None
    if C.linear:
        MULTIPLIED = DY if DH2 is None else DH2
        WEIGHT = W2
    else:
        MULTIPLIED = DPRE
        WEIGHT = W1
    KIND: tl.constexpr = "out" if C.linear else "pre"
    dnormed_operands = (
        operands_nn(MULTIPLIED, KIND, WEIGHT, KIND, C.block_n, rows, C)
        if DESCRIBED and C.tasks[MULTIPLY] > 0 and not BY_TOKEN
        else ()
    )

    ticket = tl.atomic_add(COUNTERS, 1, sem="relaxed")
    while ticket < total:
        phase, tile, part = locate(ticket, tiles, band, C)
        expert, start, begin, end = find_tile(rows, tile, C)
        if phase == 0:
            if C.tasks[0] > 0:
                prepare(
                    *(DY, X, DBRANCH, DH2, NORMED, SUM_DBRANCH),
                    *(NORM_WEIGHT, NORM_BIAS, LAYER_SCALE, TOKEN_SCALE),
                    *(rows, tile, part, expert, start, begin, end, norm_eps, C),
                )
                signal(prepared + tile)
        elif phase == 1:
            if C.tasks[1] > 0:
                block = part // 2 if AGAIN is not None else part
                inside = block * C.block_f < width_of(expert, C)
                if C.sub_norm:
                    if inside:
                        first = block * C.block_f
                        if AGAIN is not None and part % 2 == 1:
                            recompute(
                                *(X if NORMED is None else NORMED, AGAIN, W1, B1, prepared + tile),
                                *(again_operands, rows, first, expert, start, begin, end),
                                *(NORMED is None, C),
                            )
                        else:
                            project(
                                *(DY if DH2 is None else DH2, DHIDDEN, W2, prepared + tile),
                                *(dhidden_operands, rows, first, expert, start, begin, end),
                                *(DH2 is None, C),
                            )
                elif inside:
                    differentiate(
                        *(DY if DH2 is None else DH2, X if NORMED is None else NORMED, PRE),
                        *(HIDDEN, DPRE, SUM_DPRE, W1, W2, B1, prepared + tile),
                        *(again_operands, dhidden_operands),
                        *(rows, tile, part, expert, start, begin, end),
                        *(DH2 is None, NORMED is None, C),
                    )
                signal((projected if C.sub_norm else differentiated) + tile)
        elif phase < MULTIPLY:
            if C.sub_norm and C.tasks[2] > 0:
                undo_sub_norm(
                    *(PRE if AGAIN is None else AGAIN, DHIDDEN, HIDDEN, DPRE),
                    *(SUM_DPRE, SUM_SUB_NORM, SUB_NORM_WEIGHT, SUB_NORM_BIAS),
                    *(projected + tile, tile, part, expert, start, end, sub_norm_eps, C),
                )
                signal(differentiated + tile)
        elif phase == MULTIPLY:
            if C.tasks[MULTIPLY] > 0:
                if C.tasks[BEFORE] > 0:
                    wait((prepared if C.linear else differentiated) + tile, C.tasks[BEFORE])
                multiply(
                    *(MULTIPLIED, DNORMED, DX, WEIGHT, dnormed_operands),
                    *(rows, part, expert, start, begin, end, BY_TOKEN, C),
                )
                signal(multiplied + tile)
        else:
            if C.tasks[LAST] > 0:
                if C.tasks[MULTIPLY] > 0:
                    wait(multiplied + tile, C.tasks[MULTIPLY])
                undo_norm(
                    *(X, DNORMED, DX, SUM_NORM, NORM_WEIGHT),
                    *(rows, tile, part, expert, start, begin, end, norm_eps, C),
                )
        # Not earlier: a ticket taken during a task would wait, and so would its dependents.
        ticket = tl.atomic_add(COUNTERS, 1, sem="relaxed")
    leave(COUNTERS, 2 + LAST * bound)


@triton.jit
def prepare(
    DY,
    X,
    DBRANCH,
    DH2,
    NORMED,
    SUM_DBRANCH,
    NORM_WEIGHT,
    NORM_BIAS,
    LAYER_SCALE,
    TOKEN_SCALE,
    rows,
    tile,
    part,
    expert,
    start,
    begin,
    end,
    norm_eps,
    C: tl.constexpr,
):
    """Phase 0: block_r * row_steps rows."""
    BLOCK_O: tl.constexpr = C.block_o
    columns = tl.arange(0, BLOCK_O)
    within = columns < C.out
    BLOCK_R: tl.constexpr = C.block_r
    total = tl.zeros((BLOCK_R, BLOCK_O), tl.float32)
    for step in range(C.row_steps):
        grouped = start + (part * C.row_steps + step) * C.block_r + tl.arange(0, C.block_r)
        token = tokens_of(rows, grouped, expert, begin, end, C)
        inside = (grouped[:, None] < end) & within[None, :]
        at = grouped[:, None].to(tl.int64) * C.out + columns[None, :]

        dy = tl.load(DY + token[:, None] * C.out + columns[None, :], mask=inside, other=0.0)
        dbranch = dy.to(tl.float32)
        if TOKEN_SCALE is not None:
            scales = of_stream(TOKEN_SCALE, expert, begin, 1, C)
            dbranch *= tl.load(scales + token).to(tl.float32)[:, None]
        if SUM_DBRANCH is not None:
            total += dbranch
        if DBRANCH is not None:
            tl.store(DBRANCH + at, dbranch.to(DBRANCH.dtype.element_ty), mask=inside)
        if DH2 is not None:
            if LAYER_SCALE is not None:
                scale = tl.load(LAYER_SCALE + columns, mask=within, other=0.0)
                dbranch *= scale.to(tl.float32)[None, :]
            tl.store(DH2 + at, dbranch.to(DH2.dtype.element_ty), mask=inside)
        if NORMED is not None:
            x = of_stream(X, expert, begin, C.dim, C)
            normalise(
                *(x, NORMED, NORM_WEIGHT, NORM_BIAS),
                *(token, grouped, end, expert, norm_eps, C),
            )
    if SUM_DBRANCH is not None:
        row = (tile * C.tasks[0] + part).to(tl.int64)
        tl.store(SUM_DBRANCH + row * C.out + columns, tl.sum(total, 0), mask=within)


@triton.jit
def differentiate(
    DH2,
    NORMED,
    PRE,
    HIDDEN,
    DPRE,
    SUM_DPRE,
    W1,
    W2,
    B1,
    prepared,
    again_operands,
    dhidden_operands,
    rows,
    tile,
    part,
    expert,
    start,
    begin,
    end,
    DH2_BY_TOKEN: tl.constexpr,
    NORMED_BY_TOKEN: tl.constexpr,
    C: tl.constexpr,
):
    """Phase 1: block_t rows, block_f hidden columns."""
    width = width_of(expert, C)
    first = part * C.block_f
    grouped = start + tl.arange(0, C.block_t)
    if PRE is not None:
        in_order = operand_rows(rows, start, expert, begin, end, False, C)
        pre_of_rows = PRE + in_order * C.max_pre
        prefetch_tile(pre_of_rows, first, width, C.block_f)
        if C.gated:
            prefetch_tile(pre_of_rows + width, first, width, C.block_f)
        if C.tasks[0] > 0:
            wait(prepared, C.tasks[0])
    else:
        again = preactivation(
            *(again_operands, NORMED, W1, B1, prepared),
            *(rows, first, expert, start, begin, end, NORMED_BY_TOKEN, C),
        )
        # Rounded here to free registers for the product that follows.
        again = quarters(again.to(DPRE.dtype.element_ty))
    dhidden = quarters(
        hidden_gradient(
            *(dhidden_operands, DH2, W2),
            *(rows, first, expert, start, begin, end, DH2_BY_TOKEN, C),
        )
    )
    QUARTER: tl.constexpr = C.block_f // 4
    local = tl.arange(0, C.block_t)[:, None]
    pre_base = start.to(tl.int64) * C.max_pre
    hidden_base = start.to(tl.int64) * C.max_hidden
    pre_rows = local * C.max_pre
    for i in tl.static_range(4):
        columns = first + i * QUARTER + tl.arange(0, QUARTER)
        inside = inside_tile(grouped, end, columns, width, C)
        if PRE is None:
            h, value = gate_and_value(again[i], C)
            h = tl.where(inside, h, OUTSIDE)
        else:
            pre = PRE + pre_base + (pre_rows + columns[None, :])
            h = tl.load(pre, mask=inside, other=OUTSIDE)
            value = h
            if C.gated:
                value = tl.load(pre + width, mask=inside, other=OUTSIDE)

        dh = dhidden[i]
        hidden, slope = gate_with_slope(h.to(tl.float32), C)
        sums = SUM_DPRE
        if SUM_DPRE is not None:
            sums = SUM_DPRE + tile.to(tl.int64) * C.max_pre + columns
        at = DPRE + pre_base + (pre_rows + columns[None, :])
        if C.gated:
            dvalue = term(dh, hidden)
            dh *= value.to(tl.float32)
            hidden *= value.to(tl.float32)
            tl.store(at + width, dvalue.to(DPRE.dtype.element_ty), mask=inside)
            if SUM_DPRE is not None:
                tl.store(sums + width, column_sums(dvalue, C), mask=columns < width)
        dpre = term(dh, slope)
        tl.store(at, dpre.to(DPRE.dtype.element_ty), mask=inside)
        if SUM_DPRE is not None:
            tl.store(sums, column_sums(dpre, C), mask=columns < width)
        if HIDDEN is not None:
            out = HIDDEN + hidden_base + (local * C.max_hidden + columns[None, :])
            tl.store(out, hidden.to(HIDDEN.dtype.element_ty), mask=inside)


@triton.jit
def recompute(
    NORMED,
    AGAIN,
    W1,
    B1,
    prepared,
    operands,
    rows,
    first,
    expert,
    start,
    begin,
    end,
    BY_TOKEN: tl.constexpr,
    C: tl.constexpr,
):
    """A task of phase 1 with a sub-norm: block_t rows, block_f hidden columns of pre."""
    width = width_of(expert, C)
    grouped = start + tl.arange(0, C.block_t)
    again = quarters(
        preactivation(
            *(operands, NORMED, W1, B1, prepared),
            *(rows, first, expert, start, begin, end, BY_TOKEN, C),
        )
    )
    QUARTER: tl.constexpr = C.block_f // 4
    local = tl.arange(0, C.block_t)[:, None]
    for i in tl.static_range(4):
        columns = first + i * QUARTER + tl.arange(0, QUARTER)
        inside = inside_tile(grouped, end, columns, width, C)
        at = AGAIN + start.to(tl.int64) * C.max_pre + (local * C.max_pre + columns[None, :])
        h, value = gate_and_value(again[i], C)
        tl.store(at, h.to(AGAIN.dtype.element_ty), mask=inside)
        if C.gated:
            tl.store(at + width, value.to(AGAIN.dtype.element_ty), mask=inside)


@triton.jit
def project(
    DH2,
    DHIDDEN,
    W2,
    prepared,
    operands,
    rows,
    first,
    expert,
    start,
    begin,
    end,
    BY_TOKEN: tl.constexpr,
    C: tl.constexpr,
):
    """A task of phase 1 with a sub-norm: block_t rows, block_f hidden columns of dh2 W2."""
    width = width_of(expert, C)
    grouped = start + tl.arange(0, C.block_t)
    if C.tasks[0] > 0:
        wait(prepared, C.tasks[0])
    dhidden = quarters(
        hidden_gradient(
            *(operands, DH2, W2, rows, first, expert, start, begin, end, BY_TOKEN, C),
        )
    )
    QUARTER: tl.constexpr = C.block_f // 4
    local = tl.arange(0, C.block_t)[:, None]
    for i in tl.static_range(4):
        columns = first + i * QUARTER + tl.arange(0, QUARTER)
        inside = inside_tile(grouped, end, columns, width, C)
        at = DHIDDEN + start.to(tl.int64) * C.max_hidden
        at += local * C.max_hidden + columns[None, :]
        tl.store(at, dhidden[i].to(DHIDDEN.dtype.element_ty), mask=inside)


@triton.jit
def undo_sub_norm(
    PRE,
    DHIDDEN,
    HIDDEN,
    DPRE,
    SUM_DPRE,
    SUM_SUB_NORM,
    SUB_NORM_WEIGHT,
    SUB_NORM_BIAS,
    projected,
    tile,
    part,
    expert,
    start,
    end,
    sub_norm_eps,
    C: tl.constexpr,
):
    """The phase of the sub-norm: sub_r * sub_steps rows."""
    width = width_of(expert, C)
    BLOCK_H: tl.constexpr = C.block_h
    SUB_R: tl.constexpr = C.sub_r
    columns = tl.arange(0, BLOCK_H)
    within = columns < width
    dpre_sums = tl.zeros((SUB_R, BLOCK_H), tl.float32)
    dvalue_sums = tl.zeros((SUB_R, BLOCK_H), tl.float32)
    dweight = tl.zeros((SUB_R, BLOCK_H), tl.float32)
    dbias = tl.zeros((SUB_R, BLOCK_H), tl.float32)
    if C.tasks[1] > 0:
        wait(projected, C.tasks[1])
    for step in range(C.sub_steps):
        grouped = start + (part * C.sub_steps + step) * C.sub_r + tl.arange(0, C.sub_r)
        inside = (grouped[:, None] < end) & within[None, :]
        row = grouped[:, None].to(tl.int64)
        at_pre = row * C.max_pre + columns[None, :]
        at_hidden = row * C.max_hidden + columns[None, :]

        h = tl.load(PRE + at_pre, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(DHIDDEN + at_hidden, mask=inside, other=0.0).to(tl.float32)
        gated, slope = gate_with_slope(h, C)
        hidden = gated
        if C.gated:
            value = tl.load(PRE + at_pre + width, mask=inside, other=0.0).to(tl.float32)
            hidden = gated * value
        # As the forward stores it.
        hidden = tl.where(inside, hidden.to(DHIDDEN.dtype.element_ty).to(tl.float32), 0.0)
        unit, inverse = unit_rows(hidden, columns, width, sub_norm_eps, "layer")
        normed, weight = sub_normed(
            unit, SUB_NORM_WEIGHT, SUB_NORM_BIAS, expert, columns, within, C
        )
        if HIDDEN is not None:
            tl.store(HIDDEN + at_hidden, normed.to(HIDDEN.dtype.element_ty), mask=inside)
        if SUM_SUB_NORM is not None:
            dweight += term(d, unit)
            dbias += d
        dhidden = undo_unit_rows(term(d, weight), unit, inverse, width, "layer")
        if C.gated:
            dvalue = tl.where(inside, term(dhidden, gated), 0.0)
            dvalue_sums += dvalue
            tl.store(DPRE + at_pre + width, dvalue.to(DPRE.dtype.element_ty), mask=inside)
            dhidden *= value
        dpre = tl.where(inside, term(dhidden, slope), 0.0)
        dpre_sums += dpre
        tl.store(DPRE + at_pre, dpre.to(DPRE.dtype.element_ty), mask=inside)
    line = (tile * C.tasks[2] + part).to(tl.int64)
    if SUM_DPRE is not None:
        sums = SUM_DPRE + line * C.max_pre + columns
        tl.store(sums, tl.sum(dpre_sums, 0), mask=within)
        if C.gated:
            tl.store(sums + width, tl.sum(dvalue_sums, 0), mask=within)
    if SUM_SUB_NORM is not None:
        sums = SUM_SUB_NORM + line * (2 * C.max_hidden) + columns
        tl.store(sums, tl.sum(dweight, 0), mask=within)
        tl.store(sums + C.max_hidden, tl.sum(dbias, 0), mask=within)


@triton.jit
def multiply(
    A,  # dpre [T, P], or in moe_linear dh2 [T, O]
    DNORMED,
    DX,
    W,
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
    """The phase before the last: block_t rows, block_n columns."""
    first = part * C.block_n
    grouped = start + tl.arange(0, C.block_t)
    a_rows = operand_rows(rows, start, expert, begin, end, BY_TOKEN, C)
    STRIDE: tl.constexpr = C.out if C.linear else C.max_pre
    depth = C.out if C.linear else width_of(expert, C) * C.halves
    acc = quarters(
        product_nn(
            *(operands, A, a_rows, W, expert, start, first),
            *(C.dim, depth, STRIDE, C.block_n, C),
        )
    )
    QUARTER: tl.constexpr = C.block_n // 4
    if DNORMED is not None:
        OUT = DNORMED
        row = grouped.to(tl.int64)
    else:
        OUT = DX
        row = tokens_of(rows, grouped, expert, begin, end, C)
    for i in tl.static_range(4):
        columns = first + i * QUARTER + tl.arange(0, QUARTER)
        inside = inside_tile(grouped, end, columns, C.dim, C)
        at = OUT + row[:, None] * C.dim + columns[None, :]
        tl.store(at, acc[i].to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def undo_norm(
    X,
    DNORMED,
    DX,
    SUM_NORM,
    NORM_WEIGHT,
    rows,
    tile,
    part,
    expert,
    start,
    begin,
    end,
    norm_eps,
    C: tl.constexpr,
):
    """The last phase: block_r * row_steps rows."""
    columns = tl.arange(0, C.block_d)
    within = columns < C.dim
    weight = tl.load(select(NORM_WEIGHT, expert, C) + columns, mask=within, other=0.0)
    NORM: tl.constexpr = C.norm
    BLOCK_D: tl.constexpr = C.block_d
    BLOCK_R: tl.constexpr = C.block_r
    dweight = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    dbias = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for step in range(C.row_steps):
        grouped = start + (part * C.row_steps + step) * C.block_r + tl.arange(0, C.block_r)
        token = tokens_of(rows, grouped, expert, begin, end, C)
        inside = (grouped[:, None] < end) & within[None, :]

        at = token[:, None] * C.dim + columns[None, :]
        x_rows = of_stream(X, expert, begin, C.dim, C)
        x = tl.load(x_rows + at, mask=within[None, :], other=0.0)
        unit, inverse = unit_rows(x.to(tl.float32), columns, C.dim, norm_eps, NORM)
        dnormed = DNORMED + grouped[:, None].to(tl.int64) * C.dim + columns[None, :]
        d = tl.load(dnormed, mask=inside, other=0.0).to(tl.float32)
        dweight += term(d, unit)
        dbias += d
        if DX is not None:
            d = term(d, weight.to(tl.float32)[None, :])
            dx = undo_unit_rows(d, unit, inverse, C.dim, NORM)
            tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=inside)
    if SUM_NORM is not None:
        LAST: tl.constexpr = len(C.tasks) - 1
        sums = SUM_NORM + (tile * C.tasks[LAST] + part).to(tl.int64) * (2 * C.dim) + columns
        tl.store(sums, tl.sum(dweight, 0), mask=within)
        tl.store(sums + C.dim, tl.sum(dbias, 0), mask=within)
