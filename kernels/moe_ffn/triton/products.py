"""The products of moe_ffn's Triton kernels by row tile, through pointers or tensor descriptors.

An argument ``operands`` has the descriptors (descriptors.py); it is empty if the operands are read
through pointers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..._backends.triton_device import dot
from .descriptors import described_nn, described_nt
from .device import of_stream, select, select_rows, tokens_of, wait, width_of


@triton.jit
def product_nt(
    operands,
    A,  # [rows, >= K], row stride stride_a
    a_rows,  # [block_t] int64, valid rows of A
    W,  # E pointers to [N, K], row stride stride_w; or 2 E to [N / 2, K], see select_rows
    w_rows,  # [columns] valid rows of W
    acc,  # [block_t, columns] float32
    expert,
    start,  # first grouped row of the tile
    first,  # first column of the tile, in hidden columns or columns of y
    K,
    stride_a: tl.constexpr,
    stride_w,
    EVEN_K: tl.constexpr,
    C: tl.constexpr,
):
    """A[a_rows] @ W_e[w_rows]^T + acc: [block_t, columns] float32.

    Rows of the tile that the caller does not store must repeat valid rows. This is cheaper than a
    mask in the loop, and rows and columns of a product are independent of each other.
    """
    if len(operands) > 0:
        return described_nt(operands, expert, start, first, acc, K, C)
    k = tl.arange(0, C.block_k)
    a_pointers = A + a_rows[:, None] * stride_a + k[None, :]
    if len(W) > len(C.hidden):
        base, w_rows = select_rows(W, expert, w_rows, C)
        w_pointers = (base + w_rows.to(tl.int64) * stride_w)[None, :] + k[:, None]
    else:
        w_pointers = select(W, expert, C) + w_rows.to(tl.int64)[None, :] * stride_w + k[:, None]
    for begin in tl.range(0, K, C.block_k):
        if EVEN_K:
            a = tl.load(a_pointers)
            w = tl.load(w_pointers)
        else:
            a = tl.load(a_pointers, mask=k[None, :] < K - begin, other=0.0)
            w = tl.load(w_pointers, mask=k[:, None] < K - begin, other=0.0)
        acc = dot(a, w, acc, C)
        a_pointers += C.block_k
        w_pointers += C.block_k
    return acc


@triton.jit
def product_nn(
    operands,
    A,  # [rows, >= K], row stride stride_a
    a_rows,  # [block_t] int64, valid rows of A
    W,  # E pointers to [K, N], row stride N; or 2 E to [K / 2, N], one after the other
    expert,
    start,  # first grouped row of the tile
    first,  # first column of W
    N,
    K,
    stride_a: tl.constexpr,
    BLOCK_N: tl.constexpr,
    C: tl.constexpr,
):
    """A[a_rows] @ W_e[:, first : first + BLOCK_N]: [block_t, BLOCK_N] float32, zero beyond N."""
    if len(operands) > 0:
        return described_nn(operands, expert, start, first, K, BLOCK_N, C)
    k = tl.arange(0, C.block_k)
    columns = first + tl.arange(0, BLOCK_N)
    a_pointers = A + a_rows[:, None] * stride_a + k[None, :]
    BLOCK_T: tl.constexpr = C.block_t
    if len(W) > len(C.hidden):
        acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        for part in range(2):
            first_k = part * (K // 2)
            base, _ = select_rows(W, expert, first_k, C)
            w_pointers = base + k[:, None].to(tl.int64) * N + columns[None, :]
            acc = add_nn(acc, a_pointers + first_k, w_pointers, k, columns, N, K // 2, C)
        return acc
    else:
        w_pointers = select(W, expert, C) + k[:, None].to(tl.int64) * N + columns[None, :]
        acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        return add_nn(acc, a_pointers, w_pointers, k, columns, N, K, C)


@triton.jit
def add_nn(acc, a_pointers, w_pointers, k, columns, N, K, C: tl.constexpr):
    """The main loop of :func:`product_nn`: acc and the products of K columns of A."""
    for begin in tl.range(0, K, C.block_k):
        if C.even:
            a = tl.load(a_pointers)
            w = tl.load(w_pointers)
        else:
            a = tl.load(a_pointers, mask=k[None, :] < K - begin, other=0.0)
            within = (k[:, None] < K - begin) & (columns[None, :] < N)
            w = tl.load(w_pointers, mask=within, other=0.0)
        acc = dot(a, w, acc, C)
        a_pointers += C.block_k
        w_pointers += C.block_k * N
    return acc


@triton.jit
def operand_rows(rows, start, expert, begin, end, BY_TOKEN: tl.constexpr, C: tl.constexpr):
    """The rows of a tile in a tensor by token, or in a grouped one: [block_t] int64, all valid."""
    grouped = start + tl.arange(0, C.block_t)
    if BY_TOKEN:
        return tokens_of(rows, grouped, expert, begin, end, C)
    else:
        return tl.minimum(grouped, end - 1).to(tl.int64)


@triton.jit
def w1_rows(first, width, C: tl.constexpr):
    """Rows of w1 for block_f hidden columns; gate and value of a column are adjacent."""
    HALVES: tl.constexpr = C.halves
    lane = tl.arange(0, C.block_f * HALVES)
    return tl.minimum(first + lane // HALVES, width - 1) + (lane % HALVES) * width


@triton.jit
def first_sums(BIAS, expert, rows, C: tl.constexpr):
    """What accumulators start with: the bias of some rows of a weight, or zeros.

    A bias that is added after the product takes one to three instructions an element. Call this
    before :func:`wait`, so that both latencies overlap.
    """
    BLOCK_T: tl.constexpr = C.block_t
    BLOCK_N: tl.constexpr = rows.shape[0]
    sums = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    if BIAS is not None and C.rounds:
        base, at = select_rows(BIAS, expert, rows, C)
        sums += tl.load(base + at).to(tl.float32)[None, :]
    return sums


@triton.jit
def last_sums(acc, BIAS, expert, rows, C: tl.constexpr):
    """The sums of a product that :func:`first_sums` started, with the bias.

    Where results are not rounded to 16 bits, the bias comes last, as in PyTorch. A bias that is
    large beside the product would make the rounding errors of all partial sums larger.
    """
    if BIAS is not None and not C.rounds:
        base, at = select_rows(BIAS, expert, rows, C)
        bias = tl.load(base + at).to(tl.float32)
        # Triton would make a sum the accumulator's first value.
        acc = tl.fma(acc, 1.0, bias[None, :])
    return acc


@triton.jit
def preactivation(
    operands,
    NORMED,
    W1,
    B1,
    normed_rows,
    rows,
    first,
    expert,
    start,
    begin,
    end,
    BY_TOKEN: tl.constexpr,
    C: tl.constexpr,
):
    """W1_e norm(x) + b1_e: block_t rows, block_f hidden columns, with columns by :func:`w1_rows`.

    Waits for the rows of norm(x).
    """
    a_rows = operand_rows(rows, start, expert, begin, end, BY_TOKEN, C)
    A = of_stream(NORMED, expert, begin, C.dim, C) if BY_TOKEN else NORMED
    w_rows = w1_rows(first, width_of(expert, C), C)
    acc = first_sums(B1, expert, w_rows, C)
    if C.tasks[0] > 0:
        wait(normed_rows, C.tasks[0])
    acc = product_nt(
        *(operands, A, a_rows, W1, w_rows, acc, expert, start, first),
        *(C.dim, C.dim, C.dim, C.even_dim, C),
    )
    return last_sums(acc, B1, expert, w_rows, C)


@triton.jit
def hidden_gradient(
    operands,
    DH2,
    W2,
    rows,
    first,
    expert,
    start,
    begin,
    end,
    BY_TOKEN: tl.constexpr,
    C: tl.constexpr,
):
    """dh2 W2_e: block_t rows, block_f hidden columns."""
    a_rows = operand_rows(rows, start, expert, begin, end, BY_TOKEN, C)
    return product_nn(
        *(operands, DH2, a_rows, W2, expert, start, first),
        *(width_of(expert, C), C.out, C.out, C.block_f, C),
    )
