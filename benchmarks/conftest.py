"""Runs the benchmark suites with pytest-benchmark and the additions of the harness.

    pytest benchmarks                                           # a smoke test at tiny sizes
    pytest benchmarks --benchmark-enable --benchmark-autosave   # measures

There is a benchmark for each case and contender, and ``-k`` selects from them. The selected
contenders of a case are measured in turn when the first of them runs (:mod:`harness.session`);
each benchmark then passes its own times to pytest-benchmark. Thus the ``stats`` of its JSON files
are device times; everything else is in ``extra_info`` and under the key ``vlmo``.
"""

from __future__ import annotations

import itertools
import shlex
import signal
from collections.abc import Callable

import pytest
import torch

from harness.contenders import Case, Scale, Suite
from harness.meter import Settings
from harness.session import Session, is_defect, machine
from vlmo.device import versions
from vlmo.kernels.target import interpreted

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MINUTES = {"cpu": 60.0, "cuda": 20.0}
# The slowest phases in Triton's interpreter, whose layers other phases cover.
LONG = (("model", "pre-training step"), ("beit3", "VQA step"))
SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser):
    group = parser.getgroup("benchmark")
    group.addoption(
        "--scale",
        choices=[scale.value for scale in Scale],
        help="How much of each suite; by default smoke without --benchmark-enable, else by device.",
    )
    group.addoption(
        "--minutes",
        type=float,
        default=MINUTES[DEVICE.type],
        help=f"Cases that would end later are left out (on this device {MINUTES[DEVICE.type]:g}).",
    )
    group.addoption("--commit", help="What is measured, where git cannot tell.")


def pytest_configure(config):
    if _measures(config):
        # When interrupted, pytest-benchmark saves what it has measured.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        seconds = 60 * config.getoption("minutes")
        smoke = _scale(config) is Scale.smoke
        settings = Settings(seconds=0.0, energy_seconds=0.0) if smoke else Settings()
        config.stash[SESSION] = Session(DEVICE, seconds, settings)
    else:
        config.stash[SESSION] = Session(DEVICE)


def pytest_generate_tests(metafunc):
    """Parametrise a module that has a ``SUITE`` with every contender of every case."""
    suite: Suite = metafunc.module.SUITE
    tiny = suite.cases(DEVICE, Scale.smoke)
    # Taken from a tiny case, because the inputs of the others are large.
    names = suite.make(tiny[0], DEVICE).contenders
    scale = _scale(metafunc.config)
    cases = tiny if scale is Scale.smoke else suite.cases(DEVICE, scale)

    def marks(case: Case, name: str) -> list[pytest.MarkDecorator]:
        slow = name == "vlmo:triton" and (case.suite, case.phase) in LONG and interpreted()
        group = ", ".join(map(str, case.labels.values()))
        marks = [pytest.mark.benchmark(group=group, timer=CLOCK.time)]
        return [*marks, pytest.mark.slow] if slow else marks

    metafunc.parametrize(
        ("case", "contender"),
        [
            pytest.param(case, name, marks=marks(case, name), id=f"{case}-{name}")
            for case in cases
            for name in names
        ],
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Alternate between suites, the most important case of each first, as time may run out."""
    if not _measures(config):
        return
    by_suite: dict[str, dict[str, list[pytest.Item]]] = {}
    for item in items:
        if (case := _case(item)) is not None:
            by_suite.setdefault(case.suite, {}).setdefault(str(case), []).append(item)
    turns = itertools.zip_longest(*(cases.values() for cases in by_suite.values()), fillvalue=[])
    others = [item for item in items if _case(item) is None]
    items[:] = [*others, *itertools.chain.from_iterable(itertools.chain.from_iterable(turns))]


@pytest.fixture(autouse=True)
def _threads(request):
    """Use one thread in a smoke test: for tiny operations more threads only add waiting."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if _scale(request.config) is Scale.smoke else threads)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def compete(request, benchmark) -> Callable[[Suite, Case, str], None]:
    """Check a contender against float64, and measure it, or call it once in a smoke test."""
    session = request.config.stash[SESSION]

    def measured(suite: Suite, case: Case, contender: str) -> None:
        wanted = [item for item in request.session.items if _case(item) == case]
        names = [item.callspec.params["contender"] for item in wanted]
        numbers = dict(session.results(suite, case, names)[contender])
        _give_up_for(contender, numbers)
        CLOCK.replay(benchmark, numbers.pop("seconds"))
        benchmark.extra_info |= case.labels | {"contender": contender} | numbers

    def called(suite: Suite, case: Case, contender: str) -> None:
        problem = session.problem(suite, case)
        _give_up_for(contender, session.check(problem, contender))
        benchmark.pedantic(problem.work(contender))

    return measured if _measures(request.config) else called


class _Clock:
    """A timer for pytest-benchmark that replays times that have already been measured."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def replay(self, benchmark, seconds: list[float]) -> None:
        left = iter(seconds)

        def call() -> None:
            self.now += next(left)

        benchmark.pedantic(call, rounds=len(seconds))


CLOCK = _Clock()


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["device"] = machine(DEVICE)
    machine_info["versions"] = versions() | {"cuda": str(torch.version.cuda)}


def pytest_benchmark_update_commit_info(config, commit_info):
    if config.getoption("commit"):
        commit_info |= {"id": config.getoption("commit"), "dirty": False}


def pytest_benchmark_update_json(config, benchmarks, output_json):
    session = config.stash[SESSION]
    smoke = _scale(config) is Scale.smoke
    note = "Speed: a smoke run of tiny sizes and few calls, whose times mean nothing."
    output_json["vlmo"] = {
        "command": shlex.join(["pytest", *config.invocation_params.args]),
        "roof": session.roof.rates(),
        "unmeasured": [*([note] if smoke else []), *session.unmeasured()],
        "not_run": session.not_run,
    }


def _give_up_for(contender: str, numbers) -> None:
    if "reason" not in numbers:
        return
    told = f"{contender}: {numbers['reason']}"
    (pytest.fail if is_defect(contender, numbers["reason"]) else pytest.skip)(told)


def _case(item: pytest.Item) -> Case | None:
    params = item.callspec.params if hasattr(item, "callspec") else {}
    case = params.get("case")
    return case if isinstance(case, Case) else None


def _scale(config: pytest.Config) -> Scale:
    if config.getoption("scale"):
        return Scale(config.getoption("scale"))
    if not _measures(config):
        return Scale.smoke
    return Scale.full if DEVICE.type == "cuda" else Scale.cpu


def _measures(config: pytest.Config) -> bool:
    """Whether pytest-benchmark measures."""
    if config.getoption("benchmark_disable") and not config.getoption("benchmark_enable"):
        return False
    return not hasattr(config, "workerinput")  # a worker of pytest-xdist
