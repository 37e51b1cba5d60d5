"""The arguments of a call of moe_ffn, in the form that every backend receives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ACTIVATIONS = ("gelu", "gelu_tanh", "relu2", "swiglu", "geglu", "geglu_tanh")
GATED = ("swiglu", "geglu", "geglu_tanh")
TANH = ("gelu_tanh", "geglu_tanh")  # with GELU's approximation by tanh
NORMS = ("none", "layer", "rms")


class Call(NamedTuple):
    """The arguments of one call, in the order of the operation's schema."""

    x: Tensor  # [T, D]
    # E x [F, D] or [2 F, D]; if gate and value are separate 2 E x [F, D], the gate of expert 0, its
    # value, the gate of expert 1, ... b1 likewise.
    w1: Sequence[Tensor]
    w2: Sequence[Tensor]  # E x [D, F]
    b1: Sequence[Tensor]
    b2: Sequence[Tensor]
    norm_weight: Sequence[Tensor]
    norm_bias: Sequence[Tensor]
    sub_norm_weight: Sequence[Tensor]  # E x [F]
    sub_norm_bias: Sequence[Tensor]
    layer_scale: Tensor | None  # [D]
    token_scale: Tensor | None  # [T]
    residual: Tensor | None  # [T, D]
    # The rows of each expert are given by ids or by pieces. For all backends but "reference", rows
    # and offsets of a Grouping accompany ids, and pieces have at most one run per expert. Beside
    # rows, pieces are each expert's number of tokens, in a sequence or in all, if the host knows it
    # and the backend is one of COUNTING in op.py; else there are none.
    ids: Tensor | None  # [T] int32
    rows: Tensor | None  # [T] int32
    offsets: Tensor | None  # [E + 1] int32
    pieces: Sequence[int]  # expert, length, expert, length, ...
    norm: str
    norm_eps: float
    sub_norm_eps: float
    activation: str
    save_pre: bool

    @property
    def split(self) -> bool:
        """Whether gate and value of the first layer are separate tensors."""
        return len(self.w1) > len(self.w2)

    @property
    def pre_columns(self) -> tuple[int, ...]:
        """Columns of the pre-activation of each expert: F, or 2 F if gated."""
        halves = 2 if self.activation in GATED else 1
        return tuple([halves * weight.shape[1] for weight in self.w2])

    def first_layer(self, e: int) -> list[tuple[Tensor, Tensor | None]]:
        """The weight and bias of an expert's first layer; of the gate and the value if split."""
        each = 2 if self.split else 1
        return [
            (self.w1[i], self.b1[i] if self.b1 else None) for i in range(each * e, each * (e + 1))
        ]


LISTS = Call._fields[1:9]  # the parameters: one tensor per expert, or none
WITHOUT_SUB_NORM = LISTS[:6]  # those of backends that have no norm of the hidden activations


class Facts(NamedTuple):
    """What decides, beside the device, whether a backend can run a call."""

    dtype: torch.dtype  # of the weights
    width: int  # D
    hidden: Sequence[int]  # E x F
    activation: str = "gelu"
    counted: bool = True  # whether the host knows the number of rows of each expert
    sub_norm: bool = False
    split: bool = False  # whether gate and value of the first layer are separate tensors


_MAX_WEIGHT = 2**31  # elements of w1, which kernels partly address in int32


def why_not_weight(facts: Facts) -> str | None:
    """The reason if the largest weight has more elements than a kernel can address, else None."""
    elements = facts.width * max(facts.hidden) * (2 if facts.activation in GATED else 1)
    if elements >= _MAX_WEIGHT:
        return f"a weight of {elements} elements is not below 2**31."
    return None


def pre_shape(call: Call) -> tuple[int, int]:
    """Shape [T, max F] (max 2 F if gated) of the saved pre-activation; (0, 0) if not saved."""
    if not call.save_pre:
        return (0, 0)
    return (call.x.shape[0], max(call.pre_columns))
