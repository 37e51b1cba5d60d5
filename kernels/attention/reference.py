"""shared_attention in plain PyTorch with autograd: the test oracle and the backend "reference"."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import without_autocast
from .call import Call


def why_not(*facts: Any) -> str | None:
    return None


def shared_attention_reference(call: Call) -> Tensor:
    """out, in the shape of q, for any device and dtype; written for clarity, not for speed."""
    with without_autocast(call.q.device):
        dense = _pad(call)
        out = _probabilities(dense).to(call.v.dtype) @ dense.v.transpose(1, 2)
        return _unpad(out.transpose(1, 2), call)


def _probabilities(call: Call) -> Tensor:
    """softmax(q k^T * scale + bias) [B, H, N, N] in float32 or better.

    A query without a valid key gets zeros.
    """
    q, k = call.q.transpose(1, 2), call.k.transpose(1, 2)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q * call.scale).to(wide) @ k.to(wide).transpose(2, 3)
    if call.table is not None:
        # The gradient of an embedding is deterministic; that of an index uses atomic additions.
        bias = F.embedding(_index(call), call.table.to(wide))  # [N, N, H] or [B, N, N, H]
        scores = scores + bias.movedim(-1, -3)
    mask = _mask(call)
    if mask is None:
        return scores.softmax(3)
    # Not -inf: softmax of a row that is all -inf is NaN.
    scores = scores.masked_fill(~mask, torch.finfo(wide).min)
    return scores.softmax(3).masked_fill(~mask, 0)


def _mask(call: Call) -> Tensor | None:
    """True for (query, key) pairs that attend: broadcasts to [B, H, N, N]; None for all."""
    valid = _valid_keys(call)
    mask = None if valid is None else valid[:, None, None, :]
    if call.causal:
        key = torch.arange(call.q.shape[1], device=call.q.device)
        earlier = (key[None, :] <= key[:, None])[None, None]
        mask = earlier if mask is None else mask & earlier
    return mask


def _valid_keys(call: Call) -> Tensor | None:
    """True for keys of a dense call that may be attended to: [B, N]; None for all."""
    mask = call.key_mask
    if call.key_lengths is not None:
        key = torch.arange(call.q.shape[1], device=call.q.device)
        valid = key < call.key_lengths[:, None]
        mask = valid if mask is None else mask & valid
    return mask


def _index(call: Call) -> Tensor:
    """Table row of each pair: [N, N], or [B, N, N] with positions."""
    assert call.matrix is not None
    if call.positions is None:
        length = call.q.shape[1]
        return call.matrix[:length, :length]
    return call.matrix[call.positions[:, :, None], call.positions[:, None, :]]


def _pad(call: Call) -> Call:
    """The call in dense form with zeros at masked keys; packed sequences are padded."""
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
    """Set k and v to zero at masked keys, because a weight of 0 times NaN would be NaN."""
    valid = _valid_keys(call)
    if valid is None:
        return call
    k, v = (torch.where(valid[:, :, None, None], t, 0) for t in (call.k, call.v))
    others: list[Any] = [*call]
    return Call(call.q, k, v, *others[3:])


def _pad_rows(t: Tensor, call: Call) -> Tensor:
    """[T, ...] to [B, max_length, ...], padded with zeros; a dense tensor is unchanged."""
    if call.offsets is None:
        return t
    start, stop = call.offsets[:-1, None], call.offsets[1:, None]
    row = start + torch.arange(call.max_length, device=t.device)  # [B, max_length]
    inside = (row < stop).view(*row.shape, *[1] * (t.dim() - 1))
    return torch.where(inside, t[row.clamp(max=max(t.shape[0] - 1, 0))], 0)


def _unpad(t: Tensor, call: Call) -> Tensor:
    """[B, max_length, ...] back to [T, ...]; a dense tensor becomes contiguous."""
    if call.offsets is None:
        return t.contiguous()
    token = torch.arange(call.q.shape[0], device=t.device)
    sequence = torch.searchsorted(call.offsets, token, right=True) - 1
    return t[sequence, token - call.offsets[sequence]]
