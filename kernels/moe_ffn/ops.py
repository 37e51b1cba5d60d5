"""The torch.library operations vlmo::moe_ffn_fwd and vlmo::moe_ffn_bwd.

One schema, one fake and one autograd formula for all backends: the backend is an argument.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vlmo.kernels.arguments import without_autocast
from vlmo.kernels.dispatch import Absent, Backend
from vlmo.kernels.moe_ffn import reference
from vlmo.kernels.moe_ffn.reference import Call

BACKENDS: dict[str, Backend] = {
    "cuda": Absent("moe_ffn has no CUDA kernel in this version."),
    "triton": Absent("moe_ffn has no Triton kernel in this version."),
    "reference": reference,
}
_IMPLEMENTATIONS = {"reference": reference}

# The tensors that may get a gradient: lists over experts first, then single ones.
_LISTS = ("w1", "w2", "b1", "b2", "norm_weight", "norm_bias")


@torch.library.custom_op("vlmo::moe_ffn_fwd", mutates_args=())
def moe_ffn_fwd(
    x: Tensor,  # [T, D]
    w1: Sequence[Tensor],
    w2: Sequence[Tensor],
    b1: Sequence[Tensor],
    b2: Sequence[Tensor],
    norm_weight: Sequence[Tensor],
    norm_bias: Sequence[Tensor],
    layer_scale: Tensor | None,  # [D]
    token_scale: Tensor | None,  # [T]
    residual: Tensor | None,  # [T, D]
    ids: Tensor | None,  # [T] int32
    pieces: Sequence[int],  # expert, length, expert, length, ...
    norm: str,
    norm_eps: float,
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """y [T, D] and the pre-activation [T, max F] (max 2 F if gated) that the backward reads."""
    lists = (w1, w2, b1, b2, norm_weight, norm_bias)
    call = Call(
        x, *lists, layer_scale, token_scale, residual, ids, pieces, norm, norm_eps, activation
    )
    with without_autocast(x.device):
        return _IMPLEMENTATIONS[backend].forward(call)


@moe_ffn_fwd.register_fake
def _(
    x, w1, w2, b1, b2, norm_weight, norm_bias, layer_scale, token_scale, residual, ids, pieces, *_
):
    y = x.new_empty(x.shape, dtype=w2[0].dtype if residual is None else residual.dtype)
    pre = x.new_empty((x.shape[0], max(weight.shape[0] for weight in w1)), dtype=w1[0].dtype)
    return y, pre


@torch.library.custom_op("vlmo::moe_ffn_bwd", mutates_args=())
def moe_ffn_bwd(
    dy: Tensor,  # [T, D]
    pre: Tensor,
    x: Tensor,
    w1: Sequence[Tensor],
    w2: Sequence[Tensor],
    b1: Sequence[Tensor],
    b2: Sequence[Tensor],
    norm_weight: Sequence[Tensor],
    norm_bias: Sequence[Tensor],
    layer_scale: Tensor | None,
    token_scale: Tensor | None,
    ids: Tensor | None,
    pieces: Sequence[int],
    norm: str,
    norm_eps: float,
    activation: str,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    """Gradients of x, w1.., w2.., b1.., b2.., norm_weight.., norm_bias.., layer_scale, in order.

    ``needs`` says which of them are wanted; the others come back empty, of shape (0,).
    """
    lists = (w1, w2, b1, b2, norm_weight, norm_bias)
    call = Call(x, *lists, layer_scale, token_scale, None, ids, pieces, norm, norm_eps, activation)
    with without_autocast(x.device):
        return _IMPLEMENTATIONS[backend].backward(dy, pre, call, needs)


def _differentiable(call: Call) -> list[Tensor]:
    """The tensors of ``call`` in the order in which moe_ffn_bwd returns their gradients."""
    tensors = [call.x, *(tensor for name in _LISTS for tensor in getattr(call, name))]
    return tensors if call.layer_scale is None else [*tensors, call.layer_scale]


@moe_ffn_bwd.register_fake
def _(dy, pre, x, w1, w2, b1, b2, norm_weight, norm_bias, layer_scale, token_scale, *rest):
    needs = rest[-2]
    lists = (w1, w2, b1, b2, norm_weight, norm_bias)
    call = Call(x, *lists, layer_scale, token_scale, None, None, (), "none", 0.0, "gelu")
    tensors = _differentiable(call)
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        if need
        else tensor.new_empty(0)
        for tensor, need in zip(tensors, needs, strict=True)
    ]


def _save(ctx, inputs, output):
    call, backend = Call(*inputs[:-1]), inputs[-1]
    ctx.call_constants = (call.pieces, call.norm, call.norm_eps, call.activation, backend)
    ctx.counts = [len(getattr(call, name)) for name in _LISTS]
    ctx.has = (call.layer_scale is not None, call.token_scale is not None, call.ids is not None)
    ctx.residual_dtype = None if call.residual is None else call.residual.dtype
    optional = [t for t in (call.token_scale, call.ids) if t is not None]
    ctx.save_for_backward(output[1], *_differentiable(call), *optional)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or the pre-activation would get zeros of its size


def _backward(ctx, dy, _):
    pre, x, *saved = ctx.saved_tensors
    saved = iter(saved)
    lists = [[next(saved) for _ in range(count)] for count in ctx.counts]
    layer_scale, token_scale, ids = (next(saved) if has else None for has in ctx.has)
    wanted = ctx.needs_input_grad
    needs = [wanted[0], *(need for flags in wanted[1:7] for need in flags or [])]
    needs += [wanted[7]] if layer_scale is not None else []
    pieces, norm, norm_eps, activation, backend = ctx.call_constants

    grads: Iterator[Tensor | None] = itertools.repeat(None)  # y was not used
    if dy is not None:
        flat = moe_ffn_bwd(
            *(dy.contiguous(), pre, x, *lists, layer_scale, token_scale, ids, pieces),
            *(norm, norm_eps, activation, needs, backend),
        )
        grads = (grad if need else None for grad, need in zip(flat, needs, strict=True))
    dx = next(grads)
    dlists = [[next(grads) for _ in range(count)] for count in ctx.counts]
    dlayer_scale = next(grads) if layer_scale is not None else None
    dresidual = dy if wanted[9] else None  # y has the residual's dtype
    # torch.library takes an empty list of integers for an empty list of tensors.
    dpieces: list | None = None if pieces else []
    return dx, *dlists, dlayer_scale, None, dresidual, None, dpieces, *([None] * 4)


moe_ffn_fwd.register_autograd(_backward, setup_context=_save)
