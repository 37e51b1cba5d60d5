"""moe_ffn and moe_linear in plain PyTorch with autograd: test oracle, and backend "reference"."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.utils.checkpoint import checkpoint

from ..arguments import without_autocast
from ..dispatch import exporting, transformed
from .call import GATED, TANH, Call


def why_not(*facts: Any) -> str | None:
    return None


def moe_ffn_reference(call: Call) -> Tensor:
    """y [T, O], for any device and dtype; written for clarity, not for speed.

    If ``save_pre`` is False, the backward recomputes each expert from its rows of x.
    """
    if call.streams:  # in a graph of the registered operation, which has one result
        return torch.cat([moe_ffn_reference(call.alone(e)) for e in range(len(call.streams))])
    again = not call.save_pre and torch.is_grad_enabled()
    again = again and not exporting() and not transformed(call[:1])
    with without_autocast(call.x.device):
        dtype = call.w2[0].dtype if call.residual is None else call.residual.dtype
        y = call.x.new_zeros(call.out, dtype=dtype)
        for e, rows in _rows_of_experts(call):
            x = _take(call.x, rows)
            if again:
                branch = checkpoint(
                    _expert, x, e, call, use_reentrant=False, preserve_rng_state=False
                )
            else:
                branch = _expert(x, e, call)
            if call.token_scale is not None:
                branch = branch * _take(call.token_scale, rows)[:, None]
            if call.residual is not None:
                branch = _take(call.residual, rows) + branch
            y = _put(y, rows, branch.to(dtype))
    return y


def moe_ffn_gradients(dy: Tensor, call: Call, needs: Sequence[bool]) -> list[Tensor]:
    """The gradients flagged in ``needs``, in the order of the schema; the others are empty.

    The forward runs again.
    """
    flags, leaves = iter(needs), []

    def leaf(tensor: Tensor) -> Tensor:
        leaves.append(tensor.detach().requires_grad_(next(flags)))
        return leaves[-1]

    x, lists = leaf(call.x), [[leaf(t) for t in tensors] for tensors in call[1:9]]
    scale = None if call.layer_scale is None else leaf(call.layer_scale)
    with torch.enable_grad():
        y = moe_ffn_reference(Call._make((x, *lists, scale, *call[10:])))
    wanted = [t for t in leaves if t.requires_grad]
    found = iter(torch.autograd.grad(y, wanted, dy, materialize_grads=True))
    return [next(found) if t.requires_grad else t.new_empty(0) for t in leaves]


def _expert(x: Tensor, e: int, call: Call) -> Tensor:
    """``layer_scale * (W2_e sub_norm_e(act(W1_e norm_e(x) + b1_e)) + b2_e)`` for rows [n, D].

    Without w1, ``layer_scale * (W2_e norm_e(x) + b2_e)``.
    """
    hidden = _norm(x, e, call)
    if call.w1:
        h1 = [F.linear(hidden, weight, bias) for weight, bias in call.first_layer(e)]
        hidden = _sub_norm(_act(*h1, activation=call.activation), e, call)
    h2 = F.linear(hidden, call.w2[e], _at(call.b2, e))
    return h2 if call.layer_scale is None else h2 * call.layer_scale


def _norm(x: Tensor, e: int, call: Call) -> Tensor:
    """norm_e(x) [n, D], computed in float32 or better, in the dtype of the weights."""
    if call.norm == "none":
        return x
    wide, width = torch.promote_types(x.dtype, torch.float32), x.shape[-1:]
    weight = call.norm_weight[e].to(wide)
    if call.norm == "rms":
        return F.rms_norm(x.to(wide), width, weight, call.norm_eps).to(call.w2[e].dtype)
    bias = call.norm_bias[e].to(wide) if call.norm_bias else None
    return F.layer_norm(x.to(wide), width, weight, bias, call.norm_eps).to(call.w2[e].dtype)


def _sub_norm(hidden: Tensor, e: int, call: Call) -> Tensor:
    """LayerNorm of [n, F], computed in float32 or better; unchanged without a sub-norm."""
    if not call.sub_norm_weight:
        return hidden
    wide = torch.promote_types(hidden.dtype, torch.float32)
    weight, bias = call.sub_norm_weight[e].to(wide), _at(call.sub_norm_bias, e)
    bias = None if bias is None else bias.to(wide)
    return F.layer_norm(hidden.to(wide), weight.shape, weight, bias, call.sub_norm_eps).to(
        hidden.dtype
    )


def _act(*h: Tensor, activation: str) -> Tensor:
    """act(h): [n, F], from [n, F] or, gated, [n, 2 F] or two tensors [n, F]."""
    if activation in GATED:
        gate, value = h if len(h) == 2 else h[0].chunk(2, dim=1)
        return _gate(gate, activation) * value
    return _gate(h[0], activation)


def _gate(h: Tensor, activation: str) -> Tensor:
    """The activation function itself; for a gated activation, that of the gate."""
    if activation == "swiglu":
        return F.silu(h)
    if activation == "relu2":
        return F.relu(h).square()
    return F.gelu(h, approximate="tanh" if activation in TANH else "none")


def _rows_of_experts(call: Call) -> Iterator[tuple[int, Any]]:
    """For each expert e: e, and a slice, an index or a mask of its rows.

    A mask is used for ids on a GPU and in a compiled graph, where the host does not know the count:
    the expert then computes all rows, with zeros for those of other experts, which avoids a
    synchronisation with the device.
    """
    traced = not exporting() and (torch.compiler.is_compiling() or is_fake(call.x))
    counts_rows = call.x.device.type == "cpu" and not traced
    for e in range(len(call.w2)):
        if call.ids is not None:
            mask = call.ids == e
            yield e, mask.nonzero()[:, 0] if counts_rows else mask
        else:
            yield e, _segment_rows(e, call.pieces, call.x)


def _segment_rows(e: int, pieces: Sequence[int], x: Tensor) -> slice | Tensor:
    lengths = pieces[1::2]
    total = sum(lengths)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    runs = [
        (s, n) for expert, s, n in zip(pieces[::2], starts, lengths, strict=True) if expert == e
    ]
    if sum(n for _, n in runs) == total:
        return slice(None)
    # Created on the device, because a CUDA graph cannot capture a copy from the host.
    local = torch.cat([torch.arange(s, s + n, device=x.device) for s, n in runs or [(0, 0)]])
    first = torch.arange(0, x.shape[0], total, device=x.device)
    return (first[:, None] + local[None, :]).flatten()


def _take(t: Tensor, rows: Any) -> Tensor:
    if isinstance(rows, Tensor) and rows.dtype == torch.bool:
        return torch.where(rows.view(-1, *[1] * (t.dim() - 1)), t, 0)
    return t[rows]


def _put(t: Tensor, rows: Any, part: Tensor) -> Tensor:
    if isinstance(rows, slice):
        return part
    if rows.dtype == torch.bool:
        return torch.where(rows[:, None], part, t)
    return t.index_copy(0, rows, part)


def _at(tensors: Sequence[Tensor], e: int) -> Tensor | None:
    return tensors[e] if tensors else None
