"""FLOP formulas of the operations for :class:`torch.utils.flop_counter.FlopCounterMode`."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .attention.call import Call as AttentionCall
from .moe_ffn.call import Call as MoeFfnCall


def register_formulas() -> None:
    """Register FLOP formulas with PyTorch's counter if this process has imported it."""
    # Importing it here would import Triton, which reads its environment variables at import.
    if torch.compiler.is_compiling() or "torch.utils.flop_counter" not in sys.modules:
        return
    _register()
    for mode in _get_current_dispatch_mode_stack():
        # A counter copies the formulas that are registered when it is created.
        known = getattr(getattr(mode, "counter", mode), "flop_registry", None)
        if known is not None and torch.ops.vlmo.moe_ffn_fwd not in known:
            known.update(_register())


@functools.cache
def _register() -> dict[Any, Callable[..., int]]:
    """The registered formulas by operation."""
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    operations = torch.ops.vlmo
    formulas: dict[Any, Callable[..., int]] = {
        operations.moe_ffn_fwd: _moe_ffn_forward,
        operations.moe_ffn_bwd: _moe_ffn_backward,
        operations.moe_linear_fwd: _moe_ffn_forward,
        operations.moe_linear_bwd: _moe_linear_backward,
        operations.attention_fwd: _attention_forward,
        operations.attention_bwd: _attention_backward,
    }
    for operation, formula in formulas.items():
        register_flop_formula(operation, get_raw=True)(formula)
    return {operation: flop_registry[operation] for operation in formulas}


def _moe_ffn_forward(*inputs, out_val=None) -> int:
    call = MoeFfnCall(*inputs[:-1])
    return sum(first + second for first, second in _products(call))


def _moe_ffn_backward(grad, saved, *inputs, out_val=None) -> int:
    """Two products per product of the forward, less those for gradients that are not needed.

    The first product of the forward is added if its pre-activation is recomputed.
    """
    *fields, needs, _ = inputs
    call, (pre,) = MoeFfnCall(*fields), saved
    count, experts = len(call.w1), len(call.w2)
    of_w1, of_w2 = needs[1 : 1 + count], needs[1 + count : 1 + count + experts]
    total = 0
    for e, (first, second) in enumerate(_products(call)):
        total += first * (needs[0] + (pre.numel() == 0)) + second * (1 + of_w2[e])
        own = of_w1[2 * e : 2 * e + 2] if call.split else of_w1[e : e + 1]
        total += first * sum(own) // len(own)
    return total


def _moe_linear_backward(grad, saved, *inputs, out_val=None) -> int:
    """A product for x and one for each weight that needs a gradient."""
    *fields, needs, _ = inputs
    call = MoeFfnCall(*fields)
    of_weight = needs[1 : 1 + len(call.w2)]
    return sum(n * (needs[0] + of_weight[e]) for e, (_, n) in enumerate(_products(call)))


def _products(call: MoeFfnCall) -> list[tuple[int, int]]:
    """Operations of the two products of each expert; none of the first for moe_linear."""
    width = call.x.shape[1]
    return [
        (2 * tokens * width * columns, 2 * tokens * w2.numel())
        for tokens, columns, w2 in zip(_tokens(call), call.pre_columns, call.w2, strict=True)
    ]


def _tokens(call: MoeFfnCall) -> Sequence[int]:
    """Tokens of each expert; equal shares if ids have no values (FakeTensor, meta)."""
    total, experts = call.tokens, len(call.w2)
    if call.streams:
        return call.counts
    if call.pieces:
        counts = [0] * experts
        for expert, length in zip(call.pieces[::2], call.pieces[1::2], strict=True):
            counts[expert] += length
        return [count * (total // sum(counts)) for count in counts]
    ids = call.ids
    if ids is None or type(ids) is not Tensor or ids.is_meta:
        return [total // experts + (e < total % experts) for e in range(experts)]
    return torch.bincount(ids.long(), minlength=experts).tolist()


def _attention_forward(*inputs, out_val=None) -> int:
    """Scores and weighted values: 4 K operations per pair of a query and a key."""
    call = AttentionCall(*inputs[:-1])
    return 4 * _pairs(call) * call.q.shape[-2] * call.q.shape[-1]


def _attention_backward(grad, saved, *inputs, out_val=None) -> int:
    """Five products, as PyTorch counts its own attention: the scores are recomputed."""
    call = AttentionCall(*inputs[:-2])
    return 10 * _pairs(call) * call.q.shape[-2] * call.q.shape[-1]


def _pairs(call: AttentionCall) -> int:
    """Number of (query, key) pairs; masked pairs count, as in PyTorch's own formulas."""
    offsets = call.offsets
    if offsets is None:
        return call.q.shape[0] * call.q.shape[1] ** 2
    if type(offsets) is not Tensor or offsets.is_meta:
        return call.q.shape[0] * call.max_length
    return int(offsets.diff().long().square().sum())
