"""moe_ffn and moe_linear on the CPU: matrix products with one pass over the rows between them.

The products take nine tenths of the time (``products.py``); the rest are C++ kernels
(``passes.py``). For a backward, the activations and the operand of LayerScale are saved beside the
pre-activations, as autograd would: recomputing the former, or computing LayerScale's gradient from
a product with W2, costs 1 % of the backward each. Splitting the rows so that hidden activations
stay in cache does not help, because every product packs its weights again.

A CPU without instructions for 16-bit operands computes in float32: the parameters of one expert at
a time are converted, and its results are rounded once. Saved tensors stay in 16 bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .._backends import cpu as cpu_target
from . import passes, products
from .call import GATED, TANH, Call, Facts
from .passes import ExpertRows
from .rows import rows_of


def why_not(device: torch.device, facts: Facts) -> str | None:
    """The reason why :func:`forward` cannot run, or None."""
    return cpu_target.why_not(device, facts.dtype)


_Kept = tuple[Tensor, Tensor, Tensor | None]  # h1, act(h1) and h2 for an expert's rows
# Of one expert's parameter; a list of two if it is separate for gate and value.
_Gradient = Tensor | list[Tensor | None] | None


def pre_shape(call: Call) -> tuple[int, int]:
    """Shape [T, P + F (+ D)] of the saved tensor; (0, 0) if nothing is saved.

    It contains h1 of all rows, then act(h1), then with a layer scale h2; each expert by expert.
    """
    saves = call.save_pre and len(call.w1) > 0
    return (call.tokens, sum(_kept_columns(call))) if saves else (0, 0)


def _kept_columns(call: Call) -> list[int]:
    """Columns of h1, act(h1) and h2 of the widest expert."""
    found = [max(call.pre_columns), max(w.shape[1] for w in call.w2)]
    return found if call.layer_scale is None else [*found, len(call.w2[0])]


def _kept(rows: ExpertRows, pre: Tensor, call: Call, e: int) -> _Kept:
    """Views of an expert's rows of the tensors that :func:`forward` saves, see ``_Kept``."""
    found, start = [], 0
    sizes = (call.pre_columns[e], call.w2[e].shape[1], len(call.w2[e]))
    for columns, widest in zip(sizes, _kept_columns(call), strict=False):
        first = start + rows.first * widest
        part = pre.view(-1)[first : first + rows.count * columns]
        found.append(part.view(rows.count, columns))
        start += call.tokens * widest
    h1, act, *h2 = found
    return h1, act, h2[0] if h2 else None


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """y [T, O], and the tensor saved for the backward, in the shape :func:`pre_shape`."""
    if call.result_dtype == torch.float64:  # that of the residual
        y, pre = forward(call._replace(residual=None, residuals=[]))
        if call.residual is not None:
            return call.residual + y, pre
        y = y.double()
        for part, residual in zip(y.split(call.counts), call.residuals, strict=True):
            part += residual
        return y, pre
    call = _prepared(call)
    y = call.x.new_empty(call.out, dtype=call.result_dtype)
    pre = call.x.new_empty(pre_shape(call), dtype=call.w2[0].dtype)
    for e, rows in _experts(call):
        kept = _kept(rows, pre, call, e) if pre.numel() else None
        own = _own(call, e)
        wide, bias = _widened(own, e), None
        if call.b2 and products.copies_bias(wide.w2[e].dtype) and not _keeps_h2(call, kept):
            wide, bias = wide._replace(b2=[]), wide.b2[e].contiguous()
        branch = _branch(rows, kept, wide, e)
        out = _own_rows(y, call, rows)
        scales = own.layer_scale, own.token_scale
        passes.add_branch(rows, out, branch, own.residual, *scales, bias)
    return y, pre


def _keeps_h2(call: Call, kept: _Kept | None) -> bool:
    """Whether W2_e h + b2_e is saved, so that the bias must be in it."""
    return kept is not None and call.layer_scale is not None


def _branch(rows: ExpertRows, kept: _Kept | None, call: Call, e: int) -> Tensor:
    """W2_e act(W1_e norm_e(x) + b1_e) + b2_e; writes the tensors in ``kept``."""
    normed, _ = _norm(rows, call, e)
    b2 = call.b2[e] if call.b2 else None
    if not call.w1:
        return products.linear(normed, call.w2[e], b2)
    if kept is None:
        hidden, _ = _sub_norm(_linear_act(normed, call, e), call, e)
        return products.linear(hidden, call.w2[e], b2)
    h1, act, h2 = (None if t is None else _room(t, normed.dtype) for t in kept)
    assert h1 is not None and act is not None
    _first_products(normed, call, e, h1)
    _act_into(act, h1, call.activation)
    hidden, _ = _sub_norm(act, call, e)
    if h2 is None:
        branch = products.linear(hidden, call.w2[e], b2)
    else:
        products.linear_into(h2, hidden, call.w2[e], b2)
        branch = h2
    for target, source in zip(kept, (h1, act, h2), strict=True):
        if target is not None and source is not None and target is not source:
            target.copy_(source)
    return branch


def backward(dy: Tensor, pre: Tensor, call: Call, needs: Sequence[bool]) -> list[Tensor]:
    """The gradients flagged in ``needs``, in the order of the schema; the others are empty.

    An empty ``pre`` was not saved and is recomputed.
    """
    lists = [list(tensors) for tensors in call[1:9]]
    flags = iter(needs)
    of_x = next(flags)
    wanted = [list(itertools.islice(flags, len(tensors))) for tensors in lists]
    of_scale = call.layer_scale is not None and next(flags)
    of_x = any(flags) or of_x  # of any stream
    gradients = [[t.new_empty(0) for t in tensors] for tensors in lists]
    given_x, given_scale = call.x, call.layer_scale
    if dy.dtype == torch.float64:  # that of the residual
        dy = dy.float()
    call = _prepared(call)
    dscale = None
    if of_scale:
        assert call.layer_scale is not None
        dscale = torch.zeros_like(call.layer_scale)
    dx = call.x.new_empty((call.tokens, call.x.shape[1])) if of_x else None
    experts = len(call.w2)
    for e, rows in _experts(call):
        # Of w1 and b1, an expert has two tensors if gate and value are separate.
        places = [
            range(len(flags) * e // experts, len(flags) * (e + 1) // experts) for flags in wanted
        ]
        own = [[flags[i] for i in at] for flags, at in zip(wanted, places, strict=True)]
        kept = _kept(rows, pre, call, e) if pre.numel() else None
        alone = _widened(_own(call, e), e)
        dy_own, dx_own = _own_rows(dy, call, rows), dx
        if dx is not None:
            dx_own = _own_rows(dx, call, rows)
        found = _expert_backward(dy_own, kept, alone, e, rows, own, dx_own, dscale)
        for slot, gradient in enumerate(found):
            parts = gradient if isinstance(gradient, list) else [gradient]
            for i, part in zip(places[slot], parts, strict=False):
                if wanted[slot][i] and part is not None:
                    gradients[slot][i] = part.to(lists[slot][i].dtype)
    dx = call.x.new_empty(0) if dx is None else dx.to(given_x.dtype)
    flat = [dx, *itertools.chain.from_iterable(gradients)]
    if given_scale is not None:
        flat.append(given_scale.new_empty(0) if dscale is None else dscale.to(given_scale.dtype))
    if call.streams:
        flat += dx.split(call.counts) if of_x else [dx] * len(call.streams)
    return flat


def _expert_backward(
    dy: Tensor,
    kept: _Kept | None,
    call: Call,
    e: int,
    rows: ExpertRows,
    own: Sequence[Sequence[bool]],  # by field of the schema: which gradients are needed
    dx: Tensor | None,  # [T, D], of which the expert's rows are written
    dscale: Tensor | None,  # [D], accumulated
) -> list[_Gradient]:
    """Gradients of one expert's parameters in the order of the schema, if needed."""
    w2, wants = call.w2[e], [any(flags) for flags in own]
    if not call.w1:
        return _linear_backward(dy, call, e, rows, wants, dx, dscale)
    normed, statistics = _norm(rows, call, e)
    h2: Tensor | None = None
    if kept is not None:
        h1, act = (t.to(w2.dtype) for t in kept[:2])
        h2 = kept[2]
    else:
        h1 = _first_products(normed, call, e)
        act = _act_into(h1.new_empty(len(h1), w2.shape[1]), h1, call.activation)
    hidden, of_hidden = _sub_norm(act, call, e)
    if dscale is not None and h2 is None:
        h2 = products.linear(hidden, w2, call.b2[e] if call.b2 else None)
    dh2 = act.new_empty(rows.count, len(w2))
    branch = None if dscale is None else h2
    scales = call.layer_scale, call.token_scale
    db2, scale_part = passes.branch_backward(rows, dy, branch, *scales, dh2)
    if dscale is not None:
        dscale += scale_part
    dw2 = products.product(dh2.T, hidden) if wants[1] else None
    del hidden
    below = dx is not None or wants[4] or wants[5]
    before_act = below or wants[0] or wants[2]
    of_sub_norm: tuple[Tensor | None, Tensor | None] = None, None
    if not (before_act or wants[6] or wants[7]):
        return [None, dw2, None, db2, None, None, None, None]
    d = products.product(dh2, w2)
    if of_hidden is not None:
        every, weight = ExpertRows.every(rows.count), call.sub_norm_weight[e]
        dact = torch.empty_like(act) if before_act else None
        of_sub_norm = passes.norm_backward(every, d, act, of_hidden, weight, dact)
        if dact is None:
            return [None, dw2, None, db2, None, None, *of_sub_norm]
        d = dact
    del act
    dh1 = _act_backward(d, h1, call.activation)
    first = call.first_layer(e)
    parts = dh1.chunk(len(first), dim=1)
    dw1: list[Tensor | None] = [
        products.product(part.T, normed) if need else None
        for part, need in zip(parts, own[0], strict=True)
    ]
    db1: list[Tensor | None] = [passes.column_sums(part) for part in parts] if wants[2] else []
    of_norm: tuple[Tensor | None, Tensor | None] = None, None
    if below:
        weights = [weight for weight, _ in first]
        of_norm = _undo_norm(rows, parts, weights, statistics, call, e, dx)
    return [dw1, dw2, db1, db2, *of_norm, *of_sub_norm]


def _linear_backward(
    dy: Tensor,
    call: Call,
    e: int,
    rows: ExpertRows,
    wants: Sequence[bool],
    dx: Tensor | None,
    dscale: Tensor | None,
) -> list[_Gradient]:
    """:func:`_expert_backward` of moe_linear."""
    w2 = call.w2[e]
    normed, statistics = _norm(rows, call, e)
    branch = None
    if dscale is not None:
        branch = products.linear(normed, w2, call.b2[e] if call.b2 else None)
    d = w2.new_empty(rows.count, len(w2))
    scales = call.layer_scale, call.token_scale
    db2, scale_part = passes.branch_backward(rows, dy, branch, *scales, d)
    if dscale is not None:
        dscale += scale_part
    dw2 = products.product(d.T, normed) if wants[1] else None
    of_norm: tuple[Tensor | None, Tensor | None] = None, None
    if dx is not None or wants[4] or wants[5]:
        of_norm = _undo_norm(rows, [d], [w2], statistics, call, e, dx)
    return [None, dw2, None, db2, *of_norm, None, None]


def _undo_norm(
    rows: ExpertRows,
    parts: Sequence[Tensor],  # each [n, P], the gradient of a weight @ norm_e(x)
    weights: Sequence[Tensor],  # each [P, D]
    statistics: tuple[Tensor | None, Tensor] | None,
    call: Call,
    e: int,
    dx: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Write the expert's rows of dx; the gradients of the norm's weight and bias."""
    d = products.product(parts[0], weights[0])
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        products.add_product(d, part, weight)
    if statistics is not None:
        return passes.norm_backward(rows, d, call.x, statistics, call.norm_weight[e], dx)
    if dx is not None:
        passes.add_branch(rows, dx, d, None, None, None)
    return None, None


def _norm(
    rows: ExpertRows, call: Call, e: int
) -> tuple[Tensor, tuple[Tensor | None, Tensor] | None]:
    """norm_e(x) of the expert's rows in the dtype of its weights, and the statistics."""
    dtype = call.w2[e].dtype
    if call.norm == "none":
        return rows.of(call.x).to(dtype), None
    normed = call.x.new_empty(rows.count, call.x.shape[1], dtype=dtype)
    bias = call.norm_bias[e] if call.norm_bias else None
    weight = call.norm_weight[e]
    return normed, passes.norm(rows, call.x, weight, bias, call.norm, call.norm_eps, normed)


def _sub_norm(
    act: Tensor, call: Call, e: int
) -> tuple[Tensor, tuple[Tensor | None, Tensor] | None]:
    """The sub-norm of the activations [n, F] of an expert, if there is one; its statistics."""
    if not call.sub_norm_weight:
        return act, None
    bias = call.sub_norm_bias[e] if call.sub_norm_bias else None
    every, out = ExpertRows.every(len(act)), torch.empty_like(act)
    weight = call.sub_norm_weight[e]
    return out, passes.norm(every, act, weight, bias, "layer", call.sub_norm_eps, out)


def _experts(call: Call) -> Iterator[tuple[int, ExpertRows]]:
    """All experts, with their rows; with streams those of :func:`_own_rows`."""
    if call.streams:
        for e, (stream, first) in enumerate(zip(call.streams, call.firsts, strict=True)):
            yield e, replace(ExpertRows.every(len(stream)), first=first)
        return
    rows = rows_of(call)
    if rows.offsets is not None:
        for e, (start, stop) in enumerate(itertools.pairwise(rows.offsets.tolist())):
            yield e, ExpertRows(start, stop - start, (0, 0, 0), rows.tokens[start:stop])
        return
    first = 0
    for e, (start, length) in enumerate(zip(rows.starts, rows.lengths, strict=True)):
        count = rows.sequences * length
        yield e, ExpertRows(first, count, (rows.length, start, length))
        first += count


def _own(call: Call, e: int) -> Call:
    """The call with the stream of expert ``e`` as x; unchanged without streams."""
    if not call.streams:
        return call
    residual = call.residuals[e] if call.residuals else None
    token_scale = call.token_scales[e] if call.token_scales else None
    return call._replace(x=call.streams[e], residual=residual, token_scale=token_scale)


def _own_rows(t: Tensor, call: Call, rows: ExpertRows) -> Tensor:
    """The rows of an expert's stream of a tensor [T, D]; all of them without streams."""
    return t[rows.first : rows.first + rows.count] if call.streams else t


def _prepared(call: Call) -> Call:
    """The call in the form that the passes take: adjacent columns, and vectors in float32."""
    adjacent = cpu_target.with_adjacent_elements
    x, *streams = (
        adjacent(t.float() if t.dtype == torch.float64 else t)  # float64 under autocast
        for t in (call.x, *call.streams)
    )
    residual = None if call.residual is None else adjacent(call.residual)
    residuals = [adjacent(t) for t in call.residuals]
    token_scales = [t.float().contiguous() for t in call.token_scales]
    scales = (None if t is None else t.float().contiguous() for t in call[9:11])
    norms = ([t.float().contiguous() for t in tensors] for tensors in call[5:9])
    return Call._make(
        (x, *call[1:5], *norms, *scales, residual, *call[12:-3], streams, residuals, token_scales)
    )


def _widened(call: Call, e: int) -> Call:
    """The call with the parameters of expert ``e`` converted to this CPU's operand dtype."""
    dtype = call.w2[e].dtype
    operand = cpu_target.operand_dtype(dtype)
    if operand == dtype:
        return call
    experts = len(call.w2)
    wide = [
        [t.to(operand) if i * experts // len(one) == e else t for i, t in enumerate(one)]
        for one in call[1:5]
    ]
    return Call._make((call.x, *wide, *call[5:]))


def _room(kept: Tensor, dtype: torch.dtype) -> Tensor:
    """``kept`` if it has this dtype, else a buffer of its shape, to be copied to ``kept``."""
    return kept if kept.dtype == dtype else torch.empty_like(kept, dtype=dtype)


def _first_products(x: Tensor, call: Call, e: int, out: Tensor | None = None) -> Tensor:
    """W1_e x + b1_e [rows, P], written to ``out`` if given."""
    layer = call.first_layer(e)
    if out is None:
        if len(layer) == 1:
            return products.linear(x, *layer[0])
        out = x.new_empty(len(x), call.pre_columns[e])
    for columns, (weight, bias) in zip(out.chunk(len(layer), dim=1), layer, strict=True):
        products.linear_into(columns, x, weight, bias)
    return out


def _linear_act(x: Tensor, call: Call, e: int) -> Tensor:
    """act(W1_e x + b1_e)."""
    if call.activation in products.GELU:
        ((weight, bias),) = call.first_layer(e)
        return products.linear_gelu(x, weight, bias, call.activation)
    h1 = _first_products(x, call, e)
    return _act_into(h1.new_empty(len(h1), call.w2[e].shape[1]), h1, call.activation)


def _act_into(out: Tensor, h: Tensor, activation: str) -> Tensor:
    """act(h): [rows, F], from [rows, F] or, gated, [rows, 2 F]."""
    if activation in GATED:
        gate, value = h.chunk(2, dim=1)
        return _gate_into(out, gate, activation).mul_(value)
    return _gate_into(out, h, activation)


def _gate_into(out: Tensor, h: Tensor, activation: str) -> Tensor:
    """The activation function itself; for a gated activation, that of the gate."""
    if activation == "swiglu":
        return torch.ops.aten.silu.out(h, out=out)
    if activation == "relu2":
        return torch.clamp(h, min=0, out=out).square_()
    return torch.ops.aten.gelu.out(h, approximate=_approximate(activation), out=out)


def _approximate(activation: str) -> str:
    return "tanh" if activation in TANH else "none"


def _act_backward(d: Tensor, h: Tensor, activation: str) -> Tensor:
    """The gradient of h from that of act(h); in place unless gated."""
    aten = torch.ops.aten
    if activation == "relu2":
        return d.mul_(2 * h.clamp(min=0))
    how = _approximate(activation)
    if activation not in GATED:
        return aten.gelu_backward.grad_input(d, h, approximate=how, grad_input=d)
    gate, value = h.chunk(2, dim=1)
    opened = _gate_into(torch.empty_like(gate), gate, activation)
    if activation == "swiglu":
        dgate = aten.silu_backward(d * value, gate)
    else:
        dgate = aten.gelu_backward(d * value, gate, approximate=how)
    return torch.cat([dgate, d * opened], dim=1)
