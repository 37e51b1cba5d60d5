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


class Config(NamedTuple):
    """Compile-time constants of a kernel."""

    head_dim: int  # K
    block_d: int  # K, rounded up to a power of two
    unit: int  # elements; divides the addresses and strides of q, k and v
    precision: str  # of float32 products: "ieee" or "tf32"
    narrow: bool  # 32-bit offsets suffice within a head of a sequence and within the index
    causal: bool
    biased: bool  # there is a lookup; before Triton 3.7, `is not None` of a tuple did not compile
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
    key_mask: Any  # [B, N] or None


class Lookup(NamedTuple):
    """The bias: a table, and the row for each pair of tokens."""

    table: Any  # [H, entries] float32, times log2(e)
    entries: Any
    pairs: Any  # [M, row_stride] int16 (unsigned) or int32
    row_stride: Any
    affine: Any  # [M, 4] int32: offset, factor, column, 1 if the key is regular
    positions: Any  # [tokens] or None


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
def positions_of(lookup, start, rows):
    """The row of the index for each token."""
    if lookup.positions is None:
        return rows
    else:
        return tl.load(lookup.positions + start + rows).to(tl.int32)


@triton.jit
def query_side(lookup, start, rows):
    """For each query: row of the index, offset, factor."""
    position = positions_of(lookup, start, rows)
    affine = lookup.affine + position.to(tl.int64) * 4
    return position, tl.load(affine), tl.load(affine + 1)


@triton.jit
def key_side(lookup, start, rows):
    """For each key: column of the index, column of the affine form; and whether all are regular."""
    position = positions_of(lookup, start, rows)
    affine = lookup.affine + position.to(tl.int64) * 4
    return position, tl.load(affine + 2), tl.min(tl.load(affine + 3), 0) != 0


@triton.jit
def table_rows(
    lookup, q_position, q_offset, q_factor, k_position, k_column, regular, C: tl.constexpr
):
    """Table row of each pair, for queries along one dimension of the tile and keys along the other.

    It is computed if every key of the tile is regular, which is the common case, and otherwise read
    from the index.
    """
    if regular:
        row = q_factor * k_column + q_offset
    else:
        at = offset(q_position, C) * lookup.row_stride + k_position
        row = tl.load(lookup.pairs + at).to(tl.int32)
        if lookup.pairs.dtype.element_ty == tl.int16:
            row = row & 0xFFFF
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
