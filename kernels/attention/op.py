"""The torch.library operations vlmo::attention_fwd and vlmo::attention_bwd, and a shorter way.

One schema, one fake and one autograd formula for all backends: the backend is an argument.
"""

from __future__ import annotations

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
    """out, in the shape of q; differentiable.

    Goes past torch.library where nobody needs to see an operation: see ``run`` of moe_ffn.
    """
    if not runs_eagerly(tensor for tensor in call if not isinstance(tensor, int | float)):
        register_formulas()
        return attention_fwd(*call, backend)[0]
    leaves = call[:4]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves):
        return _Direct.apply(call, backend, *leaves)
    return _forward(*call, backend)[0]


def _forward(
    q: Tensor,  # [B, N, H, K], or [T, H, K] with offsets
    k: Tensor,
    v: Tensor,
    table: Tensor | None,  # [entries, H]
    index: Tensor | None,  # [M, M] int32
    affine: Tensor | None,  # [M, 4] int32
    short: Tensor | None,  # [M, P] int16
    key_mask: Tensor | None,  # [B, N] bool
    key_lengths: Tensor | None,  # [B]
    offsets: Tensor | None,  # [B + 1]
    max_length: int,
    positions: Tensor | None,  # q.shape[:-2]
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """out, in the shape of q, and the scores' log-sum-exp, q.shape[:-1], in float32 or better."""
    call = Call(
        *(q, k, v, table, index, affine, short, key_mask, key_lengths),
        *(offsets, max_length, positions, causal, scale),
    )
    with without_autocast(q.device):
        return _IMPLEMENTATIONS[backend].forward(call)


attention_fwd = torch.library.custom_op("vlmo::attention_fwd", _forward, mutates_args=())


@attention_fwd.register_fake
def _(q, k, v, *_):
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=wide)


def _backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    index: Tensor | None,
    affine: Tensor | None,
    short: Tensor | None,
    key_mask: Tensor | None,
    key_lengths: Tensor | None,
    offsets: Tensor | None,
    max_length: int,
    positions: Tensor | None,
    causal: bool,
    scale: float,
    needs_table: bool,
    backend: str,
) -> list[Tensor]:
    """Gradients of q, k, v and the table; the last is empty, of shape (0,), unless wanted."""
    call = Call(
        *(q, k, v, table, index, affine, short, key_mask, key_lengths),
        *(offsets, max_length, positions, causal, scale),
    )
    with without_autocast(q.device):
        return _IMPLEMENTATIONS[backend].backward(dout, out, lse, call, needs_table)


attention_bwd = torch.library.custom_op("vlmo::attention_bwd", _backward, mutates_args=())


@attention_bwd.register_fake
def _(dout, out, lse, q, k, v, table, *rest):
    grads = [t.new_empty(t.shape) for t in (q, k, v)]
    needs_table = rest[-2]
    return [*grads, table.new_empty(table.shape) if needs_table else q.new_empty(0)]


def _save(ctx, call: Call, out: Tensor, lse: Tensor, backend: str) -> None:
    """Leave in ``ctx`` what _gradients needs."""
    ctx.constants = (call.max_length, call.causal, call.scale, backend)
    # max_length stands between the tensors of the schema; the optional ones may be None.
    ctx.save_for_backward(out, lse, *call[:10], call.positions)
    ctx.set_materialize_grads(False)


def _gradients(ctx, dout: Tensor | None, needs_table: bool) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v and the table."""
    if dout is None:  # out was not used
        return None, None, None, None
    saved = ctx.saved_tensors
    out, lse, *tensors, positions = saved
    max_length, causal, scale, backend = ctx.constants
    # With create_graph the registered operation is needed: autograd refuses to differentiate it.
    direct = not torch.is_grad_enabled() and runs_eagerly((dout, *saved))
    register_formulas()
    call = Call._make((*tensors, max_length, positions, causal, scale))
    dq, dk, dv, dtable = (_backward if direct else attention_bwd)(
        dout.contiguous(), out, lse, *call, needs_table, backend
    )
    return dq, dk, dv, dtable if needs_table else None


class _Direct(torch.autograd.Function):
    """The operation without torch.library. Autograd sees ``leaves``, but not inside ``call``."""

    @staticmethod
    def forward(ctx, call: Call, backend: str, *leaves: Tensor | None):
        out, lse = _forward(*call, backend)
        _save(ctx, call, out, lse, backend)
        return out

    @staticmethod
    def backward(ctx, dout):
        return None, None, *_gradients(ctx, dout, ctx.needs_input_grad[5])


def _setup(ctx, inputs, output):
    out, lse = output
    _save(ctx, Call(*inputs[:-1]), out, lse, inputs[-1])
    ctx.mark_non_differentiable(lse)


def _registered_gradients(ctx, dout, _):
    return *_gradients(ctx, dout, ctx.needs_input_grad[3]), *([None] * 11)


attention_fwd.register_autograd(_registered_gradients, setup_context=_setup)


def _refuse(ctx, *_):
    raise NotImplementedError("shared_attention: second derivatives are not available.")


attention_bwd.register_autograd(_refuse)
