"""Reports of the benchmarks with invented numbers, and a check of their results in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from harness.models import WholeModel
from report import Record, Report


def measured(contender: str, ms: float, **changes: Any) -> Record:
    """A record of a case of the feed-forward suite, with 1 TFLOP and 10 GB per call."""
    record = dict(
        suite="moe_ffn",
        size="base",
        dtype="bfloat16",
        phase="forward",
        tokens=8192,
        split="40:197",
        contender=contender,
        device_ms=ms,
        device_ms_low=0.99 * ms,
        device_ms_high=1.01 * ms,
        wall_ms=ms + 0.01,
        calls=100,
        tflops=1e3 / ms,
        gb_per_s=1e4 / ms,
        share_of_roof=0.5,
        samples_per_s=35e3 / ms,
        peak_mib=None,
        launches=None,
        millijoules=None,
        clock_mhz=None,
        temperature_c=None,
        throttled=None,
        error=0.25,
    )
    return record | changes


def not_run(contender: str, reason: str, **changes: Any) -> Record:
    """A record of a contender without numbers."""
    record = measured(contender, 1.0)
    labels = {k: record[k] for k in ("suite", "size", "dtype", "phase", "tokens", "split")}
    return labels | {"contender": contender, "reason": reason} | changes


def report(*records: Record, **changes: Any) -> Report:
    """A report with some records, on an imaginary machine."""
    content: dict[str, Any] = dict(
        machine={"name": "Testing Unit 9", "cores": 2},
        commit="abc1234",
        command="pytest benchmarks --benchmark-enable",
        versions={"torch": "2.13.0"},
        roof={"copy_gb_per_s": 10.0, "matrix_tflops": {"bfloat16": 2.0}},
        unmeasured=[],
        records=list(records),
    )
    return Report(**(content | changes))


def wrong(problem: WholeModel, contender: str) -> list[str]:
    """Names of the results of a contender that exceed the error bound."""
    return [deviation.name for deviation in problem.check(contender) if not deviation.ok]


def assert_contenders_run(problem: WholeModel, *names: str) -> None:
    """Contenders can run, pass the accuracy check, and leave no gradient in the model."""
    assert set(names) < set(problem.contenders)
    for name in names:
        assert problem.why_not(name) is None
        assert not wrong(problem, name)
        problem.work(name)()
    assert all(parameter.grad is None for parameter in problem.model.parameters())


@contextlib.contextmanager
def float64_only() -> Iterator[None]:
    """Fail if a tensor in float64 becomes one of a narrower floating-point dtype in the block."""
    seen = []
    real = torch.Tensor.to

    def to(tensor: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        result = real(tensor, *arguments, **options)
        if tensor.dtype == torch.float64 and result.is_floating_point():
            seen.append(result.dtype)
        return result

    with (
        mock.patch.object(torch.Tensor, "to", to),
        mock.patch.object(torch.Tensor, "float", lambda tensor: to(tensor, torch.float32)),
    ):
        yield
    assert set(seen) <= {torch.float64}
