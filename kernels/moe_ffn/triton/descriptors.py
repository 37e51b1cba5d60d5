"""Products whose operands are read through tensor descriptors, by the copy engine of Hopper (TMA).

A descriptor tells the engine where a matrix ends, so that it fills the rest of a block with zeros,
and the threads compute neither addresses nor masks. The rows of an operand must be in grouped order
and begin at multiples of 16 bytes. :class:`vlmo.kernels.moe_ffn.triton.tiles.Tile` says when
descriptors are used.

Each program makes its descriptors when it starts, one of each matrix for every expert. Those of
activations end behind the expert's last row, because other programs may still be writing the rows
of the next expert.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..._backends.triton_device import INTERPRETED, dot
from .device import expert_offset


@triton.jit
def describe_rows(
    A, rows, KIND: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, C: tl.constexpr
):
    """E descriptors of a grouped tensor, for blocks [BLOCK_R, BLOCK_C].

    Args:
        KIND: "dim" for norm(x), "out" for dbranch, "hidden" for the activations, "pre" for dpre.
    """
    made = ()  # type: tuple
    for e in tl.static_range(len(C.hidden)):
        if KIND == "dim":
            columns, stride = C.dim, C.dim
        elif KIND == "out":
            columns, stride = C.out, C.out
        elif KIND == "hidden":
            columns, stride = C.hidden[e], C.max_hidden
        else:
            columns, stride = C.hidden[e] * C.halves, C.max_pre
        end = tl.maximum(expert_offset(rows, e + 1), 1)  # an extent cannot be 0
        block = tl.make_tensor_descriptor(A, [end, columns], [stride, 1], [BLOCK_R, BLOCK_C])
        made += (block,)
    return made


@triton.jit
def describe_transposed(W, KIND: tl.constexpr, BLOCK_N: tl.constexpr, C: tl.constexpr):
    """E descriptors of w1 ("pre") or w2 ("out") for :func:`described_nt`.

    w1 [2 F, D] of a gated activation is described as [F, 2, D], so that a block has the gate and
    the value of a hidden column in adjacent rows, like ``w1_rows`` in products.py.
    """
    HALVES: tl.constexpr = C.halves if KIND == "pre" else 1
    made = ()  # type: tuple
    for e in tl.static_range(len(C.hidden)):
        height = C.hidden[e] if KIND == "pre" else C.out
        width = C.dim if KIND == "pre" else C.hidden[e]
        block = tl.make_tensor_descriptor(
            *(W[e], [height, HALVES, width], [width, height * width, 1]),
            [BLOCK_N // HALVES, HALVES, C.block_k],
        )
        made += (block,)
    return made


@triton.jit
def describe_straight(W, KIND: tl.constexpr, BLOCK_N: tl.constexpr, C: tl.constexpr):
    """E descriptors of w1 ("pre") or w2 ("out") for :func:`described_nn`."""
    made = ()  # type: tuple
    for e in tl.static_range(len(C.hidden)):
        height = C.hidden[e] * C.halves if KIND == "pre" else C.out
        width = C.dim if KIND == "pre" else C.hidden[e]
        block = tl.make_tensor_descriptor(W[e], [height, width], [width, 1], [C.block_k, BLOCK_N])
        made += (block,)
    return made


@triton.jit
def operands_nt(A, KIND_A: tl.constexpr, W, KIND_W: tl.constexpr, rows, C: tl.constexpr):
    """The operands of :func:`described_nt`."""
    a = describe_rows(A, rows, KIND_A, C.block_t, C.block_k, C)
    return a, describe_transposed(W, KIND_W, C.block_n, C)


@triton.jit
def operands_nn(
    A, KIND_A: tl.constexpr, W, KIND_W: tl.constexpr, BLOCK_N: tl.constexpr, rows, C: tl.constexpr
):
    """The operands of :func:`described_nn`."""
    a = describe_rows(A, rows, KIND_A, C.block_t, C.block_k, C)
    return a, describe_straight(W, KIND_W, BLOCK_N, C)


@triton.jit
def of_expert(descriptors, expert, C: tl.constexpr):
    """The descriptor of an expert known only at run time."""
    chosen = descriptors[0]
    for i in tl.static_range(1, len(C.hidden)):
        if expert == i:
            chosen = descriptors[i]
    return chosen


@triton.jit
def see_stores():
    """Let copies by the engine see what the acquire before made visible to the threads."""
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "fence.proxy.async.global; mov.b32 $0, 0;",
            *("=r,r", [tl.program_id(0)]),
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def described_nt(operands, expert, first_row, first_column, acc, K, C: tl.constexpr):
    """A[rows] @ W_e[columns]^T + acc, like ``product_nt`` in products.py.

    Args:
        operands: by :func:`operands_nt`.
        first_column: in units of the descriptor: hidden columns, or columns of y.
    """
    a_blocks = of_expert(operands[0], expert, C)
    w_blocks = of_expert(operands[1], expert, C)
    BLOCK_N: tl.constexpr = acc.shape[1]
    BLOCK_K: tl.constexpr = C.block_k
    see_stores()
    for start in tl.range(0, K, C.block_k):
        a = a_blocks.load([first_row, start])
        w = tl.reshape(w_blocks.load([first_column, 0, start]), (BLOCK_N, BLOCK_K))
        acc = dot(a, tl.trans(w), acc, C)
    return acc


@triton.jit
def described_nn(
    operands, expert, first_row, first_column, K, BLOCK_N: tl.constexpr, C: tl.constexpr
):
    """A[rows] @ W_e[:, columns], like ``product_nn`` in products.py.

    Args:
        operands: by :func:`operands_nn`, for BLOCK_N columns.
    """
    a_blocks = of_expert(operands[0], expert, C)
    w_blocks = of_expert(operands[1], expert, C)
    BLOCK_T: tl.constexpr = C.block_t
    acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    see_stores()
    for start in tl.range(0, K, C.block_k):
        acc = dot(a_blocks.load([first_row, start]), w_blocks.load([start, first_column]), acc, C)
    return acc
