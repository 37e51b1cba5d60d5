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
from vlmo.kernels.moe_ffn.reference import Call, pre_shape

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
    rows: Tensor | None,  # [T] int32
    offsets: Tensor | None,  # [E + 1] int32
    pieces: Sequence[int],  # expert, length, expert, length, ...
    norm: str,
    norm_eps: float,
    activation: str,
    save_pre: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """y [T, D] and the pre-activation that the backward reads, of pre_shape."""
    call = Call(
        *(x, w1, w2, b1, b2, norm_weight, norm_bias, layer_scale, token_scale, residual),
        *(ids, rows, offsets, pieces, norm, norm_eps, activation, save_pre),
    )
    with without_autocast(x.device):
        return _IMPLEMENTATIONS[backend].forward(call)


@moe_ffn_fwd.register_fake
def _(*inputs):
    call = Call(*inputs[:-1])
    dtype = call.w2[0].dtype if call.residual is None else call.residual.dtype
    y = call.x.new_empty(call.x.shape, dtype=dtype)
    return y, call.x.new_empty(pre_shape(call), dtype=call.w1[0].dtype)


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
    rows: Tensor | None,
    offsets: Tensor | None,
    pieces: Sequence[int],
    norm: str,
    norm_eps: float,
    activation: str,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    """Gradients of x, w1.., w2.., b1.., b2.., norm_weight.., norm_bias.., layer_scale, in order.

    ``needs`` says which of them are wanted; the others come back empty, of shape (0,). An empty
    ``pre`` was not kept by the forward and is computed again.
    """
    call = Call(
        *(x, w1, w2, b1, b2, norm_weight, norm_bias, layer_scale, token_scale, None),
        *(ids, rows, offsets, pieces, norm, norm_eps, activation, pre.numel() > 0),
    )
    with without_autocast(x.device):
        return _IMPLEMENTATIONS[backend].backward(dy, pre, call, needs)


@moe_ffn_bwd.register_fake
def _(dy, pre, x, w1, w2, b1, b2, norm_weight, norm_bias, layer_scale, *rest):
    needs = rest[-2]
    tensors = [x, *w1, *w2, *b1, *b2, *norm_weight, *norm_bias]
    tensors += [] if layer_scale is None else [layer_scale]
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
    optional = (call.layer_scale, call.token_scale, call.ids, call.rows, call.offsets)
    lists = (tensor for name in _LISTS for tensor in getattr(call, name))
    ctx.save_for_backward(output[1], call.x, *lists, *optional)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or the pre-activation would get zeros of its size


def _backward(ctx, dy, _):
    pre, x, *saved = ctx.saved_tensors
    saved = iter(saved)
    lists = [[next(saved) for _ in range(count)] for count in ctx.counts]
    layer_scale, token_scale, ids, rows, offsets = saved
    wanted = ctx.needs_input_grad
    needs = [wanted[0], *(need for flags in wanted[1:7] for need in flags or [])]
    needs += [wanted[7]] if layer_scale is not None else []
    pieces, norm, norm_eps, activation, backend = ctx.call_constants

    grads: Iterator[Tensor | None] = itertools.repeat(None)  # y was not used
    if dy is not None:
        flat = moe_ffn_bwd(
            *(dy.contiguous(), pre, x, *lists, layer_scale, token_scale, ids, rows, offsets),
            *(pieces, norm, norm_eps, activation, needs, backend),
        )
        grads = (grad if need else None for grad, need in zip(flat, needs, strict=True))
    dx = next(grads)
    dlists = [[next(grads) for _ in range(count)] for count in ctx.counts]
    dlayer_scale = next(grads) if layer_scale is not None else None
    dresidual = dy if wanted[9] else None  # y has the residual's dtype
    # torch.library takes an empty list of integers for an empty list of tensors.
    dpieces: list | None = None if pieces else []
    return dx, *dlists, dlayer_scale, None, dresidual, *([None] * 3), dpieces, *([None] * 5)


moe_ffn_fwd.register_autograd(_backward, setup_context=_save)
