"""The records of a session of benchmarks: what is written, and what is told at the end."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmo.files import replacing
from vlmo.kernels.target import describe
from vlmo.machine import versions
from vlmo.timing import median_seconds

ROOT = Path(__file__).parent
Record = dict[str, Any]
# What the times of one case are told beside.
BASELINES = ("dense-compiled", "slices")


def benchmarks_enabled(config: pytest.Config) -> bool:
    """Whether to measure; else benchmarks are smoke tests."""
    if config.getoption("benchmark_disable") and not config.getoption("benchmark_enable"):
        return False
    return not hasattr(config, "workerinput")  # pytest-xdist


class Results:
    """The records of a session; each is on disk as soon as it is there."""

    def __init__(self, config: pytest.Config) -> None:
        self.started = time.monotonic()
        self.time_limit = config.getoption("--time-limit", None)
        self.folder = config.getoption("--save-results", None)
        self.commit = config.getoption("--commit", None)
        self.records: list[Record] = []
        self.roofs: dict[str, float] = {}

    @property
    def time_is_up(self) -> bool:
        return self.time_limit is not None and time.monotonic() - self.started > self.time_limit

    def roof(self, device: torch.device, dtype: torch.dtype) -> float:
        """TFLOP/s of a large matrix product, measured once."""
        name = str(dtype).removeprefix("torch.")
        if name not in self.roofs:
            n = 8192 if device.type == "cuda" else 256
            a, b, c = (torch.ones(n, n, dtype=dtype, device=device).normal_() for _ in range(3))
            work = functools.partial(torch.mm, a, b, out=c)
            work()
            [seconds] = median_seconds([work], device)
            self.roofs[name] = 2 * n**3 / seconds / 1e12
        return self.roofs[name]

    def add(self, record: Record) -> None:
        self.records.append(record)
        if self.folder is None:
            return
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        commit = self.commit or _commit()
        gpu = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        content = dict(
            gpu=describe(device),
            commit=commit,
            versions=versions() | {"cuda": torch.version.cuda},
            roof_tflops=self.roofs,
            records=self.records,
        )
        with replacing(Path(self.folder) / f"{name}-{commit}.json") as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def summary(records: list[Record]) -> list[str]:
    """One line for each record, with its speed as a multiple of each baseline's."""
    lines: list[str] = []
    told = None
    ratios = "".join(f"{'/ ' + name:>17}" for name in BASELINES)
    for record in records:
        case = _case(record)
        if case != told:
            told = case
            lines.append(f"{case:<58}{'ms':>10}{'TFLOP/s':>9}{'of roof':>9}{ratios}")
        line = f"  {record['contender']:<56}{record['device_ms']:>10.3f}{record['tflops']:>9.1f}"
        line += f"{record['share_of_roof']:>9.0%}"
        for name in BASELINES:
            other = _baseline(records, record, name)
            line += f"{other / record['device_ms']:>16.2f}x" if other else f"{'-':>17}"
        lines.append(line)
    return lines


def _baseline(records: list[Record], record: Record, name: str) -> float | None:
    """Milliseconds of the baseline in the same case; a dense one has only one split."""
    for other in records:
        if other["contender"] == name and _case(other, name) == _case(record, name):
            return other["device_ms"]
    return None


def _case(record: Record, baseline: str = "") -> str:
    names = ["operation", "phase", "dtype", "size", "tokens", "split"]
    if baseline.startswith("dense"):
        names.remove("split")
    return " ".join(str(record[name]) for name in names)


@functools.cache
def _commit() -> str:
    """Short hash, marked if tracked files differ from it; "unknown" where git cannot tell."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
