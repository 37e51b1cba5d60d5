"""Gated feed-forward networks of Qwen2's form, ``down(silu(gate(x)) * up(x))``, and RMSNorms.

The gate's and the up projection's weights are two parameters, which :func:`vlmo.kernels.moe_ffn`
takes as a pair. Only the backend ``"cuda"`` concatenates them, in every call.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .handle import why_not_plain

# The classes of norms, and their attribute for eps.
_EPS = {"Qwen2RMSNorm": "variance_epsilon", "RMSNorm": "eps"}
_SILU = ("SiLU", "SiLUActivation")


def why_not(networks: Sequence[Any], kind: str, norms: Sequence[Any] = ()) -> str | None:
    """Why :func:`vlmo.kernels.moe_ffn` cannot compute these modules, or None.

    Args:
        networks: one for each expert.
        kind: the name of their class.
        norms: one for each expert, applied before it.
    """
    if reason := why_not_plain([(network, kind) for network in networks]):
        return reason
    for network in networks:
        if type(network.act_fn).__name__ not in _SILU:
            return f"activation {type(network.act_fn).__name__}, expected SiLU"
        linears = [network.gate_proj, network.up_proj, network.down_proj]
        if reason := why_not_plain([(linear, nn.Linear) for linear in linears]):
            return reason
        if any(linear.bias is not None for linear in linears):
            return f"a {kind} with biases"
    for norm in norms:
        if type(norm).__name__ not in _EPS:
            return f"norm {type(norm).__name__}, expected {' or '.join(_EPS)}"
        if norm.weight is None or getattr(norm, "bias", None) is not None:
            return f"a {type(norm).__name__} without weight or with bias"
    if len({_eps(norm) for norm in norms}) > 1:
        return f"norms with different eps: {', '.join(str(_eps(norm)) for norm in norms)}"
    return why_not_plain([(norm, type(norm).__name__) for norm in norms])


def arguments(networks: Sequence[Any], norms: Sequence[Any] = ()) -> dict[str, Any]:
    """The arguments of :func:`vlmo.kernels.moe_ffn` for one network and norm per expert."""
    found: dict[str, Any] = dict(
        w1=[(n.gate_proj.weight, n.up_proj.weight) for n in networks],  # E x ([F, D], [F, D])
        w2=[n.down_proj.weight for n in networks],  # E x [D, F]
        activation="swiglu",
    )
    if norms:
        weights = [norm.weight for norm in norms]
        found |= dict(norm="rms", norm_weight=weights, norm_eps=_eps(norms[0]))
    return found


class Latest:
    """A function of tensors that remembers its latest result, for the layers of one pass.

    They all get the same tensor objects. In-place changes of these are noticed.
    """

    def __init__(self, function: Callable[..., Any]):
        self._function = function
        self._key: tuple = ()
        self._result: Any = None

    def __call__(self, *tensors: Tensor, **options: Any) -> Any:
        # Inference tensors do not count their changes; a graph must not keep its tensors.
        if torch.compiler.is_compiling() or any(t.is_inference() for t in tensors):
            return self._function(*tensors, **options)
        key = (tensors, [t._version for t in tensors], options)
        if not self._key or not _same(key, self._key):
            # A routing that is made in inference mode must be usable in training.
            with torch.inference_mode(False):
                self._result = self._function(*tensors, **options)
            self._key = key
        return self._result


def _same(key: tuple, other: tuple) -> bool:
    return all(map(operator.is_, key[0], other[0])) and key[1:] == other[1:]


def _eps(norm: Any) -> float:
    return getattr(norm, _EPS[type(norm).__name__])
