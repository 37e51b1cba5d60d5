"""Reports of the benchmarks with invented numbers."""

from __future__ import annotations

from typing import Any

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
