"""moe_ffn on the CPU: PyTorch's matrix products with little overhead around them.

The products take 19/20 of the time, and PyTorch's libraries run them at the machine's peak rate.
The remaining gain is between them: GELU is fused into the product if there is no backward, and each
expert's rows are written in place without a concatenation. For a backward, the activations and the
operand of LayerScale are saved beside the pre-activations, as autograd would: recomputing the
former, or computing LayerScale's gradient from a product with W2, costs 1 % of the backward each.
Splitting the rows so that hidden activations stay in cache does not help, because every product
packs its weights again (256 rows at base size: 0.89 times the speed of all rows).

A CPU without instructions for 16-bit operands computes in float32: the rows and parameters of one
expert at a time are converted, and its results are rounded once. Saved tensors stay in 16 bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .._backends import cpu as cpu_target
from . import products
from .call import GATED, Call


def why_not(
    device: torch.device, dtype: torch.dtype, width: int, hidden: Sequence[int], activation: str
) -> str | None:
    """The reason why :func:`forward` cannot run, or None."""
    return None if device.type == "cpu" else f"{device.type} tensors: it is made for the CPU."


_Kept = tuple[Tensor, Tensor, Tensor | None]  # h1, act(h1) and h2 for an expert's rows


@dataclass(frozen=True)
class _Rows:
    """The rows of one expert: the same run of every sequence, or arbitrary rows.

    Attributes:
        first: number of rows of all previous experts.
        count: number of rows of this expert.
        run: number of sequences, their length, start and length of the run; None with an index.
        index: ``[count]`` int32, the rows; None with a run.
    """

    first: int
    count: int
    run: tuple[int, int, int, int] | None
    index: Tensor | None = None

    def of(self, t: Tensor) -> Tensor:
        """Read ``[count, ...]`` from ``[T, ...]``; a view if the rows are contiguous."""
        if self.run is None:
            assert self.index is not None
            return t.index_select(0, self.index)
        return self._window(t).flatten(0, 1)

    def put(self, t: Tensor, part: Tensor, addend: Tensor | None) -> None:
        """Write ``part``, plus the same rows of ``addend``, to the rows of ``t``."""
        if self.run is None:
            assert self.index is not None
            if addend is not None:
                part = addend.index_select(0, self.index).add_(part)
            t.index_copy_(0, self.index.long(), part.to(t.dtype))
            return
        target = self._window(t)
        part = part.view(target.shape)
        if addend is None:
            target.copy_(part)
        else:
            torch.add(self._window(addend), part, out=target)

    def kept(self, pre: Tensor, call: Call, e: int) -> _Kept:
        """Views of an expert's rows of the tensors that :func:`forward` saves, see ``_Kept``."""
        found, start = [], 0
        sizes = (len(call.w1[e]), call.w2[e].shape[1], len(call.w2[e]))
        for columns, widest in zip(sizes, _kept_columns(call), strict=False):
            first = start + self.first * widest
            rows = pre.view(-1)[first : first + self.count * columns]
            found.append(rows.view(self.count, columns))
            start += len(call.x) * widest
        h1, act, *h2 = found
        return h1, act, h2[0] if h2 else None

    def _window(self, t: Tensor) -> Tensor:
        assert self.run is not None
        sequences, period, start, length = self.run
        return t.unflatten(0, (sequences, period))[:, start : start + length]


def pre_shape(call: Call) -> tuple[int, int]:
    """Shape [T, P + F (+ D)] of the saved tensor; (0, 0) if nothing is saved.

    It contains h1 of all rows, then act(h1), then with a layer scale h2; each expert by expert.
    """
    return (call.x.shape[0], sum(_kept_columns(call))) if call.save_pre else (0, 0)


def _kept_columns(call: Call) -> list[int]:
    """Columns of h1, act(h1) and h2 of the widest expert."""
    found = [max(len(w) for w in call.w1), max(w.shape[1] for w in call.w2)]
    return found if call.layer_scale is None else [*found, len(call.w2[0])]


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """y [T, D], and the tensor saved for the backward, in the shape :func:`pre_shape`."""
    dtype = call.w2[0].dtype if call.residual is None else call.residual.dtype
    y = call.x.new_empty(call.x.shape, dtype=dtype)
    pre = call.x.new_empty(pre_shape(call), dtype=call.w1[0].dtype)
    for e, rows in _experts(call):
        kept = rows.kept(pre, call, e) if call.save_pre else None
        rows.put(y, _branch(rows, kept, _widened(call, e), e), call.residual)
    return y, pre


def _branch(rows: _Rows, kept: _Kept | None, call: Call, e: int) -> Tensor:
    """The branch of one expert, without the residual; writes the tensors in ``kept``."""
    normed, *_ = _norm(_as_wide(rows.of(call.x), call, e), e, call)
    b1, b2 = call.b1[e] if call.b1 else None, call.b2[e] if call.b2 else None
    if kept is None:
        branch = products.linear(_linear_act(normed, call, e), call.w2[e], b2)
    else:
        h1, act, h2 = (None if t is None else _room(t, normed.dtype) for t in kept)
        assert h1 is not None and act is not None
        products.linear_into(h1, normed, call.w1[e], b1)
        _act_into(act, h1, call.activation)
        if h2 is None:
            branch = products.linear(act, call.w2[e], b2)
        else:
            products.linear_into(h2, act, call.w2[e], b2)
            branch = h2
        for target, source in zip(kept, (h1, act, h2), strict=True):
            if target is not None and source is not None and target is not source:
                target.copy_(source)
    if call.layer_scale is not None:
        branch = branch * call.layer_scale
    if call.token_scale is not None:
        branch = _times(branch, rows.of(call.token_scale)[:, None])
    return branch


def backward(dy: Tensor, pre: Tensor, call: Call, needs: Sequence[bool]) -> list[Tensor]:
    """The gradients flagged in ``needs``, in the order of the schema; the others are empty.

    An empty ``pre`` was not saved and is recomputed.
    """
    lists = [list(tensors) for tensors in call[1:7]]
    flags = iter(needs[1:])
    wanted = [list(itertools.islice(flags, len(tensors))) for tensors in lists]
    gradients = [[t.new_empty(0) for t in tensors] for tensors in lists]
    scale = call.layer_scale
    dscale = None
    if scale is not None and needs[-1]:
        dscale = scale.new_zeros(scale.shape, dtype=_wide(scale))
    dx = torch.empty_like(call.x, memory_format=torch.contiguous_format)
    for e, rows in _experts(call):
        wants = [bool(flags) and flags[e] for flags in wanted]
        kept = rows.kept(pre, call, e) if pre.numel() else None
        found, d = _expert_backward(dy, kept, _widened(call, e), e, rows, wants, needs[0], dscale)
        if needs[0] and d is not None:
            rows.put(dx, d, None)
        for slot, gradient in enumerate(found):
            if wants[slot] and gradient is not None:
                gradients[slot][e] = gradient.to(lists[slot][e].dtype)
    flat = [dx if needs[0] else dx.new_empty(0), *itertools.chain.from_iterable(gradients)]
    if scale is not None:
        flat.append(scale.new_empty(0) if dscale is None else dscale.to(scale.dtype))
    return flat


def _expert_backward(
    dy: Tensor,
    kept: _Kept | None,
    call: Call,
    e: int,
    rows: _Rows,
    wants: Sequence[bool],
    wants_x: bool,
    dscale: Tensor | None,  # [D], accumulated
) -> tuple[list[Tensor | None], Tensor | None]:
    """Gradients of one expert's six parameters and of its rows of x, if needed."""
    w1, w2, scale = call.w1[e], call.w2[e], call.layer_scale
    x = _as_wide(rows.of(call.x), call, e)
    normed, mean, rstd = _norm(x, e, call)
    h2: Tensor | None = None
    if kept is not None:
        h1, act = (_as_wide(t, call, e) for t in kept[:2])
        h2 = kept[2]
    else:
        h1 = products.linear(normed, w1, call.b1[e] if call.b1 else None)
        act = _act_into(h1.new_empty(len(h1), w2.shape[1]), h1, call.activation)
    dbranch = _as_wide(rows.of(dy), call, e)
    if call.token_scale is not None:
        dbranch = dbranch * rows.of(call.token_scale)[:, None]
    dh2 = (dbranch if scale is None else dbranch * scale).to(act.dtype)
    dw2 = db2 = None
    if dscale is not None:
        dscale += _scale_gradient(dbranch, act, h2, call, e)
    if wants[1]:
        dw2 = products.product(dh2.T, act)
    if wants[3]:
        db2 = dh2.sum(0)
    del act, dbranch
    below = wants_x or wants[4] or wants[5]
    if not (below or wants[0] or wants[2]):
        return [None, dw2, None, db2, None, None], None
    dh1 = _act_backward(products.product(dh2, w2), h1, call.activation)
    dw1 = products.product(dh1.T, normed) if wants[0] else None
    db1 = dh1.sum(0) if wants[2] else None
    dx, *of_norm = (
        _norm_backward(products.product(dh1, w1), x, mean, rstd, e, call) if below else [None] * 3
    )
    return [dw1, dw2, db1, db2, *of_norm], dx


def _scale_gradient(dbranch: Tensor, act: Tensor, h2: Tensor | None, call: Call, e: int) -> Tensor:
    """``[D]``: the sum over rows of ``dbranch * h2``; h2 is recomputed if it was not saved."""
    if h2 is None:
        h2 = products.linear(act, call.w2[e], call.b2[e] if call.b2 else None)
    return (dbranch * h2).sum(0, dtype=_wide(h2))


def _experts(call: Call) -> Iterator[tuple[int, _Rows]]:
    """Experts that have rows, with these rows; the gradients of the others stay zero."""
    tokens = call.x.shape[0]
    if call.ids is not None:
        assert call.rows is not None and call.offsets is not None
        bounds = call.offsets.tolist()
        for e, (start, stop) in enumerate(itertools.pairwise(bounds)):
            yield e, _Rows(start, stop - start, None, call.rows[start:stop])
        return
    lengths, first = call.pieces[1::2], 0
    period = sum(lengths)
    starts = [0, *itertools.accumulate(lengths)]
    for e in range(len(call.w1)):
        runs = [i for i, expert in enumerate(call.pieces[::2]) if expert == e]
        start = starts[runs[0]] if runs else 0
        length = sum(lengths[i] for i in runs)
        sequences = tokens // period
        yield e, _Rows(first, sequences * length, (sequences, period, start, length))
        first += sequences * length


def _widened(call: Call, e: int) -> Call:
    """The call with the parameters of expert ``e`` converted to this CPU's operand dtype."""
    dtype = call.w1[e].dtype
    operand = cpu_target.operand_dtype(dtype)
    if operand == dtype:
        return call
    x, *lists = call[:7]
    wide = [[t.to(operand) if i == e else t for i, t in enumerate(one)] for one in lists]
    return Call._make((x, *wide, *call[7:]))


def _as_wide(t: Tensor, call: Call, e: int) -> Tensor:
    """``t`` in a dtype at least as wide as the operands of expert ``e``."""
    operand = call.w1[e].dtype
    return t.to(operand) if t.dtype.itemsize < operand.itemsize else t


def _room(kept: Tensor, dtype: torch.dtype) -> Tensor:
    """``kept`` if it has this dtype, else a buffer of its shape, to be copied to ``kept``."""
    return kept if kept.dtype == dtype else torch.empty_like(kept, dtype=dtype)


def _linear_act(x: Tensor, call: Call, e: int) -> Tensor:
    """act(W1_e x + b1_e)."""
    bias = call.b1[e] if call.b1 else None
    if call.activation not in GATED:
        return products.linear_gelu(x, call.w1[e], bias, call.activation)
    h1 = products.linear(x, call.w1[e], bias)
    return _act_into(h1.new_empty(len(h1), h1.shape[1] // 2), h1, call.activation)


def _times(t: Tensor, factor: Tensor) -> Tensor:
    """``t * factor``, in place if that does not round the factor."""
    return t.mul_(factor) if torch.promote_types(t.dtype, factor.dtype) == t.dtype else t * factor


def _act_into(out: Tensor, h: Tensor, activation: str) -> Tensor:
    """act(h): [rows, F], from [rows, F] or, gated, [rows, 2 F]."""
    if activation in GATED:
        gate, value = h.chunk(2, dim=1)
        (torch.ops.aten.silu if activation == "swiglu" else torch.ops.aten.gelu).out(gate, out=out)
        return out.mul_(value)
    return torch.ops.aten.gelu.out(h, approximate=_approximate(activation), out=out)


def _approximate(activation: str) -> str:
    return "tanh" if activation == "gelu_tanh" else "none"


def _act_backward(d: Tensor, h: Tensor, activation: str) -> Tensor:
    """The gradient of h from that of act(h); in place unless gated."""
    aten = torch.ops.aten
    if activation not in GATED:
        how = _approximate(activation)
        return aten.gelu_backward.grad_input(d, h, approximate=how, grad_input=d)
    gate, value = h.chunk(2, dim=1)
    opened = F.silu(gate) if activation == "swiglu" else F.gelu(gate)
    gate_backward = aten.silu_backward if activation == "swiglu" else aten.gelu_backward
    return torch.cat([gate_backward(d * value, gate), d * opened], dim=1)


def _norm(x: Tensor, e: int, call: Call) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """norm_e(x) in the dtype of the weights; also mean (LayerNorm) and 1 / deviation per row.

    PyTorch's LayerNorm computes in float32 or better, but requires x and its parameters to have the
    same dtype.
    """
    if call.norm == "none":
        return x, None, None
    x, weight, bias = _norm_operands(x, e, call)
    mean = None
    if call.norm == "layer":
        normed, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, bias, call.norm_eps)
    else:
        rstd = torch.rsqrt(x.square().mean(1, keepdim=True) + call.norm_eps)
        normed = x * rstd * weight
    return normed.to(call.w1[e].dtype), mean, rstd


def _norm_backward(
    d: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor | None, e: int, call: Call
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, norm_weight and norm_bias from that of norm_e(x)."""
    if rstd is None:
        return d, None, None
    x, weight, bias = _norm_operands(x, e, call)
    if mean is None:
        xhat, dxhat = x * rstd, d * weight
        dx = (dxhat - xhat * (dxhat * xhat).mean(1, keepdim=True)) * rstd
        return dx, (d * xhat).sum(0), None
    exact = _wide(x) == x.dtype
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        *(d.to(x.dtype), x, x.shape[-1:], mean, rstd, weight, bias),
        [True, exact, exact and bias is not None],
    )
    if exact:
        return dx, dweight, dbias
    # PyTorch accumulates these in the dtype of x: for 3000 bfloat16 rows the errors are 3 and 5 %.
    dweight = ((x - mean) * rstd * d).sum(0)
    return dx, dweight, None if bias is None else d.sum(0)


def _norm_operands(x: Tensor, e: int, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, norm_weight and norm_bias of an expert in their common dtype, or float32 or better."""
    weight, bias = call.norm_weight[e], call.norm_bias[e] if call.norm_bias else None
    if call.norm == "layer" and all(t.dtype == x.dtype for t in (weight, bias) if t is not None):
        return x, weight, bias
    wide = _wide(x)
    return x.to(wide), weight.to(wide), None if bias is None else bias.to(wide)


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)
