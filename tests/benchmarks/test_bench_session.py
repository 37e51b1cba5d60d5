"""The accuracy gate, the time limit and reasons, with fake contenders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from harness import session as harness
from harness.contenders import Case, Suite
from harness.cost import Cost
from harness.meter import Settings
from harness.nvml import Sensors
from harness.session import Session, is_defect
from vlmo.testing import Deviation

CPU = torch.device("cpu")
RIGHT, WRONG = Deviation("y", 1.0, 1.0, 2.0), Deviation("dx", 3.0, 1.0, 2.0)
CASES = [Case("fake", "tiny", torch.float32, "forward", {"tokens": n}) for n in (1, 2)]
FEW = Settings(seconds=0)
COST = Cost(flops=4 * 10**9, bytes=10**9)


def fail():
    raise KeyError("no tile")


def out_of_memory():
    raise torch.OutOfMemoryError("\n  CUDA out of memory.\nTried to allocate 20 GiB.")


@dataclass
class FakeProblem:
    """Contenders by name: what a check finds, or what it raises, and what a call does."""

    found: dict[str, Sequence[Deviation] | Callable[[], Sequence[Deviation]]]
    works: dict[str, Callable[[], object]] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    cost: Cost = COST
    samples: int = 8

    @property
    def contenders(self) -> list[str]:
        return list(self.found)

    def why_not(self, contender):
        return self.unavailable.get(contender)

    def work(self, contender):
        return self.works.get(contender, lambda: None)

    def check(self, contender):
        found = self.found[contender]
        return found() if callable(found) else found


def results(problem, *, run: Session | None = None, case: Case = CASES[0]):
    make = problem if callable(problem) else lambda case, device: problem
    suite = Suite("fake", lambda device, scale: CASES, make)
    names = list(getattr(problem, "found", ["vlmo:a", "b"]))
    return (run or Session(CPU, settings=FEW)).results(suite, case, names)


@pytest.fixture(autouse=True)
def roof(monkeypatch):
    """1 GB/s and 3 TFLOP/s that need not be measured."""
    monkeypatch.setattr("harness.roofline.copy_gb_per_s", lambda device: 1.0)
    monkeypatch.setattr("harness.roofline.matrix_tflops", lambda device, dtype: 3.0)


def test_a_contender_has_its_times_and_rates(monkeypatch):
    def measure(works, begun, device, settings):
        return {name: begun[name] | {"seconds": [0.001, 0.002, 0.003]} for name in works}

    monkeypatch.setattr(harness, "measure", measure)
    run = Session(CPU, settings=FEW)
    numbers = results(FakeProblem({"vlmo:a": [RIGHT]}), run=run)["vlmo:a"]
    # 4 operations a byte at 1 GB/s: 0.004 TFLOP/s are attainable.
    rates = dict(tflops=2.0, gb_per_s=500.0, samples_per_s=4000.0, share_of_roof=500.0)
    assert {name: numbers[name] for name in rates} == pytest.approx(rates)
    assert numbers["error"] == 0.5 and numbers["wall_ms"] >= 0
    assert not run.not_run


def test_who_cannot_run_or_is_wrong_has_a_reason_and_the_others_go_on():
    memory = "OutOfMemoryError: CUDA out of memory."
    expected = {
        "missing": "missing is not installed",
        "raises": memory,
        "late": "KeyError: 'no tile'",
        "rounded": "out of its error bound: dx is off by 3.00e+00, allowed are 2.00e+00",
        "vlmo:wrong": "not exact: dx is off by 3.00e+00, allowed are 2.00e+00",
        "vlmo:nan": "not exact: y is off by nan, allowed are 2.00e+00",
        "vlmo:checked": "failed: KeyError: 'no tile'",
        "vlmo:called": "failed: KeyError: 'no tile'",
        "vlmo:large": memory,
        "vlmo:good": None,
        "good": None,
    }
    right: dict[str, Any] = {name: [RIGHT] for name in expected}
    problem = FakeProblem(
        right
        | {"rounded": [RIGHT, WRONG], "vlmo:wrong": [WRONG]}
        | {"vlmo:nan": [Deviation("y", float("nan"), 1.0, 2.0)]}
        | {"raises": out_of_memory, "vlmo:checked": fail, "vlmo:large": out_of_memory},
        works={"late": fail, "vlmo:called": fail},
        unavailable={"missing": "missing is not installed"},
    )
    run = Session(CPU, settings=FEW)
    found = results(problem, run=run)
    assert {name: numbers.get("reason") for name, numbers in found.items()} == expected
    assert len(found["good"]["seconds"]) == 3
    assert {r["contender"]: r["reason"] for r in run.not_run} == {
        name: reason for name, reason in expected.items() if reason
    }
    assert {(r["suite"], r["tokens"]) for r in run.not_run} == {("fake", 1)}
    defects = {r["contender"] for r in run.not_run if is_defect(r["contender"], r["reason"])}
    assert defects == {"vlmo:wrong", "vlmo:nan", "vlmo:checked", "vlmo:called"}


def test_what_fails_for_the_whole_case_is_the_reason_of_all(monkeypatch):
    found = results(lambda case, device: out_of_memory())
    assert {n["reason"] for n in found.values()} == {"OutOfMemoryError: CUDA out of memory."}
    monkeypatch.setattr(harness, "measure", lambda *arguments: fail())
    found = results(FakeProblem({"vlmo:a": [RIGHT], "b": [RIGHT]}))
    beside = "KeyError: 'no tile' (while it was timed beside the others)"
    assert [n["reason"] for n in found.values()] == [f"failed: {beside}", beside]


def test_a_case_is_measured_once():
    calls, run = [], Session(CPU, settings=FEW)
    problem = FakeProblem({"a": [RIGHT]}, works={"a": lambda: calls.append(1)})
    for case in (CASES[0], CASES[0], CASES[1]):
        results(problem, run=run, case=case)
    assert len(calls) == 2 * (2 + 3)


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        for name in ("monotonic", "perf_counter"):
            monkeypatch.setattr(f"time.{name}", lambda: self.now)

    def passes(self, seconds, found=None):
        def called():
            self.now += seconds
            return found

        return called

    def problem(self, check=1.0, **calls) -> FakeProblem:
        """Contenders whose calls take so long."""
        return FakeProblem(
            {name: self.passes(check, [RIGHT]) for name in calls},
            works={name: self.passes(seconds) for name, seconds in calls.items()},
        )


def test_a_contender_whose_calls_would_end_too_late_is_not_timed(monkeypatch):
    clock = Clock(monkeypatch)
    run = Session(CPU, 30.0, FEW)
    problem = clock.problem(a=1.0, slow=9.0, b=1.0)
    reasons = {name: n.get("reason") for name, n in results(problem, run=run).items()}
    # a: check, the first call, and three that are timed. The others check and are called once.
    left = 30 - (1 + 1) - (1 + 9)
    assert reasons == {
        "a": None,
        "slow": f"left out: it needs 21 s, and {left} s of the time limit of 30 s are left",
        "b": None,
    }
    assert clock.now == 100 + 30 - left + (1 + 1) + 2 * 3


def test_minutes_of_compiling_do_not_count_as_expected_time(monkeypatch):
    clock = Clock(monkeypatch)
    left = [200.0]

    def call():
        clock.now += left.pop() if left else 2.0

    problem = FakeProblem({"a-compiled": [RIGHT]}, works={"a-compiled": call})
    found = results(problem, run=Session(CPU, 300.0, FEW))["a-compiled"]
    assert found["seconds"] == pytest.approx([2.0] * 3) and found["wall_ms"] == pytest.approx(2000)


def test_a_compilation_that_ends_too_late_leaves_out_that_contender_alone(monkeypatch):
    clock = Clock(monkeypatch)
    problem = clock.problem(a=1.0, **{"b-compiled": 100.0})
    found = results(problem, run=Session(CPU, 60.0, FEW))
    assert found["b-compiled"]["reason"].startswith("left out: it needs")
    assert len(found["a"]["seconds"]) == 3


def test_a_failure_of_the_compiler_is_no_defect_of_ours():
    def inductor():
        raise BackendCompilerFailed(inductor, AssertionError("not codegen-ed"), None)

    found = results(FakeProblem({"vlmo:a-compiled": inductor}))["vlmo:a-compiled"]
    told = "BackendCompilerFailed: backend='inductor' raised: AssertionError: not codegen-ed"
    assert found["reason"] == told
    assert not is_defect("vlmo:a-compiled", found["reason"])


def test_after_the_time_limit_nothing_is_even_made(monkeypatch):
    clock, made = Clock(monkeypatch), []

    def make(case, device):
        made.append(case)
        clock.now += 61
        return FakeProblem({"vlmo:a": fail, "b": fail})

    run = Session(CPU, 60.0, FEW)
    told = "left out: it needs 0 s, and 0 s of the time limit of 60 s are left"
    for case in CASES:
        assert {n["reason"] for n in results(make, run=run, case=case).values()} == {told}
    assert made == CASES[:1]


def test_nothing_runs_on_a_gpu_that_no_longer_answers(monkeypatch):
    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(harness, "begin", lambda *rest: dict(wall_ms=1.0))
    monkeypatch.setattr(harness, "measure", lambda works, begun, *rest: fail())
    run = Session(CPU, settings=FEW)
    run.device = torch.device("cuda")
    for case in CASES:
        found = results(FakeProblem({"slices": [RIGHT], "vlmo:a": [RIGHT]}), run=run, case=case)
        told = "failed: the GPU no longer answers: RuntimeError: CUDA error: an illegal"
        assert found["vlmo:a"]["reason"].startswith(told)


def test_what_sensors_do_not_tell_is_told():
    class Fake(Sensors):
        def __init__(self, energy, watts):
            self.energy, self.watts = energy, watts

        def millijoules(self):
            return self.energy

        def state(self):
            return self

    def told(sensors):
        run = Session(CPU)
        run.device, run.sensors = torch.device("cuda"), sensors
        return " ".join(run.unmeasured())

    assert told(Fake(1, 100.0)) == ""
    assert "pynvml is missing" in told("pynvml is missing")
    assert "power times time" in told(Fake(None, 100.0))
    assert "nor a sensor" in told(Fake(None, None))
    assert "GPU only" in Session(CPU).unmeasured()[0]
