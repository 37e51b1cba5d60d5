"""The passes over the rows between the products of moe_ffn, in Triton.

A program processes the rows of one tile: block_t grouped rows of one expert, in steps of block_r.
In the passes of the norms a program has whole rows, in all others block_n columns. Every row is
read and written once, computed in float32 and rounded once. Scratch is in grouped order; x, dy, the
residual, y and dx are addressed by token. Rows and tiles are described in
:mod:`vlmo.kernels.moe_ffn.triton.device`.

The passes of the backward also write the sums of a tile's rows, one line of SUMS [tiles, P + 4 D]
per tile: of the gradients of b1, b2, layer scale, norm weight and norm bias. In moe_linear, D is
then the larger one of D and O. With a sub-norm, those
of its weight and bias follow, 2 max F more.
:func:`moe_ffn_sums_kernel` adds up the lines in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..._backends.triton_device import term
from ..triton.device import (
    expert_offset,
    find_tile,
    gate,
    gate_with_slope,
    normalise,
    of_stream,
    select,
    select_rows,
    sub_normalise,
    sub_normed,
    sum_rows,
    tokens_of,
    undo_unit_rows,
    unit_rows,
    width_of,
)

LINES = tl.constexpr(64)  # lines of SUMS that are added at a time
LINE_COLUMNS = tl.constexpr(64)


@triton.jit
def block_of_rows(start, step, C: tl.constexpr):
    """The grouped rows of a step."""
    return start + step * C.block_r + tl.arange(0, C.block_r)


@triton.jit
def length_of_line(C: tl.constexpr):
    """Numbers in a line of SUMS."""
    return C.max_pre + 4 * C.widest + (2 * C.max_hidden if C.sub_norm else 0)


@triton.jit
def with_bias(h, B, expert, columns, within, C: tl.constexpr):
    """h + b_e for some columns, or h without biases; float32."""
    h = h.to(tl.float32)
    if B is not None:
        base, at = select_rows(B, expert, columns, C)
        bias = tl.load(base + at, mask=within, other=0.0)
        h += bias.to(tl.float32)[None, :]
    return h


@triton.jit
def moe_ffn_norm_kernel(
    X,  # [T, D]; with streams E pointers, like TOKEN_SCALE and RESIDUAL elsewhere
    NORMED,  # [T, D] grouped
    NORM_WEIGHT,  # E pointers, like all tuples in capitals
    NORM_BIAS,
    rows,
    norm_eps,
    C: tl.constexpr,
):
    """norm_e(x) in grouped order; without a norm, x."""
    expert, start, begin, end = find_tile(rows, tl.program_id(0), C)
    for step in range(C.row_steps):
        grouped = block_of_rows(start, step, C)
        token = tokens_of(rows, grouped, expert, begin, end, C)
        if C.norm != "none":
            x = of_stream(X, expert, begin, C.dim, C)
            normalise(x, NORMED, NORM_WEIGHT, NORM_BIAS, token, grouped, end, expert, norm_eps, C)
        else:
            columns = tl.arange(0, C.block_d)
            inside = (grouped[:, None] < end) & (columns[None, :] < C.dim)
            x_rows = of_stream(X, expert, begin, C.dim, C) + token[:, None] * C.dim
            x = tl.load(x_rows + columns[None, :], mask=inside, other=0.0)
            at = NORMED + grouped[:, None].to(tl.int64) * C.dim + columns[None, :]
            tl.store(at, x.to(NORMED.dtype.element_ty), mask=inside)


@triton.jit
def moe_ffn_activation_kernel(
    H1,  # [T, P] grouped
    ACT,  # [T, max F] grouped; may be H1 unless gated
    B1,
    rows,
    C: tl.constexpr,
):
    """act(h1 + b1)."""
    BLOCKS: tl.constexpr = (C.max_hidden + C.block_n - 1) // C.block_n
    expert, start, _, end = find_tile(rows, tl.program_id(0) // BLOCKS, C)
    width = width_of(expert, C)
    columns = (tl.program_id(0) % BLOCKS) * C.block_n + tl.arange(0, C.block_n)
    within = columns < width
    for step in range(C.row_steps):
        grouped = block_of_rows(start, step, C)
        inside = (grouped[:, None] < end) & within[None, :]
        row = grouped[:, None].to(tl.int64)
        h1 = H1 + row * C.max_pre + columns[None, :]
        h = with_bias(tl.load(h1, mask=inside, other=0.0), B1, expert, columns, within, C)
        act = gate(h, C)
        if C.gated:
            value = tl.load(h1 + width, mask=inside, other=0.0)
            act *= with_bias(value, B1, expert, width + columns, within, C)
        at = ACT + row * C.max_hidden + columns[None, :]
        tl.store(at, act.to(ACT.dtype.element_ty), mask=inside)


@triton.jit
def moe_ffn_branch_kernel(
    H2,  # [T, O] grouped
    Y,  # [T, O]
    B2,
    LAYER_SCALE,  # [O]
    TOKEN_SCALE,  # [T]
    RESIDUAL,  # [T, O]
    rows,
    C: tl.constexpr,
):
    """residual + token_scale * layer_scale * (h2 + b2)."""
    BLOCKS: tl.constexpr = (C.out + C.block_n - 1) // C.block_n
    expert, start, begin, end = find_tile(rows, tl.program_id(0) // BLOCKS, C)
    columns = (tl.program_id(0) % BLOCKS) * C.block_n + tl.arange(0, C.block_n)
    within = columns < C.out
    for step in range(C.row_steps):
        grouped = block_of_rows(start, step, C)
        token = tokens_of(rows, grouped, expert, begin, end, C)
        inside = (grouped[:, None] < end) & within[None, :]
        h2 = H2 + grouped[:, None].to(tl.int64) * C.out + columns[None, :]
        y = with_bias(tl.load(h2, mask=inside, other=0.0), B2, expert, columns, within, C)
        if LAYER_SCALE is not None:
            scale = tl.load(LAYER_SCALE + columns, mask=within, other=0.0)
            y *= scale.to(tl.float32)[None, :]
        if TOKEN_SCALE is not None:
            scales = of_stream(TOKEN_SCALE, expert, begin, 1, C)
            y *= tl.load(scales + token).to(tl.float32)[:, None]
        at = token[:, None] * C.out + columns[None, :]
        if RESIDUAL is not None:
            residual_rows = of_stream(RESIDUAL, expert, begin, C.out, C)
            residual = tl.load(residual_rows + at, mask=inside, other=0.0)
            if Y.dtype.element_ty == tl.float64:
                y = y.to(tl.float64) + residual
            else:
                y += residual.to(tl.float32)
        tl.store(Y + at, y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def moe_ffn_bwd_branch_kernel(
    DY,  # [T, O]
    H2,  # [T, O] grouped; None if the gradient of the layer scale is not needed
    DH2,  # [T, O] grouped
    SUMS,  # None if neither sum is needed
    B2,
    LAYER_SCALE,
    TOKEN_SCALE,
    rows,
    C: tl.constexpr,
):
    """dh2 = layer_scale * token_scale * dy, and the sums for b2 and the layer scale."""
    BLOCKS: tl.constexpr = (C.out + C.block_n - 1) // C.block_n
    tile = tl.program_id(0) // BLOCKS
    expert, start, begin, end = find_tile(rows, tile, C)
    columns = (tl.program_id(0) % BLOCKS) * C.block_n + tl.arange(0, C.block_n)
    within = columns < C.out
    BLOCK_R: tl.constexpr = C.block_r
    BLOCK_N: tl.constexpr = C.block_n
    db2 = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    dscale = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for step in range(C.row_steps):
        grouped = block_of_rows(start, step, C)
        token = tokens_of(rows, grouped, expert, begin, end, C)
        inside = (grouped[:, None] < end) & within[None, :]
        at = grouped[:, None].to(tl.int64) * C.out + columns[None, :]
        dy = tl.load(DY + token[:, None] * C.out + columns[None, :], mask=inside, other=0.0)
        d = dy.to(tl.float32)
        if TOKEN_SCALE is not None:
            scales = of_stream(TOKEN_SCALE, expert, begin, 1, C)
            d *= tl.load(scales + token).to(tl.float32)[:, None]
        if H2 is not None:
            h2 = tl.load(H2 + at, mask=inside, other=0.0)
            dscale += d * with_bias(h2, B2, expert, columns, within, C)
        if LAYER_SCALE is not None:
            scale = tl.load(LAYER_SCALE + columns, mask=within, other=0.0)
            d *= scale.to(tl.float32)[None, :]
        db2 += d
        tl.store(DH2 + at, d.to(DH2.dtype.element_ty), mask=inside)
    if SUMS is not None:
        line = SUMS + tile.to(tl.int64) * length_of_line(C) + C.max_pre + columns
        tl.store(line, tl.sum(db2, 0), mask=within)
        if H2 is not None:
            tl.store(line + C.widest, tl.sum(dscale, 0), mask=within)


@triton.jit
def moe_ffn_bwd_activation_kernel(
    DACT,  # [T, max F] grouped
    H1,  # [T, P] grouped
    DH1,  # [T, P] grouped; None if it is not needed
    ACT,  # [T, max F] grouped, may be DACT; None if it is not needed
    SUMS,  # None if not needed
    B1,
    rows,
    C: tl.constexpr,
):
    """dh1 = act'(h1 + b1) * dact, act(h1 + b1), and the sums for b1."""
    BLOCKS: tl.constexpr = (C.max_hidden + C.block_n - 1) // C.block_n
    tile = tl.program_id(0) // BLOCKS
    expert, start, _, end = find_tile(rows, tile, C)
    width = width_of(expert, C)
    columns = (tl.program_id(0) % BLOCKS) * C.block_n + tl.arange(0, C.block_n)
    within = columns < width
    BLOCK_R: tl.constexpr = C.block_r
    BLOCK_N: tl.constexpr = C.block_n
    of_gate = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    of_value = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for step in range(C.row_steps):
        grouped = block_of_rows(start, step, C)
        inside = (grouped[:, None] < end) & within[None, :]
        row = grouped[:, None].to(tl.int64)
        of_pre = row * C.max_pre + columns[None, :]
        of_act = row * C.max_hidden + columns[None, :]
        d = tl.load(DACT + of_act, mask=inside, other=0.0).to(tl.float32)
        h = tl.load(H1 + of_pre, mask=inside, other=0.0)
        act, slope = gate_with_slope(with_bias(h, B1, expert, columns, within, C), C)
        if C.gated:
            value = tl.load(H1 + of_pre + width, mask=inside, other=0.0)
            value = with_bias(value, B1, expert, width + columns, within, C)
            dvalue = d * act
            of_value += dvalue
            if DH1 is not None:
                at = DH1 + of_pre + width
                tl.store(at, dvalue.to(DH1.dtype.element_ty), mask=inside)
            d *= value
            act *= value
        d *= slope
        of_gate += d
        if DH1 is not None:
            tl.store(DH1 + of_pre, d.to(DH1.dtype.element_ty), mask=inside)
        if ACT is not None:
            tl.store(ACT + of_act, act.to(ACT.dtype.element_ty), mask=inside)
    if SUMS is not None:
        line = SUMS + tile.to(tl.int64) * length_of_line(C) + columns
        tl.store(line, tl.sum(of_gate, 0), mask=within)
        if C.gated:
            tl.store(line + width, tl.sum(of_value, 0), mask=within)


@triton.jit
def moe_ffn_bwd_norm_kernel(
    X,  # [T, D]
    DNORMED,  # [T, D] grouped
    NORMED,  # [T, D] grouped, may be DNORMED; None if it is not needed
    DX,  # [T, D]; None if not needed
    SUMS,  # None if not needed
    NORM_WEIGHT,
    NORM_BIAS,
    rows,
    norm_eps,
    C: tl.constexpr,
):
    """dx through the norm, norm_e(x), and the sums for the norm; without a norm, only dx."""
    tile = tl.program_id(0)
    expert, start, begin, end = find_tile(rows, tile, C)
    columns = tl.arange(0, C.block_d)
    within = columns < C.dim
    NORM: tl.constexpr = C.norm
    BLOCK_R: tl.constexpr = C.block_r
    BLOCK_D: tl.constexpr = C.block_d
    dweight = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    dbias = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for step in range(C.row_steps):
        grouped = block_of_rows(start, step, C)
        token = tokens_of(rows, grouped, expert, begin, end, C)
        inside = (grouped[:, None] < end) & within[None, :]
        at = grouped[:, None].to(tl.int64) * C.dim + columns[None, :]
        d = tl.load(DNORMED + at, mask=inside, other=0.0).to(tl.float32)
        if C.norm != "none":
            x_rows = of_stream(X, expert, begin, C.dim, C) + token[:, None] * C.dim
            x = tl.load(x_rows + columns[None, :], mask=inside, other=0.0)
            unit, inverse = unit_rows(x.to(tl.float32), columns, C.dim, norm_eps, NORM)
            dweight += term(d, unit)
            dbias += d
            weight = tl.load(select(NORM_WEIGHT, expert, C) + columns, mask=within, other=0.0)
            weight = weight.to(tl.float32)[None, :]
            d = undo_unit_rows(term(d, weight), unit, inverse, C.dim, NORM)
        if DX is not None:
            dx = DX + token[:, None] * C.dim + columns[None, :]
            tl.store(dx, d.to(DX.dtype.element_ty), mask=inside)
        if NORMED is not None:
            normed = with_bias(unit * weight, NORM_BIAS, expert, columns, within, C)
            tl.store(NORMED + at, normed.to(NORMED.dtype.element_ty), mask=inside)
    if SUMS is not None:
        line = SUMS + tile.to(tl.int64) * length_of_line(C) + C.max_pre + 2 * C.widest + columns
        tl.store(line, tl.sum(dweight, 0), mask=within)
        tl.store(line + C.widest, tl.sum(dbias, 0), mask=within)


@triton.jit
def moe_ffn_sub_norm_kernel(
    ACT,  # [T, max F] grouped
    HIDDEN,  # [T, max F] grouped, may be ACT
    SUB_NORM_WEIGHT,
    SUB_NORM_BIAS,
    BLOCK_H: tl.constexpr,  # max F, rounded up to a power of two
    rows,
    sub_norm_eps,
    C: tl.constexpr,
):
    """sub_norm_e(act)."""
    expert, start, _, end = find_tile(rows, tl.program_id(0), C)
    for step in range(C.row_steps):
        sub_normalise(
            *(ACT, HIDDEN, SUB_NORM_WEIGHT, SUB_NORM_BIAS, block_of_rows(start, step, C)),
            *(end, expert, sub_norm_eps, BLOCK_H, C),
        )


@triton.jit
def moe_ffn_bwd_sub_norm_kernel(
    ACT,  # [T, max F] grouped
    DHIDDEN,  # [T, max F] grouped
    HIDDEN,  # [T, max F] grouped, may be ACT; None if it is not needed
    DACT,  # [T, max F] grouped, may be DHIDDEN; None if it is not needed
    SUMS,  # None if not needed
    SUB_NORM_WEIGHT,
    SUB_NORM_BIAS,
    BLOCK_H: tl.constexpr,
    rows,
    sub_norm_eps,
    C: tl.constexpr,
):
    """dact through the sub-norm, sub_norm_e(act), and the sums for the sub-norm."""
    tile = tl.program_id(0)
    expert, start, _, end = find_tile(rows, tile, C)
    width = width_of(expert, C)
    columns = tl.arange(0, BLOCK_H)
    within = columns < width
    BLOCK_R: tl.constexpr = C.block_r
    dweight = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
    dbias = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
    for step in range(C.row_steps):
        grouped = block_of_rows(start, step, C)
        inside = (grouped[:, None] < end) & within[None, :]
        at = grouped[:, None].to(tl.int64) * C.max_hidden + columns[None, :]
        act = tl.load(ACT + at, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(DHIDDEN + at, mask=inside, other=0.0).to(tl.float32)
        unit, inverse = unit_rows(act, columns, width, sub_norm_eps, "layer")
        dweight += term(d, unit)
        dbias += d
        hidden, weight = sub_normed(
            unit, SUB_NORM_WEIGHT, SUB_NORM_BIAS, expert, columns, within, C
        )
        if HIDDEN is not None:
            tl.store(HIDDEN + at, hidden.to(HIDDEN.dtype.element_ty), mask=inside)
        if DACT is not None:
            dact = undo_unit_rows(term(d, weight), unit, inverse, width, "layer")
            tl.store(DACT + at, dact.to(DACT.dtype.element_ty), mask=inside)
    if SUMS is not None:
        line = SUMS + tile.to(tl.int64) * length_of_line(C) + C.max_pre + 4 * C.widest + columns
        tl.store(line, tl.sum(dweight, 0), mask=within)
        tl.store(line + C.max_hidden, tl.sum(dbias, 0), mask=within)


@triton.jit
def moe_ffn_sums_kernel(
    SUMS,
    # The gradients, each None if not needed; those of an expert with a frozen parameter are empty
    DB1,
    DB2,
    DNORM_WEIGHT,
    DNORM_BIAS,
    DSUB_NORM_WEIGHT,
    DSUB_NORM_BIAS,
    DSCALE,  # [O]
    rows,
    NEEDED: tl.constexpr,
    C: tl.constexpr,
):
    """Add up the lines of an expert's tiles, or for the layer scale of all tiles."""
    OF_PRE: tl.constexpr = (C.max_pre + LINE_COLUMNS - 1) // LINE_COLUMNS
    OF_DIM: tl.constexpr = (C.widest + LINE_COLUMNS - 1) // LINE_COLUMNS
    OF_HIDDEN: tl.constexpr = (C.max_hidden + LINE_COLUMNS - 1) // LINE_COLUMNS
    OF_OTHERS: tl.constexpr = OF_PRE + 4 * OF_DIM
    ALL: tl.constexpr = OF_OTHERS + (2 * OF_HIDDEN if C.sub_norm else 0)
    expert = tl.program_id(0) // ALL
    block = tl.program_id(0) % ALL
    kind = tl.where(block < OF_PRE, 0, 1 + (block - OF_PRE) // OF_DIM)
    kind = tl.where(block < OF_OTHERS, kind, 5 + (block - OF_OTHERS) // OF_HIDDEN)
    of_dim = (block - OF_PRE) % OF_DIM
    of_hidden = (block - OF_OTHERS) % OF_HIDDEN
    block = tl.where(kind == 0, block, tl.where(kind < 5, of_dim, of_hidden))
    columns = block * LINE_COLUMNS + tl.arange(0, LINE_COLUMNS)
    # Up to Triton 3.6 a field cannot be passed directly.
    OF_B1: tl.constexpr = NEEDED.b1
    OF_B2: tl.constexpr = NEEDED.b2
    OF_WEIGHT: tl.constexpr = NEEDED.norm_weight
    OF_BIAS: tl.constexpr = NEEDED.norm_bias
    OF_SUB_WEIGHT: tl.constexpr = NEEDED.sub_norm_weight
    OF_SUB_BIAS: tl.constexpr = NEEDED.sub_norm_bias
    if kind == 0:
        if DB1 is not None:
            width = width_of(expert, C) * C.halves
            store_sum(SUMS, DB1, OF_B1, expert, columns, width, rows, C)
    elif kind >= 5:
        source = SUMS + C.max_pre + 4 * C.widest
        width = width_of(expert, C)
        if kind == 5:
            if DSUB_NORM_WEIGHT is not None:
                store_sum(source, DSUB_NORM_WEIGHT, OF_SUB_WEIGHT, expert, columns, width, rows, C)
        else:
            if DSUB_NORM_BIAS is not None:
                source += C.max_hidden
                store_sum(source, DSUB_NORM_BIAS, OF_SUB_BIAS, expert, columns, width, rows, C)
    else:
        source = SUMS + C.max_pre + (kind - 1) * C.widest
        if kind == 1:
            if DB2 is not None:
                store_sum(source, DB2, OF_B2, expert, columns, C.out, rows, C)
        elif kind == 2:
            if DSCALE is not None:
                # Of all tiles, by the programs of expert 0.
                tiles = tl.where(expert == 0, tile_of_expert(len(C.hidden), rows, C), 0)
                within = columns < C.out
                total = sum_rows(source, 0, tiles, length_of_line(C), columns, within, LINES)
                inside = within & (expert == 0)
                tl.store(DSCALE + columns, total.to(DSCALE.dtype.element_ty), mask=inside)
        elif kind == 3:
            if DNORM_WEIGHT is not None:
                store_sum(source, DNORM_WEIGHT, OF_WEIGHT, expert, columns, C.dim, rows, C)
        else:
            if DNORM_BIAS is not None:
                store_sum(source, DNORM_BIAS, OF_BIAS, expert, columns, C.dim, rows, C)


@triton.jit
def tile_of_expert(expert, rows, C: tl.constexpr):
    """First row tile of an expert; the number of tiles for E."""
    tiles = 0
    for e in tl.static_range(len(C.hidden)):
        count = expert_offset(rows, e + 1) - expert_offset(rows, e)
        tiles += tl.where(e < expert, tl.cdiv(count, C.block_t), 0)
    return tiles


@triton.jit
def store_sum(SUMS, OUT, WANTED: tl.constexpr, expert, columns, width, rows, C: tl.constexpr):
    wanted, _ = select_rows(WANTED, expert, columns, C)
    if len(OUT) > len(C.hidden):
        add_up_lines(SUMS, OUT, expert, columns, width, wanted, rows, C)
    elif wanted:
        add_up_lines(SUMS, OUT, expert, columns, width, True, rows, C)


@triton.jit
def add_up_lines(SUMS, OUT, expert, columns, width, wanted, rows, C: tl.constexpr):
    begin, end = tile_of_expert(expert, rows, C), tile_of_expert(expert + 1, rows, C)
    within = columns < width
    total = sum_rows(SUMS, begin, end, length_of_line(C), columns, within, LINES)
    base, at = select_rows(OUT, expert, columns, C)
    out = base + at
    tl.store(out, total.to(out.dtype.element_ty), mask=within & wanted)
