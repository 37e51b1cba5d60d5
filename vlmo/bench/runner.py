"""Runs suites within a time limit."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import platform
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vlmo.bench import attention, model, moe_ffn
from vlmo.bench.forecast import EXPECTATION, Forecast
from vlmo.bench.gpu import Sensors, open_sensors
from vlmo.bench.meter import (
    Numbers,
    Settings,
    begin,
    calls_to_begin,
    describe_error,
    duration,
    measure,
)
from vlmo.bench.report import FAILED, LEFT_OUT, NOT_EXACT, PEER_NOT_EXACT, Record, Report, is_ours
from vlmo.bench.roofline import Roof, measure_roof
from vlmo.bench.suite import Case, Problem, Scale, Suite
from vlmo.device import versions
from vlmo.kernels.target import describe
from vlmo.testing import Deviation
from vlmo.timing import Work

SUITES = {suite.name: suite for suite in (moe_ffn.SUITE, attention.SUITE, model.SUITE)}
# In the place of contenders' names where a case did not come so far as to have some.
ALL = "all"
# Timed calls take this part of a contender's time, within bounds; wall time and energy the rest.
_TIMED = 0.5
_LEAST_SECONDS = {Scale.cpu: 0.1, Scale.full: 0.4}
_MOST_SECONDS = {Scale.cpu: 0.8, Scale.full: 2.0}


def run(
    suites: Sequence[Suite],
    device: torch.device,
    *,
    scale: Scale,
    seconds: float,
    dtypes: Collection[str] | None = None,
    sizes: Collection[str] | None = None,
    contenders: Collection[str] | None = None,
    commit: str | None = None,
    command: str = "",
    on_case: Callable[[Report], object] | None = None,
) -> Report:
    """Measure the cases of some suites, the most telling of each first.

    Args:
        suites: take turns, case by case.
        device: where to run.
        scale: how much of each suite; smoke takes three calls of everything.
        seconds: time limit: calls are as many as it allows. A case or contender that would not be
            finished within it, by what :class:`vlmo.bench.forecast.Forecast` says, does not begin
            and is recorded with that as its reason.
        dtypes: names; only cases in these.
        sizes: only cases of these.
        contenders: names; only these, or all that begin with one and a colon ("vlmo").
        commit: of what is measured; asked of git if it is not given.
        command: that the user gave, for the report.
        on_case: is called with the report so far after each case of which there is a record, for
            a run that may be killed.

    Raises:
        ValueError: a filter lets no case or no contender through.
    """
    started = time.monotonic()
    cases = _cases(suites, device, scale, dtypes, sizes)
    order = [suite.name for suite in suites]
    on_gpu = device.type == "cuda"
    with torch.cuda.device(device) if on_gpu else contextlib.nullcontext():
        sensors = open_sensors(device)
        roof = measure_roof(device, list({case.dtype: None for _, case in cases}))
        report = Report(
            machine=machine(device),
            commit=commit or commit_of_this(),
            command=command,
            versions=versions() | {"cuda": str(torch.version.cuda)},
            roof=roof._asdict(),
        )
        session = _Session(device, scale, roof, sensors, contenders, started + seconds, seconds)
        for position, (suite, case) in enumerate(cases):
            found = session.records(suite, case, len(cases) - position)
            session.free()
            report.records = sorted(
                report.records + found, key=lambda record: order.index(record["suite"])
            )
            report.unmeasured = _unmeasured(device, sensors, report.records)
            for name in _absent(contenders, report.records):
                report.unmeasured.append(f"{name}: no case so far has such a contender.")
            if report.records and on_case is not None:
                on_case(report)
    if not report.records:
        raise ValueError(f"contenders: no case has one of {', '.join(contenders or ())}")
    return report


def why_inexact(contender: str, deviations: Sequence[Deviation]) -> str | None:
    """One sentence if a tensor breaks the rule of :mod:`vlmo.testing`.

    That is a defect of one of ours only: how others round differs from one CPU to the next.
    """
    wrong = [deviation for deviation in deviations if not deviation.ok]
    if not wrong:
        return None
    worst = max(wrong, key=lambda deviation: deviation.share)
    what = NOT_EXACT if is_ours(contender) else PEER_NOT_EXACT
    return f"{what}: {worst.name} is off by {worst.actual:.2e}, allowed are {worst.allowed:.2e}"


def machine(device: torch.device) -> dict[str, Any]:
    """What it is measured on."""
    on_gpu = device.type == "cuda"
    facts = {"name": torch.cuda.get_device_name(device) if on_gpu else "cpu"}
    if on_gpu:
        facts["gpu"] = describe(device)
    cores = len(os.sched_getaffinity(0))
    return facts | {"cpu": _cpu(), "cores": cores, "threads": torch.get_num_threads()}


def commit_of_this() -> str:
    """Short hash, marked if tracked files differ from it; "unknown" where git cannot tell."""
    folder = Path(__file__).parent
    # An installed package may lie in a repository that is about something else.
    tracked = _git(folder, "ls-files", "--error-unmatch", Path(__file__).name)
    described = tracked and _git(folder, "describe", "--always", "--dirty", "--exclude=*")
    return described or "unknown"


@dataclass
class _Entry:
    """A case while it is measured.

    Attributes:
        settings: for each contender.
        works: of contenders that have been checked and called.
        begun: what :func:`vlmo.bench.meter.begin` said of them.
        expecting: seconds that the results took that contenders are held against.
    """

    case: Case
    problem: Problem
    settings: Settings
    works: dict[str, Work] = field(default_factory=dict)
    begun: dict[str, Numbers] = field(default_factory=dict)
    expecting: float = 0.0


@dataclass
class _Session:
    """What all cases of a run share.

    Attributes:
        broken: why nothing can run any more, after a kernel has destroyed the GPU's context.
    """

    device: torch.device
    scale: Scale
    roof: Roof
    sensors: Sensors | str
    contenders: Collection[str] | None
    deadline: float
    limit: float
    broken: str | None = None

    def __post_init__(self) -> None:
        self._forecast = Forecast(self.roof)

    def records(self, suite: Suite, case: Case, cases_left: int) -> list[Record]:
        """Of every contender of one case."""
        reason = self.broken or self._why_left_out(0.0)
        if reason is not None:
            return [case.labels | {"contender": ALL, "reason": reason}]
        until = time.monotonic() + self._left / cases_left
        try:
            problem = suite.make(case, self.device)
        except Exception as error:  # as in _prepare
            return [case.labels | {"contender": ALL, "reason": _failed(ALL, describe_error(error))}]
        names = [name for name in problem.contenders if self._wants(name)]
        reasons = {name: problem.why_not(name) for name in names}
        able = [name for name in names if reasons[name] is None]
        entry = _Entry(case, problem, self._settings(self._left / cases_left / max(1, len(able))))
        reason = self._why_left_out(self._needed(entry, able)) if able else None
        if reason is not None:
            return [case.labels | {"contender": ALL, "reason": reason}]
        found: dict[str, Numbers] = {
            name: self._prepare(entry, name) if reasons[name] is None else {"reason": reasons[name]}
            for name in names
        }
        ready = max(1, len(entry.works))
        entry.settings = self._settings((until - time.monotonic()) / ready)
        for name, numbers in self._measure(entry).items():
            if "reason" in numbers:
                found[name] = {"reason": _failed(name, numbers["reason"])}
            else:
                found[name] |= numbers | self._rates(numbers, problem, case)
        return [case.labels | {"contender": name} | numbers for name, numbers in found.items()]

    def free(self) -> None:
        """Give back what is not needed any more, and see whether the GPU still answers."""
        gc.collect()
        if self.device.type != "cuda" or self.broken is not None:
            return
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception as error:
            self.broken = f"{FAILED}: the GPU no longer answers: {describe_error(error)}"

    @property
    def _left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def _why_left_out(self, seconds: float) -> str | None:
        """One sentence if what takes so long would end too late, else None."""
        left = self._left
        if left <= 0:
            return f"{LEFT_OUT}: the time limit of {self.limit:.0f} s is over"
        if seconds <= left:
            return None
        return (
            f"{LEFT_OUT}: it would take about {seconds:.0f} s; "
            f"{left:.0f} s of the time limit of {self.limit:.0f} s are left"
        )

    def _needed(self, entry: _Entry, names: Sequence[str]) -> float:
        """Seconds of a case with these contenders."""
        case, checked = entry.case, entry.problem.check_cost
        expected = self._forecast.check(case, EXPECTATION, checked)
        checks = sum(self._forecast.check(case, name, checked) for name in names)
        return expected + checks + sum(self._to_measure(entry, name) for name in names)

    def _to_measure(self, entry: _Entry, name: str) -> float:
        """Seconds of the calls of a contender after its check."""
        seconds = self._forecast.call(entry.case, name, entry.problem.cost)
        begun = dict(wall_ms=1e3 * seconds, launches=None)
        first = calls_to_begin(seconds, self.device) * seconds
        return first + duration(begun, self.device, entry.settings)

    def _wants(self, name: str) -> bool:
        return self.contenders is None or any(_means(w, name) for w in self.contenders)

    def _prepare(self, entry: _Entry, name: str) -> Numbers:
        """The error of a contender, whose first calls are added, or the reason why they are not."""
        if self.broken is not None:
            return {"reason": self.broken}
        try:
            return self._begin(entry, name)
        except Exception as error:  # a peer, a compiler or the allocator may raise anything
            return {"reason": _failed(name, describe_error(error))}
        finally:
            self.free()

    def _begin(self, entry: _Entry, name: str) -> Numbers:
        """Check it and call it for the first time, as far as it would all be finished in time.

        The check tells whether calls take far longer than was foretold, and the first calls
        whether there is time for those to be timed.
        """
        case, problem, forecast = entry.case, entry.problem, self._forecast
        reserved = sum(duration(b, self.device, entry.settings) for b in entry.begun.values())
        checking = forecast.check(case, name, problem.check_cost)
        reason = self._why_left_out(checking + self._to_measure(entry, name) + reserved)
        if reason is not None:
            return {"reason": reason}
        started = time.monotonic()
        problem.expect(name)
        entry.expecting += time.monotonic() - started
        forecast.called(case, EXPECTATION, problem.check_cost, entry.expecting)

        started = time.monotonic()
        deviations = problem.check(name)
        preparing = time.monotonic() - started
        forecast.checked(case, name, problem.check_cost, preparing)
        reason = why_inexact(name, deviations)
        reason = reason or self._why_left_out(self._to_measure(entry, name) + reserved)
        if reason is not None:
            return {"reason": reason}

        started = time.monotonic()
        work = problem.work(name)
        preparing += time.monotonic() - started
        begun = begin(work, self.device)
        if "reason" in begun:
            return {"reason": _failed(name, begun["reason"])}
        forecast.called(case, name, problem.cost, begun["wall_ms"] / 1e3)
        forecast.prepared(case, name, problem.check_cost, preparing)
        reason = self._why_left_out(duration(begun, self.device, entry.settings) + reserved)
        if reason is not None:
            return {"reason": reason}
        entry.works[name], entry.begun[name] = work, begun
        return {"error": max(deviation.share for deviation in deviations)}

    def _measure(self, entry: _Entry) -> dict[str, Numbers]:
        try:
            return measure(entry.works, self.device, entry.settings, entry.begun)
        except Exception as error:  # one that ran alone, but not beside the others
            reason = f"{describe_error(error)} (while it was timed beside the others)"
            return {name: {"reason": reason} for name in entry.works}

    def _settings(self, share: float) -> Settings:
        """For contenders with so many seconds each."""
        sensors = None if isinstance(self.sensors, str) else self.sensors
        if self.scale is Scale.smoke:
            return Settings(seconds=0, energy_seconds=0, sensors=sensors)
        least, most = _LEAST_SECONDS[self.scale], _MOST_SECONDS[self.scale]
        timed = max(least, min(most, _TIMED * share))
        return Settings(seconds=timed, sensors=sensors)

    def _rates(self, numbers: Numbers, problem: Problem, case: Case) -> Numbers:
        """By the cost of the problem."""
        seconds, cost = numbers["device_ms"] / 1e3, problem.cost
        tflops = cost.flops / seconds / 1e12
        attainable = self.roof.attainable_tflops(cost, str(case.labels["dtype"]))
        return dict(
            tflops=tflops,
            gb_per_s=cost.bytes / seconds / 1e9,
            share_of_roof=tflops / attainable,
            samples_per_s=problem.samples / seconds,
        )


def _failed(contender: str, error: str) -> str:
    """The reason to record: a defect if it is ours, which runs where it says, memory permitting."""
    fits = not error.startswith(torch.OutOfMemoryError.__name__)
    return f"{FAILED}: {error}" if fits and (is_ours(contender) or contender == ALL) else error


def _cases(
    suites: Sequence[Suite],
    device: torch.device,
    scale: Scale,
    dtypes: Collection[str] | None,
    sizes: Collection[str] | None,
) -> list[tuple[Suite, Case]]:
    """In the order in which they are measured: the first of every suite, then the second."""

    def chosen(suite: Suite) -> Iterator[tuple[Suite, Case]]:
        for case in suite.cases(device, scale):
            right_dtype = dtypes is None or case.labels["dtype"] in dtypes
            if right_dtype and (sizes is None or case.size in sizes):
                yield suite, case

    turns = itertools.zip_longest(*map(chosen, suites))
    found = [entry for turn in turns for entry in turn if entry is not None]
    if not found:
        filters = {"dtypes": dtypes, "sizes": sizes}
        told = [f"{k}: {', '.join(v)}" for k, v in filters.items() if v is not None]
        raise ValueError(f"no case of {', '.join(s.name for s in suites)} has {'; '.join(told)}")
    return found


def _means(wanted: str, contender: str) -> bool:
    """Whether a name of the caller's is that of a contender, or of all backends of which it is."""
    return wanted in (contender, contender.partition(":")[0])


def _absent(contenders: Collection[str] | None, records: Sequence[Record]) -> list[str]:
    """Names of the caller's that no record has."""
    names = {record["contender"] for record in records}
    return [w for w in dict.fromkeys(contenders or ()) if not any(_means(w, n) for n in names)]


def _unmeasured(
    device: torch.device, sensors: Sensors | str, records: Sequence[Mapping[str, Any]]
) -> list[str]:
    """What a user might look for in the records, and why it is not there."""
    if device.type != "cuda":
        return [
            "Peak memory, launches, energy and clocks are measured on a GPU only.",
            "Times on a CPU are wall times, with caches as the call before left them.",
        ]
    found = []
    if isinstance(sensors, str):
        found.append(f"Energy, clocks, temperature and throttling: {sensors}.")
    elif sensors.millijoules() is None:
        how = "mJ are its power times time" if sensors.state().watts else "nor a power sensor"
        found.append(f"This GPU has no energy counter: {how}.")
    if any("device_ms" in record and record["launches"] is None for record in records):
        found.append("Launches: PyTorch's profiler saw no kernel.")
    return found


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
