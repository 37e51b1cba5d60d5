"""Benchmark suite of the feed-forward sublayer of a multiway transformer.

    y = x + layer_scale * (W2_e GELU(W1_e LayerNorm_e(x) + b1_e) + b2_e)

for the tokens of each expert e. All contenders compute this function, with these exceptions:

* ``dense``: all tokens go to the first expert, as in a model without modality experts.
* ``liger``: Liger-Kernel's fused MoE is SwiGLU without biases. Its hidden width is 2 F / 3, rounded
  up to a multiple of 16, so that its products have as many operations (base: exactly; large: 0.2 %
  more). Its accuracy is checked against that function.
* ``quack``: QuACK's GELU is the tanh approximation, and is checked against this.

``grouped_mm``, ``liger``, ``quack`` and ``scattermoe`` take the weights of all experts stacked in
one tensor. Their users store them that way, so stacking is not timed, and gradients are of the
stack.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from harness import peers
from harness.contenders import (
    Case,
    Contender,
    Contest,
    Form,
    Make,
    Scale,
    Suite,
    compiled,
    half_dtypes,
    ours,
    smoke_dtype,
)
from harness.cost import moe_ffn_backward, moe_ffn_forward
from harness.peers import Rows
from vlmo.kernels import ModalityRouting, moe_ffn

NAME = "moe_ffn"
PHASES = ("forward", "forward+backward")
SIZES = {"base": (768, 3072), "large": (1024, 4096), "tiny": (32, 48)}  # D, F
EPS = 1e-6

# Fields that are one tensor for all experts in the layout "stacked".
_STACKED = ("w1", "b1", "w2", "b2")

PerExpert = Any  # a list of E tensors, or one tensor with E in front


class Parameters(NamedTuple):
    """The parameters of all experts."""

    norm_weight: PerExpert  # E x [D]
    norm_bias: PerExpert
    w1: PerExpert  # E x [F, D]; with SwiGLU E x [2 F, D], the gate first
    b1: PerExpert  # E x [F]; with SwiGLU none
    w2: PerExpert  # E x [D, F]
    b2: PerExpert  # E x [D]; with SwiGLU none
    layer_scale: PerExpert  # one, [D]


def feed_forward(x: Tensor, p: Parameters, e: int, activation: str = "gelu") -> Tensor:
    """The sublayer of one expert."""
    h = _norm(x, p, e)
    if activation == "swiglu":
        gate, value = F.linear(h, p.w1[e]).chunk(2, dim=-1)
        return x + p.layer_scale[0] * F.linear(F.silu(gate) * value, p.w2[e])
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    h = F.gelu(F.linear(h, p.w1[e], p.b1[e]), approximate=approximate)
    return x + p.layer_scale[0] * F.linear(h, p.w2[e], p.b2[e])


def _norm(x: Tensor, p: Parameters, e: int) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], p.norm_weight[e], p.norm_bias[e], EPS)


def dense(x: Tensor, p: Parameters) -> Tensor:
    """Route all tokens to the first expert."""
    return feed_forward(x, p, 0)


def slices(split: Sequence[int], activation: str = "gelu") -> Form:
    """The form of VLMo and BEiT-3: slice, feed forward, concatenate."""

    def form(x: Tensor, p: Parameters) -> Tensor:
        parts = x.split(list(split), dim=1)
        fed = [feed_forward(part, p, e, activation) for e, part in enumerate(parts)]
        return torch.cat(fed, dim=1)

    return form


def masks(rows: Rows, experts: int) -> Form:
    """The form of Mixture-of-Transformers and CogVLM: a boolean mask of each expert's tokens.

    The masks of a batch are computed once. Indexing with a mask synchronises with the GPU.
    """
    chosen = [rows.ids == e for e in range(experts)]

    def form(x: Tensor, p: Parameters) -> Tensor:
        tokens = x.flatten(0, 1)
        y = torch.empty_like(tokens)
        for e, mask in enumerate(chosen):
            y[mask] = feed_forward(tokens[mask], p, e)
        return y.view_as(x)

    return form


def routed(split: Sequence[int], backend: str, *, recompute: bool = False) -> Form:
    """This library's operation."""
    routing = ModalityRouting.segments(list(enumerate(split)))

    def form(x: Tensor, p: Parameters) -> Tensor:
        return moe_ffn(
            *(x, routing, p.w1, p.w2),
            b1=p.b1,
            b2=p.b2,
            norm="layer",
            norm_weight=p.norm_weight,
            norm_bias=p.norm_bias,
            norm_eps=EPS,
            layer_scale=p.layer_scale[0],
            residual=x,
            recompute=recompute,
            backend=backend,
        )

    return form


def grouped_mm(split: Sequence[int], rows: Rows) -> Form:
    """PyTorch's grouped product on tokens sorted by expert; everything else is eager."""
    product = peers.grouped_mm()
    ends = rows.ends.to(torch.int32)

    def sorted_feed_forward(h: Tensor, p: Parameters) -> Tensor:
        h = product(h, p.w1.mT, offs=ends)
        parts = h.split(rows.counts)
        h = torch.cat([F.gelu(part + b1) for part, b1 in zip(parts, p.b1, strict=True)])
        h = product(h, p.w2.mT, offs=ends)
        parts = h.split(rows.counts)
        return torch.cat([part + b2 for part, b2 in zip(parts, p.b2, strict=True)])

    return by_expert(split, rows, sorted_feed_forward)


def by_expert(
    split: Sequence[int], rows: Rows, sorted_feed_forward: Callable[[Tensor, Parameters], Tensor]
) -> Form:
    """The sublayer around a feed-forward layer for normed tokens that are sorted by expert."""

    def form(x: Tensor, p: Parameters) -> Tensor:
        parts = x.split(list(split), dim=1)
        normed = [_norm(part, p, e).flatten(0, 1) for e, part in enumerate(parts)]
        fed = sorted_feed_forward(torch.cat(normed), p).split(rows.counts)
        scaled = [
            part + p.layer_scale[0] * f.view_as(part) for part, f in zip(parts, fed, strict=True)
        ]
        return torch.cat(scaled, dim=1)

    return form


def in_order(
    split: Sequence[int], feed_forward_of_all: Callable[[Tensor, Parameters], Tensor]
) -> Form:
    """The sublayer around a feed-forward layer for normed tokens in their original order."""

    def form(x: Tensor, p: Parameters) -> Tensor:
        parts = x.split(list(split), dim=1)
        normed = torch.cat([_norm(part, p, e) for e, part in enumerate(parts)], dim=1)
        fed = feed_forward_of_all(normed.flatten(0, 1), p)
        return x + p.layer_scale[0] * fed.view_as(x)

    return form


class Sublayer(Contest):
    """Random inputs of one case, and its contenders."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self.dim, self.hidden = SIZES[case.size]
        self.split = tuple(int(length) for length in str(case.shape["split"]).split(":"))
        length = sum(self.split)
        sequences = max(1, round(int(case.shape["tokens"]) / length))
        self._generator = torch.Generator(device).manual_seed(0)
        x, dy = (self._draw(sequences, length, self.dim) for _ in range(2))
        self.parameters = self._drawn()
        self._layouts = {"lists": self.parameters}
        backward = case.phase != "forward"
        super().__init__(self._contenders(sequences), x, dy.detach(), backward=backward)

        self.tokens = sequences * length
        shape, experts = (self.tokens, self.dim, self.hidden), len(self.split)
        facts: dict[str, Any] = dict(experts=experts, itemsize=case.dtype.itemsize)
        self.cost = moe_ffn_forward(*shape, **facts, keeps_pre=backward)
        if backward:
            self.cost += moe_ffn_backward(*shape, **facts)

    def _contenders(self, sequences: int) -> dict[str, Contender]:
        case, device, split = self.case, self.device, self.split
        eager = _always(slices(split))
        given = functools.partial(self._parameters, "lists")
        facts = (case, device)
        found = ours(
            *(NAME, *facts, lambda name: _always(routed(split, name))),
            eager=eager,
            parameters=given,
        )
        rows = Rows.of(sequences, split, device)
        one = functools.partial(self._parameters, "one")
        plain = {
            "slices": Contender(eager, eager, given),
            "masks": Contender(_always(masks(rows, len(split))), eager, given),
            "dense": Contender(_always(dense), _always(dense), one),
        }
        for name, entry in plain.items():
            found[name] = entry
            found[f"{name}-compiled"] = compiled(entry, *facts, whole=name != "masks")
        return found | self._peers(rows, eager)

    def _peers(self, rows: Rows, eager: Make) -> dict[str, Contender]:
        split, dtype = self.split, self.case.dtype
        stacked = functools.partial(self._parameters, "stacked")

        def operands(p: Parameters) -> tuple[PerExpert, ...]:
            return p.w1, p.b1, p.w2, p.b2

        # Called with the contender, because the package need not be installed before.
        def make_scattermoe(_: object) -> Form:
            feed = peers.scattermoe(rows)
            return in_order(split, lambda h, p: feed(h, *operands(p)))

        def make_liger(_: object) -> Form:
            feed = peers.liger(rows, dtype)
            return in_order(split, lambda h, p: feed(h, p.w1, p.w2))

        def make_quack(_: object) -> Form:
            feed = peers.quack(rows)
            return by_expert(split, rows, lambda h, p: feed(h, *operands(p)))

        def reason(why_not: Callable[..., str | None]) -> Callable[[], str | None]:
            return functools.partial(why_not, self.device, dtype)

        grouped = Contender(
            lambda _: grouped_mm(split, rows),
            *(eager, stacked, reason(peers.why_not_grouped_mm)),
        )
        traced = grouped._replace(why_not=reason(peers.why_not_traced_grouped_mm))
        tanh, gated = _always(slices(split, "gelu_tanh")), _always(slices(split, "swiglu"))
        return {
            "grouped_mm": grouped,
            "grouped_mm-compiled": compiled(traced, self.case, self.device, whole=True),
            "scattermoe": Contender(
                make_scattermoe, eager, stacked, reason(peers.why_not_scattermoe)
            ),
            "quack": Contender(make_quack, tanh, stacked, reason(peers.why_not_quack)),
            "liger": Contender(
                make_liger,
                *(gated, functools.partial(self._parameters, "gated")),
                reason(peers.why_not_liger),
            ),
        }

    def _parameters(self, layout: str) -> Parameters:
        """The same parameters in another layout, created on demand; "gated" has its own."""
        if layout not in self._layouts:
            self._layouts[layout] = self._laid_out(layout)
        return self._layouts[layout]

    def _laid_out(self, layout: str) -> Parameters:
        p = self.parameters
        if layout == "one":
            return Parameters(*([tensors[0]] for tensors in p))
        if layout == "gated":
            hidden = -(-2 * self.hidden // 3 // 16) * 16
            p = self._drawn(2 * hidden, hidden)._replace(b1=[], b2=[])
        return p._replace(**{name: _stack(getattr(p, name)) for name in _STACKED})

    def _drawn(self, rows: int | None = None, hidden: int | None = None) -> Parameters:
        dim, hidden, experts = self.dim, hidden or self.hidden, range(len(self.split))
        rows, draw = rows or hidden, self._draw
        return Parameters(
            norm_weight=[draw(dim, scale=0.1, shift=1.0) for _ in experts],
            norm_bias=[draw(dim, scale=0.1) for _ in experts],
            w1=[draw(rows, dim, scale=dim**-0.5) for _ in experts],
            b1=[draw(rows, scale=0.1) for _ in experts],
            w2=[draw(dim, hidden, scale=hidden**-0.5) for _ in experts],
            b2=[draw(dim, scale=0.1) for _ in experts],
            layer_scale=[draw(dim, scale=0.1)],
        )

    def _draw(self, *shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        values = torch.randn(shape, generator=self._generator, device=self.device)
        return (values * scale + shift).to(self.case.dtype).requires_grad_()


def cases(device: torch.device, scale: Scale) -> list[Case]:
    """All cases; those closest to bfloat16, base, 32768 tokens, 40:197 come first."""
    lists: tuple[list[Any], ...]
    if scale is Scale.smoke:
        lists = [smoke_dtype(device)], ["tiny"], [30], ["3:4", "2:1:4"]
    elif scale is Scale.cpu:
        dtypes = [torch.float32, torch.bfloat16, torch.float16]
        lists = dtypes, ["base"], [1896], ["40:197"]
    else:
        splits = ["40:197", "50:50", "5:55:40"]
        lists = half_dtypes(device), ["base", "large"], [32768, 8192, 131072], splits
    ranked = itertools.product(*(list(enumerate(values)) for values in lists))
    found = [
        Case(NAME, size, dtype, phase, dict(tokens=tokens, split=split))
        for (_, dtype), (_, size), (_, tokens), (_, split) in sorted(
            ranked, key=lambda choice: sum(rank for rank, _ in choice)
        )
        for phase in PHASES
    ]
    if scale is not Scale.cpu:
        return found
    # Without AVX512-FP16, the backward of PyTorch's float16 products takes 20 seconds a call.
    return [case for case in found if case.dtype != torch.float16 or case.phase == "forward"]


def _always(form: Form) -> Make:
    """A form that is the same for all subsets of the sequences."""
    return lambda chosen: form


def _stack(tensors: PerExpert) -> PerExpert:
    if not len(tensors):
        return tensors
    return torch.stack([tensor.detach() for tensor in tensors]).requires_grad_()


SUITE = Suite(NAME, cases, Sublayer)


def bench_moe_ffn(compete, case, contender):
    compete(SUITE, case, contender)
