"""The public function moe_ffn: contract, argument checks and dispatch.

The public function moe_linear (linear.py) shares the checks and the dispatch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._op import Operation, recorded
from ..arguments import FLOATS, autocast_dtype, check_choice, check_tensor
from ..dispatch import resolve
from ..routing import ModalityRouting
from .call import ACTIVATIONS, GATED, NORMS, Call, Facts
from .op import BACKENDS, COUNTING, MOE_FFN
from .reference import moe_ffn_reference


def moe_ffn(
    x: Tensor,  # [..., D]
    routing: ModalityRouting,
    w1: Sequence[Tensor],  # E x [F, D], or E x [2 F, D] for a gated activation
    w2: Sequence[Tensor],  # E x [D, F]
    *,
    b1: Sequence[Tensor] | None = None,  # E x [F] or [2 F]
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
    token_scale: Tensor | None = None,  # x.shape[:-1]
    residual: Tensor | None = None,  # [..., D]
    recompute: bool = False,
    backend: str | None = None,
) -> Tensor:  # [..., D]
    """Feed-forward layer that routes each token to the expert of its modality, in one operation.

    For a token t that ``routing`` sends to expert e::

        h_t = act(W1_e norm_e(x_t) + b1_e)
        y_t = residual_t + token_scale_t * layer_scale * (W2_e sub_norm_e(h_t) + b2_e)

    Everything except the two products and the activation is optional. The order of the tokens is
    unchanged. Experts may have no tokens, and may differ in hidden width F.

    Args:
        x: input, floating point; the last dimension is D.
        routing: the expert of each token of ``x.shape[:-1]``.
        w1, w2: one matrix per expert, in the layout of the weight of :class:`torch.nn.Linear`. For
            a gated activation the first F rows of ``w1`` are for the gate, the rest for the value.
        b1, b2: one bias per expert, or None.
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
        y, in the shape of x; its dtype is that of ``residual`` if given, else that of ``w2``.

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
    check_input(x, routing)
    check_choice("activation", activation, ACTIVATIONS)
    check_choice("norm", norm, NORMS)
    given = (w1, w2, b1, b2, norm_weight, norm_bias, sub_norm_weight, sub_norm_bias)
    experts = Experts(*[() if tensors is None else tensors for tensors in given])
    operand_dtype = autocast_dtype(x.device.type)
    experts = experts.autocast(operand_dtype)
    if operand_dtype is not None and norm == "none":
        x = x.to(operand_dtype)
    experts.check(x, routing.num_experts, activation, norm, cast=operand_dtype is not None)
    check_vectors(x, x.shape[-1], layer_scale, token_scale, residual)
    options = (norm, norm_eps, sub_norm_eps, activation)
    vectors = (layer_scale, token_scale, residual)
    return dispatch(MOE_FFN, x, routing, experts, vectors, options, recompute, backend)


def dispatch(
    operation: Operation,
    x: Tensor,  # [..., D]
    routing: ModalityRouting,
    experts: Experts,
    vectors: tuple[Tensor | None, Tensor | None, Tensor | None],  # layer, token scale, residual
    options: tuple[str, float, float, str],  # norm, norm_eps, sub_norm_eps, activation
    recompute: bool,
    backend: str | None,
) -> Tensor:  # [..., O]
    """Run moe_ffn or moe_linear with checked arguments."""
    experts = Experts(*map(list, experts))
    layer_scale, token_scale, residual = vectors
    norm, norm_eps, sub_norm_eps, activation = options
    width, out = x.shape[-1], (*x.shape[:-1], experts.w2[0].shape[0])
    facts = Facts(
        dtype=experts.w2[0].dtype,
        width=width,
        hidden=tuple([weight.shape[1] for weight in experts.w2]),
        activation=activation,
        counted=bool(routing.counts) or x.device.type == "cpu",
        sub_norm=bool(experts.sub_norm_weight),
        linear=0 if experts.w1 else out[-1],
    )
    tensors = (x, *itertools.chain.from_iterable(experts), *vectors)
    name = resolve(operation.name, BACKENDS, backend, tensors, x.device, facts)
    ids, rows, offsets, pieces = routing.ids, None, None, routing.pieces
    if name != "reference" and not routing.by_arithmetic:
        ids, rows, offsets = routing.grouping(math.prod(x.shape[:-1]), x.device)
        # Counts vary between batches: in a compiled graph they would be guarded on.
        pieces = tuple(enumerate(routing.counts)) if name in COUNTING else ()
    call = Call(
        x.reshape(-1, width),
        *experts,
        layer_scale,
        None if token_scale is None else token_scale.reshape(-1),
        None if residual is None else residual.reshape(-1, out[-1]),
        *(ids, rows, offsets),
        [number for piece in pieces for number in piece],
        norm,
        norm_eps,
        sub_norm_eps,
        activation,
        save_pre=not recompute and recorded(tensors),
    )
    if name == "reference":
        return moe_ffn_reference(call).reshape(out)
    # Like nn.Linear, this returns a tensor that is not a view; FSDP warns about views.
    return torch.ops.aten._unsafe_view.default(operation.run(call, name), out)


def check_input(x: Tensor, routing: ModalityRouting) -> None:
    """Raise TypeError or ValueError unless x [..., D] is a tensor that the routing fits."""
    if not isinstance(routing, ModalityRouting):
        raise TypeError(f"routing: expected a ModalityRouting, got {type(routing).__name__}")
    check_tensor("x", x, dtypes=FLOATS)
    if x.dim() < 2:
        raise ValueError(f"x: shape {tuple(x.shape)} has no token dimension before the model's")
    routing.check_tokens(x.shape[:-1], x.device)


# The public names of the fields of Experts in moe_linear.
_LINEAR = ("w1", "weight", "b1", "bias", "norm_weight", "norm_bias", "", "")


class Experts(NamedTuple):
    """The parameters of all experts: lists with E tensors or none."""

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
        self, x: Tensor, num_experts: int, activation: str | None, norm: str, cast: bool
    ) -> None:
        """Raise TypeError or ValueError unless every parameter fits x and the routing.

        Without an activation these are the parameters of moe_linear.
        """
        linear = activation is None
        names, required = (_LINEAR, ("weight",)) if linear else (Experts._fields, ("w1", "w2"))
        for name, tensors in zip(names, self, strict=True):
            if isinstance(tensors, Tensor):
                raise TypeError(
                    f"{name}: expected a sequence of one tensor per expert, got a tensor"
                )
            optional = name not in required and len(tensors) == 0
            if len(tensors) != num_experts and not optional:
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
        halves = 2 if activation in GATED else 1
        rows = [w2.shape[1] * halves for w2 in self.w2]
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
                    check_tensor(
                        name, tensor, shape=shapes[e], dtypes=dtypes, device=device, item=e
                    )


def check_vectors(
    x: Tensor,
    out: int,  # O
    layer_scale: Tensor | None,
    token_scale: Tensor | None,
    residual: Tensor | None,
) -> None:
    """Raise TypeError or ValueError unless these fit x [..., D] and y [..., O]."""
    dtypes = tuple({x.dtype, torch.float32})
    if layer_scale is not None:
        check_tensor("layer_scale", layer_scale, shape=(out,), dtypes=dtypes, device=x.device)
    if token_scale is not None:
        check_tensor("token_scale", token_scale, shape=x.shape[:-1], dtypes=dtypes, device=x.device)
        if token_scale.requires_grad:
            raise ValueError("token_scale: requires a gradient, but it is not differentiable")
    if residual is not None:
        shape = (*x.shape[:-1], out)
        check_tensor("residual", residual, shape=shape, dtypes=FLOATS, device=x.device)
