"""Forward of shared_attention in Triton: online softmax over blocks of keys."""

from __future__ import annotations

import triton
import triton.language as tl

from ..._backends.triton_device import dot
from .device import (
    LN_2,
    Sequences,
    bias_tile,
    clamp,
    head_of,
    load_keys,
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
def attention_fwd_kernel(
    q,
    k,
    v,
    OUT,
    LSE,
    sequences,
    batch,
    length,
    tokens,
    bias,
    scale,
    C: tl.constexpr,
):
    """out and log-sum-exp of block_q queries of one head; ``scale`` includes log2(e)."""
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
    q_tile = load_rows(head_of(q, sequences, b, start, head, C), q, rows, C)
    k_base = head_of(k, sequences, b, start, head, C)
    v_base = head_of(v, sequences, b, start, head, C)
    if C.biased:
        own = query_side(bias, head, start, rows, C)

    BLOCK_Q: tl.constexpr = C.block_q
    BLOCK_D: tl.constexpr = C.block_d
    highest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for first in range(begin, stop, C.block_k):
        keys = rows_of(bias, b, first + tl.arange(0, C.block_k))
        k_rows = clamp(keys, valid)
        allowed = valid_keys(sequences, start, keys, valid)
        # [block_q, block_k]
        s = product(q_tile, tl.trans(load_rows(k_base, k, k_rows, C)), C) * scale
        if C.biased:
            s += bias_tile(bias, own, head, start, first, k_rows, C).to(tl.float32)
        s = tl.where(allowed[None, :], s, float("-inf"))
        if C.causal:
            s = tl.where(keys[None, :] <= queries[:, None], s, float("-inf"))

        higher = tl.maximum(highest, tl.max(s, 1))
        # As long as there is no valid key, -inf - -inf would be NaN.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(s - shift[:, None])
        rescale = tl.exp2(highest - shift)
        total = total * rescale + tl.sum(p, 1)
        v_tile = load_keys(v_base, v, k_rows, allowed, sequences, C)
        acc = dot(p.to(v_tile.dtype), v_tile, acc * rescale[:, None], C)
        highest = higher

    # Without a valid key, out is 0 and the log-sum-exp is -inf, like ``highest``.
    total = tl.where(total == 0, 1.0, total)
    out = acc * (1.0 / total)[:, None]
    store_own(OUT, out, sequences, start, queries, length, head, C)
    lse = (highest + tl.log2(total)) * LN_2
    at = LSE + (start + queries) * sequences.heads + head
    tl.store(at, lse, mask=queries < length)
