"""Launches the kernels of shared_attention: one forward, two or three backward.

Both begin with one more if they expand the bias (``expands`` in arguments.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..call import Call
from . import tiles
from .arguments import Work
from .backward import attention_bwd_kv_kernel, attention_bwd_q_kernel
from .bias_gradient import attention_bwd_table_kernel
from .forward import attention_fwd_kernel


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """out, in the shape of q, and float32 log-sum-exp of the scores, q.shape[:-1]."""
    q = call.q
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)
    if q.numel():
        work, tile = Work(call), tiles.choose(q.device, q.dtype, q.shape[-1]).forward
        work.launch(attention_fwd_kernel, tile, work.programs(tile.block_q), (out, lse))
    return out, lse


def backward(
    dout: Tensor, out: Tensor, lse: Tensor, call: Call, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of q, k and v, and of the table if there is one (None if not needed)."""
    q = call.q
    dq, dk, dv = (tensor.new_empty(tensor.shape) for tensor in (q, call.k, call.v))
    grads: list[Tensor | None] = [dq, dk, dv]
    dtable = None
    if call.table is not None:
        dtable = call.table.new_zeros(call.table.shape) if needs[3] else None
        grads.append(dtable)
    if q.numel() == 0:
        return grads
    work, row = Work(call, backward=True), tiles.choose(q.device, q.dtype, q.shape[-1])
    delta = torch.empty_like(lse)
    tensors = (out, dout, lse, delta, dq)
    work.launch(attention_bwd_q_kernel, row.q, work.programs(row.q.block_q), tensors, work.scale)
    tensors = (dout, lse, delta, dk, dv)
    work.launch(attention_bwd_kv_kernel, row.kv, work.programs(row.kv.block_k), tensors, work.scale)
    if dtable is not None:
        _table_gradient(work, row.table, (dout, lse, delta), dtable)
    return grads


def _table_gradient(
    work: Work,
    tile: tiles.Tile,
    tensors: tuple[Tensor, ...],
    dtable: Tensor,  # [entries, H], written
) -> None:
    entries, heads = dtable.shape
    chunk, parts = work.table_shares(tile)
    sums = dtable.new_zeros(heads, parts, entries, dtype=torch.int64)
    partial = dtable.new_zeros(heads, parts, entries, dtype=torch.float32)
    found = dtable.new_empty(heads, parts, chunk, dtype=torch.int32)
    tensors = (*tensors, sums, partial, found)
    work.launch(attention_bwd_table_kernel, tile, heads * parts, tensors, chunk, parts)
    dtable.copy_(partial.sum(1).t())
