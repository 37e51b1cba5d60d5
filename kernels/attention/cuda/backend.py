"""The CUDA backend of shared_attention, for the tensor cores of sm_70 and sm_75: host side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import target
from ..._backends import cuda as cuda_target
from ..call import Call
from . import arguments as host
from .backward import launch_keys, launch_queries
from .bias_gradient import launch_table
from .forward import CUBIN, launch_forward

_MAX_HEAD_DIM = 128
_MAX_HEAD_DIM_OF_SM_75 = 64  # beyond it the backward needs over 64 KiB of shared memory


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int, entries: int) -> str | None:
    """The reason why :func:`forward` cannot run, or None."""
    if head_dim > _MAX_HEAD_DIM:
        return f"head dim {head_dim} is above {_MAX_HEAD_DIM}."
    if head_dim > _MAX_HEAD_DIM_OF_SM_75 and target.compute_capability(device) == (7, 5):
        return (
            f"head dim {head_dim} is above {_MAX_HEAD_DIM_OF_SM_75}, the largest for which the "
            "64 KiB of shared memory of sm_75 are enough."
        )
    return cuda_target.why_not(CUBIN, device, dtype)


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """out, in the shape of q, and float32 log-sum-exp of the scores, q.shape[:-1]; one launch."""
    q = call.q
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    if q.numel() == 0:
        return q.new_empty(q.shape), lse
    prepared = host.prepare(call)
    out = q.new_empty(prepared.q.shape)
    launch_forward(prepared, out, lse)
    return _unpadded(out, q), lse


def backward(
    dout: Tensor, out: Tensor, lse: Tensor, call: Call, needs: Sequence[bool]
) -> list[Tensor]:
    """Gradients of q, k, v and, if needed, the table, in two or three launches."""
    q, table = call.q, call.table
    if q.numel() == 0:
        return [torch.zeros_like(t) for t in call[:4] if t is not None]
    prepared = host.prepare(call)
    out, dout = (host.readable(t, prepared.length) for t in (out, dout))
    dq, dk, dv = (q.new_empty(prepared.q.shape) for _ in range(3))
    # Heads are outermost, because a CTA reads the values of adjacent tokens of one head.
    lse = lse.reshape(-1, lse.shape[-1]).t().contiguous().t()
    delta = torch.empty_like(lse)
    launch_queries(prepared, out, dout, lse, dq, delta)
    launch_keys(prepared, dout, lse, delta, dk, dv)
    sign = host.sign_of(call.scale)
    if sign < 0:
        dq.neg_()
    elif sign == 0:
        dq.zero_()
    grads = [_unpadded(t, q) for t in (dq, dk, dv)]
    if table is None:
        return grads
    if not needs[3]:
        return [*grads, q.new_empty(0)]
    dtable = launch_table(prepared, dout, lse, delta)[: len(table)]
    return [*grads, dtable.to(table.dtype).contiguous()]


def _unpadded(t: Tensor, q: Tensor) -> Tensor:
    return t[..., : q.shape[-1]].contiguous()
