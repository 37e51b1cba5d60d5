"""Gradients of q, k and v in Triton, without atomics; both kernels recompute the probabilities.

For a tile of queries, one kernel iterates over keys; for a tile of keys, the other iterates over
queries. This takes seven products instead of five, but every sum is computed by one program in a
fixed order, so the results are deterministic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..._backends.triton_device import dot, term
from .device import (
    Sequences,
    bias_tile,
    bias_tile_of_keys,
    clamp,
    head_of,
    key_side,
    load_keys,
    load_lse,
    load_own,
    load_rows,
    product,
    program_place,
    query_side,
    rows_of,
    sequence_of,
    span_of,
    store_own,
    valid_keys,
)


@triton.jit(do_not_specialize=["batch", "length", "tokens"])
def attention_bwd_q_kernel(
    q,
    k,
    v,
    OUT,
    DOUT,
    LSE,
    DELTA,
    DQ,
    sequences,
    batch,
    length,
    tokens,
    bias,
    scale,
    factor,
    C: tl.constexpr,
):
    """dq of block_q queries of one head, and delta = rowsum(dout * out) for the other kernels.

    ``scale`` is ``factor`` times log2(e).
    """
    sequences = Sequences(
        *(batch, sequences.heads, length, tokens),
        *(sequences.offsets, sequences.key_lengths, sequences.key_mask),
    )
    tile, b, head = program_place(sequences, C.block_q)
    start, length, valid = sequence_of(sequences, b)
    queries = tile * C.block_q + tl.arange(0, C.block_q)
    if tile * C.block_q >= length:
        return
    stop = valid
    if C.causal:
        stop = tl.minimum(valid, (tile + 1) * C.block_q)
    begin, stop = span_of(bias, b, 0, stop, C.block_k)

    rows = clamp(queries, length)
    # [block_q, block_d]
    dout = load_own(DOUT, sequences, start, rows, head, C)
    out = load_own(OUT, sequences, start, rows, head, C)
    delta = tl.sum(term(dout.to(tl.float32), out.to(tl.float32)), 1)
    at = DELTA + (start + queries) * sequences.heads + head
    tl.store(at, delta, mask=queries < length)

    lse = load_lse(LSE, sequences, start, queries, length, head)
    q_tile = load_rows(head_of(q, sequences, b, start, head, C), q, rows, C)
    k_base = head_of(k, sequences, b, start, head, C)
    v_base = head_of(v, sequences, b, start, head, C)
    if C.biased:
        own = query_side(bias, head, start, rows, C)

    BLOCK_Q: tl.constexpr = C.block_q
    BLOCK_D: tl.constexpr = C.block_d
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for first in range(begin, stop, C.block_k):
        keys = rows_of(bias, b, first + tl.arange(0, C.block_k))
        k_rows = clamp(keys, valid)
        allowed = valid_keys(sequences, start, keys, valid)
        k_tile = load_keys(k_base, k, k_rows, allowed, sequences, C)
        # [block_q, block_k]
        s = product(q_tile, tl.trans(k_tile), C) * scale
        if C.biased:
            s += bias_tile(bias, own, head, start, first, k_rows, C).to(tl.float32)
        s = tl.where(allowed[None, :], s, float("-inf"))
        if C.causal:
            s = tl.where(keys[None, :] <= queries[:, None], s, float("-inf"))

        p = tl.exp2(s - lse[:, None])
        dp = product(dout, tl.trans(load_rows(v_base, v, k_rows, C)), C)
        ds = p * (dp - delta[:, None])
        if sequences.key_mask is not None:
            ds = tl.where(p == 0.0, 0.0, ds)  # dp may be NaN at a masked key
        acc = dot(ds.to(k_tile.dtype), k_tile, acc, C)

    store_own(DQ, acc * factor, sequences, start, queries, length, head, C)


@triton.jit(do_not_specialize=["batch", "length", "tokens"])
def attention_bwd_kv_kernel(
    q,
    k,
    v,
    DOUT,
    LSE,
    DELTA,
    DK,
    DV,
    sequences,
    batch,
    length,
    tokens,
    bias,
    scale,
    factor,
    C: tl.constexpr,
):
    """dk and dv of block_k keys of one head; the rows of a tile are keys."""
    sequences = Sequences(
        *(batch, sequences.heads, length, tokens),
        *(sequences.offsets, sequences.key_lengths, sequences.key_mask),
    )
    tile, b, head = program_place(sequences, C.block_k)
    start, length, valid = sequence_of(sequences, b)
    first_key = tile * C.block_k
    keys = first_key + tl.arange(0, C.block_k)
    if first_key >= length:
        return
    begin = 0
    if C.causal:
        begin = (first_key // C.block_q) * C.block_q
    begin, stop = span_of(bias, b, begin, length, C.block_q)
    # A tile without a valid key skips the loop over queries and stores zeros.
    stop = tl.where(first_key < valid, stop, 0)

    k_rows = clamp(keys, valid)
    # [block_k, block_d]
    k_tile = load_rows(head_of(k, sequences, b, start, head, C), k, k_rows, C)
    v_tile = load_rows(head_of(v, sequences, b, start, head, C), v, k_rows, C)
    q_base = head_of(q, sequences, b, start, head, C)
    if C.biased:
        own = key_side(bias, head, start, k_rows, C)

    BLOCK_K: tl.constexpr = C.block_k
    BLOCK_D: tl.constexpr = C.block_d
    dk = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for first in range(begin, stop, C.block_q):
        queries = rows_of(bias, b, first + tl.arange(0, C.block_q))
        rows = clamp(queries, length)
        q_tile = load_rows(q_base, q, rows, C)
        # [block_k, block_q]
        s = product(k_tile, tl.trans(q_tile), C) * scale
        if C.biased:
            s += bias_tile_of_keys(bias, own, head, start, first, rows, C).to(tl.float32)
        if C.expanded:
            # The bias of a position without a query may be anything.
            s = tl.where((queries < length)[None, :], s, float("-inf"))
        if C.causal:
            s = tl.where(keys[:, None] <= queries[None, :], s, float("-inf"))

        p = tl.exp2(s - load_lse(LSE, sequences, start, queries, length, head)[None, :])
        dout = load_own(DOUT, sequences, start, rows, head, C)
        dv = dot(p.to(dout.dtype), dout, dv, C)
        dp = product(v_tile, tl.trans(dout), C)
        delta = tl.load(DELTA + (start + rows) * sequences.heads + head)
        ds = p * (dp - delta[None, :])
        dk = dot(ds.to(q_tile.dtype), q_tile, dk, C)

    # A masked key affects only its own row of the tile, which is set to zero here.
    allowed = valid_keys(sequences, start, keys, valid)[:, None]
    dk = tl.where(allowed, dk, 0.0)
    dv = tl.where(allowed, dv, 0.0)
    store_own(DK, dk * factor, sequences, start, keys, length, head, C)
    store_own(DV, dv, sequences, start, keys, length, head, C)
