"""The benchmarks from the command line: measurements, files, selection, errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from report import Report, groups

ROOT = Path(__file__).parents[2]
# pytest-benchmark saves nothing where pytest-xdist names a worker.
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST_")}
# Two contenders of one tiny case, and one that is not installed.
SELECTED = "forward-30-3:4 and not backward and not compiled and (vlmo:cpu or slices or quack)"
# A plugin that makes our operation wrong.
WRONG = """
import vlmo.kernels
right = vlmo.kernels.moe_ffn
vlmo.kernels.moe_ffn = lambda *inputs, **options: 1.01 * right(*inputs, **options)
"""


def run(folder: Path, *arguments: str) -> tuple[int, str]:
    """Exit status and output of the benchmarks, with files in the folder."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--scale=smoke"]
    result = subprocess.run(
        [*command, "--benchmark-enable", f"--benchmark-storage={folder}", *arguments],
        cwd=ROOT,
        env=ENVIRONMENT | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    return result.returncode, result.stdout


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    """The folder of two runs, of which the second has a wrong operation."""
    folder = tmp_path_factory.mktemp("storage")
    (folder / "wrong.py").write_text(WRONG)
    common = ["benchmarks/bench_moe_ffn.py", "-k", SELECTED, "--benchmark-autosave", "--commit=abc"]
    status, told = run(folder, *common)
    assert status == 0, told
    assert "2 passed, 1 skipped" in told and "quack-kernels is not installed" in told
    status, told = run(folder, *common, "-p", "wrong")
    assert status == 1 and "1 failed, 1 passed, 1 skipped" in told, told
    assert "vlmo:cpu: not exact: y is off by" in told
    return folder


def test_a_file_has_times_and_everything_they_depend_on(measured):
    path = min(measured.rglob("*.json"))
    it = Report.load(path)
    assert it.machine["name"] == "cpu" and it.machine["cores"] >= 1 and it.machine["cpu"]
    assert f"instructions {it.machine['instructions']}" in it.markdown()
    assert it.commit == "abc" and {"torch", "triton", "vlmo"} <= set(it.versions)
    assert it.command.startswith("pytest -p no:cacheprovider") and "--scale=smoke" in it.command
    assert it.roof["copy_gb_per_s"] > 0 and set(it.roof["matrix_tflops"]) == {"float32"}
    assert "times mean nothing" in it.unmeasured[0]
    [group] = groups(it.records)
    assert group.title == "moe_ffn, tiny, float32, forward, tokens 30, split 3:4"
    assert {r["contender"] for r in group.records} == {"vlmo:cpu", "slices"}
    for record in group.records:
        assert record["device_ms_low"] <= record["device_ms"] <= record["device_ms_high"]
        assert record["calls"] == 3 and 0 <= record["error"] <= 1 and record["tflops"] > 0
    assert it.not_run() == ["quack-kernels is not installed: quack (1 case)"]
    # The times of pytest-benchmark are those of the calls, not of handing them over.
    [stats] = [
        b["stats"]
        for b in json.loads(path.read_text())["benchmarks"]
        if b["extra_info"]["contender"] == "slices"
    ]
    assert stats["min"] > 1e-5


def test_pytest_benchmark_compares_two_files(measured):
    result = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", "--storage", measured, "compare"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("forward-30-3:4-slices") == 2


def test_one_of_ours_that_is_not_exact_has_no_times(measured):
    it = Report.load(max(measured.rglob("*.json")))
    assert [r["contender"] for r in it.records if "device_ms" in r] == ["slices"]
    assert it.not_run()[0].startswith("not exact: y is off by")


def test_compiled_contenders_can_be_left_out(tmp_path):
    arguments = ["benchmarks", "--collect-only", "-q"]
    status, told = run(tmp_path, *arguments, "--scale=cpu", "-k", "not compiled")
    assert status == 0 and "[model-base" in told and "compiled]" not in told
    status, told = run(tmp_path, *arguments, "--scale=cpu", "-k", "compiled and model")
    assert status == 0
    names = [
        line.rpartition("-")[0].rpartition("-")[2] for line in told.splitlines() if "[" in line
    ]
    assert set(names) == {"vlmo:cpu", "official"}


def test_suites_take_turns(tmp_path):
    status, told = run(tmp_path, "benchmarks", "-k", "cpu and not compiled", "--collect-only", "-q")
    assert status == 0
    order = [line.split("[")[1].split("-")[0] for line in told.splitlines() if "[" in line]
    # The first case of each suite, then the second.
    suites = ["attention", "beit3", "integrations", "model", "moe_ffn"]
    assert order[: 2 * len(suites)] == 2 * suites
