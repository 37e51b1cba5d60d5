"""What an operation costs at least: arithmetic and memory traffic, from its shapes."""

from __future__ import annotations

from typing import NamedTuple


class Cost(NamedTuple):
    """Floating-point operations of the matrix products, and bytes to and from memory."""

    flops: int
    bytes: int

    def __add__(self, other: Cost) -> Cost:  # type: ignore[override]
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


def moe_ffn_forward(
    tokens: int,
    dim: int,
    hidden: int,
    *,
    experts: int,
    itemsize: int,
    gated: bool = False,
    keeps_pre: bool = False,
) -> Cost:
    r"""The forward of the whole sublayer, with norm, biases, layer scale and residual = x.

    With T tokens, and P = F or, gated, 2 F:

    .. math:: flops = 2 T D P + 2 T F D

    .. math:: bytes = itemsize \cdot (2 T D + [keeps\_pre] \, T P + parameters)

    x is read, y written, and the pre-activation written if a backward follows; every parameter is
    read once. The hidden activations count as never leaving the cache, so no implementation moves
    less; norm, activation and the other elementwise parts count no operations.
    """
    pre = hidden * (2 if gated else 1)
    moved = 2 * tokens * dim + keeps_pre * tokens * pre + _parameters(dim, hidden, pre, experts)
    return Cost(2 * tokens * dim * (pre + hidden), itemsize * moved)


def moe_ffn_backward(
    tokens: int,
    dim: int,
    hidden: int,
    *,
    experts: int,
    itemsize: int,
    gated: bool = False,
    recomputes: bool = False,
) -> Cost:
    r"""The backward with every gradient.

    .. math:: flops = 2 (2 T D P + 2 T F D) + [recomputes] \, 2 T D P

    .. math:: bytes = itemsize \cdot (3 T D + [not\ recomputes] \, T P + 2\, parameters)

    Two products for each of the forward's, and the first of those again if the pre-activation was
    not kept. dy, x and the pre-activation are read, dx is written; every parameter is read and its
    gradient written. What one kernel leaves for the next is not counted.
    """
    pre = hidden * (2 if gated else 1)
    flops = 4 * tokens * dim * (pre + hidden) + recomputes * 2 * tokens * dim * pre
    moved = 3 * tokens * dim + (not recomputes) * tokens * pre
    return Cost(flops, itemsize * (moved + 2 * _parameters(dim, hidden, pre, experts)))


def _parameters(dim: int, hidden: int, pre: int, experts: int) -> int:
    """Elements: w1, b1, w2, b2 and LayerNorm's two vectors of each expert, one layer scale."""
    return experts * (pre * dim + pre + dim * hidden + dim + 2 * dim) + dim
