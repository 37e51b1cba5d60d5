"""Suites, their cases, and the contenders of a case: their computation and accuracy check.

No implementation is timed before its results have been compared with float64 by the rule of
:mod:`vlmo.testing`.
"""

from __future__ import annotations

import contextlib
import enum
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from harness.cost import Cost
from vlmo.kernels import BACKEND_NAMES, why_not
from vlmo.kernels.target import compute_capability, interpreted
from vlmo.testing import Deviation, deviations

Work = Callable[[], object]

# Names of contenders that torch.compile compiles end with this.
COMPILED = "-compiled"
# Graphs per function: of a block of unilm's model one for each pass, position relative to the first
# VL block, and batch size.
_GRAPHS = 64

# A named tuple whose fields are tensors or lists of tensors.
Parameters = Any
Form = Callable[[Tensor, Parameters], Tensor]
# Returns a form for all sequences, or for those with the given indices only.
Make = Callable[[Sequence[int] | None], Form]


class Scale(str, enum.Enum):
    """The sizes at which a suite runs."""

    smoke = "smoke"  # tiny sizes, to check that everything runs; their times mean nothing
    cpu = "cpu"  # base size, as much as two cores can compile and compute in less than an hour
    full = "full"  # base and large, for a GPU


@dataclass(frozen=True)
class Case:
    """One computation.

    Attributes:
        suite: name of the suite.
        size: "base", "large", or "tiny".
        dtype: dtype of the operands.
        phase: "forward" or "forward+backward"; in the suite of the model, its task.
        shape: other properties that distinguish the cases of the suite; the first entry is the
            number on the x-axis of plots.
    """

    suite: str
    size: str
    dtype: torch.dtype
    phase: str
    shape: Mapping[str, int | str] = field(default_factory=dict)

    @property
    def labels(self) -> dict[str, int | str]:
        """All fields, for a record."""
        dtype = str(self.dtype).removeprefix("torch.")
        found = dict(suite=self.suite, size=self.size, dtype=dtype, phase=self.phase)
        return {**found, **self.shape}

    def __str__(self) -> str:
        return "-".join(str(value) for value in self.labels.values())


class Problem(Protocol):
    """Inputs of a case on a device, and its contenders."""

    @property
    def contenders(self) -> Sequence[str]:
        """Names, those of this library first (they begin with ``vlmo``)."""

    @property
    def cost(self) -> Cost:
        """Lower bounds for every implementation."""

    @property
    def samples(self) -> int:
        """Number of pairs or sequences in a call."""

    def why_not(self, contender: str) -> str | None:
        """The reason if it cannot run on this machine, else None."""

    def work(self, contender: str) -> Work:
        """A call of the contender, compiled if its name says so; a forward records no gradients."""

    def check(self, contender: str) -> Sequence[Deviation]:
        """Run the contender and compare the results with float64."""


class Suite(NamedTuple):
    """The cases of an operation or of the model.

    Attributes:
        name: as in :attr:`Case.suite`.
        cases: returns the cases, the most important first, because time may run out.
        make: returns the problem of a case.
    """

    name: str
    cases: Callable[[torch.device, Scale], list[Case]]
    make: Callable[[Case, torch.device], Problem]


class Contender(NamedTuple):
    """An implementation of a case.

    Attributes:
        make: returns its form.
        eager: the same function of the same parameters in plain PyTorch, exact in float64.
        parameters: parameters of that function, in the layout that the form takes.
        why_not: returns the reason if it cannot run on this machine, else None.
    """

    make: Make
    eager: Make
    parameters: Callable[[], Parameters]
    why_not: Callable[[], str | None] = lambda: None


class Contest:
    """A :class:`Problem` of sequences that are independent of each other.

    Args:
        entered: the contenders by name.
        x: ``[B, ...]``, the input; it requires a gradient.
        dy: gradient of the output.
        backward: whether a call includes the backward.
    """

    contenders: Sequence[str]
    cost: Cost
    samples: int

    def __init__(
        self, entered: dict[str, Contender], x: Tensor, dy: Tensor, *, backward: bool
    ) -> None:
        # Otherwise the shapes of earlier cases count towards Dynamo's recompilation limit.
        torch._dynamo.reset()
        self.entered, self.x, self.dy, self.backward = entered, x, dy, backward
        self.contenders = tuple(entered)
        self.samples = x.shape[0]
        self._forms: dict[str, Form] = {}
        self._expected: dict[tuple[int, int], list[dict[str, Tensor]]] = {}

    def why_not(self, contender: str) -> str | None:
        """The reason if it cannot run on this machine, else None."""
        return self._entry(contender).why_not()

    def work(self, contender: str) -> Work:
        """A call of the contender: forward without gradients, or forward and every gradient."""
        form, parameters = self._form(contender), self._entry(contender).parameters()
        if not self.backward:
            return functools.partial(torch.no_grad()(form), self.x.detach(), parameters)
        inputs = [self.x, *leaves(parameters)]

        def both() -> tuple[Tensor, ...]:
            return torch.autograd.grad(form(self.x, parameters), inputs, self.dy)

        return both

    def check(self, contender: str) -> Sequence[Deviation]:
        """Run at full size and compare with float64 what depends on three sequences only.

        These are the first, the middle and the last. The outputs and gradients of sequences are
        independent of each other. As dy is zero for all other sequences, these do not contribute to
        the gradient of a parameter. A large problem is thus checked at the cost of one call of the
        contender and a few small calls.
        """
        entry = self._entry(contender)
        chosen = self._chosen
        dy = torch.zeros_like(self.dy)
        dy[chosen] = self.dy[chosen]
        actual = self._run(self._form(contender), self.x, entry.parameters(), dy)
        actual |= {name: actual[name][chosen] for name in actual if name in ("y", "dx")}
        # Gradients of float32 parameters are compared in the dtype of the operands as well, because
        # some contenders take these parameters in that dtype.
        actual = {name: tensor.to(self.x.dtype) for name, tensor in actual.items()}
        return deviations(actual, *self._expectation(entry))

    @property
    def _chosen(self) -> list[int]:
        return sorted({0, self.samples // 2, self.samples - 1})

    def _expectation(self, entry: Contender) -> list[dict[str, Tensor]]:
        """Results for the chosen sequences in plain PyTorch, in the case's dtype and in float64."""
        parameters, chosen = entry.parameters(), self._chosen
        key = (id(entry.eager), id(parameters))
        if key not in self._expected:
            wide = type(parameters)(*(_wide(field) for field in parameters))
            form, x = entry.eager(chosen), self.x.detach()[chosen]
            self._expected[key] = [
                self._run(form, given.requires_grad_(), p, self.dy[chosen].to(given.dtype))
                for given, p in ((x, parameters), (x.double(), wide))
            ]
        return self._expected[key]

    def _run(self, form: Form, x: Tensor, p: Parameters, dy: Tensor) -> dict[str, Tensor]:
        if not self.backward:
            with torch.no_grad():
                return {"y": form(x.detach(), p)}
        y = form(x, p)
        dx, *gradients = torch.autograd.grad(y, [x, *leaves(p)], dy)
        return {"y": y.detach(), "dx": dx} | dict(zip(_names(p), gradients, strict=True))

    def _form(self, contender: str) -> Form:
        """The form for all sequences; the check and the timing use the same one, compiled once."""
        if contender not in self._forms:
            self._forms[contender] = self._entry(contender).make(None)
        return self._forms[contender]

    def _entry(self, contender: str) -> Contender:
        if contender not in self.entered:
            raise ValueError(f"contender: {contender!r} is none of {', '.join(self.entered)}")
        return self.entered[contender]


def leaves(parameters: Parameters) -> list[Tensor]:
    """All tensors in the parameters."""
    return [tensor for field in parameters for tensor in _tensors(field)]


def ours(
    operation: str,
    case: Case,
    device: torch.device,
    make: Callable[[str], Make],
    *,
    eager: Make,
    parameters: Callable[[], Parameters],
) -> dict[str, Contender]:
    """The contenders ``vlmo:BACKEND`` for every backend."""

    reason = functools.partial(why_not_ours, operation, case, device)
    return {
        f"vlmo:{name}": Contender(make(name), eager, parameters, functools.partial(reason, name))
        for name in BACKEND_NAMES
    }


def why_not_ours(operation: str, case: Case, device: torch.device, backend: str) -> str | None:
    """The reason if a backend cannot run an operation on this machine, else None."""
    if (
        backend in ("triton", "composed")
        and device.type == "cpu"
        and case.size != "tiny"
        and interpreted()
    ):
        return "Triton's interpreter is for tests: at this size a call takes hours."
    return why_not(operation, backend, device=device, dtype=case.dtype)


def compiled(entry: Contender, case: Case, device: torch.device, *, whole: bool) -> Contender:
    """The contender through ``torch.compile``; ``whole`` if it must be one graph."""
    backend = compiler_of(case, device)

    def make(chosen: Sequence[int] | None) -> Form:
        form = entry.make(chosen)
        return torch.compile(form, fullgraph=whole, dynamic=False, backend=backend)

    return entry._replace(make=make)


def without_fallback() -> contextlib.AbstractContextManager[Any]:
    """Let functions have many graphs, and raise an error instead of running them uncompiled."""
    return torch._dynamo.config.patch(recompile_limit=_GRAPHS, fail_on_recompile_limit_hit=True)


def is_compiled(contender: str) -> bool:
    """Whether the first call of a contender may compile it."""
    return contender.endswith(COMPILED)


def compiler_of(case: Case, device: torch.device) -> str:
    """The backend of ``torch.compile``.

    A tiny case on a CPU only checks that it can be traced, because compiling C++ takes too long.
    """
    return "eager" if device.type == "cpu" and case.size == "tiny" else "inductor"


def half_dtypes(device: torch.device) -> list[torch.dtype]:
    """The 16-bit dtypes that the device supports: below sm_80 there is no bfloat16."""
    capability = compute_capability(device)
    if capability is not None and capability < (8, 0):
        return [torch.float16]
    return [torch.bfloat16, torch.float16]


def smoke_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else half_dtypes(device)[0]


def _tensors(field: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [field] if isinstance(field, Tensor) else field


def _wide(field: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
    wide = [tensor.detach().double().requires_grad_() for tensor in _tensors(field)]
    return wide[0] if isinstance(field, Tensor) else wide


def _names(parameters: Parameters) -> list[str]:
    """Names of the gradients, in the order of the leaves."""
    named = zip(parameters._fields, parameters, strict=True)
    return [f"d{name}[{i}]" for name, field in named for i, _ in enumerate(_tensors(field))]
