"""Modules for multiway transformers: a linear layer, a norm or a feed-forward network per expert.

A multiway module contains one ordinary module per expert under the expert's name, so its state dict
reads like those of separate networks: ``ffn.text.fc1.weight``. Its forward takes the routing of the
tokens along with them. Parameters of plain submodules are passed to a fused operation; submodules
that were wrapped, replaced or hooked are called (see :mod:`vlmo.kernels.wrappers`).

An expert that has no piece in :meth:`vlmo.kernels.ModalityRouting.segments` takes no part: its
parameters get no gradient, not even zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import check_choice
from .moe_ffn.api import moe_ffn
from .moe_ffn.call import ACTIVATIONS, GATED
from .moe_ffn.linear import moe_linear
from .moe_ffn.reference import _act
from .routing import ModalityRouting
from .wrappers import is_plain

Function = Callable[[Tensor], Tensor]

# The norms that a feed-forward network may begin with, and their names in moe_ffn.
_NORMS: dict[str, type[nn.LayerNorm] | type[nn.RMSNorm]] = {
    "layer": nn.LayerNorm,
    "rms": nn.RMSNorm,
}


class Multiway(nn.ModuleDict):
    """One module per expert, in the order of the routing's experts.

    Args:
        experts: the experts' names, or their number for the names "0", "1", ...
        make: makes the module of an expert.
    """

    def __init__(self, experts: int | Sequence[str], make: Callable[[], nn.Module]):
        names = [*map(str, range(experts))] if isinstance(experts, int) else list(experts)
        if not names or len(set(names)) < len(names):
            raise ValueError(f"experts: {experts!r} are not one or more different names")
        super().__init__({name: make() for name in names})

    def reset_parameters(self) -> None:
        """Set every parameter to its initial value."""
        for module in self.values():
            module.reset_parameters()  # type: ignore[operator]  # all of them have it

    def routed(self, routing: ModalityRouting) -> tuple[list[Any], ModalityRouting]:
        """The modules of the experts that take part, and the routing of the tokens to these."""
        modules = [*self.values()]
        if not isinstance(routing, ModalityRouting):
            raise TypeError(f"routing: expected a ModalityRouting, got {type(routing).__name__}")
        if routing.num_experts != len(modules):
            raise ValueError(
                f"routing: {routing.num_experts} experts, but the module has {len(modules)} "
                f"({', '.join(self)})"
            )
        used = sorted({expert for expert, _ in routing.pieces})
        if len(used) in (0, len(modules)):
            return modules, routing
        pieces = [(used.index(expert), length) for expert, length in routing.pieces]
        return [modules[expert] for expert in used], ModalityRouting.segments(pieces)


class MultiwayLinear(Multiway):
    """A linear layer per expert, with the norm before it and the residual after it.

    Args:
        in_features, out_features, bias: as for :class:`torch.nn.Linear`.
        experts: the experts' names, or their number.
        backend: as for :func:`vlmo.kernels.moe_linear`.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        experts: int | Sequence[str],
        bias: bool = True,
        *,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        factory: Any = dict(device=device, dtype=dtype)
        super().__init__(experts, lambda: nn.Linear(in_features, out_features, bias, **factory))
        self.backend = backend

    def forward(
        self,
        x: Tensor,  # [..., D]
        routing: ModalityRouting,
        *,
        norm: MultiwayNorm | None = None,
        layer_scale: Tensor | None = None,  # [O]
        token_scale: Tensor | None = None,  # x.shape[:-1]
        residual: Tensor | None = None,  # [..., O]
    ) -> Tensor:  # [..., O]
        """``residual + token_scale * layer_scale * linear(norm(x))``; all but ``linear`` optional.

        O is ``out_features``.
        """
        x, norms = _norms_of(norm, x, routing)
        linears, routing = self.routed(routing)
        return linear(
            x,
            routing,
            linears,
            norms=norms,
            layer_scale=layer_scale,
            token_scale=token_scale,
            residual=residual,
            backend=self.backend,
        )


class MultiwayNorm(Multiway):
    """A norm per expert.

    Args:
        dim: width D.
        experts: the experts' names, or their number.
        eps: added to the variance (or mean square).
        kind: ``"layer"`` (LayerNorm with weight and bias) or ``"rms"`` (RMSNorm).
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        experts: int | Sequence[str],
        eps: float = 1e-6,
        kind: str = "layer",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_choice("kind", kind, [*_NORMS])
        super().__init__(experts, lambda: _NORMS[kind](dim, eps=eps, device=device, dtype=dtype))

    def forward(
        self,
        x: Tensor,  # [..., D]
        routing: ModalityRouting,
    ) -> Tensor:  # [..., D]
        norms, routing = self.routed(routing)
        return by_expert(x, routing, norms)


class FeedForward(nn.Module):
    """One expert: ``fc2(act(fc1(x)))``, with a sub-norm ``fc2(ffn_layernorm(act(fc1(x))))``.

    Args:
        dim: width D.
        hidden: hidden width F.
        activation: as for :func:`vlmo.kernels.moe_ffn`; a gated one doubles the rows of ``fc1``.
        sub_norm: normalise the hidden units (the sub-LayerNorm of Magneto, arXiv 2210.06423).
        eps: added to the variance by the sub-norm.
        bias: whether both layers have biases.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        activation: str = "gelu",
        sub_norm: bool = False,
        eps: float = 1e-5,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_choice("activation", activation, ACTIVATIONS)
        factory: Any = dict(device=device, dtype=dtype)
        self.activation = activation
        self.fc1 = nn.Linear(dim, hidden * (2 if activation in GATED else 1), bias, **factory)
        self.fc2 = nn.Linear(hidden, dim, bias, **factory)
        self.ffn_layernorm = nn.LayerNorm(hidden, eps, **factory) if sub_norm else None

    def reset_parameters(self) -> None:
        """Set every parameter to its initial value."""
        for module in self.children():
            module.reset_parameters()  # type: ignore[operator]  # all of them have it

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        hidden = _act(hidden.flatten(0, -2), activation=self.activation).unflatten(0, x.shape[:-1])
        if self.ffn_layernorm is not None:
            hidden = self.ffn_layernorm(hidden)
        return self.fc2(hidden)

    def is_plain(self) -> bool:
        """Whether its weights determine its output, see :mod:`vlmo.kernels.wrappers`."""
        return (
            is_plain(self, FeedForward)
            and is_plain(self.fc1, nn.Linear)
            and is_plain(self.fc2, nn.Linear)
            and (self.ffn_layernorm is None or is_plain(self.ffn_layernorm, nn.LayerNorm))
        )


class MultiwayFFN(Multiway):
    """A feed-forward network per expert, with the norm before it and the residual after it.

    Args:
        dim: width D.
        hidden: hidden width F of every expert.
        experts: the experts' names, or their number.
        activation, sub_norm, eps, bias, device, dtype: as for :class:`FeedForward`.
        backend: as for :func:`vlmo.kernels.moe_ffn`.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        experts: int | Sequence[str],
        *,
        activation: str = "gelu",
        sub_norm: bool = False,
        eps: float = 1e-5,
        bias: bool = True,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        factory: Any = dict(bias=bias, device=device, dtype=dtype)
        options: Any = dict(activation=activation, sub_norm=sub_norm, eps=eps, **factory)
        super().__init__(experts, lambda: FeedForward(dim, hidden, **options))
        self.backend = backend

    def forward(
        self,
        x: Tensor,  # [..., D]
        routing: ModalityRouting,
        *,
        norm: MultiwayNorm | None = None,
        layer_scale: Tensor | None = None,  # [D]
        token_scale: Tensor | None = None,  # x.shape[:-1]
        residual: Tensor | None = None,  # [..., D]
    ) -> Tensor:  # [..., D]
        """``residual + token_scale * layer_scale * ffn(norm(x))``; all but ``ffn`` is optional."""
        x, norms = _norms_of(norm, x, routing)
        experts, routing = self.routed(routing)
        return feed_forward(
            x,
            routing,
            experts,
            norms=norms,
            layer_scale=layer_scale,
            token_scale=token_scale,
            residual=residual,
            backend=self.backend,
        )


def linear(
    x: Tensor,  # [..., D]
    routing: ModalityRouting,
    linears: Sequence[Any],
    *,
    norms: Sequence[Any] | None = None,
    layer_scale: Tensor | None = None,  # [O]
    token_scale: Tensor | None = None,  # x.shape[:-1]
    residual: Tensor | None = None,  # [..., O]
    backend: str | None = None,
) -> Tensor:  # [..., O]
    """``residual + token_scale * layer_scale * linear(norm(x))`` with each token's own modules.

    Args:
        x: input.
        routing: the expert of each token.
        linears: one module per expert. If all are plain, and the norms as well, one operation reads
            their parameters; otherwise all are called.
        norms: one norm per expert, or None.
        layer_scale, token_scale, residual, backend: as for :func:`vlmo.kernels.moe_linear`.
    """
    kind = "none" if norms is None else _kind_of(norms)
    plain = all(is_plain(module, nn.Linear) for module in linears)
    if kind is None or not plain or len({module.bias is None for module in linears}) > 1:
        functions = linears if norms is None else [*map(_after, norms, linears)]
        return _finish(by_expert(x, routing, functions), layer_scale, token_scale, residual)
    return moe_linear(
        x,
        routing,
        [module.weight for module in linears],
        _vectors(linears, "bias"),
        layer_scale=layer_scale,
        token_scale=token_scale,
        residual=residual,
        backend=backend,
        **_norm_arguments(norms, kind),
    )


def feed_forward(
    x: Tensor,  # [..., D]
    routing: ModalityRouting,
    experts: Sequence[Any],
    *,
    norms: Sequence[Any] | None = None,
    layer_scale: Tensor | None = None,  # [D]
    token_scale: Tensor | None = None,  # x.shape[:-1]
    residual: Tensor | None = None,  # [..., D]
    backend: str | None = None,
) -> Tensor:  # [..., D]
    """``residual + token_scale * layer_scale * expert(norm(x))`` with each token's own modules.

    Args:
        x: input.
        routing: the expert of each token.
        experts: one module per expert. If all are plain, and the norms as well, one operation reads
            their parameters; otherwise all are called.
        norms: one norm per expert, or None.
        layer_scale, token_scale, residual, backend: as for :func:`vlmo.kernels.moe_ffn`.
    """
    kind = "none" if norms is None else _kind_of(norms)
    plain = all(isinstance(expert, FeedForward) and expert.is_plain() for expert in experts)
    if kind is None or not plain or not _alike(experts):
        functions = experts if norms is None else [*map(_after, norms, experts)]
        return _finish(by_expert(x, routing, functions), layer_scale, token_scale, residual)
    parameters: dict[str, Any] = dict(
        w1=[expert.fc1.weight for expert in experts],
        w2=[expert.fc2.weight for expert in experts],
        b1=_vectors([expert.fc1 for expert in experts], "bias"),
        b2=_vectors([expert.fc2 for expert in experts], "bias"),
        activation=experts[0].activation,
        layer_scale=layer_scale,
        token_scale=token_scale,
        residual=residual,
    )
    parameters |= _norm_arguments(norms, kind)
    if experts[0].ffn_layernorm is not None:
        sub_norms = [expert.ffn_layernorm for expert in experts]
        parameters |= dict(
            sub_norm_weight=_vectors(sub_norms, "weight"),
            sub_norm_bias=_vectors(sub_norms, "bias"),
            sub_norm_eps=sub_norms[0].eps,
        )
    return moe_ffn(x, routing, backend=backend, **parameters)


def by_expert(
    x: Tensor,  # [..., D]
    routing: ModalityRouting,
    functions: Sequence[Function],
) -> Tensor:  # [..., any]
    """Apply to each token the function of its expert, each once, to tokens ``[n, D]``.

    Waits for the device if only it knows how many tokens each expert has.
    """
    routing.check_tokens(x.shape[:-1], x.device)
    flat = x.flatten(0, -2)
    if len(functions) == 1:
        return functions[0](flat).unflatten(0, x.shape[:-1])
    if routing.by_arithmetic:
        sequences = flat.view(-1, routing.max_length, flat.shape[-1])
        parts = sequences.split([length for _, length in routing.pieces], dim=1)
        outs = [
            functions[expert](part.flatten(0, 1)).unflatten(0, part.shape[:2])
            for (expert, _), part in zip(routing.pieces, parts, strict=True)
        ]
        return torch.cat(outs, dim=1).flatten(0, 1).unflatten(0, x.shape[:-1])
    grouping = routing.grouping(flat.shape[0], x.device)
    counts = routing.counts or tuple(grouping.offsets.diff().tolist())
    if routing.pieces:
        counts = tuple(count * (flat.shape[0] // routing.max_length) for count in counts)
    rows = grouping.rows.long()
    parts = flat[rows].split(counts)
    out = torch.cat([function(part) for function, part in zip(functions, parts, strict=True)])
    return torch.empty_like(out).index_copy(0, rows, out).unflatten(0, x.shape[:-1])


def _finish(
    branch: Tensor,
    layer_scale: Tensor | None,
    token_scale: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    if layer_scale is not None:
        branch = branch * layer_scale
    if token_scale is not None:
        branch = (branch * token_scale[..., None]).to(branch.dtype)
    return branch if residual is None else residual + branch


def _norms_of(
    norm: MultiwayNorm | None, x: Tensor, routing: ModalityRouting
) -> tuple[Tensor, Sequence[Any] | None]:
    """x and the norms of the experts that take part; if the norm is not plain, norm(x) and None."""
    if norm is None:
        return x, None
    if not is_plain(norm, MultiwayNorm):
        return norm(x, routing), None
    return x, norm.routed(routing)[0]


def _norm_arguments(norms: Sequence[Any] | None, kind: str) -> dict[str, Any]:
    """The arguments of an operation for plain norms of one kind."""
    if norms is None:
        return {}
    return dict(
        norm=kind,
        norm_weight=_vectors(norms, "weight"),
        norm_bias=_vectors(norms, "bias") if kind == "layer" else None,
        norm_eps=norms[0].eps,
    )


def _after(norm: Function, function: Function) -> Function:
    return lambda rows: function(norm(rows))


def _kind_of(norms: Sequence[Any]) -> str | None:
    """The kind that all norms have, with one eps; None if they differ or one is not plain."""
    for kind, module in _NORMS.items():
        if all(is_plain(norm, module) and norm.eps == norms[0].eps for norm in norms):
            return kind
    return None


def _alike(experts: Sequence[FeedForward]) -> bool:
    """Whether plain experts have the same activation, biases and sub-norm."""
    kinds = {
        (
            expert.activation,
            expert.fc1.bias is None,
            expert.fc2.bias is None,
            None if expert.ffn_layernorm is None else expert.ffn_layernorm.eps,
        )
        for expert in experts
    }
    return len(kinds) == 1


def _vectors(modules: Sequence[Any], name: str) -> list[Tensor] | None:
    """A parameter of each module; None if the modules have none of this name."""
    found = [getattr(module, name) for module in modules]
    return None if found[0] is None else found
