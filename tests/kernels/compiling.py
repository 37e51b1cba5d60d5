"""Runs compiled.py and compiled_attention.py, with the installed Triton or with another release.

``make tritons`` unpacks the oldest and the newest supported release under build/triton;
tests/kernels/triton_releases lists their versions. One of them takes precedence over the installed
release while a script runs.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest
import triton
from packaging.requirements import Requirement

TESTS = Path(__file__).parent
UNPACKED = TESTS.parents[1] / "build" / "triton" / str(sys.implementation.cache_tag)
RELEASES = ("oldest", "newest")
# In make test the installed release, and types with the oldest; the others in make test-all.
WITH_INSTALLED = ("installed", *(pytest.param(r, marks=pytest.mark.slow) for r in RELEASES))
FOR_TYPES = ("oldest", pytest.param("newest", marks=pytest.mark.slow))
KINDS = ("sm_80", "sm_90", "sm_100")  # a GPU of each kind of tensor-core instruction


def version_of(release: str) -> str:
    """The version that tests/kernels/triton_releases specifies for this Python."""
    lines = (TESTS / "triton_releases" / f"{release}.txt").read_text().splitlines()
    (wanted,) = [r for r in map(Requirement, lines) if r.marker is None or r.marker.evaluate()]
    (specifier,) = wanted.specifier
    assert (wanted.name, specifier.operator) == ("triton", "==")
    return specifier.version


def compiled(script: str, *jobs: str, release: str = "installed") -> list[dict]:
    """The output of a script for its jobs, from a process in which Triton compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    wanted = triton.__version__
    if release != "installed":
        wanted, folder = version_of(release), UNPACKED / release
        found = [d.version for d in distributions(name="triton", path=[str(folder)])]
        assert found == [wanted], f"{folder} holds Triton {found}, not {wanted}: run `make tritons`"
        paths = [str(folder), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    command = [sys.executable, str(TESTS / script), *jobs]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, f"Triton {wanted}: {run.stderr[-4000:]}"
    reports = [json.loads(line) for line in run.stdout.splitlines()]
    assert {report["triton"] for report in reports} == {wanted}
    return reports


def assert_no_spills(report: dict) -> None:
    """Main loops do not spill, and what surrounds them spills little: two dozen numbers a thread.

    Tiles are chosen for Triton 3.7.1; other releases may spill more.
    """
    if report["triton"] == "3.7.1":
        assert report["local_in_loops"] == 0, report
        assert report["local_bytes"] <= 96, report
    else:
        assert report["local_bytes"] <= 160, report
