"""A run of the benchmarks: the accuracy gate, the time limit, and contenders timed in turn."""

from __future__ import annotations

import gc
import math
import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch._dynamo.exc import BackendCompilerFailed

from harness.contenders import Case, Problem, Suite, Work, is_compiled
from harness.cpu import describe_cpu, restrictions
from harness.meter import Numbers, Settings, begin, duration, measure
from harness.nvml import Sensors, open_sensors
from harness.roofline import Roof
from vlmo.kernels.target import describe
from vlmo.testing import Deviation

# Prefixes of reasons. For this library's own contenders both are defects. Peers may exceed the
# error bound where a CPU rounds differently; they are reported without a timing.
NOT_EXACT, FAILED = "not exact", "failed"
PEER_NOT_EXACT, LEFT_OUT = "out of its error bound", "left out"


class Session:
    """State of a run that all cases share.

    Args:
        device: device to run on.
        seconds: time limit. It is checked before each case, before each contender, and, including
            the expected duration of the timed calls, after a contender's first calls. Contenders
            that do not fit are left out, with that as their reason. A compilation is not
            interrupted, so a run may end later by the time of one.
        settings: effort of the measurements; the sensors are added.

    Attributes:
        not_run: a record with a ``reason`` for each contender without numbers.
    """

    def __init__(
        self, device: torch.device, seconds: float = math.inf, settings: Settings | None = None
    ) -> None:
        self.device, self.limit = device, seconds
        self.roof = Roof(device)
        self.sensors = open_sensors(device)
        sensors = self.sensors if isinstance(self.sensors, Sensors) else None
        self.settings = (settings or Settings())._replace(sensors=sensors)
        self.not_run: list[dict[str, Any]] = []
        self._deadline = time.monotonic() + seconds
        self._broken: str | None = None  # the reason why nothing can run on this GPU any more
        self._problem: tuple[str, Problem] | None = None
        self._results: tuple[str, dict[str, Numbers]] | None = None

    def problem(self, suite: Suite, case: Case) -> Problem:
        """The inputs of a case; those of the previous case are freed."""
        if self._problem is None or self._problem[0] != str(case):
            self._problem = self._results = None
            gc.collect()
            self._problem = str(case), suite.make(case, self.device)
        return self._problem[1]

    def results(self, suite: Suite, case: Case, contenders: Sequence[str]) -> dict[str, Numbers]:
        """Numbers of each contender of a case, or the ``reason`` why there are none.

        The first call for a case measures all of them in turn.
        """
        if self._results is None or self._results[0] != str(case):
            self._results = str(case), self._measure(suite, case, contenders)
            self.not_run += [
                case.labels | {"contender": name, "reason": numbers["reason"]}
                for name, numbers in self._results[1].items()
                if "reason" in numbers
            ]
        return self._results[1]

    def check(self, problem: Problem, contender: str) -> Numbers:
        """The error of a contender as a share of its bound, or the ``reason`` why it failed."""
        reason = problem.why_not(contender)
        if reason is None:
            deviations = problem.check(contender)
            reason = why_inexact(contender, deviations)
        if reason is not None:
            return {"reason": reason}
        return {"error": max(deviation.share for deviation in deviations)}

    def unmeasured(self) -> list[str]:
        """Sentences about quantities that were not measured, with reasons."""
        if self.device.type != "cuda":
            return [
                "Peak memory, launches, energy and clocks are measured on a GPU only.",
                "Times on a CPU are wall times, with caches as the call before left them.",
            ]
        if isinstance(self.sensors, str):
            return [f"Energy, clocks, temperature and throttling: {self.sensors}."]
        if self.sensors.millijoules() is None:
            how = "mJ are its power times time" if self.sensors.state().watts else "nor a sensor"
            return [f"This GPU has no energy counter: {how}."]
        return []

    def _measure(self, suite: Suite, case: Case, contenders: Sequence[str]) -> dict[str, Numbers]:
        reason = self._broken or self._why_left_out()
        if reason is not None:
            return {name: {"reason": reason} for name in contenders}
        try:
            problem = self.problem(suite, case)
        except Exception as error:  # as in _begin
            return {name: {"reason": describe_failure(name, error)} for name in contenders}
        found: dict[str, Numbers] = {}
        works: dict[str, Work] = {}
        for name in contenders:
            begun = {known: found[known] for known in works}
            found[name] = self._begin(problem, name, begun, works)
        try:
            timed = measure(works, found, self.device, self.settings)
        except Exception as error:  # a contender that ran alone, but not with the others
            beside = " (while it was timed beside the others)"
            timed = {n: {"reason": describe_failure(n, error) + beside} for n in works}
        for name, numbers in timed.items():
            found[name] = numbers
            if "reason" not in numbers:
                found[name] |= self._rates(problem, case, numbers["seconds"])
        return found

    def _begin(
        self, problem: Problem, name: str, begun: dict[str, Numbers], works: dict[str, Work]
    ) -> Numbers:
        """Check a contender and make its first calls; add it to ``works`` if it passes."""
        try:
            reason = problem.why_not(name) or self._broken or self._why_left_out()
            if reason is not None:
                return {"reason": reason}
            found = self.check(problem, name)
            if "reason" in found:
                return found
            work = problem.work(name)
            found |= begin(work, self.device, compiles=is_compiled(name))
            wanted = [*begun.values(), found]
            reason = self._why_left_out(
                sum(duration(numbers, self.device, self.settings) for numbers in wanted)
            )
            if reason is not None:
                return {"reason": reason}
            works[name] = work
            return found
        except Exception as error:  # a peer, a compiler or the allocator may raise anything
            return {"reason": describe_failure(name, error)}
        finally:
            self._free()

    def _rates(self, problem: Problem, case: Case, seconds: Sequence[float]) -> Numbers:
        median, cost = statistics.median(seconds), problem.cost
        tflops = cost.flops / median / 1e12
        return dict(
            tflops=tflops,
            gb_per_s=cost.bytes / median / 1e9,
            share_of_roof=tflops / self.roof.attainable_tflops(cost, case.dtype),
            samples_per_s=problem.samples / median,
        )

    def _why_left_out(self, seconds: float = 0.0) -> str | None:
        """The reason if ``seconds`` more would exceed the time limit, else None."""
        left = self._deadline - time.monotonic()
        if 0 < left >= seconds:
            return None
        return (
            f"{LEFT_OUT}: it needs {seconds:.0f} s, and {max(left, 0):.0f} s of the time limit of "
            f"{self.limit:.0f} s are left"
        )

    def _free(self) -> None:
        """Free memory of the GPU, and check whether it still responds."""
        if self.device.type != "cuda" or self._broken is not None:
            return
        gc.collect()
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception as error:
            self._broken = f"{FAILED}: the GPU no longer answers: {describe_error(error)}"


def is_ours(contender: str) -> bool:
    """Whether a contender belongs to this library."""
    return contender.startswith("vlmo")


def is_defect(contender: str, reason: str) -> bool:
    """Whether a reason why one of this library's contenders has no numbers is a defect."""
    return is_ours(contender) and reason.startswith((NOT_EXACT, FAILED))


def why_inexact(contender: str, deviations: Sequence[Deviation]) -> str | None:
    """The reason if a tensor exceeds the error bound of :mod:`vlmo.testing`, else None."""
    wrong = [deviation for deviation in deviations if not deviation.ok]
    if not wrong:
        return None
    worst = max(wrong, key=lambda deviation: deviation.share)
    what = NOT_EXACT if is_ours(contender) else PEER_NOT_EXACT
    return f"{what}: {worst.name} is off by {worst.actual:.2e}, allowed are {worst.allowed:.2e}"


def describe_failure(contender: str, error: Exception) -> str:
    """The reason for an error; a defect if it is ours and not of the allocator or the compiler."""
    of_torch = isinstance(error, (torch.OutOfMemoryError, BackendCompilerFailed))
    told = describe_error(error)
    return f"{FAILED}: {told}" if is_ours(contender) and not of_torch else told


def describe_error(error: Exception) -> str:
    """Type of an error and first line of its message, or two if the first ends with a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    return ": ".join([type(error).__name__, *([told] if told else [])])


def machine(device: torch.device) -> dict[str, Any]:
    """Properties of the device that pytest-benchmark does not record."""
    on_gpu = device.type == "cuda"
    facts: dict[str, Any] = {"name": torch.cuda.get_device_name(device) if on_gpu else "cpu"}
    facts |= {"gpu": describe(device)} if on_gpu else describe_cpu() | restrictions()
    return facts | dict(cores=len(os.sched_getaffinity(0)), threads=torch.get_num_threads())
