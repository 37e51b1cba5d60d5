"""Device functions shared by moe_ffn's Triton kernels: rows, tickets, activations, norms.

Rows have two numberings. A *token* is a row of x and y. *Grouped* rows number the tokens expert by
expert: expert e owns the grouped rows ``[offset_e, offset_e + count_e)``, in token order. A row
tile never spans two experts. Scratch tensors are in grouped order, so that a tile's rows are
contiguous; x, dy, residual, y and dx are addressed by token.

The tests compare :func:`locate` with the model of the tickets in benchmarks/modelled/schedule.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..._backends.triton_device import from_odd, prefetch, reciprocal, term


class Config(NamedTuple):
    """Compile-time constants of a kernel."""

    dim: int  # D
    out: int  # O, the width of y; D but for moe_linear
    widest: int  # the larger one of both
    linear: bool  # whether there is no first layer, so that F is D
    hidden: tuple[int, ...]  # E x F
    max_hidden: int
    norm: str
    activation: str
    gated: bool
    halves: int  # of a pre-activation: 2 (gate and value) or 1
    max_pre: int  # columns of the widest expert's pre-activation: P
    sub_norm: bool  # whether the hidden activations are normalised
    precision: str  # of float32 products: "ieee" or "tf32"
    rounds: bool  # whether activations are rounded to 16 bits
    tasks: tuple[int, ...]  # tasks of a row tile in each phase
    even_dim: bool  # block_k divides D
    even_hidden: bool  # block_k divides every F
    even: bool  # every block divides D, O and every F
    block_t: int  # rows of a tile
    block_n: int  # columns of a tile; of hidden columns there are block_f, half as many if gated
    block_f: int
    block_k: int
    block_d: int  # D, rounded up to a power of two
    block_o: int  # O, likewise
    block_r: int  # rows that a phase without products processes at once
    row_steps: int  # number of iterations in a task of such a phase
    block_h: int  # max F, rounded up to a power of two
    sub_r: int  # rows that the sub-norm processes at once
    sub_steps: int  # number of iterations in a task of the sub-norm
    num_warps: int
    descriptors: bool  # whether grouped operands are read through tensor descriptors
    streams: bool  # whether x, the residual and the token scale are one tensor per expert
    overhead: int  # empty positions before a tile of the weights that is divided


class Passed(NamedTuple):
    """:class:`vlmo.kernels.moe_ffn.rows.Rows` in the form that a kernel takes.

    Integers are encoded by :func:`vlmo.kernels._backends.triton_device.odd`.
    """

    starts: Any  # E x first token of the expert's run in a sequence; None with an index
    lengths: Any  # E x number of tokens of the run
    ends: Any  # E x grouped row after the expert's last
    length: Any  # tokens of a sequence
    tokens: Any  # [T] int32, token of each grouped row; None in the segment form
    offsets: Any  # [E + 1] int32


@triton.jit
def select(values, index, C: tl.constexpr):
    """``values[index]`` for an index known only at run time."""
    chosen = values[0]
    for i in tl.static_range(1, len(C.hidden)):
        chosen = tl.where(index == i, values[i], chosen)
    return chosen


@triton.jit
def select_rows(values, expert, rows, C: tl.constexpr):
    """The values of an expert for some rows of its first layer, and the rows' numbers in them.

    Usually that is one value, and the rows themselves. If gate and value are separate, there are
    2 E values, and the rows from F on are those of the expert's second one, beginning with 0.
    """
    if len(values) > len(C.hidden):
        width = width_of(expert, C)
        of_value = rows >= width
        chosen = tl.where(of_value, values[1], values[0])
        for i in tl.static_range(1, len(C.hidden)):
            other = tl.where(of_value, values[2 * i + 1], values[2 * i])
            chosen = tl.where(expert == i, other, chosen)
        return chosen, tl.where(of_value, rows - width, rows)
    else:
        return select(values, expert, C), rows


@triton.jit
def of_stream(A, expert, begin, stride: tl.constexpr, C: tl.constexpr):
    """A tensor that is addressed by token, where ``begin`` is the expert's first grouped row.

    With streams it is one of E tensors, moved such that its first row has the number ``begin``:
    tokens are then in grouped order.
    """
    if C.streams:
        return select(A, expert, C) + (0 - begin).to(tl.int64) * stride
    else:
        return A


@triton.jit
def width_of(expert, C: tl.constexpr):
    """F of an expert."""
    HIDDEN: tl.constexpr = C.hidden  # up to Triton 3.6 a field cannot be passed directly
    return select(HIDDEN, expert, C)


@triton.jit
def expert_offset(rows, i: tl.constexpr):
    """First grouped row of expert ``i``; T for ``i`` = E."""
    if rows.offsets is None:
        if i == 0:
            return 0
        else:
            return from_odd(rows.ends[i - 1])
    else:
        return tl.load(rows.offsets + i)


@triton.jit
def count_tiles(rows, C: tl.constexpr):
    """Number of row tiles of all experts."""
    tiles = 0
    for e in tl.static_range(len(C.hidden)):
        tiles += tl.cdiv(expert_offset(rows, e + 1) - expert_offset(rows, e), C.block_t)
    return tiles


@triton.jit
def find_tile(rows, tile, C: tl.constexpr):
    """The expert of a row tile, the tile's first grouped row, the expert's first row and end."""
    expert, first, begin, end = 0, 0, 0, 0
    before = 0
    for e in tl.static_range(len(C.hidden)):
        start = expert_offset(rows, e)
        stop = expert_offset(rows, e + 1)
        tiles = tl.cdiv(stop - start, C.block_t)
        inside = (tile >= before) & (tile < before + tiles)
        expert = tl.where(inside, e, expert)
        first = tl.where(inside, start + (tile - before) * C.block_t, first)
        begin = tl.where(inside, start, begin)
        end = tl.where(inside, stop, end)
        before += tiles
    return expert, first, begin, end


@triton.jit
def tokens_of(rows, grouped, expert, begin, end, C: tl.constexpr):
    """Tokens of grouped rows of one expert, int64; rows beyond its end repeat its last one."""
    grouped = tl.maximum(tl.minimum(grouped, end - 1), 0)
    if rows.offsets is None:
        length = tl.maximum(from_odd(select(rows.lengths, expert, C)), 1)
        local = grouped - begin
        start = from_odd(select(rows.starts, expert, C))
        token = (local // length) * from_odd(rows.length) + start
        return (token + local % length).to(tl.int64)
    else:
        return tl.load(rows.tokens + grouped).to(tl.int64)


@triton.jit
def first_ticket(step, tiles, band, C: tl.constexpr):
    """Number of tickets before ``step``, as in ``Banded.first_ticket`` of the model."""
    tickets = 0
    for p in tl.static_range(len(C.tasks)):
        tickets += tl.minimum(tl.maximum(step - p, 0) * band, tiles) * C.tasks[p]
    return tickets


@triton.jit
def locate(ticket, tiles, band, C: tl.constexpr):
    """Phase, row tile and part of a ticket, as in ``Banded.locate`` of the model."""
    per_tile = 0
    for p in tl.static_range(len(C.tasks)):
        per_tile += C.tasks[p]
    step = ticket // (band * per_tile)
    while first_ticket(step + 1, tiles, band, C) <= ticket:
        step += 1
    offset = ticket - first_ticket(step, tiles, band, C)
    phase, first, size, within = -1, 0, 1, 0
    for p in tl.static_range(len(C.tasks)):
        begin = tl.minimum(tl.maximum(step - p, 0) * band, tiles)
        count = tl.minimum(tl.maximum(step - p + 1, 0) * band, tiles) - begin
        inside = (phase < 0) & (offset < count * C.tasks[p])
        phase = tl.where(inside, p, phase)
        first = tl.where(inside, begin, first)
        size = tl.where(inside, count, size)
        within = tl.where(inside, offset, within)
        offset -= count * C.tasks[p]
    # Divided once: a division takes as long as everything else here.
    return phase, first + within % size, within // size


@triton.jit
def signal(counter):
    """Publish this program's stores to programs that wait on the counter (release)."""
    # One thread executes the atomic; it must not overtake the stores of the other threads.
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release")


@triton.jit
def wait(counter, expected):
    """Spin until the counter has ``expected`` signals, all from programs with earlier tickets."""
    while tl.atomic_add(counter, 0, sem="acquire") < expected:
        pass


@triton.jit
def leave(counters, size):
    """Reset all counters for the next launch; the last program to finish does it."""
    tl.debug_barrier()
    if tl.atomic_add(counters + 1, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        for first in range(0, size, 1024):
            at = first + tl.arange(0, 1024)
            tl.store(counters + at, tl.zeros((1024,), tl.int32), mask=at < size)


@triton.jit
def sigmoid(x, C: tl.constexpr):
    if C.rounds:
        return reciprocal(1.0 + tl.exp2(-1.4426950408889634 * x))
    else:
        return tl.sigmoid(x)


@triton.jit
def normal_tail(x):
    """The tail Phi(-a) of the normal distribution, a = abs(x), and exp(-a^2 / 2).

    tail = bell q(t), t = 1 / (1 + 0.36 a), with the polynomial q of csrc/common/activation.cuh. Its
    largest relative error for a <= 8 is 2.0e-5, a twenty-fourth of the largest error of rounding to
    float16, for half of the instructions of erf.
    """
    t = reciprocal(1.0 + 0.36 * tl.abs(x))
    q = 0.24151058098923406 - 0.09412777934009552 * t
    q = 0.049573229817512846 + t * q
    q = 0.16095662590775353 + t * q
    q = 0.14209608922113928 + t * q
    bell = tl.exp2(x * x * -0.7213475204444817)
    return bell * t * q, bell


@triton.jit
def normal_cdf(x):
    return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)


@triton.jit
def gate(x, C: tl.constexpr):
    """The activation function; for a gated activation, the factor of the value."""
    if C.activation == "swiglu":
        return x * sigmoid(x, C)
    elif C.activation == "relu2":
        x = tl.maximum(x, 0.0)
        return x * x
    elif C.activation == "gelu_tanh" or C.activation == "geglu_tanh":
        # x * (1 + tanh(u)) / 2 = x * sigmoid(2 u)
        return x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x), C)
    elif C.rounds:
        tail, _ = normal_tail(x)
        return tl.maximum(x, 0.0) - tl.abs(x) * tail
    else:
        return x * normal_cdf(x)


@triton.jit
def gate_with_slope(x, C: tl.constexpr):
    """The activation and its derivative."""
    if C.activation == "swiglu":
        s = sigmoid(x, C)
        return x * s, s * (1.0 + x * (1.0 - s))
    elif C.activation == "relu2":
        x = tl.maximum(x, 0.0)
        return x * x, 2.0 * x
    elif C.activation == "gelu_tanh" or C.activation == "geglu_tanh":
        s = sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x), C)
        inner = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        return x * s, s * (1.0 + x * (1.0 - s) * inner)
    elif C.rounds:
        tail, bell = normal_tail(x)
        cdf = tl.where(x > 0.0, 1.0 - tail, tail)
        return x * cdf, cdf + x * 0.3989422804014327 * bell
    else:
        cdf = normal_cdf(x)
        return x * cdf, cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def halves(tile):
    """The left and the right half of a tile's columns."""
    ROWS: tl.constexpr = tile.shape[0]
    HALF: tl.constexpr = tile.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, HALF)), (0, 2, 1)))


@triton.jit
def quarters(tile):
    """Four parts of a tile's columns, from left to right.

    Epilogues process one part at a time: addresses, masks and intermediate values of a tile of
    128 x 256 do not fit in the registers beside its accumulators. Without the split, the kernels
    spill 528 (forward), 1720 (rows) and 360 (weights) bytes per thread on sm_90.
    """
    left, right = halves(tile)
    a, b = halves(left)
    c, d = halves(right)
    return a, b, c, d


@triton.jit
def eighths(tile):
    """Eight parts of a tile's columns, from left to right; see :func:`quarters`."""
    a, b, c, d = quarters(tile)
    a0, a1 = halves(a)
    b0, b1 = halves(b)
    c0, c1 = halves(c)
    d0, d1 = halves(d)
    return a0, a1, b0, b1, c0, c1, d0, d1


@triton.jit
def column_sums(tile, C: tl.constexpr):
    """``tl.sum(tile, 0)``, which would store the sums of each warp with 16-way bank conflicts.

    Epilogues hold eight adjacent columns in a thread, so that a warp has ``LANES`` adjacent rows
    and the warps follow each other. The rows of a thread are added first, then those of a warp. The
    few sums that are left, one per warp, are added in pairs.
    """
    ROWS: tl.constexpr = tile.shape[0]
    COLUMNS: tl.constexpr = tile.shape[1]
    LANES: tl.constexpr = 256 // COLUMNS if 256 // COLUMNS < ROWS else ROWS
    WARPS: tl.constexpr = C.num_warps if C.num_warps * LANES < ROWS else ROWS // LANES
    sums = tl.sum(tl.reshape(tile, (ROWS // (WARPS * LANES), WARPS * LANES, COLUMNS)), 0)
    sums = tl.trans(tl.sum(tl.reshape(sums, (WARPS, LANES, COLUMNS)), 1))
    for _ in tl.static_range(4):  # at most 16 warps
        if sums.shape[1] > 1:
            first, second = tl.split(tl.reshape(sums, (COLUMNS, sums.shape[1] // 2, 2)))
            sums = first + second
    return tl.reshape(sums, (COLUMNS,))


@triton.jit
def sum_rows(SOURCE, begin, end, stride, columns, within, ROWS: tl.constexpr):
    """Sums over the rows [begin, end) of some columns, ROWS at a time, in a fixed order."""
    COLUMNS: tl.constexpr = columns.shape[0]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(begin, end, ROWS):
        r = first + tl.arange(0, ROWS)
        at = SOURCE + r[:, None].to(tl.int64) * stride + columns[None, :]
        inside = (r[:, None] < end) & within[None, :]
        total += tl.load(at, mask=inside, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def inside_tile(grouped, end, columns, width, C: tl.constexpr):
    """Mask of a tile's numbers: rows before ``end``, columns before ``width``."""
    if C.even:
        return grouped[:, None] < end
    else:
        return (grouped[:, None] < end) & (columns[None, :] < width)


@triton.jit
def prefetch_tile(rows, first, width, COLUMNS: tl.constexpr):
    """Prefetch COLUMNS columns of a tile, which the epilogue reads after a long product.

    Args:
        rows: [block_t] addresses of valid rows.
        width: number of columns of a row.
    """
    LINE: tl.constexpr = 1024 // rows.dtype.element_ty.primitive_bitwidth
    LINES: tl.constexpr = (COLUMNS + LINE - 1) // LINE
    columns = tl.minimum(first + tl.arange(0, LINES) * LINE, width - 1)
    prefetch(rows[:, None] + columns[None, :])


@triton.jit
def gate_and_value(h, C: tl.constexpr):
    """The columns that ``preactivation`` interleaves; without a gate both are the same."""
    if C.gated:
        return tl.split(tl.reshape(h, (h.shape[0], h.shape[1] // 2, 2)))
    else:
        return h, h


@triton.jit
def unit_rows(x, columns, width, eps, NORM: tl.constexpr):
    """The normalised rows xhat of LayerNorm or RMSNorm, and each row's 1 / deviation; float32."""
    if NORM == "layer":
        mean = tl.sum(x, 1) / width
        x = tl.where(columns[None, :] < width, x - mean[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(term(x, x), 1) / width + eps)
    return x * inverse[:, None], inverse


@triton.jit
def undo_unit_rows(d, unit, inverse, width, NORM: tl.constexpr):
    """The gradient of x from ``d``, that of the results of :func:`unit_rows`."""
    dx = d - unit * (tl.sum(term(d, unit), 1) / width)[:, None]
    if NORM == "layer":
        dx -= (tl.sum(d, 1) / width)[:, None]
    return dx * inverse[:, None]


@triton.jit
def sub_normed(unit, SUB_NORM_WEIGHT, SUB_NORM_BIAS, expert, columns, within, C: tl.constexpr):
    """Scale and shift normalised rows by the sub-norm's weight and bias; the weight [1, F]."""
    weight = tl.load(select(SUB_NORM_WEIGHT, expert, C) + columns, mask=within, other=0.0)
    weight = weight.to(tl.float32)[None, :]
    hidden = unit * weight
    if SUB_NORM_BIAS is not None:
        bias = tl.load(select(SUB_NORM_BIAS, expert, C) + columns, mask=within, other=0.0)
        hidden += bias.to(tl.float32)[None, :]
    return hidden, weight


@triton.jit
def sub_normalise(
    HIDDEN,  # [T, max F] grouped
    OUT,  # [T, max F] grouped, may be HIDDEN
    SUB_NORM_WEIGHT,
    SUB_NORM_BIAS,
    grouped,  # [rows]
    end,
    expert,
    eps,
    BLOCK_H: tl.constexpr,
    C: tl.constexpr,
):
    """Store sub_norm_e(hidden) of some rows."""
    width = width_of(expert, C)
    columns = tl.arange(0, BLOCK_H)
    within = columns < width
    inside = (grouped[:, None] < end) & within[None, :]
    at = grouped[:, None].to(tl.int64) * C.max_hidden + columns[None, :]
    hidden = tl.load(HIDDEN + at, mask=inside, other=0.0).to(tl.float32)
    unit, _ = unit_rows(hidden, columns, width, eps, "layer")
    y, _ = sub_normed(unit, SUB_NORM_WEIGHT, SUB_NORM_BIAS, expert, columns, within, C)
    tl.store(OUT + at, y.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def normalise(
    X,
    NORMED,
    NORM_WEIGHT,
    NORM_BIAS,
    token,  # [block_r] int64
    grouped,  # [block_r]
    end,
    expert,
    norm_eps,
    C: tl.constexpr,
):
    """Store norm_e(x) of some rows to grouped scratch."""
    columns = tl.arange(0, C.block_d)
    within = columns < C.dim
    inside = (grouped[:, None] < end) & within[None, :]

    x = tl.load(X + token[:, None] * C.dim + columns[None, :], mask=within[None, :], other=0.0)
    NORM: tl.constexpr = C.norm
    unit, _ = unit_rows(x.to(tl.float32), columns, C.dim, norm_eps, NORM)
    weight = tl.load(select(NORM_WEIGHT, expert, C) + columns, mask=within, other=0.0)
    y = unit * weight.to(tl.float32)[None, :]
    if NORM_BIAS is not None:
        bias = tl.load(select(NORM_BIAS, expert, C) + columns, mask=within, other=0.0)
        y += bias.to(tl.float32)[None, :]
    at = NORMED + grouped[:, None].to(tl.int64) * C.dim + columns[None, :]
    tl.store(at, y.to(NORMED.dtype.element_ty), mask=inside)
