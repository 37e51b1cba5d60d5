"""The torch.library operations vlmo::attention_fwd and vlmo::attention_bwd.

One schema, one fake and one autograd formula for all backends: the backend is an argument.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmo.kernels.arguments import without_autocast
from vlmo.kernels.attention import reference
from vlmo.kernels.attention.reference import Call
from vlmo.kernels.dispatch import Absent, Backend

BACKENDS: dict[str, Backend] = {
    "cuda": Absent("shared_attention has no CUDA kernel in this version."),
    "triton": Absent("shared_attention has no Triton kernel in this version."),
    "reference": reference,
}
_IMPLEMENTATIONS = {"reference": reference}


@torch.library.custom_op("vlmo::attention_fwd", mutates_args=())
def attention_fwd(
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


@attention_fwd.register_fake
def _(q, k, v, *_):
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=wide)


@torch.library.custom_op("vlmo::attention_bwd", mutates_args=())
def attention_bwd(
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


@attention_bwd.register_fake
def _(dout, out, lse, q, k, v, table, *rest):
    grads = [t.new_empty(t.shape) for t in (q, k, v)]
    needs_table = rest[-2]
    return [*grads, table.new_empty(table.shape) if needs_table else q.new_empty(0)]


def _save(ctx, inputs, output):
    call, backend = Call(*inputs[:-1]), inputs[-1]
    ctx.constants = (call.max_length, call.causal, call.scale, backend)
    # max_length stands between the tensors of the schema; the optional ones may be None.
    ctx.save_for_backward(*output, *call[:10], call.positions)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, _):
    if dout is None:  # out was not used
        return (None,) * 15
    out, lse, *tensors, positions = ctx.saved_tensors
    max_length, causal, scale, backend = ctx.constants
    needs_table = ctx.needs_input_grad[3]
    dq, dk, dv, dtable = attention_bwd(
        *(dout.contiguous(), out, lse, *tensors, max_length, positions, causal, scale),
        *(needs_table, backend),
    )
    return dq, dk, dv, dtable if needs_table else None, *([None] * 11)


attention_fwd.register_autograd(_backward, setup_context=_save)
