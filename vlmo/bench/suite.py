"""What is measured: cases, and the ways to compute each of them.

A suite lists its cases and makes a problem of one: inputs on a device, and contenders that compute
the same thing from them. Nothing is timed that has not been held against float64 by the rule of
:mod:`vlmo.testing`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from vlmo.bench.cost import Cost
from vlmo.testing import Deviation
from vlmo.timing import Work


class Scale(enum.Enum):
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
        shape: what else tells the cases of the suite apart, in the order in which it is told; the
            first is the number that speed is drawn over.
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
        """What the computation costs at least, whoever does it."""

    @property
    def check_cost(self) -> Cost:
        """The same of the call that the check makes."""

    @property
    def samples(self) -> int:
        """Pairs or sequences that one call takes."""

    def why_not(self, contender: str) -> str | None:
        """One sentence if it cannot run here, else None."""

    def work(self, contender: str) -> Work:
        """A call of it, compiled where that is its point; forward without recording gradients."""

    def expect(self, contender: str) -> None:
        """Compute what the check needs and contenders share: the results in float64, and eager."""

    def check(self, contender: str) -> Sequence[Deviation]:
        """Run it and hold it against float64."""


@dataclass(frozen=True)
class Suite:
    """Cases of one kind.

    Attributes:
        name: as in :attr:`Case.suite`.
        cases: the most telling first, because time may run out.
        make: the problem of a case.
    """

    name: str
    cases: Callable[[torch.device, Scale], list[Case]]
    make: Callable[[Case, torch.device], Problem]
