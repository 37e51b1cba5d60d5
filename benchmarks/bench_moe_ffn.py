"""The routed feed-forward sublayer beside a dense one, slices and peers, forward and backward.

    pytest benchmarks --benchmark-enable --save-results

Without ``--benchmark-enable`` this is a smoke test at tiny sizes. See conftest.py for the report.
"""

from __future__ import annotations

import pytest
import torch

from reporting import benchmarks_enabled
from vlmo.bench.moe_ffn import SUITE
from vlmo.bench.suite import Scale


def pytest_generate_tests(metafunc):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    full = benchmarks_enabled(metafunc.config) and device.type == "cuda"
    cases = SUITE.cases(device, Scale.full if full else Scale.smoke)
    entered = [(case, name) for case in cases for name in SUITE.make(cases[0], device).contenders]
    names = [f"{case}-{name}" for case, name in entered]
    metafunc.parametrize(("case", "contender"), entered, ids=names)
    metafunc.parametrize("device", [device], ids=str)


def bench_moe_ffn(case, contender, device, measured):
    problem = SUITE.make(case, device)
    reason = problem.why_not(contender)
    if reason is not None:
        pytest.skip(f"{contender}: {reason}")
    wrong = [deviation for deviation in problem.check(contender) if not deviation.ok]
    assert not wrong, f"not exact enough to be timed: {wrong}"
    labels = case.labels | dict(operation=case.suite, contender=contender)
    measured(problem.work(contender), device, case.dtype, problem.cost, labels)
