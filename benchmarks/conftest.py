"""What every benchmark reports, and where.

Each case tells its device time (events around calls on a full queue, median), wall time with launch
and synchronisation, TFLOP/s and GB/s by the formulas of cost.py, its share of the rate at which the
same GPU multiplies two 8192 x 8192 matrices of the same dtype, peak memory and number of launches.
The L2 cache is not flushed: one call's tensors are larger. Ratios are told at the end.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from reporting import ROOT, Record, Results, benchmarks_enabled, summary
from vlmo.bench import launches
from vlmo.bench.cost import Cost
from vlmo.timing import median_seconds


def pytest_addoption(parser):
    group = parser.getgroup("vlmo")
    group.addoption(
        "--save-results",
        nargs="?",
        const=str(ROOT / "results"),
        metavar="FOLDER",
        help="write a JSON named by GPU and commit to FOLDER, by default benchmarks/results",
    )
    group.addoption(
        "--commit", default=None, help="commit for --save-results, where git cannot tell"
    )
    group.addoption(
        "--time-limit", type=float, metavar="SECONDS", help="skip the cases that begin later"
    )


RESULTS = pytest.StashKey[Results]()


def pytest_configure(config):
    config.stash[RESULTS] = Results(config)


@pytest.fixture
def measured(request, benchmark) -> Callable[..., None]:
    """Measures ``work``, which must have run before, and records it with its labels."""
    results = request.config.stash[RESULTS]
    if results.time_is_up:
        pytest.skip(f"began after the time limit of {results.time_limit:.0f} s")

    def measure(
        work: Callable[[], object],
        device: torch.device,
        dtype: torch.dtype,
        cost: Cost,
        labels: Record,
    ) -> None:
        wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

        def timed() -> None:
            work()
            wait()

        if not benchmarks_enabled(request.config):
            benchmark.pedantic(timed)
            return
        roof = results.roof(device, dtype)
        benchmark.pedantic(timed, rounds=10, warmup_rounds=2)
        [seconds] = median_seconds([work], device)
        found = dict(
            device_ms=1e3 * seconds,
            wall_ms=1e3 * benchmark.stats.stats.median,
            tflops=cost.flops / seconds / 1e12,
            gb_per_s=cost.bytes / seconds / 1e9,
            share_of_roof=cost.flops / seconds / 1e12 / roof,
        )
        if device.type == "cuda":
            found["peak_mib"] = _peak_bytes(timed) / 2**20
            found["launches"] = launches.count(work)[0].total()
        benchmark.extra_info |= labels | found
        results.add(labels | found)

    return measure


def pytest_terminal_summary(terminalreporter, config):
    lines = summary(config.stash[RESULTS].records)
    if lines:
        terminalreporter.section("device time, and how many times as fast as a baseline")
        for line in lines:
            terminalreporter.write_line(line)


def _peak_bytes(work: Callable[[], None]) -> int:
    """Memory that a call takes beyond what is held before it."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() - before
