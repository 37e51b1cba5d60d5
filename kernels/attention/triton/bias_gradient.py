"""Gradient of the bias table in Triton: deterministic, and without an N x N tensor.

A program takes a tile of queries and keys and accumulates the gradients of the scores over a range
of the batch in registers, because the bias of a pair is the same in every sequence. Then it
scatters the tile to the rows of the table. Pairs that read the same row are added in any order,
so they are added as integers, whose sum does not depend on the order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import (
    Sequences,
    clamp,
    head_of,
    key_side,
    load_lse,
    load_own,
    load_rows,
    pairs_at,
    product,
    query_side,
    row_of_pairs,
    rows_of,
    sequence_of,
    table_rows,
    valid_keys,
)

_BLOCK_B = tl.constexpr(32)  # sequences that are tested at a time
_BLOCK_E = tl.constexpr(512)  # entries that are read and reset at a time
# The largest magnitude of a tile is scaled to 2^40 to 2^41: a sum of 2^22 such numbers fits into 63
# bits, and numbers above 2^-17 of the largest keep the 24 bits of a float32.
_LARGEST = tl.constexpr(40)


@triton.jit(do_not_specialize=["batch", "length", "tokens", "chunk", "parts"])
def attention_bwd_table_kernel(
    q,
    k,
    v,
    DOUT,
    LSE,
    DELTA,
    SUMS,  # [H, parts, entries] int64, zeros before and after
    PARTIAL,  # [H, parts, entries] float32, zeros
    FOUND,  # [H, parts, chunk] int32, scratch
    sequences,
    batch,
    length,
    tokens,
    bias,
    scale,
    chunk,
    parts,
    C: tl.constexpr,
):
    """Adds every ``parts``-th tile of a head to one row of PARTIAL.

    There is one tile for every ``chunk`` sequences. ``scale`` includes a factor of log2(e).
    """
    sequences = Sequences(
        *(batch, sequences.heads, length, tokens),
        *(sequences.offsets, sequences.key_lengths, sequences.key_mask),
    )
    program = tl.program_id(0)
    part, head = program % parts, (program // parts).to(tl.int64)
    program = program.to(tl.int64)
    sums, partial = SUMS + program * bias.entries, PARTIAL + program * bias.entries
    found = FOUND + program * chunk
    extent = length
    if bias.rows is not None:
        extent = bias.size
    chunks, k_tiles = tl.cdiv(batch, chunk), tl.cdiv(extent, C.block_k)
    items = tl.cdiv(extent, C.block_q) * k_tiles * chunks
    for turn in range(tl.cdiv(items - part, parts)):
        item = part + turn * parts
        first_b, tile = (item % chunks) * chunk, item // chunks
        first_query, first_key = (tile // k_tiles) * C.block_q, (tile % k_tiles) * C.block_k
        count = tl.minimum(chunk, batch - first_b)
        if C.causal and bias.rows is None:
            count = tl.where(first_key < first_query + C.block_q, count, 0)
        if C.expanded or bias.positions is None:
            shared_tile(
                *(q, k, v, DOUT, LSE, DELTA, sums, partial, found, sequences, bias, scale),
                *(head, first_b, count, first_query, first_key, C),
            )
        else:
            tile_of_each(
                *(q, k, v, DOUT, LSE, DELTA, sums, partial, sequences, bias, scale),
                *(head, first_b, count, first_query, first_key, C),
            )


@triton.jit
def shared_tile(
    q,
    k,
    v,
    DOUT,
    LSE,
    DELTA,
    sums,
    partial,
    found,
    sequences,
    bias,
    scale,
    head,
    first_b,
    count,
    first_query,
    first_key,
    C: tl.constexpr,
):
    """A tile whose pairs read the same rows in every sequence: one scatter for all of them."""
    b_tile = shared_bias(bias, head, first_query, first_key, sequences.length, C)
    BLOCK_Q: tl.constexpr = C.block_q
    BLOCK_K: tl.constexpr = C.block_k
    # [block_q, block_k]
    acc = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    if C.ragged or bias.rows is not None:
        count = find(bias, sequences, found, first_b, count, first_query, first_key, C)
    for i in range(count):
        b = first_b + i
        if C.ragged or bias.rows is not None:
            b = tl.load(found + i)
        start, length, valid = sequence_of(sequences, b)
        queries = rows_of(bias, b, first_query + tl.arange(0, C.block_q))
        keys = rows_of(bias, b, first_key + tl.arange(0, C.block_k))
        acc += score_gradients(
            *(q, k, v, DOUT, LSE, DELTA, sequences, scale, b_tile, head, b),
            *(queries, keys, start, length, valid, C),
        )
    # Read after the loop instead of held in registers during it.
    row = shared_rows(bias, head, first_query, first_key, sequences.length, C)
    scatter(acc, row, sums, partial, bias.entries)


@triton.jit
def find(bias, sequences, found, first_b, count, first_query, first_key, C: tl.constexpr):
    """Writes to ``found`` which of ``count`` sequences have a query and a key in a tile.

    Most tiles of a short sequence are empty. Loads in a branch of the loop over the sequences would
    not be pipelined.
    """
    number = 0
    for first in range(0, count, _BLOCK_B):
        i = first + tl.arange(0, _BLOCK_B)
        b = tl.minimum(first_b + i, sequences.batch - 1)
        _, length, valid = sequence_of(sequences, b)
        first_row, first_column = first_query, first_key
        if bias.rows is not None:
            rows = bias.rows + (b.to(tl.int64) * bias.pitch)[:, None]
            queries = (first_query + tl.arange(0, C.block_q))[None, :]
            keys = (first_key + tl.arange(0, C.block_k))[None, :]
            first_row = tl.min(tl.load(rows + queries), 1)
            first_column = tl.min(tl.load(rows + keys), 1)
        has = ((i < count) & (first_row < length) & (first_column < valid)).to(tl.int32)
        tl.store(found + number + tl.cumsum(has) - 1, b, mask=has != 0)
        number += tl.sum(has)
    tl.debug_barrier()
    return number


@triton.jit
def tile_of_each(
    q,
    k,
    v,
    DOUT,
    LSE,
    DELTA,
    sums,
    partial,
    sequences,
    bias,
    scale,
    head,
    first_b,
    count,
    first_query,
    first_key,
    C: tl.constexpr,
):
    """A tile whose pairs read different rows in each sequence: one scatter per sequence."""
    queries = first_query + tl.arange(0, C.block_q)
    keys = first_key + tl.arange(0, C.block_k)
    for i in range(count):
        start, length, valid = sequence_of(sequences, first_b + i)
        if (first_query < length) & (first_key < valid):
            q_rows, k_rows = clamp(queries, length), clamp(keys, valid)
            row = rows_of_pairs(bias, head, start, q_rows, k_rows, C)
            b_tile = tl.load(bias.table + head * bias.entries + row)
            ds = score_gradients(
                *(q, k, v, DOUT, LSE, DELTA, sequences, scale, b_tile, head, first_b + i),
                *(queries, keys, start, length, valid, C),
            )
            scatter(ds, row, sums, partial, bias.entries)


@triton.jit
def shared_bias(bias, head, first_query, first_key, length, C: tl.constexpr):
    """Bias of the pairs of a tile in every sequence: [block_q, block_k]."""
    if C.expanded:
        places = clamp(first_query + tl.arange(0, C.block_q), bias.size)
        at = row_of_pairs(bias.by_query, bias, head, places, C)
        return tl.load(at[:, None] + (first_key + tl.arange(0, C.block_k))[None, :])
    else:
        row = shared_rows(bias, head, first_query, first_key, length, C)
        return tl.load(bias.table + head * bias.entries + row)


@triton.jit
def shared_rows(bias, head, first_query, first_key, length, C: tl.constexpr):
    """Table rows of the pairs of a tile in every sequence: [block_q, block_k]."""
    q_places = first_query + tl.arange(0, C.block_q)
    k_places = first_key + tl.arange(0, C.block_k)
    if C.expanded:
        return pairs_at(bias, clamp(q_places, bias.size)[:, None], k_places[None, :], C)
    else:
        q_places, k_places = clamp(q_places, length), clamp(k_places, length)
        return rows_of_pairs(bias, head, 0, q_places, k_places, C)


@triton.jit
def rows_of_pairs(bias, head, start, q_rows, k_rows, C: tl.constexpr):
    """Table rows of the pairs of a tile of a lookup: [block_q, block_k]."""
    q_position, q_offset, q_factor, _ = query_side(bias, head, start, q_rows, C)
    k_position, k_column, regular = key_side(bias, head, start, k_rows, C)
    return table_rows(
        *(bias, q_position[:, None], q_offset[:, None], q_factor[:, None]),
        *(k_position[None, :], k_column[None, :], regular, C),
    )


@triton.jit
def score_gradients(
    q,
    k,
    v,
    DOUT,
    LSE,
    DELTA,
    sequences,
    scale,
    b_tile,
    head,
    b,
    queries,
    keys,
    start,
    length,
    valid,
    C: tl.constexpr,
):
    """ds of a tile of one head of one sequence; 0 for pairs that do not attend."""
    q_rows, k_rows = clamp(queries, length), clamp(keys, valid)
    q_tile = load_rows(head_of(q, sequences, b, start, head, C), q, q_rows, C)
    k_tile = load_rows(head_of(k, sequences, b, start, head, C), k, k_rows, C)
    # [block_q, block_k]
    s = product(q_tile, tl.trans(k_tile), C) * scale + b_tile.to(tl.float32)
    p = tl.exp2(s - load_lse(LSE, sequences, start, queries, length, head)[:, None])
    dout = load_own(DOUT, sequences, start, q_rows, head, C)
    v_tile = load_rows(head_of(v, sequences, b, start, head, C), v, k_rows, C)
    dp = product(dout, tl.trans(v_tile), C)
    delta = tl.load(DELTA + (start + q_rows) * sequences.heads + head)
    # Masked here and not in s, because dp may be NaN at a masked key, too.
    allowed = valid_keys(sequences, start, keys, valid)[None, :]
    if C.expanded:
        # The bias of a position without a query may be anything.
        allowed &= (queries < length)[:, None]
    ds = tl.where(allowed, p * (dp - delta[:, None]), 0.0)
    if C.causal:
        ds = tl.where(keys[None, :] <= queries[:, None], ds, 0.0)
    return ds


@triton.jit
def scatter(ds, row, sums, partial, entries):
    """Adds a tile to the rows of the table that its pairs read.

    The tile is scaled by a power of two and accumulated in ``sums`` as integers; then ``sums`` is
    added to ``partial`` in float32 and reset to zeros. The tiles of each ``partial`` and their
    order are the same in every run, so results are bitwise reproducible.
    """
    # NaN counts as inf, because a maximum may ignore NaN.
    largest = tl.max(tl.where(ds == ds, tl.abs(ds), float("inf")))
    exponent = largest.to(tl.int32, bitcast=True) >> 23
    # 2^(_LARGEST - exponent) and its inverse, from their bits; the exponent of the scale is capped
    # for tiles below 2^-86.
    power = tl.minimum(254 - (exponent - _LARGEST), 253)
    scale = (power << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - power) << 23).to(tl.float32, bitcast=True)
    fixed = (ds * scale).to(tl.int64)
    tl.atomic_add(sums + row, fixed, mask=fixed != 0, sem="relaxed")

    tl.debug_barrier()
    poison = largest * 0  # NaN if the tile has a non-finite number, which integers cannot represent
    for first in range(0, entries, _BLOCK_E):
        at = first + tl.arange(0, _BLOCK_E)
        inside = at < entries
        # An atomic exchange sees the results of the atomics even if L1 has a stale copy.
        value = tl.atomic_xchg(
            sums + at, tl.zeros((_BLOCK_E,), tl.int64), mask=inside, sem="relaxed"
        )
        total = tl.load(partial + at, mask=inside, other=0.0)
        tl.store(partial + at, total + value.to(tl.float32) * inverse + poison, mask=inside)
    tl.debug_barrier()
