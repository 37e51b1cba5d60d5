"""Suites within a time limit, by suites that pretend."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch

from vlmo.bench import runner
from vlmo.bench.cost import Cost
from vlmo.bench.report import Report
from vlmo.bench.roofline import Roof
from vlmo.bench.runner import ALL, run
from vlmo.bench.suite import Case, Scale, Suite
from vlmo.parity import Deviation

CPU = torch.device("cpu")
COST = Cost(flops=4 * 10**9, bytes=10**9)
TINY = Cost(flops=4, bytes=1)  # a nanosecond at the roof
RIGHT, WRONG = Deviation("y", 1.0, 1.0, 2.0), Deviation("dx", 3.0, 1.0, 2.0)


def out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB.")


@dataclass
class FakeProblem:
    """Contenders by name: what a check finds, or what it raises, and what a call does."""

    found: dict[str, Sequence[Deviation] | Callable[[], None]]
    works: dict[str, Callable[[], object]] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    cost: Cost = TINY
    samples: int = 8
    expecting: Callable[[], object] = lambda: None

    @property
    def contenders(self) -> list[str]:
        return list(self.found)

    @property
    def check_cost(self) -> Cost:
        return self.cost

    def expect(self, contender):
        self.expecting()

    def why_not(self, contender):
        return self.unavailable.get(contender)

    def work(self, contender):
        return self.works.get(contender, lambda: None)

    def check(self, contender):
        found = self.found[contender]
        return found() if callable(found) else found


def case(suite="fake", *, tokens=8, size="tiny", dtype=torch.float32) -> Case:
    return Case(suite, size, dtype, "forward", {"tokens": tokens})


def suite_of(problem, cases=None, name="fake") -> Suite:
    """A suite whose cases are all ``problem``, or what it makes of a case."""
    make = problem if callable(problem) else lambda case, device: problem
    return Suite(name, lambda device, scale: cases or [case(name)], make)


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """A roof of 1 GB/s and 3 TFLOP/s that need not be measured."""

    def measure_roof(device, dtypes):
        return Roof(1.0, {str(dtype).removeprefix("torch."): 3.0 for dtype in dtypes})

    monkeypatch.setattr(runner, "measure_roof", measure_roof)
    # Beside everything that a session of tests has loaded it takes a tenth of a second.
    monkeypatch.setattr(runner.gc, "collect", lambda: 0)


def smoke(*suites, seconds=60.0, **options) -> Report:
    return run(suites, CPU, scale=Scale.smoke, seconds=seconds, **options)


def test_a_record_has_the_case_and_all_numbers(monkeypatch, tmp_path):
    numbers = dict(device_ms=2.0, device_ms_low=1.0, device_ms_high=3.0, calls=3)
    nothing = dict.fromkeys(["peak_mib", "launches", "millijoules", "clock_mhz", "temperature_c"])
    measured = numbers | nothing | dict(wall_ms=2.0, throttled=None)
    monkeypatch.setattr(runner, "measure", lambda works, *args: dict.fromkeys(works, measured))
    report = smoke(
        suite_of(FakeProblem({"vlmo:a": [RIGHT]}, cost=COST)),
        commit="abc",
        command="vlmo bench",
    )
    rates = dict(tflops=2.0, gb_per_s=500.0, samples_per_s=4000.0)
    # 4 operations a byte at 1 GB/s: 0.004 TFLOP/s are attainable.
    rates |= dict(share_of_roof=pytest.approx(500.0), error=0.5)
    labels = dict(suite="fake", size="tiny", dtype="float32", phase="forward", tokens=8)
    assert report.records == [labels | {"contender": "vlmo:a"} | measured | rates]
    assert (report.commit, report.command) == ("abc", "vlmo bench")
    assert report.roof == {"copy_gb_per_s": 1.0, "matrix_tflops": {"float32": 3.0}}
    assert report.machine["name"] == "cpu" and report.machine["cores"] >= 1
    assert any("GPU only" in sentence for sentence in report.unmeasured)
    assert {"torch", "cuda", "vlmo"} <= set(report.versions)
    # What is measured can be written and read again.
    assert Report.load(smoke(suite_of(FakeProblem({"a": [RIGHT]}))).save(tmp_path)).records


def test_who_cannot_run_or_is_wrong_has_a_reason_and_the_run_goes_on():
    problem = FakeProblem(
        {
            "missing": [RIGHT],
            "raises": out_of_memory,
            "vlmo:wrong": [RIGHT, WRONG],
            "vlmo:nan": [Deviation("y", float("nan"), 1.0, 2.0)],
            "rounded": [RIGHT, WRONG],
            "late": [RIGHT],
            "good": [RIGHT],
        },
        works={"late": out_of_memory},
        unavailable={"missing": "missing is not installed"},
    )
    report = smoke(suite_of(problem))
    reasons = {record["contender"]: record.get("reason") for record in report.records}
    assert list(reasons) == list(problem.found)
    memory = "OutOfMemoryError: CUDA out of memory."
    assert reasons["missing"] == "missing is not installed"
    assert reasons["raises"] == reasons["late"] == memory
    assert reasons["vlmo:wrong"] == "not exact: dx is off by 3.00e+00, allowed are 2.00e+00"
    assert reasons["vlmo:nan"] == "not exact: y is off by nan, allowed are 2.00e+00"
    assert reasons["good"] is None and report.records[-1]["calls"] == 3
    assert {record["contender"] for record in report.defects} == {"vlmo:wrong", "vlmo:nan"}
    # How a peer rounds is no fault of this library: it is told where the case is told.
    told = "out of its error bound: dx is off by 3.00e+00, allowed are 2.00e+00"
    assert reasons["rounded"] == told
    assert f"rounded: not timed: {told}." in report.markdown()


def fail():
    raise KeyError("no tile")


def test_one_of_ours_that_fails_is_a_defect():
    found = {name: [RIGHT] for name in ("vlmo:called", "slices", "vlmo:absent", "vlmo:good")}
    problem = FakeProblem(
        found | {"vlmo:checked": fail, "vlmo:large": out_of_memory},
        works={"vlmo:called": fail, "slices": fail},
        unavailable={"vlmo:absent": "needs a GPU"},
    )
    report = smoke(suite_of(problem))
    reasons = {record["contender"]: record.get("reason") for record in report.records}
    assert reasons["vlmo:called"] == reasons["vlmo:checked"] == "failed: KeyError: 'no tile'"
    assert reasons["slices"] == "KeyError: 'no tile'"
    assert reasons["vlmo:large"] == "OutOfMemoryError: CUDA out of memory."
    assert reasons["vlmo:good"] is None
    assert [r["contender"] for r in report.defects] == ["vlmo:called", "vlmo:checked"]


def test_nothing_runs_on_a_gpu_that_no_longer_answers(monkeypatch):
    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(runner.torch.cuda, "synchronize", synchronize)
    problem = FakeProblem({name: [RIGHT] for name in ("slices", "vlmo:a")})
    roof = Roof(1.0, {"float32": 3.0})
    session = runner._Session(
        torch.device("cuda"), Scale.smoke, roof, "no sensors", None, float("inf"), 60.0
    )
    monkeypatch.setattr(runner, "begin", lambda *rest: dict(wall_ms=1.0, launches=None))
    monkeypatch.setattr(runner, "measure", lambda works, *rest: {n: {"reason": "-"} for n in works})
    first, second = session.records(suite_of(problem), case(), 1)
    assert first["reason"] == "-"  # it had been checked when the GPU was found not to answer
    assert second["reason"].startswith("failed: the GPU no longer answers: RuntimeError: CUDA")
    [rest] = session.records(suite_of(problem), case(), 1)
    assert (rest["contender"], rest["reason"]) == (ALL, second["reason"])
    session.free()  # once more, in vain


def test_one_that_fails_beside_the_others_does_not_end_the_run(monkeypatch):
    def measure(works, *arguments):
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(runner, "measure", measure)
    cases = [case(tokens=1), case(tokens=2)]
    report = smoke(suite_of(FakeProblem({"a": [RIGHT]}), cases))
    assert [record["tokens"] for record in report.records] == [1, 2]
    assert all("illegal memory access (while" in record["reason"] for record in report.records)


def test_a_problem_that_does_not_fit_is_recorded():
    def make(case, device):
        return out_of_memory() if case.shape["tokens"] == 1 else FakeProblem({"a": [RIGHT]})

    report = smoke(suite_of(make, [case(tokens=1), case(tokens=2)]))
    assert report.records[0]["contender"] == ALL
    assert report.records[0]["reason"] == "OutOfMemoryError: CUDA out of memory."
    assert not report.defects
    assert report.records[1]["device_ms"] >= 0


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        for name in ("monotonic", "perf_counter"):
            monkeypatch.setattr(runner.time, name, lambda: self.now)

    def passes(self, seconds, found=None):
        """A function that takes so long."""

        def called():
            self.now += seconds
            return found

        return called

    def problem(self, *, checks=None, check=1.0, roof=1.0, **calls) -> FakeProblem:
        """Contenders whose calls take so long, of a case that takes ``roof`` seconds at best."""
        return FakeProblem(
            {name: self.passes((checks or {}).get(name, check), [RIGHT]) for name in calls},
            works={name: self.passes(seconds) for name, seconds in calls.items()},
            cost=Cost(flops=int(4e9 * roof), bytes=int(1e9 * roof)),
        )


def of_problems(*problems, dtypes=None) -> Suite:
    """A suite with a case of each, by the number of tokens."""
    cases = [
        case(tokens=number, dtype=(dtypes or {}).get(number, torch.float32))
        for number, _ in enumerate(problems, 1)
    ]
    return suite_of(lambda case, device: problems[case.shape["tokens"] - 1], cases)


def reasons_of(report) -> dict[tuple[int, str], str | None]:
    return {(r["tokens"], r["contender"]): r.get("reason") for r in report.records}


def test_a_case_that_would_end_too_late_does_not_begin(monkeypatch):
    clock = Clock(monkeypatch)
    long, short = clock.problem(a=1.0, b=2.0, roof=10.0), clock.problem(a=0.1, b=0.1, roof=0.01)
    report = smoke(of_problems(short, long, short), seconds=60)
    # The first case: paces of 10, so 100 s a call at the second, of which there are five, and three
    # as long at the check. Nothing of it has been called when the third begins.
    reasons = reasons_of(report)
    left = 60 - (2 * (1 + 5 * 0.1))
    assert reasons[2, ALL].startswith("left out: it would take about ")
    assert reasons[2, ALL].endswith(f"; {left:.0f} s of the time limit of 60 s are left")
    assert [key for key, reason in reasons.items() if reason is None] == [
        *((1, "a"), (1, "b")),
        *((3, "a"), (3, "b")),
    ]
    assert clock.now == pytest.approx(100 + 2 * (60 - left))
    [line] = report.left_out()
    assert line.startswith("fake, tiny, float32, forward, tokens 2: all: left out: ")
    assert line in report.markdown() and not report.not_run() and not report.defects


def test_what_is_left_out_for_lack_of_time_is_right_to_the_second(monkeypatch):
    """By a case whose contenders keep their paces: it fits as soon as there is time for it."""
    for spare, fits in ((1e-6, True), (-1e-6, False)):
        clock = Clock(monkeypatch)
        problem = clock.problem(check=1.0, roof=0.01, a=1.0, b=2.0)
        # A check, a call as long as a second, and three that are timed; b's check is one call.
        first, again = (1 + 4) + (1 + 8), (1 + 4) + (2 + 8)
        report = smoke(of_problems(problem, problem), seconds=first + again + spare)
        left_out = [reason for reason in reasons_of(report).values() if reason is not None]
        assert len(left_out) == (not fits)
        assert clock.now == pytest.approx(100 + first * (2 if fits else 1))


def test_one_that_is_far_slower_than_foretold_is_not_called_on(monkeypatch):
    """Fifty times, in the first case of all: its check tells."""
    clock = Clock(monkeypatch)
    slow = clock.problem(checks={"peer": 200.0}, **{"vlmo:a": 1.0}, peer=200.0, last=1.0)
    reasons = reasons_of(smoke(of_problems(slow, slow), seconds=270))
    assert reasons[1, "vlmo:a"] is reasons[1, "last"] is None
    assert reasons[1, "peer"].startswith("left out: it would take about 603 s; 68 s")
    assert reasons[2, ALL].startswith("left out")  # with that peer it would take 800 s
    assert clock.now == 100 + 200 + 2 * 5


def test_one_whose_calls_are_slower_than_its_check_is_not_timed(monkeypatch):
    clock = Clock(monkeypatch)
    slow = clock.problem(**{"vlmo:a": 1.0}, peer=100.0)
    reasons = reasons_of(smoke(of_problems(slow), seconds=270))
    assert reasons[1, "vlmo:a"] is None
    told = "left out: it would take about 203 s; 167 s of the time limit of 270 s are left"
    assert reasons[1, "peer"] == told
    assert clock.now < 100 + 270


def test_another_dtype_is_foretold_by_the_paces_of_the_first(monkeypatch):
    """And by its own roof: where bfloat16 is slow, it is slow for everyone."""
    monkeypatch.setattr(
        *(runner, "measure_roof"), lambda *rest: Roof(1e9, {"float32": 4e-3, "bfloat16": 4e-4})
    )
    clock = Clock(monkeypatch)
    fast, slow = clock.problem(a=2.0, check=2.0), clock.problem(a=20.0, check=20.0)
    dtypes = {2: torch.bfloat16}
    reasons = reasons_of(smoke(of_problems(fast, slow, dtypes=dtypes), seconds=60))
    assert reasons[1, "a"] is None
    assert reasons[2, ALL].startswith("left out: it would take about 80 s; 50 s")


def test_compiling_is_foretold_by_earlier_cases_and_is_no_pace(monkeypatch):
    clock = Clock(monkeypatch)
    problem = clock.problem(checks={"compiled": 20.2}, compiled=0.1, roof=0.1)
    report = smoke(of_problems(*[problem] * 6), seconds=110.2)
    reasons = reasons_of(report)
    assert [reasons.get((number, "compiled"), "-") for number in range(1, 7)] == [None] * 5 + ["-"]
    assert reasons[6, ALL] == (
        "left out: it would take about 21 s; 7 s of the time limit of 110 s are left"
    )
    assert clock.now == pytest.approx(100 + 5 * (20.2 + 0.5))


def test_a_roof_measured_on_a_busy_machine_is_corrected_by_earlier_cases(monkeypatch):
    """Others take a tenth of what it allows: so will one of another suite."""
    clock = Clock(monkeypatch)
    first, other = clock.problem(a=0.1, b=0.1, check=0.1), clock.problem(c=5.0, check=5.0, roof=50)
    suites = [of_problems(first), suite_of(other, [case("other", tokens=2)], "other")]
    reasons = reasons_of(smoke(*suites, seconds=60))
    # By the roof alone a call would take 50 s at least; by the others it takes 7.5 s with caution.
    assert reasons == {(1, "a"): None, (1, "b"): None, (2, "c"): None}
    reasons = reasons_of(smoke(*suites, seconds=30))
    assert reasons[2, ALL].startswith("left out: it would take about 37 s; 29 s")


def test_what_happens_once_only_is_no_pace(monkeypatch):
    """A model is made in the first case, and the next dtype's check is shorter than that took."""
    clock = Clock(monkeypatch)
    first = clock.problem(checks={"a": 30.0}, a=0.1, roof=0.1)
    dtypes = {2: torch.bfloat16, 3: torch.bfloat16}
    later = [clock.problem(a=0.1, check=0.1, roof=0.1) for _ in range(2)]
    reasons = reasons_of(smoke(of_problems(first, *later, dtypes=dtypes), seconds=300))
    assert set(reasons.values()) == {None}


def test_the_expectation_is_foretold_too(monkeypatch):
    clock = Clock(monkeypatch)
    problem = clock.problem(a=1.0)
    problem.expecting = clock.passes(30.0)
    reasons = reasons_of(smoke(of_problems(problem, problem), seconds=60))
    assert reasons[1, "a"] is None
    assert reasons[2, ALL] == (
        "left out: it would take about 35 s; 25 s of the time limit of 60 s are left"
    )


def test_after_the_time_limit_nothing_is_even_made(monkeypatch):
    clock, made = Clock(monkeypatch), []

    def make(case, device):
        made.append(case.shape["tokens"])
        clock.now += 61
        return clock.problem(a=1.0)

    report = smoke(suite_of(make, [case(tokens=1), case(tokens=2)]), seconds=60)
    over = "left out: the time limit of 60 s is over"
    assert reasons_of(report) == {(1, ALL): over, (2, ALL): over}
    assert made == [1]


def test_calls_are_as_many_as_what_is_left_allows(monkeypatch):
    clock, given = Clock(monkeypatch), []

    def measure(works, device, settings, begun):
        given.append(settings.seconds)
        return {}

    monkeypatch.setattr(runner, "begin", lambda *rest: dict(wall_ms=1.0, launches=None))
    monkeypatch.setattr(runner, "measure", measure)
    problems = [
        clock.problem(check=1, roof=1e-3, a=0, b=0),
        clock.problem(check=20, roof=1e-3, c=0),
        clock.problem(check=0.1, roof=1e-3, d=0),
    ]
    run([of_problems(*problems)], CPU, scale=Scale.cpu, seconds=24)
    # 24 s for three cases, two of the first 8 gone, two contenders, half of the time for calls, but
    # 0.8 s at most on a CPU; 22 s for two cases, all gone; 2 s for the last.
    assert given == [0.8, 0.1, 0.8]


def test_suites_take_turns_but_their_records_are_told_together():
    told = []
    first = suite_of(FakeProblem({"a": [RIGHT]}), [case("one", tokens=n) for n in (1, 2)], "one")
    second = suite_of(FakeProblem({"a": [RIGHT]}), [case("two", tokens=n) for n in (3,)], "two")
    report = smoke(
        first,
        second,
        on_case=lambda report: told.append([record["tokens"] for record in report.records]),
    )
    assert told == [[1], [1, 3], [1, 2, 3]]
    assert [record["tokens"] for record in report.records] == [1, 2, 3]


def test_filters_let_some_cases_and_contenders_through():
    cases = [
        case(size=size, dtype=dtype)
        for size in ("base", "large")
        for dtype in (torch.float16, torch.float32)
    ]
    suite = suite_of(FakeProblem({n: [RIGHT] for n in ("vlmo:a", "vlmo:b", "slices")}), cases)
    report = smoke(suite, dtypes=["float16"], sizes=["large"], contenders=["vlmo"])
    found = [(r["size"], r["dtype"], r["contender"]) for r in report.records]
    assert found == [("large", "float16", "vlmo:a"), ("large", "float16", "vlmo:b")]
    report = smoke(suite, dtypes=["float16"], contenders=["slices", "vlmo:b", "flex"])
    assert [r["contender"] for r in report.records] == ["vlmo:b", "slices"] * 2
    assert report.unmeasured[-1] == "flex: no case so far has such a contender."
    with pytest.raises(ValueError, match=r"no case of fake has dtypes: float8; sizes: huge"):
        smoke(suite, dtypes=["float8"], sizes=["huge"])
    told = []
    with pytest.raises(ValueError, match=r"contenders: no case has one of quack"):
        smoke(suite, contenders=["quack"], on_case=told.append)
    assert not told


def test_a_gpu_s_report_tells_what_its_sensors_do_not():
    gpu, record = torch.device("cuda"), {"device_ms": 1.0, "launches": 5}

    class Sensors:
        def __init__(self, energy, watts):
            self.energy, self.watts = energy, watts

        def millijoules(self):
            return self.energy

        def state(self):
            return self

    def told(sensors, record=record):
        return " ".join(runner._unmeasured(gpu, sensors, [record]))

    assert told(Sensors(1, 100.0)) == ""
    assert "pynvml is missing" in told("pynvml is missing")
    assert "power times time" in told(Sensors(None, 100.0))
    assert "nor a power sensor" in told(Sensors(None, None))
    assert "profiler saw no kernel" in told(Sensors(1, 100.0), record | {"launches": None})
    assert told(Sensors(1, 100.0), {"reason": "is not installed"}) == ""


def test_the_commit_is_that_of_the_repository_of_this_package(monkeypatch, tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True)

    git("init", "-q")
    file = tmp_path / "runner.py"
    file.write_text("one\n")
    monkeypatch.setattr(runner, "__file__", str(file))
    git("commit", "-q", "--allow-empty", "-m", "of something else")
    assert runner.commit_of_this() == "unknown"
    git("add", "runner.py")
    git("commit", "-q", "-m", "of this")
    found = runner.commit_of_this()
    assert len(found) >= 7 and int(found, 16)
    file.write_text("two\n")
    assert runner.commit_of_this() == f"{found}-dirty"
    monkeypatch.setenv("PATH", "")
    assert runner.commit_of_this() == "unknown"
