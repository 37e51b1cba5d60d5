"""shared_attention in plain PyTorch: the oracle, and the backend that runs everywhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .call import Call


def why_not(*facts: Any) -> str | None:
    return None


def shared_attention_reference(call: Call) -> Tensor:
    """The oracle: differentiable by autograd, any device and dtype, no trick of any kernel."""
    return forward(call)[0]


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """out, in the shape of q, and the scores' log-sum-exp in float32 or better, q.shape[:-1]."""
    dense = _pad(call)
    p, lse = _probabilities(dense)
    out = p.to(call.v.dtype) @ dense.v.transpose(1, 2)
    return _unpad(out.transpose(1, 2), call), _unpad(lse.transpose(1, 2), call)


def backward(dout: Tensor, out: Tensor, lse: Tensor, call: Call, needs_table: bool) -> list[Tensor]:
    """Gradients of q, k, v and the table (empty unless wanted).

    ``out`` and ``lse`` are for kernels that rebuild probabilities; the oracle starts from scratch.
    """
    dense = _pad(call)
    q, k, v = (t.transpose(1, 2) for t in (dense.q, dense.k, dense.v))  # [B, H, N, K]
    wide = _accumulator(q)
    dout = _pad_rows(dout, call).transpose(1, 2)
    p, _ = _probabilities(dense)

    dv = p.to(v.dtype).transpose(2, 3) @ dout
    dp = (dout @ v.transpose(2, 3)).to(wide)
    # Equal to rowsum(dout * out), but free of the rounding of out: a lone key gets exactly 0.
    delta = (p * dp).sum(3, keepdim=True)
    ds = p * (dp - delta)  # [B, H, N, N]
    dq = (ds @ k.to(wide)) * call.scale
    dk = ds.transpose(2, 3) @ (q * call.scale).to(wide)
    grads = [
        _unpad(d.transpose(1, 2), call).to(t.dtype)
        for d, t in zip((dq, dk, dv), (q, k, v), strict=True)
    ]
    if call.table is None or not needs_table:
        return [*grads, call.q.new_empty(0)]
    return [*grads, _table_gradient(ds, dense).to(call.table.dtype)]


def _probabilities(call: Call) -> tuple[Tensor, Tensor]:
    """softmax(q k^T * scale + bias) [B, H, N, N] and its log-sum-exp [B, H, N].

    In float32 or better. A query without a valid key gets zeros and a log-sum-exp of -inf.
    """
    q, k = call.q.transpose(1, 2), call.k.transpose(1, 2)
    wide = _accumulator(q)
    scores = (q * call.scale).to(wide) @ k.to(wide).transpose(2, 3)
    if call.table is not None:
        bias = call.table.to(wide)[_index(call)]  # [N, N, H] or [B, N, N, H]
        scores = scores + bias.movedim(-1, -3)
    mask = _mask(call)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    lse = scores.logsumexp(3)
    shift = lse.masked_fill(lse.isneginf(), 0)
    return (scores - shift[..., None]).exp(), lse


def _mask(call: Call) -> Tensor | None:
    """Which (query, key) pairs attend: broadcasts to [B, H, N, N]; None for all."""
    valid = _valid_keys(call)
    mask = None if valid is None else valid[:, None, None, :]
    if call.causal:
        key = torch.arange(call.q.shape[1], device=call.q.device)
        earlier = (key[None, :] <= key[:, None])[None, None]
        mask = earlier if mask is None else mask & earlier
    return mask


def _valid_keys(call: Call) -> Tensor | None:
    """Which keys of a dense call may be attended to: [B, N]; None for all."""
    mask = call.key_mask
    if call.key_lengths is not None:
        key = torch.arange(call.q.shape[1], device=call.q.device)
        valid = key < call.key_lengths[:, None]
        mask = valid if mask is None else mask & valid
    return mask


def _index(call: Call) -> Tensor:
    """The table row of each pair: [N, N], or [B, N, N] with positions."""
    assert call.matrix is not None
    if call.positions is None:
        length = call.q.shape[1]
        return call.matrix[:length, :length]
    return call.matrix[call.positions[:, :, None], call.positions[:, None, :]]


def _table_gradient(ds: Tensor, call: Call) -> Tensor:
    """Sum of the score gradients of all pairs that read each row: [entries, H]."""
    assert call.table is not None
    index = _index(call)
    ds = ds.sum(0) if call.positions is None else ds
    pairs = ds.movedim(-3, -1).reshape(-1, ds.shape[-3])
    # Sorts on a GPU instead of adding atomically, so that the sum is repeatable.
    return torch.ops.aten.embedding_dense_backward(
        pairs.contiguous(), index.reshape(-1).long(), call.table.shape[0], -1, False
    )


def _pad(call: Call) -> Call:
    """A dense call whose masked keys are zeros; a packed one is padded to max_length."""
    if call.offsets is None:
        return _without_masked_keys(call)
    q, k, v = (_pad_rows(t, call) for t in (call.q, call.k, call.v))
    positions = call.positions
    if positions is not None:
        positions = _pad_rows(positions, call)
    return Call(  # Dynamo of torch 2.8 cannot trace _replace()
        *(q, k, v, call.table, call.matrix, call.affine, call.short),
        key_mask=None,
        key_lengths=call.offsets.diff(),
        offsets=None,
        max_length=call.max_length,
        positions=positions,
        causal=call.causal,
        scale=call.scale,
    )


def _without_masked_keys(call: Call) -> Call:
    """Zeros in k and v under masked keys: what a weight of 0 is multiplied with may be NaN."""
    valid = _valid_keys(call)
    if valid is None:
        return call
    k, v = (torch.where(valid[:, :, None, None], t, 0) for t in (call.k, call.v))
    others: list[Any] = [*call]
    return Call(call.q, k, v, *others[3:])


def _pad_rows(t: Tensor, call: Call) -> Tensor:
    """[T, ...] to [B, max_length, ...], zeros behind each sequence; a dense tensor unchanged."""
    if call.offsets is None:
        return t
    start, stop = call.offsets[:-1, None], call.offsets[1:, None]
    row = start + torch.arange(call.max_length, device=t.device)  # [B, max_length]
    inside = (row < stop).view(*row.shape, *[1] * (t.dim() - 1))
    return torch.where(inside, t[row.clamp(max=max(t.shape[0] - 1, 0))], 0)


def _unpad(t: Tensor, call: Call) -> Tensor:
    """[B, max_length, ...] back to [T, ...]; a dense tensor is made contiguous."""
    if call.offsets is None:
        return t.contiguous()
    token = torch.arange(call.q.shape[0], device=t.device)
    sequence = torch.searchsorted(call.offsets, token, right=True) - 1
    return t[sequence, token - call.offsets[sequence]]


def _accumulator(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)
