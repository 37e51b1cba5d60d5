"""Lower bounds of an operation's cost: arithmetic and memory traffic, from its shapes."""

from __future__ import annotations

from typing import NamedTuple


class Cost(NamedTuple):
    """Floating-point operations of the matrix products, and bytes of memory traffic."""

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
    keeps_pre: bool = False,
) -> Cost:
    r"""The forward of the whole sublayer, with norm, biases, layer scale and residual = x.

    With T tokens:

    .. math:: flops = 4 T D F

    .. math:: bytes = itemsize \cdot (2 T D + [keeps\_pre] \, T F + parameters)

    x is read, y written, and the pre-activation written if a backward follows; every parameter is
    read once. Hidden activations are assumed to stay in cache, so this is a lower bound. Operations
    of the norm, the activation and other elementwise parts are not counted.
    """
    moved = 2 * tokens * dim + keeps_pre * tokens * hidden + _parameters(dim, hidden, experts)
    return Cost(4 * tokens * dim * hidden, itemsize * moved)


def moe_ffn_backward(tokens: int, dim: int, hidden: int, *, experts: int, itemsize: int) -> Cost:
    r"""The backward with every gradient, from a saved pre-activation.

    .. math:: flops = 8 T D F

    .. math:: bytes = itemsize \cdot (3 T D + T F + 2\, parameters)

    There are two products for each product of the forward. dy, x and the pre-activation are read
    and dx is written; every parameter is read and its gradient written. Intermediate tensors
    between kernels are not counted.
    """
    moved = 3 * tokens * dim + tokens * hidden + 2 * _parameters(dim, hidden, experts)
    return Cost(8 * tokens * dim * hidden, itemsize * moved)


def attention_forward(
    sequences: int,
    length: int,
    heads: int,
    dim: int,
    *,
    itemsize: int,
    entries: int = 0,
    keeps_lse: bool = False,
) -> Cost:
    r"""Softmax attention with B sequences of N tokens, H heads of ``dim`` = K numbers each.

    .. math:: flops = 4 B H N^2 K

    .. math:: bytes = itemsize \cdot (4 B H N K + H \, entries) + [keeps\_lse] \, 4 B H N

    The products are scores and weighted values. q, k and v are read; the output is written, and the
    log-sum-exp of the scores in float32 if a backward follows; the table of the relative position
    bias (``entries`` x H) is read once. Scores, weights and bias are assumed to stay on chip.
    """
    rows = sequences * heads * length
    moved = 4 * rows * dim + heads * entries
    return Cost(4 * rows * length * dim, itemsize * moved + keeps_lse * 4 * rows)


def attention_backward(
    sequences: int,
    length: int,
    heads: int,
    dim: int,
    *,
    itemsize: int,
    entries: int = 0,
) -> Cost:
    r"""The backward for q, k, v and, with ``entries``, the table of the bias.

    .. math:: flops = 8 B H N^2 K

    .. math:: bytes = itemsize \cdot (8 B H N K + 2 H \, entries) + 4 B H N

    There are four products, for the gradients of values, weights, queries and keys. A fifth
    recomputes the scores. Fused implementations need it, but eager PyTorch, which saves the
    weights, does not, so it does not count as useful work. The FlashAttention papers count it;
    their rates are 10 / 8 of these for the same time (14 / 12 with the forward). q, k, v, the
    output, its gradient, the log-sum-exp (float32) and the table are read, and the gradients of q,
    k, v and the table are written.
    """
    rows = sequences * heads * length
    moved = 8 * rows * dim + 2 * heads * entries
    return Cost(8 * rows * length * dim, itemsize * moved + 4 * rows)


def _parameters(dim: int, hidden: int, experts: int) -> int:
    """Elements of w1, b1, w2, b2 and LayerNorm's two vectors per expert, and of one layer scale."""
    return experts * (2 * dim * hidden + hidden + dim + 2 * dim) + dim
