"""The arguments of a call of moe_ffn, in the form that every backend receives."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

ACTIVATIONS = ("gelu", "gelu_tanh", "relu2", "swiglu", "geglu", "geglu_tanh")
GATED = ("swiglu", "geglu", "geglu_tanh")
TANH = ("gelu_tanh", "geglu_tanh")  # with GELU's approximation by tanh
NORMS = ("none", "layer", "rms")


class Call(NamedTuple):
    """The arguments of one call, in the order of the operation's schema."""

    x: Tensor  # [T, D]; [0, D] with streams
    # E x [F, D] or [2 F, D]; if gate and value are separate 2 E x [F, D], the gate of expert 0, its
    # value, the gate of expert 1, ... b1 likewise. moe_linear has no first layer: w1 is empty, and
    # F is D. In moe_ffn, O is D.
    w1: Sequence[Tensor]
    w2: Sequence[Tensor]  # E x [O, F]
    b1: Sequence[Tensor]
    b2: Sequence[Tensor]
    norm_weight: Sequence[Tensor]
    norm_bias: Sequence[Tensor]
    sub_norm_weight: Sequence[Tensor]  # E x [F]
    sub_norm_bias: Sequence[Tensor]
    layer_scale: Tensor | None  # [O]
    token_scale: Tensor | None  # [T]
    residual: Tensor | None  # [T, O]
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
    # With streams, the tokens of each expert are a tensor of their own. The streams take the place
    # of x, with pieces of one run per expert, and these of residual and token_scale.
    streams: Sequence[Tensor] = ()  # E x [T_e, D]
    residuals: Sequence[Tensor] = ()  # E x [T_e, D]
    token_scales: Sequence[Tensor] = ()  # E x [T_e]

    @property
    def counts(self) -> list[int]:
        """The lengths of the streams."""
        return [stream.shape[0] for stream in self.streams]

    @property
    def firsts(self) -> list[int]:
        """The first row of each stream in y."""
        return [0, *itertools.accumulate(self.counts)][:-1]

    @property
    def tokens(self) -> int:
        """T, of all streams if there are."""
        return sum(self.counts) if self.streams else self.x.shape[0]

    @property
    def result_dtype(self) -> torch.dtype:
        """The dtype of y."""
        added = self.residuals[0] if self.residuals else self.residual
        return (self.w2[0] if added is None else added).dtype

    def alone(self, e: int) -> Call:
        """The call of a stream and its expert alone."""
        x = self.streams[e]
        lists: list[Sequence[Tensor]] = []
        for name in LISTS:
            tensors = getattr(self, name)
            each = len(tensors) // len(self.w2)
            lists.append(tensors[each * e : each * (e + 1)])
        token_scale = self.token_scales[e] if self.token_scales else None
        residual = self.residuals[e] if self.residuals else None
        options = (self.norm, self.norm_eps, self.sub_norm_eps, self.activation, self.save_pre)
        fields: Any = (x, *lists, self.layer_scale, token_scale, residual, None, None, None)
        return Call._make((*fields, [0, x.shape[0]], *options, [], [], []))

    @property
    def split(self) -> bool:
        """Whether gate and value of the first layer are separate tensors."""
        return len(self.w1) > len(self.w2)

    @property
    def pre_columns(self) -> tuple[int, ...]:
        """Columns of the pre-activation of each expert: F, 2 F if gated, 0 in moe_linear."""
        halves = 0 if not self.w1 else 2 if self.activation in GATED else 1
        return tuple([halves * weight.shape[1] for weight in self.w2])

    def first_layer(self, e: int) -> list[tuple[Tensor, Tensor | None]]:
        """The weight and bias of an expert's first layer; of the gate and the value if split."""
        each = 2 if self.split else 1
        return [
            (self.w1[i], self.b1[i] if self.b1 else None) for i in range(each * e, each * (e + 1))
        ]

    @property
    def out(self) -> tuple[int, int]:
        """The shape [T, O] of y."""
        return self.tokens, self.w2[0].shape[0]


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
    streams: bool = False  # whether the tokens of each expert are a tensor of their own
    linear: int = 0  # O of moe_linear, whose ``hidden`` is E x D


_MAX_WEIGHT = 2**31  # elements of w1, which kernels partly address in int32


def why_not_weight(facts: Facts) -> str | None:
    """The reason if the largest weight has more elements than a kernel can address, else None."""
    elements = facts.width * max(facts.hidden) * (2 if facts.activation in GATED else 1)
    if facts.linear:
        elements = facts.width * facts.linear
    if elements >= _MAX_WEIGHT:
        return f"a weight of {elements} elements is not below 2**31."
    return None


def pre_shape(call: Call) -> tuple[int, int]:
    """Shape [T, max F] (max 2 F if gated) of the saved pre-activation; (0, 0) if not saved."""
    if not call.save_pre or not call.w1:
        return (0, 0)
    return (call.tokens, max(call.pre_columns))
