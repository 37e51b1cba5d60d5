"""The releases of Triton documented as supported are those that are tested."""

import re

import pytest
import torch
import triton
from packaging.requirements import Requirement
from packaging.version import Version

import compiling
from compiling import RELEASES, TESTS, compiled, version_of
from vlmo.kernels._backends import triton as triton_target


def named(release: str) -> list[Version]:
    """The versions in a file of tests/kernels/triton_releases."""
    text = (TESTS / "triton_releases" / f"{release}.txt").read_text()
    return [Version(s.version) for line in text.splitlines() for s in Requirement(line).specifier]


def test_the_bound_is_the_oldest_that_is_compiled_with():
    project = (TESTS.parents[1] / "pyproject.toml").read_text()
    (bound,) = re.findall(r'"triton>=(\d+)\.(\d+)"', project)
    assert min(named("oldest")).release[:2] == tuple(map(int, bound))
    assert tuple(map(int, bound)) == triton_target._OLDEST_TRITON


def test_the_installed_release_is_between_them():
    oldest, newest = (Version(version_of(release)) for release in RELEASES)
    assert oldest <= Version(triton.__version__) <= newest


@pytest.mark.parametrize(
    ("found", "reason"),
    [(None, "Triton is not installed."), ("3.3.1", "Triton 3.3.1 is older than 3.4.")],
)
def test_reasons(found, reason, monkeypatch):
    monkeypatch.setattr(triton_target, "_TRITON", found)
    assert triton_target.why_not(torch.device("cuda"), torch.float16) == reason


@pytest.mark.parametrize("release", RELEASES)
def test_a_release_that_is_not_there_is_no_reason_to_skip(release, tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "UNPACKED", tmp_path)
    with pytest.raises(AssertionError, match=r"holds Triton \[\], not 3\..*: run `make tritons`"):
        compiled("compiled.py", "types:sm_90", release=release)
