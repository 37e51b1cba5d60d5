"""Suites, their cases, and the contenders of a case: how each computes it and how it is checked.

No implementation is timed before its results have been compared with float64 by the rule of
:mod:`vlmo.testing`.
"""

from __future__ import annotations

import enum
import functools
import os
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

# Asks for contenders that torch.compile makes for the CPU, which takes minutes of a C++ compiler.
COMPILE_VARIABLE = "VLMO_BENCH_COMPILE"

# A named tuple whose fields are tensors or lists of tensors.
Parameters = Any
Form = Callable[[Tensor, Parameters], Tensor]
# Of a form: for all sequences, or for those of the given numbers only.
Make = Callable[[Sequence[int] | None], Form]


class Scale(str, enum.Enum):
    """How much of a suite."""

    smoke = "smoke"  # tiny sizes that show that everything runs; their times mean nothing
    cpu = "cpu"  # base size, as much as two cores manage in minutes
    full = "full"  # base and large, for a GPU


@dataclass(frozen=True)
class Case:
    """One computation.

    Attributes:
        suite: name of the suite.
        size: "base", "large", or "tiny".
        dtype: of the operands.
        phase: "forward", "forward+backward"; in the suite of the model, what it does.
        shape: what else distinguishes the cases of the suite; the first entry is the number that
            plots have on their x-axis.
    """

    suite: str
    size: str
    dtype: torch.dtype
    phase: str
    shape: Mapping[str, int | str] = field(default_factory=dict)

    @property
    def labels(self) -> dict[str, int | str]:
        """Everything, for a record."""
        dtype = str(self.dtype).removeprefix("torch.")
        found = dict(suite=self.suite, size=self.size, dtype=dtype, phase=self.phase)
        return {**found, **self.shape}

    def __str__(self) -> str:
        return "-".join(str(value) for value in self.labels.values())


class Problem(Protocol):
    """Inputs of one case on one device, and the ways to compute it."""

    @property
    def contenders(self) -> Sequence[str]:
        """Names, this library's own first (they begin with ``vlmo``)."""

    @property
    def cost(self) -> Cost:
        """Lower bounds for every implementation."""

    @property
    def samples(self) -> int:
        """Pairs or sequences that one call takes."""

    def why_not(self, contender: str) -> str | None:
        """One sentence if it cannot run here, else None."""

    def work(self, contender: str) -> Work:
        """A call of it, compiled if its name says so; forward without recording gradients."""

    def check(self, contender: str) -> Sequence[Deviation]:
        """Run it and compare the results with float64."""


class Suite(NamedTuple):
    """Cases of one kind.

    Attributes:
        name: as in :attr:`Case.suite`.
        cases: the most important first, because time may run out.
        make: the problem of a case.
    """

    name: str
    cases: Callable[[torch.device, Scale], list[Case]]
    make: Callable[[Case, torch.device], Problem]


class Contender(NamedTuple):
    """One way to compute a case.

    Attributes:
        make: its form.
        eager: the same function of the same parameters in plain PyTorch, right in float64.
        parameters: of that function, in the layout that the form takes.
        why_not: one sentence if it cannot run here, else None.
    """

    make: Make
    eager: Make
    parameters: Callable[[], Parameters]
    why_not: Callable[[], str | None] = lambda: None


class Contest:
    """A :class:`Problem` of sequences that do not depend on each other.

    Args:
        entered: the contenders by name.
        x: ``[B, ...]``, the input; it requires a gradient.
        dy: the gradient of the output.
        backward: whether a call is forward and backward.
    """

    contenders: Sequence[str]
    cost: Cost
    samples: int

    def __init__(
        self, entered: dict[str, Contender], x: Tensor, dy: Tensor, *, backward: bool
    ) -> None:
        # Else the shapes of earlier cases count towards Dynamo's limit of recompilations.
        torch._dynamo.reset()
        self.entered, self.x, self.dy, self.backward = entered, x, dy, backward
        self.contenders = tuple(entered)
        self.samples = x.shape[0]
        self._forms: dict[str, Form] = {}
        self._expected: dict[tuple[int, int], list[dict[str, Tensor]]] = {}

    def why_not(self, contender: str) -> str | None:
        """One sentence if it cannot run here, else None."""
        return self._entry(contender).why_not()

    def work(self, contender: str) -> Work:
        """A call of it: forward without recording gradients, or forward and every gradient."""
        form, parameters = self._form(contender), self._entry(contender).parameters()
        if not self.backward:
            return functools.partial(torch.no_grad()(form), self.x.detach(), parameters)
        inputs = [self.x, *leaves(parameters)]

        def both() -> tuple[Tensor, ...]:
            return torch.autograd.grad(form(self.x, parameters), inputs, self.dy)

        return both

    def check(self, contender: str) -> Sequence[Deviation]:
        """Run at full size and hold against float64 what depends on three sequences only.

        Those are the first, the middle and the last. The outputs and gradients of sequences are
        independent of each other, and with a dy that is zero elsewhere, the other sequences add
        nothing to the gradient of a parameter. So a large problem is checked at the cost of one
        call of the contender and a few of a small one.
        """
        entry = self._entry(contender)
        chosen = self._chosen
        dy = torch.zeros_like(self.dy)
        dy[chosen] = self.dy[chosen]
        actual = self._run(self._form(contender), self.x, entry.parameters(), dy)
        actual |= {name: actual[name][chosen] for name in actual if name in ("y", "dx")}
        # The gradient of a float32 parameter counts as one in the dtype of the operands, too: some
        # contenders take what is made of the parameter in that dtype.
        actual = {name: tensor.to(self.x.dtype) for name, tensor in actual.items()}
        return deviations(actual, *self._expectation(entry))

    @property
    def _chosen(self) -> list[int]:
        return sorted({0, self.samples // 2, self.samples - 1})

    def _expectation(self, entry: Contender) -> list[dict[str, Tensor]]:
        """The chosen sequences in plain PyTorch: in the dtype of the case, and in float64."""
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
        """Of all sequences; what is checked is what is timed, compiled once."""
        if contender not in self._forms:
            self._forms[contender] = self._entry(contender).make(None)
        return self._forms[contender]

    def _entry(self, contender: str) -> Contender:
        if contender not in self.entered:
            raise ValueError(f"contender: {contender!r} is none of {', '.join(self.entered)}")
        return self.entered[contender]


def leaves(parameters: Parameters) -> list[Tensor]:
    """Every tensor in them."""
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
    """``vlmo:BACKEND`` for every backend."""

    reason = functools.partial(why_not_ours, operation, case, device)
    return {
        f"vlmo:{name}": Contender(make(name), eager, parameters, functools.partial(reason, name))
        for name in BACKEND_NAMES
    }


def why_not_ours(operation: str, case: Case, device: torch.device, backend: str) -> str | None:
    """One sentence if a backend cannot run an operation of this library here, else None."""
    if backend == "triton" and device.type == "cpu" and case.size != "tiny" and interpreted():
        return "Triton's interpreter is for tests: at this size a call takes hours."
    return why_not(operation, backend, device=device, dtype=case.dtype)


def compiled(entry: Contender, case: Case, device: torch.device, *, whole: bool) -> Contender:
    """The contender through ``torch.compile``; ``whole`` if it must be one graph."""
    backend = compiler_of(case, device)

    def make(chosen: Sequence[int] | None) -> Form:
        form = entry.make(chosen)
        return torch.compile(form, fullgraph=whole, dynamic=False, backend=backend)

    def reason() -> str | None:
        # What is not installed comes first: it would not run compiled either.
        return entry.why_not() or why_not_compiled(case, device)

    return entry._replace(make=make, why_not=reason)


def compiler_of(case: Case, device: torch.device) -> str:
    """The backend of ``torch.compile``.

    A tiny case on a CPU is only to see that it can be traced: building C++ code takes too long.
    """
    return "eager" if device.type == "cpu" and case.size == "tiny" else "inductor"


def why_not_compiled(case: Case, device: torch.device) -> str | None:
    """One sentence if ``torch.compile`` is not worth its wait here, else None."""
    builds = device.type == "cpu" and compiler_of(case, device) == "inductor"
    if not builds or os.environ.get(COMPILE_VARIABLE) == "1":
        return None
    return (
        "torch.compile takes minutes to build C++ code for a CPU; "
        f"{COMPILE_VARIABLE}=1 asks for it."
    )


def half_dtypes(device: torch.device) -> list[torch.dtype]:
    """Those of 16 bits that the device multiplies: below sm_80 there is no bfloat16."""
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
    """Of the gradients, in the order of the leaves."""
    named = zip(parameters._fields, parameters, strict=True)
    return [f"d{name}[{i}]" for name, field in named for i, _ in enumerate(_tensors(field))]
