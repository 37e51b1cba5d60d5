"""The torch.library operations vlmo::moe_ffn_fwd and vlmo::moe_ffn_bwd, and a shorter way to them.

One schema, one fake and one autograd formula for all backends: the backend is an argument.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..arguments import without_autocast
from ..dispatch import Backend, runs_eagerly
from ..flops import register_formulas
from . import cpu as cpu_impl
from . import reference
from .call import Call
from .cuda import backend as cuda_impl
from .triton import backend as triton_impl

BACKENDS: dict[str, Backend] = {
    "cuda": cuda_impl,
    "triton": triton_impl,
    "cpu": cpu_impl,
    "reference": reference,
}
_IMPLEMENTATIONS = {
    "cuda": cuda_impl,
    "triton": triton_impl,
    "cpu": cpu_impl,
    "reference": reference,
}


def run(call: Call, backend: str) -> Tensor:
    """y [T, D], differentiable; ``call.save_pre`` counts only if autograd records the call.

    torch.library costs more time on the host than a kernel takes on a GPU. It is for those who
    need to see an operation: torch.compile, modes, subclasses of tensors. Other calls go past it.
    """
    leaves = (call.residual, *_leaves(call))
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves)
    if call.save_pre and not recorded:
        fields: list[Any] = [*call]  # Dynamo of torch 2.8 cannot trace _replace()
        fields[-1] = False
        call = Call(*fields)
    if not runs_eagerly((*leaves, *_constants(call))):
        register_formulas()
        return moe_ffn_fwd(*call, backend)[0]
    if recorded:
        return _Direct.apply(call, backend, *leaves)
    return _forward(*call, backend)[0]


def _leaves(call: Call) -> tuple[Tensor | None, ...]:
    """The tensors that may get a gradient from the backward, in the order of its schema."""
    # Nor call[1:7].
    lists = (call.w1, call.w2, call.b1, call.b2, call.norm_weight, call.norm_bias)
    return (call.x, *itertools.chain.from_iterable(lists), call.layer_scale)


def _constants(call: Call) -> tuple[Tensor | None, ...]:
    return (call.token_scale, call.ids, call.rows, call.offsets)


def _forward(
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
    """y [T, D] and what the backward reads: the pre-activation, of the backend's pre_shape."""
    call = Call(
        *(x, w1, w2, b1, b2, norm_weight, norm_bias, layer_scale, token_scale, residual),
        *(ids, rows, offsets, pieces, norm, norm_eps, activation, save_pre),
    )
    with without_autocast(x.device):
        return _IMPLEMENTATIONS[backend].forward(call)


moe_ffn_fwd = torch.library.custom_op("vlmo::moe_ffn_fwd", _forward, mutates_args=())


@moe_ffn_fwd.register_fake
def _(*inputs):
    call = Call(*inputs[:-1])
    dtype = call.w2[0].dtype if call.residual is None else call.residual.dtype
    y = call.x.new_empty(call.x.shape, dtype=dtype)
    shape = _IMPLEMENTATIONS[inputs[-1]].pre_shape(call)
    return y, call.x.new_empty(shape, dtype=call.w1[0].dtype)


def _backward(
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


moe_ffn_bwd = torch.library.custom_op("vlmo::moe_ffn_bwd", _backward, mutates_args=())


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


def _save(ctx, call: Call, pre: Tensor, backend: str) -> None:
    """Leave in ``ctx`` what _gradients needs."""
    ctx.settings = (call.pieces, call.norm, call.norm_eps, call.activation, backend)
    ctx.counts = [len(tensors) for tensors in call[1:7]]
    ctx.save_for_backward(pre, *_leaves(call), *_constants(call))
    ctx.set_materialize_grads(False)  # or the pre-activation would get zeros of its size


def _gradients(ctx, dy: Tensor | None, wanted: Sequence[bool]) -> list[Tensor | None]:
    """Gradients of _leaves(), None for those that are not ``wanted``."""
    if dy is None or not any(wanted):  # dy is None if y was not used
        return [None] * len(wanted)
    saved = ctx.saved_tensors
    pre, x, *tensors = saved
    rest = iter(tensors)
    lists = [list(itertools.islice(rest, count)) for count in ctx.counts]
    layer_scale, *constants = rest
    needs = list(wanted if layer_scale is not None else wanted[:-1])
    *settings, backend = ctx.settings
    # With create_graph the registered operation is needed: autograd refuses to differentiate it.
    direct = not torch.is_grad_enabled() and runs_eagerly((dy, *saved))
    register_formulas()
    flat = (_backward if direct else moe_ffn_bwd)(
        *(dy.contiguous(), pre, x, *lists, layer_scale, *constants, *settings, needs, backend)
    )
    grads = [grad if need else None for grad, need in zip(flat, needs, strict=True)]
    return grads if layer_scale is not None else [*grads, None]


class _Direct(torch.autograd.Function):
    """The operation without torch.library. Autograd sees ``leaves``, but not inside ``call``."""

    @staticmethod
    def forward(ctx, call: Call, backend: str, residual: Tensor | None, *leaves: Tensor | None):
        y, pre = _forward(*call, backend)
        _save(ctx, call, pre, backend)
        return y

    @staticmethod
    def backward(ctx, dy):
        _, _, wants_residual, *wanted = ctx.needs_input_grad
        # y has the residual's dtype
        return None, None, dy if wants_residual else None, *_gradients(ctx, dy, wanted)


def _setup(ctx, inputs, output):
    _save(ctx, Call(*inputs[:-1]), output[1], inputs[-1])
    ctx.mark_non_differentiable(output[1])


def _nested_gradients(ctx, dy, _):
    wanted = ctx.needs_input_grad
    flags = [flag for flags in wanted[1:7] for flag in flags or ()]
    grads = iter(_gradients(ctx, dy, [wanted[0], *flags, wanted[7]]))
    dx = next(grads)
    lists = [list(itertools.islice(grads, count)) for count in ctx.counts]
    dresidual = dy if wanted[9] else None
    # torch.library takes an empty list of integers for an empty list of tensors.
    dpieces: list | None = None if ctx.settings[0] else []
    return dx, *lists, next(grads), None, dresidual, *([None] * 3), dpieces, *([None] * 5)


moe_ffn_fwd.register_autograd(_nested_gradients, setup_context=_setup)


def _refuse(ctx, *_):
    raise NotImplementedError("moe_ffn: second derivatives are not available.")


moe_ffn_bwd.register_autograd(_refuse)
