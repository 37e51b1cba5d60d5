"""Prepares the bias of a call in Triton: expands the table, and inverts the positions.

The bias of a pair of tokens depends only on their positions, M x M for a head: less than two
megabytes for VLMo's joint sequences, which stay in L2 while all sequences of a batch read them. A
kernel then copies 16 bytes of the bias at a time, as it does k and v, instead of looking up each
pair.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import ABSENT, LOG2_E, Sequences, offset, pairs_at, sequence_of

EXPANDED_HEADS = 4  # of a program; in a table with heads last, they share sectors
_HEADS = tl.constexpr(EXPANDED_HEADS)
_TOKENS = tl.constexpr(256)  # that are placed at a time


@triton.jit(do_not_specialize=["batch", "length", "tokens"])
def attention_expand_kernel(
    TABLE,  # [entries, H]
    sequences,
    batch,
    length,
    tokens,
    bias,
    entry_stride,
    head_stride,
    tiles,
    C: tl.constexpr,
):
    """Writes ``bias.by_query``, ``by_key``, ``rows`` and ``spans``, each unless it is None.

    The first ``tiles`` programs expand a tile of block_q queries and block_k keys, each for a few
    heads; the others place the tokens of one sequence.
    """
    sequences = Sequences(
        *(batch, sequences.heads, length, tokens),
        *(sequences.offsets, sequences.key_lengths, sequences.key_mask),
    )
    program = tl.program_id(0)
    if program < tiles:
        expand(TABLE, sequences.heads, bias, entry_stride, head_stride, program, C)
    elif bias.rows is not None:
        place(sequences, bias, program - tiles)


@triton.jit
def expand(TABLE, heads, bias, entry_stride, head_stride, program, C: tl.constexpr):
    """Columns from M to the pitch become zeros."""
    groups, k_tiles = tl.cdiv(heads, _HEADS), bias.pitch // C.block_k
    first_head, tile = program % groups * _HEADS, program // groups
    # [block_q, 1] and [1, block_k]
    queries = ((tile // k_tiles) * C.block_q + tl.arange(0, C.block_q))[:, None]
    keys = ((tile % k_tiles) * C.block_k + tl.arange(0, C.block_k))[None, :]
    inside = (queries < bias.size) & (keys < bias.size)
    row = pairs_at(bias, tl.minimum(queries, bias.size - 1), keys, C)
    for i in tl.static_range(_HEADS):
        head = (first_head + i).to(tl.int64)
        known = inside & (head < heads)
        value = tl.load(TABLE + row.to(tl.int64) * entry_stride + head * head_stride, mask=known)
        value = tl.where(known, value.to(tl.float32) * LOG2_E, 0.0)
        if bias.by_query.dtype.element_ty == tl.float16:
            # Finite numbers stay finite.
            finite = tl.abs(value) < float("inf")
            value = tl.where(finite, tl.minimum(tl.maximum(value, -65504.0), 65504.0), value)
        value = value.to(bias.by_query.dtype.element_ty)
        first = head * bias.size * bias.pitch
        at = first + offset(queries, C) * bias.pitch + keys
        tl.store(bias.by_query + at, value, mask=(queries < bias.size) & (head < heads))
        if bias.by_key is not None:
            padded = (keys < bias.size) & (queries < bias.pitch) & (head < heads)
            at = first + offset(keys, C) * bias.pitch + queries
            tl.store(bias.by_key + at, value, mask=padded)


@triton.jit
def place(sequences, bias, b):
    """The row of each position of sequence ``b``, and the span of its positions."""
    rows = bias.rows + b.to(tl.int64) * bias.pitch
    for first in range(0, bias.pitch, _TOKENS):
        at = first + tl.arange(0, _TOKENS)
        tl.store(rows + at, tl.full((_TOKENS,), ABSENT, tl.int32), mask=at < bias.pitch)
    tl.debug_barrier()
    start, length, _ = sequence_of(sequences, b)
    lowest, highest = bias.size, -1
    for first in range(0, length, _TOKENS):
        row = first + tl.arange(0, _TOKENS)
        position = tl.load(bias.positions + start + row, mask=row < length, other=-1).to(tl.int32)
        tl.store(rows + position, row, mask=row < length)
        highest = tl.maximum(highest, tl.max(position, 0))
        lowest = tl.minimum(lowest, tl.min(tl.where(row < length, position, bias.size), 0))
    tl.store(bias.spans + 2 * b, lowest)
    tl.store(bias.spans + 2 * b + 1, highest + 1)
