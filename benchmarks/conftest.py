"""The suites of ``vlmo bench``, a test for each case and contender.

    pytest benchmarks                                            # a smoke test at tiny sizes
    pytest benchmarks --benchmark-enable --benchmark-json=FILE   # measures

``vlmo bench`` measures the contenders of a case in turn, within a time limit, and writes a report;
this is for pytest's selection (``-k``). The statistics of pytest-benchmark are of wall time; device
time, memory, launches and energy are in the file's ``extra_info``, by :mod:`vlmo.bench.meter`.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vlmo.bench.gpu import Sensors, open_sensors
from vlmo.bench.meter import Settings, measure
from vlmo.bench.model import PRETRAINING
from vlmo.bench.report import is_ours
from vlmo.bench.runner import SUITES, why_inexact
from vlmo.bench.suite import Case, Problem, Scale
from vlmo.kernels.target import interpreted

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_generate_tests(metafunc):
    """Of a module whose ``SUITE`` is the name of one."""
    suite = SUITES[metafunc.module.SUITE]
    tiny = suite.cases(DEVICE, Scale.smoke)
    # Large problems are not made to be asked who takes part: who is none is skipped.
    names = {name: None for case in tiny for name in suite.make(case, DEVICE).contenders}
    cases = tiny
    if _enabled(metafunc.config):
        cases = suite.cases(DEVICE, Scale.full if DEVICE.type == "cuda" else Scale.cpu)
    entered = [(case, name) for case in cases for name in names]

    def marks(case: Case, name: str) -> list[pytest.MarkDecorator]:
        # Triton's interpreter takes longest for this phase, whose layers the others have as well.
        long = name == "vlmo:triton" and case.phase == PRETRAINING
        return [pytest.mark.slow] if long and interpreted() else []

    metafunc.parametrize(
        ("problem", "contender"),
        [pytest.param(*entry, marks=marks(*entry)) for entry in entered],
        indirect=["problem"],
        ids=[f"{case}-{name}" for case, name in entered],
        scope="module",
    )


@pytest.fixture(autouse=True)
def _threads(request):
    """One in a smoke test: those of tiny operations wait longer for each other than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if _enabled(request.config) else 1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def problem(request) -> Problem:
    """Shared by the contenders of a case, which follow each other."""
    return SUITES[request.module.SUITE].make(request.param, DEVICE)


@pytest.fixture
def held(request, benchmark) -> Callable[[Problem, str], None]:
    """Holds a contender against float64, and calls or measures it."""

    def hold(problem: Problem, contender: str) -> None:
        if contender not in problem.contenders:
            pytest.skip(f"{contender} takes no part in this case")
        reason = problem.why_not(contender)
        if reason is not None:
            pytest.skip(f"{contender}: {reason}")
        wrong = why_inexact(contender, problem.check(contender))
        if wrong is not None and not is_ours(contender):
            pytest.skip(f"{contender}: {wrong}")
        assert wrong is None, f"{contender} is {wrong}"
        work = problem.work(contender)

        def waited_for() -> None:
            work()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        if not _enabled(request.config):
            benchmark.pedantic(waited_for)
            return
        sensors = open_sensors(DEVICE)
        settings = Settings(sensors=sensors if isinstance(sensors, Sensors) else None)
        [numbers] = measure({contender: work}, DEVICE, settings).values()
        assert "reason" not in numbers, numbers["reason"]
        benchmark.extra_info |= numbers
        benchmark.pedantic(waited_for, rounds=3)

    return hold


def _enabled(config: pytest.Config) -> bool:
    """Whether to measure."""
    if config.getoption("benchmark_disable") and not config.getoption("benchmark_enable"):
        return False
    return not hasattr(config, "workerinput")  # pytest-xdist
