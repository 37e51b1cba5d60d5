"""Device functions shared by the Triton kernels of shared_attention: sequences, tiles, the bias.

Scores are in base 2, s = log2(e) * (scale * q k^T + bias), so that one ``exp2`` gives a
probability. Rows of a tile beyond the end of a sequence repeat its last row, which costs less than
a mask in the loop; their scores are set to -inf, or their results are not stored.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..._backends.triton_device import dot, from_odd
from .. import call

LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(call.LOG2_E)
PITCH = 128  # no tile is wider, so no tile of an expanded bias reaches beyond its rows
ABSENT = tl.constexpr(2**31 - 1)  # a row that is beyond the end of every sequence


class Config(NamedTuple):
    """Compile-time constants of a kernel."""

    head_dim: int  # K
    block_d: int  # K, rounded up to a power of two
    unit: int  # elements; divides the addresses and strides of q, k and v
    precision: str  # of float32 products: "ieee" or "tf32"
    narrow: bool  # 32-bit offsets suffice within a head of a sequence and within the index
    causal: bool
    biased: bool  # there is a bias; before Triton 3.7, `is not None` of a tuple did not compile
    expanded: bool  # the bias is read from Bias.by_query and by_key, not from the table
    ragged: bool  # sequences differ in length, or in their number of valid keys
    block_q: int  # queries of a tile
    block_k: int  # keys of a tile


class View(NamedTuple):
    """q, k or v: its address, and its strides, all but the last in units of ``Config.unit``."""

    pointer: Any
    batch: Any  # 0 if packed; passed by :func:`vlmo.kernels._backends.triton_device.odd`
    row: Any
    head: Any
    dim: Any


class Sequences(NamedTuple):
    """The rows of each sequence, and its valid keys.

    Kernels receive ``batch``, ``length`` and ``tokens`` as separate arguments and insert them here,
    because Triton would specialise on them inside a tuple.
    """

    batch: Any  # B
    heads: Any  # H
    length: Any  # N, or max_length
    tokens: Any  # B N, or T
    offsets: Any  # [B + 1], or None: dense
    key_lengths: Any  # [B] or None
    key_mask: Any  # [B, N] int16 or None


class Bias(NamedTuple):
    """The bias of pairs of tokens, times log2(e), in one of two forms, and the tokens' positions.

    Expanded (expand.py), all pairs of positions have their bias in memory, and a tile of it is
    contiguous. As a lookup, a pair has only its row of the table.

    A kernel has a tile of tokens and iterates over others. With ``rows``, it iterates over their
    positions instead of their rows, so that tiles of an expanded bias stay contiguous.
    """

    entries: Any  # of the table
    size: Any  # M, the number of positions
    pairs: Any  # [M, pair_stride] int16 (unsigned) or int32: row of the table
    pair_stride: Any
    positions: Any  # [tokens], or None: rows of a sequence
    # lookup
    table: Any  # [H, entries] float32
    affine: Any  # [M, 4] int32: offset, factor, column, 1 if the key is regular
    # expanded
    by_query: Any  # [H, M, pitch] float16 or float32; rows are queries
    by_key: Any  # [H, M, pitch], rows are keys; None in the forward
    pitch: Any  # M, rounded up to a multiple of PITCH; of the rows of ``rows`` as well
    rows: Any  # [B, pitch] int32: row in the sequence of each position, or ABSENT; or None
    spans: Any  # [B, 2] int32: first position of a sequence, and the one after the last


@triton.jit
def program_place(sequences, BLOCK: tl.constexpr):
    """Tile, sequence and head of a program. Tiles vary fastest, so that they share k and v in L2.

    Heads vary slowest, so that concurrent programs read few heads of the table.
    """
    program = tl.program_id(0)
    tiles = tl.cdiv(sequences.length, BLOCK)
    rest = program // tiles
    return program % tiles, rest % sequences.batch, rest // sequences.batch


@triton.jit
def sequence_of(sequences, b):
    """First token (int64), number of tokens and end of the valid keys of sequence ``b``."""
    if sequences.offsets is None:
        start = b.to(tl.int64) * sequences.length
        length = sequences.length
    else:
        start = tl.load(sequences.offsets + b).to(tl.int64)
        length = (tl.load(sequences.offsets + b + 1) - start).to(tl.int32)
        # An empty sequence at the end must not point beyond the tensors.
        start = tl.minimum(start, sequences.tokens - 1)
    valid = length
    if sequences.key_lengths is not None:
        valid = tl.minimum(length, tl.load(sequences.key_lengths + b).to(tl.int32))
    return start, length, valid


@triton.jit
def head_of(view, sequences, b, start, head, C: tl.constexpr):
    """Address of the first row of one head of one sequence."""
    at = head.to(tl.int64) * view.head
    if sequences.offsets is None:
        at += b.to(tl.int64) * from_odd(view.batch)
    else:
        at += start * view.row
    return view.pointer + at * C.unit


@triton.jit
def clamp(rows, end):
    """``rows``, limited to the last row before ``end``."""
    return tl.maximum(tl.minimum(rows, end - 1), 0)


@triton.jit
def offset(number, C: tl.constexpr):
    """A row or column number in the integer type for offsets within a head of a sequence."""
    if C.narrow:
        return number
    else:
        return number.to(tl.int64)


@triton.jit
def load_rows(base, view, rows, C: tl.constexpr):
    """Rows of one head: [rows, block_d], zeros from column K on."""
    dims = tl.arange(0, C.block_d)
    at = (offset(rows, C) * view.row)[:, None] * C.unit + (offset(dims, C) * view.dim)[None, :]
    if C.head_dim == C.block_d:
        return tl.load(base + at)
    else:
        return tl.load(base + at, mask=dims[None, :] < C.head_dim, other=0.0)


@triton.jit
def load_keys(base, view, rows, allowed, sequences, C: tl.constexpr):
    """:func:`load_rows` with zeros at masked keys, because a weight of 0 times NaN would be NaN."""
    if sequences.key_mask is None:
        return load_rows(base, view, rows, C)
    else:
        dims = tl.arange(0, C.block_d)
        at = (offset(rows, C) * view.row)[:, None] * C.unit + (offset(dims, C) * view.dim)[None, :]
        inside = allowed[:, None] & (dims[None, :] < C.head_dim)
        return tl.load(base + at, mask=inside, other=0.0)


@triton.jit
def own_rows(POINTER, sequences, start, rows, head, C: tl.constexpr):
    """Addresses in a contiguous tensor [tokens, H, K]: [rows, block_d]."""
    first = POINTER + (start * sequences.heads + head) * C.head_dim
    at = offset(rows, C) * sequences.heads * C.head_dim
    return first + (at[:, None] + tl.arange(0, C.block_d)[None, :])


@triton.jit
def load_own(POINTER, sequences, start, rows, head, C: tl.constexpr):
    """Rows of a contiguous tensor [tokens, H, K]: [rows, block_d], zeros from column K on."""
    at = own_rows(POINTER, sequences, start, rows, head, C)
    if C.head_dim == C.block_d:
        return tl.load(at)
    else:
        inside = tl.arange(0, C.block_d)[None, :] < C.head_dim
        return tl.load(at, mask=inside, other=0.0)


@triton.jit
def store_own(POINTER, value, sequences, start, rows, end, head, C: tl.constexpr):
    """Store the rows before ``end`` to a contiguous tensor [tokens, H, K]."""
    inside = (rows[:, None] < end) & (tl.arange(0, C.block_d)[None, :] < C.head_dim)
    at = own_rows(POINTER, sequences, start, rows, head, C)
    tl.store(at, value.to(POINTER.dtype.element_ty), mask=inside)


@triton.jit
def product(a, b, C: tl.constexpr):
    return dot(a, b, None, C)


@triton.jit
def positions_of(bias, start, rows):
    """The row of the index for each token."""
    if bias.positions is None:
        return rows
    else:
        return tl.load(bias.positions + start + rows).to(tl.int32)


@triton.jit
def span_of(bias, b, begin, end, BLOCK: tl.constexpr):
    """What a kernel iterates over in blocks: rows from ``begin`` to ``end``, or positions."""
    if bias.rows is None:
        return begin, end
    else:
        first, after = tl.load(bias.spans + 2 * b), tl.load(bias.spans + 2 * b + 1)
        return first // BLOCK * BLOCK, after


@triton.jit
def rows_of(bias, b, places):
    """The rows of a block that a kernel iterates over; ABSENT for positions without a token."""
    if bias.rows is None:
        return places
    else:
        return tl.load(bias.rows + b.to(tl.int64) * bias.pitch + places)


@triton.jit
def query_side(bias, head, start, rows, C: tl.constexpr):
    """What :func:`bias_tile` needs of its queries.

    Expanded, the address of each one's row; else, row of the index, offset, factor, table.
    """
    position = positions_of(bias, start, rows)
    if C.expanded:
        return row_of_pairs(bias.by_query, bias, head, position, C)
    else:
        affine = bias.affine + position.to(tl.int64) * 4
        table = bias.table + head.to(tl.int64) * bias.entries
        return position, tl.load(affine), tl.load(affine + 1), table


@triton.jit
def key_side(bias, head, start, rows, C: tl.constexpr):
    """What :func:`bias_tile_of_keys` needs of its keys.

    Expanded, the address of each one's row; else, column of the index, column of the affine form,
    and whether all are regular.
    """
    position = positions_of(bias, start, rows)
    if C.expanded:
        return row_of_pairs(bias.by_key, bias, head, position, C)
    else:
        affine = bias.affine + position.to(tl.int64) * 4
        return position, tl.load(affine + 2), tl.min(tl.load(affine + 3), 0) != 0


@triton.jit
def row_of_pairs(POINTER, bias, head, position, C: tl.constexpr):
    first = POINTER + head.to(tl.int64) * bias.size * bias.pitch
    return first + offset(position, C) * bias.pitch


@triton.jit
def bias_tile(bias, queries, head, start, first, k_rows, C: tl.constexpr):
    """The bias [block_q, block_k] of :func:`query_side` and the keys of a block from ``first``."""
    if C.expanded:
        return tl.load(queries[:, None] + (first + tl.arange(0, C.block_k))[None, :])
    else:
        q_position, q_offset, q_factor, table = queries
        k_position, k_column, regular = key_side(bias, head, start, k_rows, C)
        row = table_rows(
            *(bias, q_position[:, None], q_offset[:, None], q_factor[:, None]),
            *(k_position[None, :], k_column[None, :], regular, C),
        )
        return tl.load(table + row)


@triton.jit
def bias_tile_of_keys(bias, keys, head, start, first, q_rows, C: tl.constexpr):
    """The bias [block_k, block_q] of :func:`key_side` and the queries of a block from ``first``."""
    if C.expanded:
        return tl.load(keys[:, None] + (first + tl.arange(0, C.block_q))[None, :])
    else:
        k_position, k_column, regular = keys
        q_position, q_offset, q_factor, table = query_side(bias, head, start, q_rows, C)
        row = table_rows(
            *(bias, q_position[None, :], q_offset[None, :], q_factor[None, :]),
            *(k_position[:, None], k_column[:, None], regular, C),
        )
        return tl.load(table + row)


@triton.jit
def pairs_at(bias, q_position, k_position, C: tl.constexpr):
    """Table row of each pair from the index; anything for positions beyond its end."""
    at = offset(q_position, C) * bias.pair_stride + k_position
    row = tl.load(bias.pairs + at, mask=k_position < bias.size, other=0).to(tl.int32)
    if bias.pairs.dtype.element_ty == tl.int16:
        row = row & 0xFFFF
    return row


@triton.jit
def table_rows(
    bias, q_position, q_offset, q_factor, k_position, k_column, regular, C: tl.constexpr
):
    """Table row of each pair, for queries along one dimension of the tile and keys along the other.

    It is computed if every key of the tile is regular, which is the common case, and otherwise read
    from the index.
    """
    if regular:
        row = q_factor * k_column + q_offset
    else:
        row = pairs_at(bias, q_position, k_position, C)
    return row


@triton.jit
def valid_keys(sequences, start, keys, valid):
    """True for the keys of a tile that may be attended to."""
    allowed = keys < valid
    if sequences.key_mask is not None:
        allowed = tl.load(sequences.key_mask + start + keys, mask=allowed, other=0) != 0
    return allowed


@triton.jit
def load_lse(LSE, sequences, start, rows, length, head):
    """Log-sum-exp of each query in base 2; inf beyond the end, which makes probabilities 0."""
    at = LSE + (start + clamp(rows, length)) * sequences.heads + head
    lse = tl.load(at)
    known = (rows < length) & (lse != float("-inf"))
    return tl.where(known, lse * LOG2_E, float("inf"))
