"""Runs every parity case of the Triton kernels as PTX for each target and dtype.

    TRITON_INTERPRET=0 python benchmarks/verify_ptx.py

writes ``results/ptx.json`` and ``.md`` beside this file, and takes some 20 minutes on two cores.
These are the tests of tests/ptx/tests/test_kernels.py, including the slow ones, with their results.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests" / part) for part in ("", "kernels")]

import torch  # noqa: E402
import triton  # noqa: E402

import attention_cases  # noqa: E402
import moe_ffn_cases  # noqa: E402
from ptx.driver import INTERLEAVINGS, TARGETS, emulated  # noqa: E402
from ptx.tests.test_kernels import ATTENTION, DTYPES, MOE_FFN, PLACE  # noqa: E402
from vlmo.files import replacing  # noqa: E402

RESULTS = Path(__file__).parent / "results"
CASES: dict[str, tuple[Any, list]] = {
    "moe_ffn": (moe_ffn_cases, MOE_FFN),
    "shared_attention": (attention_cases, ATTENTION),
}


@dataclasses.dataclass
class Row:
    """A case on a target in a dtype."""

    operation: str
    target: str
    dtype: str
    case: str
    kernels: list[str]  # kernels that finished with the same result in every interleaving
    reports: list[str]
    failed: str  # the reason why the call failed or exceeded its error bound, or ""
    # For the output or gradient that is worst relative to eager PyTorch in the same dtype.
    worst: str = ""
    error: float = 0.0
    eager: float = 0.0


def run(operation: str, number: int, target: str, dtype: torch.dtype) -> Row:
    torch.set_num_threads(1)
    module, cases = CASES[operation]
    errors, failed = {}, ""
    with emulated(target) as gpu:
        try:
            errors = module.assert_parity(cases[number], dtype, PLACE)
        except Exception as error:  # any error is reported in the table
            failed = f"{type(error).__name__}: {error}"
    row = Row(
        *(operation, target, str(dtype).removeprefix("torch."), str(cases[number])),
        kernels=[launch.kernel.removesuffix("_kernel") for launch in gpu.launches],
        reports=[str(report) for report in gpu.reports],
        failed=failed,
    )
    if errors:
        row.worst = max(errors, key=lambda name: errors[name][0] / max(errors[name][1], 1e-7))
        row.error, row.eager = errors[row.worst]
    return row


def rows() -> list[Row]:
    jobs = [
        (operation, number, target, dtype)
        for operation, (_, cases) in CASES.items()
        for target, dtype, number in itertools.product(TARGETS, DTYPES, range(len(cases)))
    ]
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        return [*pool.map(run, *zip(*jobs, strict=True))]


def table(found: list[dict[str, Any]]) -> list[str]:
    """Markdown table with a line for each kernel, target and dtype."""
    groups = collections.defaultdict(list)
    for row in found:
        for kernel in row["kernels"]:
            groups[kernel, row["target"], row["dtype"]].append(row)
    lines = [
        "| kernel | target | dtype | cases | ended, equal in each interleaving | reports "
        "| largest error beside eager's |",
        "|---|---|---|--:|--:|--:|---|",
    ]
    for (kernel, target, dtype), group in sorted(groups.items()):
        good = [row for row in group if not row["failed"]]
        worst = max(good, key=lambda row: row["error"] / max(row["eager"], 1e-7))
        lines.append(
            f"| {kernel} | {target} | {dtype} | {len(group)} | {len(good)} "
            f"| {sum(len(row['reports']) for row in group)} "
            f"| {worst['error']:.1e} beside {worst['eager']:.1e} ({worst['worst']}) |"
        )
    return lines


def write(found: list[dict[str, Any]]) -> None:
    data = {"triton": triton.__version__, "interleavings": len(INTERLEAVINGS), "rows": found}
    with replacing(RESULTS / "ptx.json") as path:
        path.write_text(json.dumps(data, indent=1) + "\n")
    wrong = [row for row in found if row["failed"] or row["reports"]]
    text = [
        "# The parity cases as PTX",
        "",
        f"By `benchmarks/verify_ptx.py`, Triton {data['triton']}, tiles of the tables. Each launch",
        f"runs in {data['interleavings']} interleavings of one to three resident CTAs. Errors are",
        "relative to the largest value, against float64: of the result or gradient that is worst",
        "beside eager PyTorch in the same dtype, whichever kernel of the operation made it.",
        "",
        *table(found),
        "",
        *(f"* {row['case']}, {row['target']}, {row['dtype']}: {row['failed']}" for row in wrong),
        *([] if wrong else ["No case has failed, and there is no report."]),
    ]
    with replacing(RESULTS / "ptx.md") as path:
        path.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    write([dataclasses.asdict(row) for row in rows()])
