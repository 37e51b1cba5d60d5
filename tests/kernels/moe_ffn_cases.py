"""Calls of moe_ffn for the tests: cases, tensors, and the eager baseline."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import attention_cases
from accuracy import assert_as_accurate_as, relative_errors
from vlmo.kernels import ModalityRouting, moe_ffn, moe_linear
from vlmo.kernels.moe_ffn import cpu
from vlmo.kernels.moe_ffn.call import GATED, Facts
from vlmo.kernels.moe_ffn.op import BACKENDS

PLACES = [*attention_cases.PLACES, ("cpu", "composed"), ("cuda", "composed")]


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "relu2": lambda h: F.relu(h) ** 2,
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": lambda h: F.gelu(h, approximate="tanh"),
}


@dataclass(frozen=True)
class Case:
    """A call; the defaults are a small version of VLMo's lower layers."""

    pieces: tuple = ((0, 7), (1, 13))  # (expert, length) of every sequence
    form: str = "segments"  # "segments", "ids" or "packed"
    batch: int = 3
    dim: int = 24
    hidden: tuple = (40, 40)
    activation: str = "gelu"
    norm: str = "layer"
    bias: bool = True
    norm_bias: bool = True
    sub_norm: bool = False
    linear: int = 0  # output width of moe_linear, which has no first layer
    split: bool = False  # whether gate and value are separate tensors
    streams: bool = False  # whether the tokens of each expert are a tensor of their own
    layer_scale: bool = True
    token_scale: bool = True
    residual: bool = True
    tags: tuple = field(default=())

    def __str__(self):
        changed = [f"{k}={v}" for k, v in vars(self).items() if v != getattr(Case, k, ())]
        return ",".join(changed).replace(" ", "") or "vlmo"


SPARSE = ((0, 3), (3, 5), (1, 4))
PAIRS: dict[str, Any] = dict(split=True, activation="swiglu")

CASES = [
    Case(),
    Case(form="ids"),
    Case(form="packed"),
    # one expert; three; four with one empty and unequal widths; an expert in two pieces
    Case(pieces=((0, 20),), hidden=(40,)),
    Case(pieces=((0, 3), (1, 5), (2, 11)), hidden=(40, 40, 40)),
    Case(pieces=((0, 3), (3, 5), (1, 4)), hidden=(17, 64, 8, 33)),
    Case(pieces=((0, 3), (3, 5), (1, 4)), hidden=(17, 64, 8, 33), form="ids", activation="geglu"),
    Case(pieces=((1, 2), (0, 5), (1, 9)), form="packed"),
    # odd primes, one token, all tokens in one expert, no token at all
    Case(pieces=((0, 31), (1, 37)), dim=59, hidden=(101, 101), batch=2),
    Case(pieces=((1, 1),), batch=1),
    Case(pieces=((1, 1),), batch=1, form="ids"),
    Case(pieces=((0, 9), (1, 0)), form="ids"),
    Case(batch=0),
    Case(batch=0, form="ids"),
    # activations, gated without biases as in Mixture-of-Transformers
    Case(activation="gelu_tanh"),
    Case(activation="swiglu", norm="rms", bias=False, norm_bias=False, layer_scale=False),
    Case(activation="geglu"),
    # optional parts one by one, and none of them
    Case(norm="none"),
    Case(norm="rms", norm_bias=False),
    Case(norm_bias=False),
    Case(bias=False),
    Case(layer_scale=False),
    Case(token_scale=False),
    Case(residual=False),
    Case(
        norm="none",
        bias=False,
        norm_bias=False,
        layer_scale=False,
        token_scale=False,
        residual=False,
    ),
    # with a norm of the hidden activations
    Case(sub_norm=True),
    Case(sub_norm=True, form="ids", activation="swiglu", norm="rms", norm_bias=False, bias=False),
    Case(sub_norm=True, pieces=((0, 3), (3, 5), (1, 4)), hidden=(17, 64, 8, 33), norm="none"),
    Case(activation="relu2", batch=5),
    Case(activation="geglu_tanh", norm="rms", norm_bias=False),
    # moe_linear
    Case(linear=40),
    Case(linear=24, form="ids", norm="none"),
    Case(linear=59, form="packed", norm="rms", norm_bias=False, layer_scale=False),
    Case(linear=16, pieces=((0, 3), (3, 5), (1, 4)), hidden=(1, 1, 1, 1), token_scale=False),
    Case(
        *(((0, 7), (1, 13)), "segments", 3, 72, (1, 1)),
        norm="none",
        bias=False,
        norm_bias=False,
        layer_scale=False,
        token_scale=False,
        residual=False,
        linear=24,
    ),
    # gate and value as separate tensors
    Case(split=True, activation="swiglu", norm="rms", bias=False, norm_bias=False),
    Case(split=True, activation="geglu", form="ids", hidden=(17, 64, 8, 33), pieces=SPARSE),
    Case(split=True, activation="geglu_tanh", hidden=(40,), pieces=((0, 20),)),
    Case(split=True, activation="swiglu", form="packed", sub_norm=True),
    # text and image as separate tensors; one without tokens; without a norm, x is an operand
    Case(streams=True),
    Case(streams=True, pieces=SPARSE, hidden=(17, 64, 8, 33), norm="none"),
    Case(streams=True, pieces=((0, 20),), hidden=(40,), norm="none", layer_scale=False),
    Case(streams=True, norm="none", residual=False, token_scale=False, bias=False),
    Case(streams=True, split=True, activation="swiglu", norm="rms", norm_bias=False, sub_norm=True),
]


def expert_ids(case: Case) -> Tensor:
    if case.streams:
        return torch.arange(len(case.hidden)).repeat_interleave(torch.tensor(lengths(case)))
    one = [expert for expert, length in case.pieces for _ in range(length)]
    return torch.tensor(one * case.batch, dtype=torch.int64)


def lengths(case: Case) -> list[int]:
    """Number of tokens of each stream."""
    counts = [0] * len(case.hidden)
    for expert, length in case.pieces:
        counts[expert] += case.batch * length
    return counts


def make_routing(case: Case, device) -> ModalityRouting:
    experts = len(case.hidden)
    if case.streams:  # of the streams in a row
        return ModalityRouting.segments([*enumerate(lengths(case))], num_experts=experts)
    if case.form == "segments":
        return ModalityRouting.segments(case.pieces, num_experts=experts)
    if case.form == "packed":
        sequences = [case.pieces] * case.batch
        return ModalityRouting.packed(sequences, num_experts=experts, device=device)
    ids = expert_ids(case)
    generator = torch.Generator().manual_seed(1)
    return ModalityRouting.from_ids(
        ids[torch.randperm(len(ids), generator=generator)].to(device), experts
    )


def make_tensors(case: Case, device, dtype) -> dict:
    """Inputs by argument name, values drawn in float64; lists hold one tensor per expert.

    With ``split``, w1 and b1 hold two: gate and value. With ``streams``, x, residual and
    token_scale are lists as well.
    """
    generator = torch.Generator().manual_seed(2)

    def draw(*shape, scale=1.0, shift=0.0):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + shift
        return values.to(device, dtype)

    def draw_tokens(*columns):
        if not case.streams:
            return draw(*leading, *columns)
        # Of different shapes, which moe_ffn flattens.
        shapes = [(n,) if e % 2 else (case.batch, n // case.batch) for e, n in counts]
        return [draw(*shape, *columns) for shape in shapes]

    counts = [*enumerate(lengths(case))]
    length = sum(n for _, n in case.pieces)
    leading = (case.batch, length) if case.form == "segments" else (case.batch * length,)
    dim, rows = case.dim, [h * (2 if case.activation in GATED else 1) for h in case.hidden]

    def first(tensors):
        # Copies, because views would share their storage.
        return [t.clone() for pair in tensors for t in pair.chunk(2)] if case.split else tensors

    out, tensors = case.linear or dim, {"x": draw_tokens(dim)}
    if case.linear:
        tensors["w2"] = [draw(out, dim, scale=dim**-0.5) for _ in rows]
        if case.bias:
            tensors["b2"] = [draw(out) for _ in rows]
    else:
        tensors["w1"] = first([draw(r, dim, scale=dim**-0.5) for r in rows])
        tensors["w2"] = [draw(dim, h, scale=h**-0.5) for h in case.hidden]
        if case.bias:
            tensors |= {"b1": first([draw(r) for r in rows]), "b2": [draw(dim) for _ in rows]}
    if case.norm != "none":
        tensors["norm_weight"] = [draw(dim, scale=0.1, shift=1.0) for _ in rows]
        if case.norm_bias:
            tensors["norm_bias"] = [draw(dim, scale=0.1) for _ in rows]
    if case.sub_norm:
        tensors["sub_norm_weight"] = [draw(h, scale=0.1, shift=1.0) for h in case.hidden]
        if case.norm_bias:
            tensors["sub_norm_bias"] = [draw(h, scale=0.1) for h in case.hidden]
    if case.layer_scale:
        tensors["layer_scale"] = draw(out, scale=0.1, shift=0.3)
    if case.residual:
        tensors["residual"] = draw_tokens(out)
    if case.token_scale:
        scales = draw_tokens()
        tensors["token_scale"] = (
            [(t > 0).to(dtype) * 2 for t in scales] if case.streams else (scales > 0).to(dtype) * 2
        )
    return tensors


def leaves(tensors: dict) -> dict[str, Tensor]:
    """The differentiable tensors of make_tensors by name, with requires_grad set."""
    flat: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name == "token_scale":
            continue
        items = (
            {f"{name}[{e}]": t for e, t in enumerate(value)}
            if isinstance(value, list)
            else {name: value}
        )
        flat |= {key: t.requires_grad_() for key, t in items.items()}
    return flat


def pairs(tensors: list) -> list[tuple]:
    """Gate and value of each expert."""
    return [*zip(tensors[::2], tensors[1::2], strict=True)]


def activations(case: Case, h: Tensor, e: int, tensors: dict) -> Tensor:
    """The hidden activations of an expert."""
    act, w1, b1 = ACTIVATIONS[case.activation], tensors["w1"], tensors.get("b1")
    if case.split:
        bias = pairs(b1)[e] if b1 else (None, None)
        gate, value = [F.linear(h, *layer) for layer in zip(pairs(w1)[e], bias, strict=True)]
        return act(gate) * value
    h = F.linear(h, w1[e], b1[e] if b1 else None)
    if case.activation not in GATED:
        return act(h)
    gate, value = h.chunk(2, -1)
    return act(gate) * value


def joined(value, *columns: int) -> Tensor:
    """The tokens of all streams in a row: [T, *columns]."""
    parts = value if isinstance(value, list) else [value]
    return torch.cat([part.reshape(-1, *columns) for part in parts])


def in_a_row(case: Case, tensors: dict) -> dict:
    """The tensors with all streams joined."""
    columns = {"x": (case.dim,), "residual": (case.dim,), "token_scale": ()}
    return tensors | {k: joined(tensors[k], *c) for k, c in columns.items() if k in tensors}


def eager(case: Case, ids: Tensor, tensors: dict) -> Tensor:
    """moe_ffn in its usual form: boolean masks, F.linear, F.layer_norm, autograd."""
    if case.streams:
        return eager(replace(case, streams=False), ids, in_a_row(case, tensors))
    x = tensors["x"].reshape(-1, case.dim)
    shape = (*tensors["x"].shape[:-1], case.linear or case.dim)
    out = x.new_zeros(len(x), shape[-1])
    for e in range(len(case.hidden)):
        mask = (ids == e).to(x.device)
        at = {k: v[e] if isinstance(v, list) else v for k, v in tensors.items()}
        h = x[mask]
        if case.norm == "layer":
            h = F.layer_norm(h, (case.dim,), at["norm_weight"], at.get("norm_bias"), 1e-6)
        elif case.norm == "rms":
            h = F.rms_norm(h, (case.dim,), at["norm_weight"], 1e-6)
        if not case.linear:
            h = activations(case, h, e, tensors)
        if case.sub_norm:
            weight = at["sub_norm_weight"]
            h = F.layer_norm(h, weight.shape, weight, at.get("sub_norm_bias"), 1e-5)
        out = out.masked_scatter(mask[:, None], F.linear(h, at["w2"], at.get("b2")))
    if case.layer_scale:
        out = out * tensors["layer_scale"]
    if case.token_scale:
        out = out * tensors["token_scale"].reshape(-1, 1)
    if case.residual:
        out = tensors["residual"].reshape(out.shape) + out
    return out.view(shape)


def eager_autocast(case: Case, ids: Tensor, tensors: dict) -> Tensor:
    """eager() without its masked_scatter, which autocast does not promote; with LayerNorm."""
    if case.streams:
        return eager_autocast(replace(case, streams=False), ids, in_a_row(case, tensors))
    x = tensors["x"].reshape(-1, case.dim)
    parts = []
    for e in range(len(case.hidden)):
        at = {k: v[e] if isinstance(v, list) else v for k, v in tensors.items()}
        h = x[ids == e]
        if case.norm == "layer":
            h = F.layer_norm(h, (case.dim,), at["norm_weight"], at["norm_bias"], 1e-6)
        parts.append(F.linear(activations(case, h, e, tensors), at["w2"], at["b2"]))
    order = torch.cat([(ids == e).nonzero()[:, 0] for e in range(len(case.hidden))]).argsort()
    out = torch.cat(parts)[order] * tensors["layer_scale"]
    out = tensors["residual"].reshape(-1, case.dim) + out * tensors["token_scale"].reshape(-1, 1)
    return out.view(tensors["x"].shape)


def skip_unless_possible(place, case: Case, dtype: torch.dtype) -> None:
    """Skip a test, with the reason, if the backend does not support the call."""
    counted = bool(make_routing(case, place.device).counts) or place.device.type == "cpu"
    hidden = (case.dim,) * len(case.hidden) if case.linear else case.hidden
    facts = Facts(dtype, case.dim, hidden, case.activation, counted, case.sub_norm)
    facts = facts._replace(streams=case.streams, linear=case.linear)
    if reason := BACKENDS[place.backend].why_not(place.device, facts):
        pytest.skip(f"{place.backend}: {reason}")


def call(case: Case, routing: ModalityRouting, tensors: dict, **options) -> Tensor:
    if case.linear:
        names = {"w2": "weight", "b2": "bias"}
        given = {names.get(k, k): v for k, v in tensors.items()}
        return moe_linear(routing=routing, norm=case.norm, **given, **options)
    paired = {k: pairs(tensors[k]) for k in ("w1", "b1") if case.split and k in tensors}
    y = moe_ffn(
        routing=None if case.streams else routing,
        **(tensors | paired),
        norm=case.norm,
        activation=case.activation,
        **options,
    )
    return joined(y, case.dim) if case.streams else y


def outputs_and_gradients(function, tensors: dict) -> dict[str, Tensor]:
    flat = leaves(tensors)
    y = function(tensors)
    generator = torch.Generator().manual_seed(3)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
    y.backward(dy)
    zeros = {name: torch.zeros_like(t) for name, t in flat.items()}
    grads = {name: zeros[name] if t.grad is None else t.grad for name, t in flat.items()}
    return {"y": y.detach(), **grads}


def assert_parity(case: Case, dtype: torch.dtype, place, **options) -> dict[str, tuple[float, ...]]:
    """Check the output and every gradient of a case against the error bound.

    ``options`` are passed to moe_ffn.

    Returns:
        By name, the relative error of ``place.backend`` and that of eager PyTorch in ``dtype``.
    """
    device, backend = place
    routing = make_routing(case, device)
    ids = routing.expert_ids(expert_ids(case).numel(), device)
    assert ids.numel() == expert_ids(case).numel()

    def run(function, to):
        # The same rounded values in every dtype: created in the tested dtype, then widened.
        tensors = make_tensors(case, device, dtype)
        wide = {
            k: [t.to(to) for t in v] if isinstance(v, list) else v.to(to)
            for k, v in tensors.items()
        }
        return outputs_and_gradients(function, wide)

    exact = run(lambda t: eager(case, ids, t), torch.float64)
    baseline = run(lambda t: eager(case, ids, t), dtype)
    actual = run(lambda t: call(case, routing, t, backend=backend, **options), dtype)
    for name, value in actual.items():
        assert_as_accurate_as(name, value, exact[name], baseline[name])
    return relative_errors(actual, baseline, exact)


class Spy:
    """A backend that records its calls and delegates them to the CPU backend."""

    pre_shape = staticmethod(cpu.pre_shape)

    def __init__(self):
        self.calls = []

    def why_not(self, *facts):
        return None

    def forward(self, call):
        self.calls.append(call)
        return cpu.forward(call)

    def backward(self, dy, pre, call, needs):
        self.calls.append(call)
        return cpu.backward(dy, pre, call, needs)
