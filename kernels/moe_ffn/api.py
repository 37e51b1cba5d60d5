"""The public function moe_ffn: contract, argument checks and dispatch.

The public function moe_linear (linear.py) shares the checks and the dispatch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .._op import Operation, recorded
from ..arguments import FLOATS, autocast_dtype, check_choice, check_tensor
from ..dispatch import resolve
from ..routing import ModalityRouting
from .call import ACTIVATIONS, GATED, NORMS, Call, Facts
from .op import BACKENDS, COUNTING, MOE_FFN
from .reference import moe_ffn_reference

# One tensor, or one for each expert.
Tokens = TypeVar("Tokens", Tensor, Sequence[Tensor])


def moe_ffn(
    x: Tokens,  # [..., D], or E such tensors: the tokens of each expert
    routing: ModalityRouting | None,  # None if x is a sequence
    # E x [F, D]; for a gated activation E x [2 F, D], or pairs ([F, D], [F, D]) of gate and value
    w1: Sequence[Tensor] | Sequence[Sequence[Tensor]],
    w2: Sequence[Tensor],  # E x [D, F]
    *,
    # E x [F] or [2 F], or pairs ([F], [F]) like w1
    b1: Sequence[Tensor] | Sequence[Sequence[Tensor]] | None = None,
    b2: Sequence[Tensor] | None = None,  # E x [D]
    norm: str = "none",
    norm_weight: Sequence[Tensor] | None = None,  # E x [D]
    norm_bias: Sequence[Tensor] | None = None,  # E x [D]
    norm_eps: float = 1e-6,
    sub_norm_weight: Sequence[Tensor] | None = None,  # E x [F]
    sub_norm_bias: Sequence[Tensor] | None = None,  # E x [F]
    sub_norm_eps: float = 1e-5,
    activation: str = "gelu",
    layer_scale: Tensor | None = None,  # [D]
    token_scale: Tokens | None = None,  # x.shape[:-1]; a sequence like x, as is residual
    residual: Tokens | None = None,  # [..., D]
    recompute: bool = False,
    backend: str | None = None,
) -> Tokens:  # [..., D], or a list of E such tensors
    """Feed-forward layer that routes each token to the expert of its modality, in one operation.

    For a token t that ``routing`` sends to expert e::

        h_t = act(W1_e norm_e(x_t) + b1_e)
        y_t = residual_t + token_scale_t * layer_scale * (W2_e sub_norm_e(h_t) + b2_e)

    Everything except the two products and the activation is optional. The order of the tokens is
    unchanged. Experts may have no tokens, and may differ in hidden width F.

    Args:
        x: input, floating point; the last dimension is D. If the tokens of each expert are a tensor
            of their own, as text and image in a dual-stream block, x is the sequence of these, on
            every backend but ``"cuda"``. Their shapes differ in all dimensions but the last. They,
            ``residual`` and ``token_scale`` are read where they are, not concatenated.
        routing: the expert of each token of ``x.shape[:-1]``; None if x is a sequence.
        w1, w2: one matrix per expert, in the layout of the weight of :class:`torch.nn.Linear`. For
            a gated activation the first F rows of ``w1[e]`` are for the gate, the rest for the
            value; or ``w1[e]`` is a pair of two matrices, gate and value, for every expert, on
            every backend but ``"cuda"``. They are read where they are, not concatenated.
        b1, b2: one bias per expert, or None; ``b1[e]`` is a pair if ``w1[e]`` is one.
        norm: ``"none"``, ``"layer"`` (LayerNorm) or ``"rms"`` (RMSNorm) of x, with one
            ``norm_weight`` per expert and, for LayerNorm, optionally one ``norm_bias``. For an
            RMSNorm that scales by 1 + w, as in Gemma, pass ``1 + w.float()``.
        norm_eps: added to the variance (or mean square).
        sub_norm_weight, sub_norm_bias: LayerNorm of the hidden activations, as in BEiT-3 and
            Magneto (sub-LN, Wang et al. 2022), on every backend but ``"cuda"``. No sub-norm without
            a weight.
        sub_norm_eps: added to the variance by the sub-norm.
        activation: ``"gelu"`` (exact, erf), ``"gelu_tanh"``, ``"relu2"`` (the square of ReLU), or,
            gated, ``"swiglu"``, ``"geglu"`` (exact) or ``"geglu_tanh"``.
        layer_scale: learned scale of each channel (``gamma_2`` of VLMo).
        token_scale: factor of each token's branch, for stochastic depth; not differentiable.
        residual: added at the end; often x itself.
        recompute: save only x for the backward and recompute ``W1_e norm_e(x) + b1_e`` there, at
            the cost of one more product. By default this pre-activation is saved if gradients are
            recorded: F numbers per token (2 F if gated). On a CPU the activations and the operand
            of ``layer_scale`` are saved too, F + D more; ``"composed"`` saves that operand, D more.
            ``"reference"`` saves whatever autograd saves. Gradients do not depend on it.
        backend: ``"cuda"``, ``"triton"``, ``"composed"``, ``"cpu"`` or ``"reference"``; see
            :mod:`vlmo.kernels`. ``"composed"`` needs a routing with ``counts``: not
            :meth:`~vlmo.kernels.ModalityRouting.from_ids` on a GPU.

    Returns:
        y, in the shape of x; its dtype is that of ``residual`` if given, else that of ``w2``. If x
        is a sequence, a list of tensors, which are successive rows of one.

    Dtypes: float16, bfloat16, float32 or float64. x, weights and biases share one dtype; norm
    parameters, ``layer_scale``, ``token_scale`` and ``residual`` may be float32 if x is 16-bit.
    Under autocast, ``w1``, ``w2``, ``b1``, ``b2`` (and x, if there is no norm) are cast to
    autocast's dtype; norm, scales and residual stay as they are. Products accumulate in float32
    (float64 for float64); norms and activations are computed in float32 or better.

    Differentiable with respect to x, every weight and bias, the norm parameters, ``layer_scale``
    and ``residual``. For an expert whose parameters do not require gradients, none are computed.
    Forward-mode differentiation and the transforms of ``torch.func`` (grad, jvp, vmap, ...) use the
    backend ``"reference"``, the only one that supports them. It is also the only one with second
    derivatives.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value, or the number of weights is
            not the routing's number of experts.
        NotImplementedError: the requested backend cannot run this call (with its reason).
    """
    streams = not isinstance(x, Tensor) and isinstance(x, Sequence)
    if streams and routing is not None:
        raise TypeError("routing: expected None, because x is a sequence of tensors")
    xs: list[Any] = _listed("x", x, len(x)) if streams else [x]
    check_inputs(xs, routing, streams)
    num_experts = len(xs) if routing is None else routing.num_experts
    check_choice("activation", activation, ACTIVATIONS)
    check_choice("norm", norm, NORMS)

    split = _has_pairs(w1) or _has_pairs(b1)
    if split:
        w1 = _gates_and_values("w1", w1, num_experts, activation)
        b1 = _gates_and_values("b1", b1, num_experts, activation)
    given: Any = (w1, w2, b1, b2, norm_weight, norm_bias, sub_norm_weight, sub_norm_bias)
    experts = Experts(*[() if tensors is None else tensors for tensors in given])
    device = xs[0].device
    operand_dtype = autocast_dtype(device.type)
    experts = experts.autocast(operand_dtype)
    if operand_dtype is not None and norm == "none":
        xs = [t.to(operand_dtype) for t in xs]
    cast = operand_dtype is not None
    experts.check(xs[0], num_experts, activation, norm, cast, split)
    residuals: list[Tensor] = _listed("residual", residual, len(xs) if streams else None)
    token_scales: list[Tensor] = _listed("token_scale", token_scale, len(xs) if streams else None)
    vectors = (layer_scale, token_scales, residuals)
    check_vectors(xs, xs[0].shape[-1], *vectors, streams)
    options = (norm, norm_eps, sub_norm_eps, activation)
    made = dispatch(MOE_FFN, xs, routing, experts, vectors, options, streams, recompute, backend)
    result: Any = made if streams else made[0]
    return result


def dispatch(
    operation: Operation,
    xs: list[Tensor],  # [..., D], or E such tensors
    routing: ModalityRouting | None,  # None with streams
    experts: Experts,
    vectors: tuple[Tensor | None, list[Tensor], list[Tensor]],  # layer, token scales, residuals
    options: tuple[str, float, float, str],  # norm, norm_eps, sub_norm_eps, activation
    streams: bool,
    recompute: bool,
    backend: str | None,
) -> list[Tensor]:  # [..., O] for each of xs
    """Run moe_ffn or moe_linear with checked arguments."""
    experts = Experts(*map(list, experts))
    layer_scale, token_scales, residuals = vectors
    norm, norm_eps, sub_norm_eps, activation = options
    device, width, out = xs[0].device, xs[0].shape[-1], experts.w2[0].shape[0]
    facts = Facts(
        dtype=experts.w2[0].dtype,
        width=width,
        hidden=tuple([weight.shape[1] for weight in experts.w2]),
        activation=activation,
        counted=routing is None or bool(routing.counts) or device.type == "cpu",
        sub_norm=bool(experts.sub_norm_weight),
        streams=streams,
        linear=0 if experts.w1 else out,
    )
    parameters = itertools.chain.from_iterable(experts)
    tensors: Any = (*xs, *parameters, layer_scale, *token_scales, *residuals)
    name = resolve(operation.name, BACKENDS, backend, tensors, device, facts)
    shapes = [(*t.shape[:-1], out) for t in xs]
    xs = [t.reshape(-1, width) for t in xs]
    token_scales = [t.reshape(-1) for t in token_scales]
    residuals = [t.reshape(-1, out) for t in residuals]
    ids, rows, offsets = None, None, None
    if routing is None:
        pieces = tuple(enumerate([t.shape[0] for t in xs]))
    else:
        ids, pieces = routing.ids, routing.pieces
        if name != "reference" and not routing.by_arithmetic:
            ids, rows, offsets = routing.grouping(xs[0].shape[0], device)
            # Counts vary between batches: in a compiled graph they would be guarded on.
            pieces = tuple(enumerate(routing.counts)) if name in COUNTING else ()
    call = Call(
        xs[0].new_empty(0, width) if streams else xs[0],
        *experts,
        layer_scale,
        token_scales[0] if token_scales and not streams else None,
        residuals[0] if residuals and not streams else None,
        *(ids, rows, offsets),
        [number for piece in pieces for number in piece],
        norm,
        norm_eps,
        sub_norm_eps,
        activation,
        save_pre=not recompute and recorded(tensors),
        streams=xs if streams else [],
        residuals=residuals if streams else [],
        token_scales=token_scales if streams else [],
    )
    if name == "reference" and streams:
        alone = [moe_ffn_reference(call.alone(e)) for e in range(len(xs))]
        return [y.reshape(shape) for y, shape in zip(alone, shapes, strict=True)]
    if name == "reference":
        return [moe_ffn_reference(call).reshape(shapes[0])]
    if streams:
        # Of no tensor that autograd knows these are views: they may be changed in place.
        parts = torch.unsafe_split_with_sizes(operation.run(call, name), [t.shape[0] for t in xs])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
    # Like nn.Linear, this returns a tensor that is not a view; FSDP warns about views.
    return [torch.ops.aten._unsafe_view.default(operation.run(call, name), shapes[0])]


# The public names of the fields of Experts in moe_linear.
_LINEAR = ("w1", "weight", "b1", "bias", "norm_weight", "norm_bias", "", "")


class Experts(NamedTuple):
    """The parameters of all experts: lists with E tensors or none; w1 and b1 as in Call."""

    w1: Sequence[Tensor]
    w2: Sequence[Tensor]
    b1: Sequence[Tensor]
    b2: Sequence[Tensor]
    norm_weight: Sequence[Tensor]
    norm_bias: Sequence[Tensor]
    sub_norm_weight: Sequence[Tensor]
    sub_norm_bias: Sequence[Tensor]

    def autocast(self, dtype: torch.dtype | None) -> Experts:
        """The operands of the products in autocast's ``dtype``; unchanged if that is None."""
        if dtype is None:
            return self

        def cast(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
            return [t.to(dtype) if isinstance(t, Tensor) else t for t in tensors]

        return Experts._make([*map(cast, self[:4]), *self[4:]])

    def check(
        self,
        x: Tensor,
        num_experts: int,
        activation: str | None,
        norm: str,
        cast: bool,
        split: bool = False,
    ) -> None:
        """Raise TypeError or ValueError unless every parameter fits x and the routing.

        Without an activation these are the parameters of moe_linear.
        """
        linear = activation is None
        names, required = (_LINEAR, ("weight",)) if linear else (Experts._fields, ("w1", "w2"))
        each = {"w1": 2, "b1": 2} if split else {}
        for name, tensors in zip(names, self, strict=True):
            if isinstance(tensors, Tensor):
                raise TypeError(
                    f"{name}: expected a sequence of one tensor per expert, got a tensor"
                )
            optional = name not in required and len(tensors) == 0
            if len(tensors) != num_experts * each.get(name, 1) and not optional:
                raise ValueError(f"{name}: {len(tensors)} tensors for {num_experts} experts")
        if norm == "none" and (self.norm_weight or self.norm_bias):
            raise ValueError("norm: 'none', but norm_weight or norm_bias was given")
        if norm != "none" and not self.norm_weight:
            raise ValueError(f"norm_weight: missing for norm {norm!r}")
        if norm == "rms" and self.norm_bias:
            raise ValueError("norm_bias: RMSNorm has none")
        if self.sub_norm_bias and not self.sub_norm_weight:
            raise ValueError("sub_norm_bias: given without sub_norm_weight")

        width, device = x.shape[-1], x.device
        first = self.w2[0]
        operand = first.dtype if cast and isinstance(first, Tensor) else x.dtype
        operands, vectors = (operand,), tuple({x.dtype, torch.float32, operand})
        # moe_ffn returns the width of x and has any hidden width, moe_linear the opposite.
        for e, w2 in enumerate(self.w2):
            shape = (-1 if e == 0 else first.shape[0], width) if linear else (width, -1)
            check_tensor(names[1], w2, shape=shape, dtypes=operands, device=device, item=e)
        halves = 2 if activation in GATED and not split else 1
        rows = [w2.shape[1] * halves for w2 in self.w2 for _ in range(2 if split else 1)]
        of_rows, of_width = [(count,) for count in rows], [(width,)] * num_experts
        of_hidden = [(w2.shape[1],) for w2 in self.w2]
        for name, tensors, shapes, dtypes in (
            ("w1", self.w1, [(count, width) for count in rows], operands),
            ("b1", self.b1, of_rows, operands),
            (names[3], self.b2, [(first.shape[0],)] * num_experts, operands),
            ("norm_weight", self.norm_weight, of_width, vectors),
            ("norm_bias", self.norm_bias, of_width, vectors),
            ("sub_norm_weight", self.sub_norm_weight, of_hidden, vectors),
            ("sub_norm_bias", self.sub_norm_bias, of_hidden, vectors),
        ):
            for e, tensor in enumerate(tensors):
                # Inline, because nearly all tensors fit and the call takes longer than this.
                if not (
                    isinstance(tensor, Tensor)
                    and tensor.shape == shapes[e]
                    and tensor.dtype in dtypes
                    and tensor.device == device
                ):
                    if name in each:
                        name, e = f"{name}[{e // 2}]", e % 2
                    check_tensor(
                        name, tensor, shape=shapes[e], dtypes=dtypes, device=device, item=e
                    )


def _has_pairs(tensors: object) -> bool:
    return isinstance(tensors, Sequence) and any(isinstance(t, Sequence) for t in tensors)


def _gates_and_values(name: str, pairs: Any, num_experts: int, activation: str) -> Any:
    """The pairs of all experts one after the other; what has no experts is left to check."""
    if isinstance(pairs, Tensor) or not pairs:
        return pairs
    if activation not in GATED:
        raise ValueError(f"{name}: pairs, but activation {activation!r} is not gated")
    for e, pair in enumerate(pairs):
        if not isinstance(pair, Sequence):
            raise TypeError(
                f"{name}[{e}]: expected a pair of gate and value, because w1 or b1 has pairs, got "
                f"{type(pair).__name__}"
            )
        if len(pair) != 2:
            raise ValueError(f"{name}[{e}]: {len(pair)} tensors, expected gate and value")
    if len(pairs) != num_experts:
        raise ValueError(f"{name}: {len(pairs)} pairs for {num_experts} experts")
    return list(itertools.chain.from_iterable(pairs))


def _listed(name: str, value: Any, count: int | None) -> list[Tensor]:
    """The tensors of ``count`` streams, or the only tensor if that is None; none for None."""
    if value is None:
        return []
    if count is None:
        return [value]
    if isinstance(value, Tensor) or not isinstance(value, Sequence):
        raise TypeError(f"{name}: expected a sequence like x, got {type(value).__name__}")
    if len(value) != count or not count:
        raise ValueError(f"{name}: {len(value)} tensors, but x is a sequence of {count}")
    return list(value)


def check_inputs(xs: list[Tensor], routing: ModalityRouting | None, streams: bool = False) -> None:
    """Raise TypeError or ValueError unless these are tensors [..., D] that the routing fits.

    Args:
        xs: x alone, or the streams.
    """
    if not streams and not isinstance(routing, ModalityRouting):
        raise TypeError(f"routing: expected a ModalityRouting, got {type(routing).__name__}")
    for e, x in enumerate(xs):
        item = e if streams else None
        dtypes, device = ((xs[0].dtype,), xs[0].device) if e else (FLOATS, None)
        check_tensor("x", x, dtypes=dtypes, device=device, item=item)
        name = f"x[{e}]" if streams else "x"
        if x.dim() < 2:
            raise ValueError(
                f"{name}: shape {tuple(x.shape)} has no token dimension before the model's"
            )
        if x.shape[-1] != xs[0].shape[-1]:
            raise ValueError(f"{name}: width {x.shape[-1]}, but x[0] has {xs[0].shape[-1]}")
    if routing is not None:
        routing.check_tokens(xs[0].shape[:-1], xs[0].device)


def check_vectors(
    xs: list[Tensor],
    out: int,  # O
    layer_scale: Tensor | None,
    token_scales: list[Tensor],
    residuals: list[Tensor],
    streams: bool = False,
) -> None:
    """Raise TypeError or ValueError unless these fit x [..., D] and y [..., O], or the streams."""
    dtypes, device = tuple({xs[0].dtype, torch.float32}), xs[0].device
    if layer_scale is not None:
        check_tensor("layer_scale", layer_scale, shape=(out,), dtypes=dtypes, device=device)
    for e, (scale, x) in enumerate(zip(token_scales, xs, strict=True) if token_scales else ()):
        item, of_first = e if streams else None, (token_scales[0].dtype,) if e else dtypes
        tokens = x.shape[:-1]
        check_tensor("token_scale", scale, shape=tokens, dtypes=of_first, device=device, item=item)
        if scale.requires_grad:
            raise ValueError("token_scale: requires a gradient, but it is not differentiable")
    for e, (residual, x) in enumerate(zip(residuals, xs, strict=True) if residuals else ()):
        item, of_first = e if streams else None, (residuals[0].dtype,) if e else FLOATS
        shape = (*x.shape[:-1], out)
        check_tensor("residual", residual, shape=shape, dtypes=of_first, device=device, item=item)
