"""moe_ffn in plain PyTorch: the oracle, and the backend that runs everywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .call import GATED, Call, pre_shape


def why_not(*facts: Any) -> str | None:
    return None


def moe_ffn_reference(call: Call) -> Tensor:
    """The oracle: differentiable by autograd, any device and dtype, no trick of any kernel."""
    return forward(call)[0]


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """y [T, D] and the pre-activation, of :func:`pre_shape`."""
    dtype = call.w2[0].dtype if call.residual is None else call.residual.dtype
    y = call.x.new_zeros(call.x.shape, dtype=dtype)
    pre = call.x.new_zeros(pre_shape(call), dtype=call.w1[0].dtype)
    for e, rows in _rows_of_experts(call):
        h1 = _pre(norm(_take(call.x, rows), e, call), e, call)
        h2 = F.linear(_act(h1, call.activation), call.w2[e], _at(call.b2, e))
        branch = h2 if call.layer_scale is None else h2 * call.layer_scale
        if call.token_scale is not None:
            branch = branch * _take(call.token_scale, rows)[:, None]
        if call.residual is not None:
            branch = _take(call.residual, rows) + branch
        y = _put(y, rows, branch.to(dtype))
        if call.save_pre:
            pre = _put(pre, rows, F.pad(h1, (0, pre.shape[1] - h1.shape[1])))
    return y, pre


def backward(dy: Tensor, pre: Tensor, call: Call, needs: Sequence[bool]) -> list[Tensor]:
    """The gradients that ``needs`` asks for, in the order of the schema; empty ones elsewhere.

    An empty ``pre`` was not kept and is computed again.
    """
    parameters = [list(tensors) for tensors in call[1:7]]
    wanted = _split(needs[1:], [len(tensors) for tensors in parameters])
    dx = torch.zeros_like(call.x, memory_format=torch.contiguous_format)
    dparameters = [[t.new_empty(0) for t in tensors] for tensors in parameters]
    dscale = None if call.layer_scale is None else torch.zeros_like(call.layer_scale)
    for e, rows in _rows_of_experts(call):
        wants = [bool(flags) and flags[e] for flags in wanted]
        normed, of_norm = norm_vjp(_take(call.x, rows), e, call)
        kept = pre.numel() > 0
        h1 = _take(pre, rows)[:, : call.w1[e].shape[0]] if kept else _pre(normed, e, call)
        act, of_act = act_vjp(h1, call.activation)

        dbranch = _take(dy, rows)
        if call.token_scale is not None:
            dbranch = dbranch * _take(call.token_scale, rows)[:, None]
        dh2 = dbranch if call.layer_scale is None else dbranch * call.layer_scale
        dh2 = dh2.to(act.dtype)
        dh1 = of_act(dh2 @ call.w2[e])
        dx_rows, dnorm_weight, dnorm_bias = of_norm(dh1 @ call.w1[e])

        if needs[0]:
            dx = _put(dx, rows, dx_rows.to(dx.dtype))
        found = (
            dh1.T @ normed if wants[0] else None,
            dh2.T @ act if wants[1] else None,
            dh1.sum(0) if wants[2] else None,
            dh2.sum(0) if wants[3] else None,
            dnorm_weight,
            dnorm_bias,
        )
        for slot, gradient in enumerate(found):
            if wants[slot] and gradient is not None:
                dparameters[slot][e] = gradient.to(parameters[slot][e].dtype)
        if dscale is not None and needs[-1]:
            h2 = F.linear(act, call.w2[e], _at(call.b2, e))
            wide = _accumulator(dscale)
            dscale = dscale + (dbranch.to(wide) * h2.to(wide)).sum(0).to(dscale.dtype)
    flat = [dx if needs[0] else dx.new_empty(0), *(d for slot in dparameters for d in slot)]
    if dscale is not None:
        flat.append(dscale if needs[-1] else dscale.new_empty(0))
    return flat


def norm(x: Tensor, e: int, call: Call) -> Tensor:
    """norm_e(x) [rows, D], computed in float32 or better, in the dtype of the weights."""
    if call.norm == "none":
        return x
    wide, width = _accumulator(x), x.shape[-1:]
    weight = call.norm_weight[e].to(wide)
    if call.norm == "rms":
        return F.rms_norm(x.to(wide), width, weight, call.norm_eps).to(call.w1[e].dtype)
    bias = call.norm_bias[e].to(wide) if call.norm_bias else None
    return F.layer_norm(x.to(wide), width, weight, bias, call.norm_eps).to(call.w1[e].dtype)


Gradients = tuple[Tensor, Tensor | None, Tensor | None]


def norm_vjp(x: Tensor, e: int, call: Call) -> tuple[Tensor, Callable[[Tensor], Gradients]]:
    """norm_e(x), and the map from its gradient to those of x, norm_weight and norm_bias."""
    normed = norm(x, e, call)
    if call.norm == "none":
        return normed, lambda d: (d, None, None)
    x = x.to(_accumulator(x))
    weight = call.norm_weight[e].to(x.dtype)
    centred = x - x.mean(1, keepdim=True) if call.norm == "layer" else x
    inverse = torch.rsqrt(centred.square().mean(1, keepdim=True) + call.norm_eps)
    xhat = centred * inverse

    def vjp(d: Tensor) -> Gradients:
        d = d.to(x.dtype)
        dxhat = d * weight
        dx = dxhat - xhat * (dxhat * xhat).mean(1, keepdim=True)
        if call.norm == "layer":
            dx = dx - dxhat.mean(1, keepdim=True)
        return dx * inverse, (d * xhat).sum(0), d.sum(0)

    return normed, vjp


def _pre(normed: Tensor, e: int, call: Call) -> Tensor:
    """The pre-activation [rows, F] or, gated, [rows, 2 F]."""
    return F.linear(normed, call.w1[e], _at(call.b1, e))


def _act(h: Tensor, activation: str) -> Tensor:
    """act(h): [rows, F], from [rows, F] or, gated, [rows, 2 F]."""
    if activation in GATED:
        gate, value = h.chunk(2, dim=1)
        return (F.silu(gate) if activation == "swiglu" else F.gelu(gate)) * value
    return F.gelu(h, approximate="tanh" if activation == "gelu_tanh" else "none")


def act_vjp(h: Tensor, activation: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """act(h), and the map from its gradient to that of h."""
    aten = torch.ops.aten
    if activation not in GATED:
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        return _act(h, activation), lambda d: aten.gelu_backward(d, h, approximate=approximate)
    gate, value = h.chunk(2, dim=1)
    opened = F.silu(gate) if activation == "swiglu" else F.gelu(gate)
    gate_backward = aten.silu_backward if activation == "swiglu" else aten.gelu_backward
    return opened * value, lambda d: torch.cat([gate_backward(d * value, gate), d * opened], dim=1)


def _accumulator(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _rows_of_experts(call: Call) -> Iterator[tuple[int, Any]]:
    """For each expert e: (e, a slice, an index, or a mask of its rows).

    A mask is for ids on a GPU, where the count is unknown to the host: the expert then computes
    every row, rows of others as zeros, and nothing waits for the device.
    """
    for e in range(len(call.w1)):
        if call.ids is not None:
            mask = call.ids == e
            yield e, mask.nonzero()[:, 0] if call.x.device.type == "cpu" else mask
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
    # Made on the device: a copy from the host is not allowed while a CUDA graph is captured.
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


def _split(flags: Sequence[bool], counts: Sequence[int]) -> list[list[bool]]:
    rest = iter(flags)
    return [[next(rest) for _ in range(count)] for count in counts]


def _at(tensors: Sequence[Tensor], e: int) -> Tensor | None:
    return tensors[e] if tensors else None
