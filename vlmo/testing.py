"""Compares every backend of this machine with float64 and with plain eager PyTorch.

The error bound (:func:`allowed_error`): the error of a backend against float64 may be at most twice
that of eager PyTorch in the same dtype, plus one rounding unit of the largest value; for outputs
and for every gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmo.kernels import (
    BACKEND_NAMES,
    ModalityRouting,
    RelativePositionBias,
    RelativePositionIndex,
    moe_ffn,
    shared_attention,
    why_not,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Small sizes that are not multiples of any tile size.
_BATCH, _TEXT, _GRID = 3, 13, 4
_WIDTH, _HIDDEN, _HEADS = 128, 512, 2
_IMAGE = _GRID**2 + 1

Inputs = dict[str, Tensor]
Function = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Deviation:
    """The error of one tensor against float64: largest absolute errors, and the error bound."""

    name: str
    actual: float
    eager: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.actual <= self.allowed  # False for NaN

    @property
    def share(self) -> float:
        """The error as a share of the error bound."""
        return self.actual / self.allowed if self.allowed else float(not self.ok)


@dataclass(frozen=True)
class Parity:
    """Deviations of one backend for an operation and dtype: first the output, then gradients."""

    operation: str
    backend: str
    device: torch.device
    dtype: torch.dtype
    deviations: Sequence[Deviation]

    @property
    def ok(self) -> bool:
        return all(deviation.ok for deviation in self.deviations)

    @property
    def output(self) -> Deviation:
        return self.deviations[0]

    @property
    def worst_gradient(self) -> Deviation:
        """The gradient whose error is closest to its bound, or furthest beyond it."""
        gradients = self.deviations[1:]
        wrong = [deviation for deviation in gradients if not deviation.ok]
        return max(wrong or gradients, key=lambda deviation: deviation.share)


def check_backends(
    devices: Sequence[torch.device], *, backend: str | None = None, seed: int = 0
) -> Iterator[Parity]:
    """Compare every backend that can run on ``devices``, or only ``backend``.

    Raises:
        ValueError: there is no such backend.
    """
    backends = BACKEND_NAMES if backend is None else (backend,)
    for device in devices:
        for operation, case in _CASES.items():
            for dtype in DTYPES:
                for name in backends:
                    if why_not(operation, name, device=device, dtype=dtype) is None:
                        yield _compare(operation, case, name, device, dtype, seed)


FACTOR = 2.0  # times the error of eager PyTorch


def allowed_error(
    eager: float, largest: float, dtype: torch.dtype, factor: float = FACTOR
) -> float:
    """The error bound: ``factor`` times the eager error, plus one rounding unit of ``largest``.

    Args:
        eager: largest error of eager PyTorch in ``dtype`` against float64; or the L2 norm of its
            errors.
        largest: largest absolute value in float64; or the L2 norm of all values.
        dtype: dtype of the compared tensors.
        factor: see above.
    """
    return factor * eager + torch.finfo(dtype).eps * largest


def deviations(
    actual: Mapping[str, Tensor], eager: Mapping[str, Tensor], exact: Mapping[str, Tensor]
) -> list[Deviation]:
    """Errors and bounds per tensor; ``exact`` is in float64, the other two in one dtype."""
    found = []
    for name, target in exact.items():
        errors = [float((t[name].double() - target).abs().max()) for t in (actual, eager)]
        allowed = allowed_error(errors[1], float(target.abs().max()), actual[name].dtype)
        found.append(Deviation(name, errors[0], errors[1], allowed))
    return found


@dataclass(frozen=True)
class _Case:
    """The inputs of an operation (float64, on the CPU), its eager form, and the operation."""

    inputs: Callable[[torch.Generator], Inputs]
    eager: Function
    operation: Callable[[Inputs, str], Tensor]


def _compare(
    operation: str,
    case: _Case,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
) -> Parity:
    generator = torch.Generator().manual_seed(seed)
    # All three start from the same rounded numbers.
    inputs = {k: v.to(device, dtype) for k, v in case.inputs(generator).items()}
    exact_inputs = {k: v.double() for k, v in inputs.items()}
    weight = torch.randn(inputs["x"].shape, generator=generator).to(device, dtype)
    exact = _run(case.eager, exact_inputs, weight.double())
    eager = _run(case.eager, inputs, weight)
    actual = _run(lambda given: case.operation(given, backend), inputs, weight)
    return Parity(operation, backend, device, dtype, deviations(actual, eager, exact))


def _run(function: Function, inputs: Mapping[str, Tensor], weight: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of all inputs for the output gradient ``weight``."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    output = function(leaves).reshape(weight.shape)
    gradients = torch.autograd.grad(output, list(leaves.values()), weight)
    return {"y": output.detach()} | dict(zip(leaves, gradients, strict=True))


def _ffn_inputs(generator: torch.Generator) -> Inputs:
    def draw(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * scale + shift

    inputs = {"x": draw(_BATCH, _TEXT + _IMAGE, _WIDTH), "gamma": draw(_WIDTH, scale=0.1)}
    for expert in ("text", "image"):
        inputs |= {
            f"norm_weight_{expert}": draw(_WIDTH, scale=0.1, shift=1.0),
            f"norm_bias_{expert}": draw(_WIDTH, scale=0.1),
            f"w1_{expert}": draw(_HIDDEN, _WIDTH, scale=_WIDTH**-0.5),
            f"b1_{expert}": draw(_HIDDEN, scale=0.1),
            f"w2_{expert}": draw(_WIDTH, _HIDDEN, scale=_HIDDEN**-0.5),
            f"b2_{expert}": draw(_WIDTH, scale=0.1),
        }
    return inputs


def _ffn_eager(given: Inputs) -> Tensor:
    """The usual form in multiway transformers: slice, apply each expert, concatenate."""
    parts = []
    runs = {"text": slice(0, _TEXT), "image": slice(_TEXT, None)}
    for expert, run in runs.items():
        x = given["x"][:, run]
        norm = (given[f"norm_weight_{expert}"], given[f"norm_bias_{expert}"])
        h = F.layer_norm(x, (_WIDTH,), *norm, eps=1e-6)
        h = F.gelu(F.linear(h, given[f"w1_{expert}"], given[f"b1_{expert}"]))
        h = F.linear(h, given[f"w2_{expert}"], given[f"b2_{expert}"])
        parts.append(x + given["gamma"] * h)
    return torch.cat(parts, dim=1)


def _ffn_operation(given: Inputs, backend: str) -> Tensor:
    def both(name: str) -> list[Tensor]:
        return [given[f"{name}_{expert}"] for expert in ("text", "image")]

    return moe_ffn(
        given["x"],
        ModalityRouting.segments([(0, _TEXT), (1, _IMAGE)]),
        both("w1"),
        both("w2"),
        b1=both("b1"),
        b2=both("b2"),
        norm="layer",
        norm_weight=both("norm_weight"),
        norm_bias=both("norm_bias"),
        layer_scale=given["gamma"],
        residual=given["x"],
        backend=backend,
    )


def _index() -> RelativePositionIndex:
    return RelativePositionIndex.joint(_GRID, _TEXT, text_capacity=_TEXT)


def _key_mask(device: torch.device) -> Tensor:
    """Captions of three lengths, followed by the image: ``[B, N]``."""
    lengths = torch.tensor([[_TEXT], [_TEXT // 2], [1]])
    text = torch.arange(_TEXT) < lengths
    image = torch.ones(_BATCH, _IMAGE, dtype=torch.bool)
    return torch.cat([text, image], dim=1).to(device)


def _attention_inputs(generator: torch.Generator) -> Inputs:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shape = (_BATCH, _TEXT + _IMAGE, _HEADS, _WIDTH // _HEADS)
    # The queries are named "x": the comparison needs one input with the shape of the output.
    tensors = {"x": draw(*shape), "k": draw(*shape), "v": draw(*shape)}
    return tensors | {"table": draw(_index().entries, _HEADS)}


def _attention_eager(given: Inputs) -> Tensor:
    q, k, v = (given[name].transpose(1, 2) for name in ("x", "k", "v"))
    device = q.device
    bias = given["table"][_index().matrix.long().to(device)].permute(2, 0, 1)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3) + bias
    scores = scores.masked_fill(~_key_mask(device)[:, None, None, :], float("-inf"))
    return (F.softmax(scores, dim=-1) @ v).transpose(1, 2)


def _attention_operation(given: Inputs, backend: str) -> Tensor:
    device = given["x"].device
    return shared_attention(
        given["x"],
        given["k"],
        given["v"],
        bias=RelativePositionBias(given["table"], _index().to(device)),
        key_mask=_key_mask(device),
        backend=backend,
    )


_CASES = {
    "moe_ffn": _Case(_ffn_inputs, _ffn_eager, _ffn_operation),
    "shared_attention": _Case(_attention_inputs, _attention_eager, _attention_operation),
}
