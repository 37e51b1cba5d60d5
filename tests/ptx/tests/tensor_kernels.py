"""Matrix products whose operands are copied by tensor descriptors that the programs create."""

import triton
import triton.language as tl


@triton.jit
def tile_of(M, BM: tl.constexpr, BN: tl.constexpr):
    """(row, column) of a program's tile."""
    tiles = tl.cdiv(M, BM)
    return tl.program_id(0) % tiles * BM, tl.program_id(0) // tiles * BN


@triton.jit
def store_tile(C, acc, M, N, BM: tl.constexpr, BN: tl.constexpr):
    tiles = tl.cdiv(M, BM)
    across = tl.program_id(0) // tiles
    # Not the row of tile_of: where Triton 3.7 splits a product between two groups of warps, it adds
    # the offset of the second one to the register of this row, and again to the range.
    rows = (tl.program_id(0) - across * tiles) * BM + tl.arange(0, BM)
    columns = across * BN + tl.arange(0, BN)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    tl.store(C + rows[:, None] * N + columns[None, :], acc, mask=inside)


@triton.jit
def product(
    A,  # [M, K]
    B,  # [K, N] if B_ACROSS, else [N, K]
    C,  # [M, N]
    M,
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    B_ACROSS: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):
    row, column = tile_of(M, BM, BN)
    a = tl.make_tensor_descriptor(A, [M, K], [K, 1], [BM, BK])
    if B_ACROSS:
        b = tl.make_tensor_descriptor(B, [K, N], [N, 1], [BK, BN])
    else:
        b = tl.make_tensor_descriptor(B, [N, K], [K, 1], [BN, BK])
    acc = tl.zeros([BM, BN], tl.float32)
    for k in tl.range(0, tl.cdiv(K, BK), warp_specialize=SPECIALIZE):
        left = a.load([row, k * BK])
        if B_ACROSS:
            right = b.load([k * BK, column])
        else:
            right = b.load([column, k * BK]).T
        acc = tl.dot(left, right, acc)
    store_tile(C, acc, M, N, BM, BN)


@triton.jit
def selected_product(
    A,  # [M, K]
    B0,  # [N, K]
    B1,  # [N, K]
    C,  # [M, N]
    M,
    N,
    K,
    expert,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """With the right operand of an expert."""
    row, column = tile_of(M, BM, BN)
    a = tl.make_tensor_descriptor(A, [M, K], [K, 1], [BM, BK])
    b = tl.make_tensor_descriptor(B0, [N, K], [K, 1], [BN, BK])
    b1 = tl.make_tensor_descriptor(B1, [N, K], [K, 1], [BN, BK])
    if expert == 1:
        b = b1
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(tl.cdiv(K, BK)):
        left = a.load([row, k * BK])
        right = b.load([column, k * BK])
        acc = tl.dot(left, right.T, acc)
    store_tile(C, acc, M, N, BM, BN)
