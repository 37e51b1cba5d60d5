"""The backward of moe_ffn by weights, in one launch: every gradient that is a sum over tokens.

    dw1 = dpre^T norm(x)         dw2 = layer_scale * G, G = dbranch^T hidden
    dlayer_scale = row sums of (w2 * G) + b2 * sum of dbranch

so the layer scale needs no third product. moe_linear has dw2 only, with norm(x) for hidden.

Two or three experts give too few tiles of dw1 and dw2 to fill a GPU evenly, so they are divided
(stream-K): whole tiles as long as they fill all programs, then one equal share of the remaining
steps for each program. A share may begin or end inside a tile. The program with a tile's first step
owns the tile and reduces the partial tiles of the other programs in a fixed order, so the result is
bitwise reproducible. Tickets start with the last share, so that an owner only waits for programs
with earlier tickets.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ..._backends.triton_device import dot
from .. import plan
from .descriptors import describe_rows, of_expert
from .device import (
    eighths,
    expert_offset,
    inside_tile,
    leave,
    of_stream,
    select,
    select_rows,
    signal,
    sum_rows,
    tokens_of,
    wait,
    width_of,
)

SUM_COLUMNS = tl.constexpr(plan.SUM_COLUMNS)
SUM_ROWS = tl.constexpr(32)  # that are added at a time


class Work(NamedTuple):
    """The work of a launch, compiled into the kernel. Tuples have one element per expert."""

    w1_tiles: tuple[int, ...]  # 0 if no gradient is needed
    w2_tiles: tuple[int, ...]
    whole: tuple[int, ...]  # tiles that are not divided
    workers: int  # number of shares of the other tiles
    # Gradients to store; of w1 and b1 two for each expert if gate and value are separate
    w1: tuple[bool, ...]
    w2: tuple[bool, ...]
    b1: tuple[bool, ...]
    b2: tuple[bool, ...]
    norm_weight: tuple[bool, ...]
    norm_bias: tuple[bool, ...]
    sub_norm_weight: tuple[bool, ...]
    sub_norm_bias: tuple[bool, ...]
    # Column blocks of each kind of sum, over all experts, and its rows per row tile
    sum_blocks: tuple[int, ...]  # dpre, dbranch, norm weight, norm bias, and those of the sub-norm
    dpre_rows: int
    dbranch_rows: int
    norm_rows: int
    rows_block_t: int  # rows of the row tiles that the sums were computed for
    scale_signals: int  # number of contributions to dlayer_scale
    scale_rows: int  # rows of SUM_SCALE


@triton.jit
def steps_of(rows, e: tl.constexpr, C: tl.constexpr):
    """Steps of a tile of expert ``e``; at least one, so that an empty expert gets zeros."""
    count = expert_offset(rows, e + 1) - expert_offset(rows, e)
    return tl.maximum(tl.cdiv(count, C.block_k), 1)


@triton.jit
def total_steps(rows, C: tl.constexpr, W: tl.constexpr):
    """Number of positions of the whole tiles, and of the divided tiles."""
    whole, rest = 0, 0
    for e in tl.static_range(len(C.hidden)):
        steps = steps_of(rows, e, C)
        whole += W.whole[e] * steps
        rest += (W.w1_tiles[e] + W.w2_tiles[e] - W.whole[e]) * (steps + C.overhead)
    return whole, rest


@triton.jit
def find_work(position, stop, rows, C: tl.constexpr, W: tl.constexpr):
    """The piece of a share that starts at a position: ``Split.pieces`` of the model.

    Returns expert, tile, first and last step of the piece before ``stop`` (equal if it is empty),
    steps of the tile, and the first position after the tile.
    """
    expert, tile, first, steps, behind = -1, 0, 0, 1, 0
    before = 0
    for divided in tl.static_range(2):
        for e in tl.static_range(len(C.hidden)):
            each = steps_of(rows, e, C)
            if divided == 0:
                skipped = 0
                count = W.whole[e]
                length = each
            else:
                skipped = W.whole[e]
                count = W.w1_tiles[e] + W.w2_tiles[e] - W.whole[e]
                length = each + C.overhead
            inside = (expert < 0) & (position < before + count * length)
            number = (position - before) // length
            end = before + (number + 1) * length
            tile = tl.where(inside, skipped + number, tile)
            first = tl.where(inside, tl.maximum(position - (end - each), 0), first)
            steps = tl.where(inside, each, steps)
            behind = tl.where(inside, end, behind)
            expert = tl.where(inside, e, expert)
            before += count * length
    last = tl.maximum(steps - tl.maximum(behind - stop, 0), first)
    return expert, tile, first, last, steps, behind


@triton.jit
def find_range(ticket, rows, C: tl.constexpr, W: tl.constexpr):
    """Positions [first, last) of a ticket, the number of its share or -1, and a share's length."""
    whole_steps, rest = total_steps(rows, C, W)
    share = tl.cdiv(rest, W.workers)
    whole_tiles = 0
    for e in tl.static_range(len(C.hidden)):
        whole_tiles += W.whole[e]
    if ticket < whole_tiles:
        position = 0
        stop = 0
        before = 0
        for e in tl.static_range(len(C.hidden)):
            each = steps_of(rows, e, C)
            inside = (ticket >= 0) & (ticket < W.whole[e])
            position = tl.where(inside, before + ticket * each, position)
            stop = tl.where(inside, before + (ticket + 1) * each, stop)
            before += W.whole[e] * each
            ticket -= W.whole[e]
        number = -1
    else:
        number = W.workers - 1 - (ticket - whole_tiles)
        position = whole_steps + tl.minimum(number * share, rest)
        stop = whole_steps + tl.minimum((number + 1) * share, rest)
    return position, stop, number, share


@triton.jit
def moe_ffn_bwd_weights_kernel(
    DPRE,  # [T, P] grouped; in moe_linear DBRANCH
    NORMED,  # [T, D] grouped, or x by token if NORMED_BY_TOKEN; arbitrary in moe_linear
    DBRANCH,  # [T, O] grouped, or dy by token if DBRANCH_BY_TOKEN
    HIDDEN,  # [T, max F] grouped; in moe_linear NORMED
    SUM_DPRE,  # partial sums from the kernel of the rows; arbitrary if not needed
    SUM_DBRANCH,
    SUM_NORM,
    SUM_SUB_NORM,
    PARTIAL,  # [workers, block_t, block_n] float32 scratch
    SUM_SCALE,  # [scale_rows, O] float32 scratch, None if dlayer_scale is not needed
    SUM_BIAS,  # [E, O] float32 scratch: b2 * sum of dbranch; None if not needed
    DW1,  # E pointers, like all tuples in capitals
    DW2,
    DB1,
    DB2,
    DNORM_WEIGHT,
    DNORM_BIAS,
    DSUB_NORM_WEIGHT,
    DSUB_NORM_BIAS,
    DLAYER_SCALE,
    W2,
    B2,
    LAYER_SCALE,
    rows,
    COUNTERS,  # [3 + workers]: ticket, finished programs, parts of dlayer_scale, partial tiles
    NORMED_BY_TOKEN: tl.constexpr,
    DBRANCH_BY_TOKEN: tl.constexpr,
    C: tl.constexpr,
    W: tl.constexpr,
):
    W1_TILES: tl.constexpr = W.w1_tiles
    B1_WANTED: tl.constexpr = W.b1
    B2_WANTED: tl.constexpr = W.b2
    NORM_WEIGHT_WANTED: tl.constexpr = W.norm_weight
    NORM_BIAS_WANTED: tl.constexpr = W.norm_bias
    SUB_NORM_WEIGHT_WANTED: tl.constexpr = W.sub_norm_weight
    SUB_NORM_BIAS_WANTED: tl.constexpr = W.sub_norm_bias
    partial_ready = COUNTERS + 3
    operands = (
        (
            describe_rows(DPRE, rows, "out" if C.linear else "pre", C.block_k, C.block_t, C),
            describe_rows(NORMED, rows, "dim", C.block_k, C.block_n, C),
            describe_rows(DBRANCH, rows, "out", C.block_k, C.block_t, C),
            describe_rows(HIDDEN, rows, "hidden", C.block_k, C.block_n, C),
        )
        if C.descriptors and not NORMED_BY_TOKEN and not DBRANCH_BY_TOKEN
        else ()
    )
    ranges = W.workers
    for e in tl.static_range(len(C.hidden)):
        ranges += W.whole[e]
    total = ranges
    for k in tl.static_range(len(W.sum_blocks)):
        total += W.sum_blocks[k]

    ticket = tl.atomic_add(COUNTERS, 1, sem="relaxed")
    while ticket < total:
        brought = 0  # contributions to dlayer_scale
        if ticket < ranges:
            position, stop, number, share = find_range(ticket, rows, C, W)
            while position < stop:
                expert, tile, step, last, steps, position = find_work(position, stop, rows, C, W)
                if step < last:
                    is_w1 = tile < select(W1_TILES, expert, C)
                    corner = tile_corner(expert, tile, is_w1, C, W)
                    acc = weight_product(
                        *(DPRE, NORMED, DBRANCH, HIDDEN, operands, rows, expert, is_w1, corner),
                        *(step, last, NORMED_BY_TOKEN, DBRANCH_BY_TOKEN, C),
                    )
                    if step > 0:
                        save_partial(acc, PARTIAL, number, C)
                        signal(partial_ready + number)
                    else:
                        # The remaining steps of the tile start the shares after this one.
                        peers = tl.cdiv(steps - last, tl.maximum(share, 1))
                        for peer in range(number + 1, number + 1 + peers):
                            wait(partial_ready + peer, 1)
                        finish_tile(
                            *(acc, PARTIAL, number, peers, DW1, DW2, SUM_SCALE, W2, LAYER_SCALE),
                            *(expert, is_w1, corner, C, W),
                        )
                        brought += tl.where(is_w1, 0, 1)
        else:
            kind, expert, columns, sums = add_up(
                SUM_DPRE, SUM_DBRANCH, SUM_NORM, SUM_SUB_NORM, ticket - ranges, rows, C, W
            )
            if kind == 0:
                if DB1 is not None:
                    width = width_of(expert, C) * C.halves
                    store_sum(DB1, B1_WANTED, expert, columns, width, sums, C)
            elif kind == 1:
                within = columns < C.out
                if SUM_BIAS is not None:
                    brings = within & (sums != 0.0)
                    b2 = tl.load(select(B2, expert, C) + columns, mask=brings, other=0.0)
                    at = SUM_BIAS + expert * C.out + columns
                    tl.store(at, sums * b2.to(tl.float32), mask=within)
                    brought += 1
                if DB2 is not None:
                    if LAYER_SCALE is not None:
                        scale = tl.load(LAYER_SCALE + columns, mask=within, other=0.0)
                        sums *= scale.to(tl.float32)
                    store_sum(DB2, B2_WANTED, expert, columns, C.out, sums, C)
            elif kind == 2:
                if DNORM_WEIGHT is not None:
                    store_sum(DNORM_WEIGHT, NORM_WEIGHT_WANTED, expert, columns, C.dim, sums, C)
            elif kind == 3:
                if DNORM_BIAS is not None:
                    store_sum(DNORM_BIAS, NORM_BIAS_WANTED, expert, columns, C.dim, sums, C)
            elif kind == 4:
                if DSUB_NORM_WEIGHT is not None:
                    width = width_of(expert, C)
                    store_sum(
                        DSUB_NORM_WEIGHT, SUB_NORM_WEIGHT_WANTED, expert, columns, width, sums, C
                    )
            else:
                if DSUB_NORM_BIAS is not None:
                    width = width_of(expert, C)
                    store_sum(DSUB_NORM_BIAS, SUB_NORM_BIAS_WANTED, expert, columns, width, sums, C)
        if SUM_SCALE is not None:  # noqa: SIM102 (decided when compiled, the next when run)
            if brought > 0:
                finish_scale(SUM_SCALE, SUM_BIAS, DLAYER_SCALE, COUNTERS + 2, brought, C, W)
        ticket = tl.atomic_add(COUNTERS, 1, sem="relaxed")
    leave(COUNTERS, 3 + W.workers)


@triton.jit
def save_partial(acc, PARTIAL, number, C: tl.constexpr):
    parts = eighths(acc)
    for i in tl.static_range(8):
        tl.store(partial_at(PARTIAL, number, i, C), parts[i])


@triton.jit
def partial_at(PARTIAL, number, i: tl.constexpr, C: tl.constexpr):
    """Addresses of eighth ``i`` of the partial tile of share ``number``."""
    EIGHTH: tl.constexpr = C.block_n // 8
    slot = PARTIAL + (number * 8 + i) * (C.block_t * EIGHTH)
    return slot + tl.arange(0, C.block_t)[:, None] * EIGHTH + tl.arange(0, EIGHTH)[None, :]


@triton.jit
def tile_corner(expert, tile, is_w1, C: tl.constexpr, W: tl.constexpr):
    """First row and column of a tile of dw1 [F or 2 F, D] or dw2 [O, F], and the matrix's shape."""
    W1_TILES: tl.constexpr = W.w1_tiles
    hidden = width_of(expert, C)
    tile_rows = tl.where(is_w1, hidden * C.halves, C.out)
    tile_columns = tl.where(is_w1, C.dim, hidden)
    local = tile - tl.where(is_w1, 0, select(W1_TILES, expert, C))
    across = tl.cdiv(tile_columns, C.block_n)
    return (local // across) * C.block_t, (local % across) * C.block_n, tile_rows, tile_columns


@triton.jit
def weight_product(
    DPRE,
    NORMED,
    DBRANCH,
    HIDDEN,
    operands,
    rows,
    expert,
    is_w1,
    corner,
    step,
    last,
    NORMED_BY_TOKEN: tl.constexpr,
    DBRANCH_BY_TOKEN: tl.constexpr,
    C: tl.constexpr,
):
    """dpre^T norm(x), or dbranch^T hidden, over the tokens of steps [step, last)."""
    first_m, first_n, tile_rows, tile_columns = corner
    A = tl.where(is_w1, DPRE, DBRANCH)
    if NORMED_BY_TOKEN and C.streams:
        first_row, _ = rows_of(rows, expert, C)
        B = tl.where(is_w1, of_stream(NORMED, expert, first_row, C.dim, C), HIDDEN)
    else:
        B = tl.where(is_w1, NORMED, HIDDEN)
    stride_a = tl.where(is_w1, C.max_pre, C.out)
    stride_b = tl.where(is_w1, C.dim, C.max_hidden)
    begin, end = rows_of(rows, expert, C)
    m = first_m + tl.arange(0, C.block_t)
    n = first_n + tl.arange(0, C.block_n)

    BLOCK_T: tl.constexpr = C.block_t
    BLOCK_N: tl.constexpr = C.block_n
    k = tl.arange(0, C.block_k)
    a_local = k[None, :] * stride_a + m[:, None]
    b_local = k[:, None] * stride_b + n[None, :]

    acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    if len(operands) > 0:
        dpre, normed, dbranch, hidden = operands
        a_blocks, b_blocks = of_expert(dbranch, expert, C), of_expert(hidden, expert, C)
        if is_w1:
            a_blocks, b_blocks = of_expert(dpre, expert, C), of_expert(normed, expert, C)
        # An expert without rows has a step, and a descriptor has at least one row.
        for number in tl.range(step, tl.where(begin < end, last, step)):
            row = begin + number * C.block_k
            acc = dot(a_blocks.load([row, first_m]).T, b_blocks.load([row, first_n]), acc, C)
        return acc

    # Only the last step of an expert needs masks, which with tensor cores would cost a third of
    # every step. float32 has no tensor cores, and would spill with a second product.
    WHOLE: tl.constexpr = C.rounds
    whole = last
    if WHOLE:
        whole = tl.minimum(last, (end - begin) // C.block_k)
    for number in tl.range(step, whole):
        acc = add_step(
            *(acc, A, B, rows, expert, is_w1, begin, end, begin + number * C.block_k),
            *(m, n, stride_a, stride_b, a_local, b_local, tile_rows, tile_columns),
            *(WHOLE, NORMED_BY_TOKEN, DBRANCH_BY_TOKEN, C),
        )
    if WHOLE:  # noqa: SIM102 (decided when compiled, the next when run)
        if whole < last:
            acc = add_step(
                *(acc, A, B, rows, expert, is_w1, begin, end, begin + whole * C.block_k),
                *(m, n, stride_a, stride_b, a_local, b_local, tile_rows, tile_columns),
                *(False, NORMED_BY_TOKEN, DBRANCH_BY_TOKEN, C),
            )
    return acc


@triton.jit
def rows_of(rows, expert, C: tl.constexpr):
    """The grouped rows [begin, end) of an expert."""
    begin, end = 0, 0
    for e in tl.static_range(len(C.hidden)):
        begin = tl.where(expert == e, expert_offset(rows, e), begin)
        end = tl.where(expert == e, expert_offset(rows, e + 1), end)
    return begin, end


@triton.jit
def add_step(
    acc,
    A,
    B,
    rows,
    expert,
    is_w1,
    begin,
    end,
    first,
    m,
    n,
    stride_a,
    stride_b,
    a_local,
    b_local,
    tile_rows,
    tile_columns,
    WHOLE: tl.constexpr,  # whether all block_k rows from ``first`` on belong to the expert
    NORMED_BY_TOKEN: tl.constexpr,
    DBRANCH_BY_TOKEN: tl.constexpr,
    C: tl.constexpr,
):
    """acc + A^T B over the block_k grouped rows from ``first`` on."""
    k = tl.arange(0, C.block_k)
    in_order = (first + k).to(tl.int64)
    token = in_order
    if NORMED_BY_TOKEN or DBRANCH_BY_TOKEN:
        token = tokens_of(rows, first + k, expert, begin, end, C)
    if DBRANCH_BY_TOKEN:
        a_at = A + (tl.where(is_w1, in_order, token)[None, :] * stride_a + m[:, None])
    else:
        a_at = A + first.to(tl.int64) * stride_a + a_local
    if NORMED_BY_TOKEN:
        normed_rows = token if C.linear else tl.where(is_w1, token, in_order)
        b_at = B + (normed_rows[:, None] * stride_b + n[None, :])
    else:
        b_at = B + first.to(tl.int64) * stride_b + b_local
    # Loaded in the layout of the product, [block_t, block_k] and [block_k, block_n]: for an operand
    # that is transposed after its load, Triton has one buffer instead of num_stages - 1 on sm_80.
    if WHOLE and C.even:
        a = tl.load(a_at)
        b = tl.load(b_at)
    else:
        inside_m, inside_n = m[:, None] < tile_rows, n[None, :] < tile_columns
        if WHOLE:
            a = tl.load(a_at, mask=inside_m, other=0.0)
            b = tl.load(b_at, mask=inside_n, other=0.0)
        elif C.even:
            a = tl.load(a_at, mask=k[None, :] < end - first, other=0.0)
            b = tl.load(b_at, mask=k[:, None] < end - first, other=0.0)
        else:
            a = tl.load(a_at, mask=inside_m & (k[None, :] < end - first), other=0.0)
            b = tl.load(b_at, mask=inside_n & (k[:, None] < end - first), other=0.0)
    return dot(a, b, acc, C)


@triton.jit
def finish_tile(
    acc,
    PARTIAL,
    number,
    peers,
    DW1,
    DW2,
    SUM_SCALE,
    W2,
    LAYER_SCALE,
    expert,
    is_w1,
    corner,
    C: tl.constexpr,
    W: tl.constexpr,
):
    """Add the peers' partial tiles; store a tile of dw1 or dw2, and its part of dlayer_scale."""
    first_m, first_n, tile_rows, tile_columns = corner
    W1_WANTED: tl.constexpr = W.w1
    W2_WANTED: tl.constexpr = W.w2
    BLOCK_T: tl.constexpr = C.block_t
    EIGHTH: tl.constexpr = C.block_n // 8
    parts = eighths(acc)
    m = first_m + tl.arange(0, C.block_t)
    row = m[:, None] * tile_columns
    factor = tl.full((BLOCK_T,), 1.0, tl.float32)
    if LAYER_SCALE is not None:
        scale = tl.load(LAYER_SCALE + m, mask=(m < tile_rows) & (not is_w1), other=1.0)
        factor = scale.to(tl.float32)
    of_scale = tl.zeros((BLOCK_T, EIGHTH), tl.float32)
    for i in tl.static_range(8):
        n = first_n + i * EIGHTH + tl.arange(0, EIGHTH)
        inside = inside_tile(m, tile_rows, n, tile_columns, C)
        at = row + n[None, :]
        part = parts[i]
        for peer in range(number + 1, number + 1 + peers):
            part += tl.load(partial_at(PARTIAL, peer, i, C))
        if is_w1:
            if DW1 is not None:
                if len(DW1) > len(C.hidden):
                    base, own_row = select_rows(DW1, expert, m, C)
                    wanted, _ = select_rows(W1_WANTED, expert, m, C)
                    out = (base + own_row * tile_columns)[:, None] + n[None, :]
                    inside = inside & wanted[:, None]
                    tl.store(out, part.to(out.dtype.element_ty), mask=inside)
                else:
                    out = select(DW1, expert, C) + at
                    wanted = select(W1_WANTED, expert, C)
                    tl.store(out, part.to(out.dtype.element_ty), mask=inside & wanted)
        else:
            if SUM_SCALE is not None:
                w2 = tl.load(select(W2, expert, C) + at, mask=inside, other=0.0)
                # For an expert without rows part is 0, but 0 times a non-finite weight is NaN.
                of_scale += tl.where(part == 0.0, 0.0, part * w2.to(tl.float32))
            if DW2 is not None:
                part *= factor[:, None]
                out = select(DW2, expert, C) + at
                tl.store(
                    out, part.to(out.dtype.element_ty), mask=inside & select(W2_WANTED, expert, C)
                )
    if SUM_SCALE is not None:
        line = first_n // C.block_n
        for e in tl.static_range(len(C.hidden)):
            line += tl.where(e < expert, tl.cdiv(C.hidden[e], C.block_n), 0)
        sums = tl.sum(of_scale, 1)
        tl.store(SUM_SCALE + line * C.out + m, sums, mask=(m < C.out) & (not is_w1))


@triton.jit
def finish_scale(
    SUM_SCALE, SUM_BIAS, DLAYER_SCALE, counter, brought, C: tl.constexpr, W: tl.constexpr
):
    """Count contributions to dlayer_scale; the program with the last one sums all of them."""
    tl.debug_barrier()
    before = tl.atomic_add(counter, brought, sem="acq_rel")
    if before + brought == W.scale_signals:
        for first in range(0, C.out, SUM_COLUMNS):
            columns = first + tl.arange(0, SUM_COLUMNS)
            within = columns < C.out
            total = sum_rows(SUM_SCALE, 0, W.scale_rows, C.out, columns, within, SUM_ROWS)
            if SUM_BIAS is not None:
                total += sum_rows(SUM_BIAS, 0, len(C.hidden), C.out, columns, within, SUM_ROWS)
            out = DLAYER_SCALE + columns
            tl.store(out, total.to(out.dtype.element_ty), mask=within)


@triton.jit
def add_up(
    SUM_DPRE,
    SUM_DBRANCH,
    SUM_NORM,
    SUM_SUB_NORM,
    block,
    rows,
    C: tl.constexpr,
    W: tl.constexpr,
):
    """Reduce a block of columns of partial sums of one kind: kind, expert, columns, sums.

    Kinds: 0 dpre, 1 dbranch, 2 the norm's weight, 3 its bias, 4 the sub-norm's weight, 5 its bias.
    """
    kind = 0
    blocks = W.sum_blocks[0]
    for i in tl.static_range(1, len(W.sum_blocks)):
        behind = (kind == i - 1) & (block >= blocks)
        block -= tl.where(behind, blocks, 0)
        kind = tl.where(behind, i, kind)
        blocks = tl.where(behind, W.sum_blocks[i], blocks)
    each = blocks // len(C.hidden)
    expert = block // each
    columns = (block % each) * SUM_COLUMNS + tl.arange(0, SUM_COLUMNS)

    source = tl.where(kind == 0, SUM_DPRE, tl.where(kind == 1, SUM_DBRANCH, SUM_NORM))
    source += tl.where(kind == 3, C.dim, 0)
    stride = tl.where(kind == 0, C.max_pre, tl.where(kind == 1, C.out, 2 * C.dim))
    per_tile = tl.where(kind == 0, W.dpre_rows, tl.where(kind == 1, W.dbranch_rows, W.norm_rows))
    width = tl.where(kind == 0, width_of(expert, C) * C.halves, C.dim)
    width = tl.where(kind == 1, C.out, width)
    if C.sub_norm:
        source = tl.where(kind >= 4, SUM_SUB_NORM, source)
        source += tl.where(kind == 5, C.max_hidden, 0)
        stride = tl.where(kind >= 4, 2 * C.max_hidden, stride)
        per_tile = tl.where(kind >= 4, W.dpre_rows, per_tile)
        width = tl.where(kind >= 4, width_of(expert, C), width)
    begin, end, tiles = 0, 0, 0
    for e in tl.static_range(len(C.hidden)):
        begin = tl.where(expert == e, tiles, begin)
        tiles += tl.cdiv(expert_offset(rows, e + 1) - expert_offset(rows, e), W.rows_block_t)
        end = tl.where(expert == e, tiles, end)
    within = columns < width
    sums = sum_rows(source, begin * per_tile, end * per_tile, stride, columns, within, SUM_ROWS)
    return kind, expert, columns, sums


@triton.jit
def store_sum(OUT, wanted, expert, columns, width, sums, C: tl.constexpr):
    base, at = select_rows(OUT, expert, columns, C)
    own, _ = select_rows(wanted, expert, columns, C)
    out = base + at
    tl.store(out, sums.to(out.dtype.element_ty), mask=(columns < width) & own)
