"""The releases of Triton that are said to be supported are those that are tested."""

import re

import pytest
import triton
from packaging.requirements import Requirement
from packaging.version import Version

import compiling
from compiling import RELEASES, TESTS, compiled, version_of
from vlmo.kernels import triton_target


def named(release: str) -> list[Version]:
    """The versions in a file of tests/triton_releases."""
    text = (TESTS / "triton_releases" / f"{release}.txt").read_text()
    return [Version(s.version) for line in text.splitlines() for s in Requirement(line).specifier]


def test_the_bound_is_the_oldest_that_is_compiled_with():
    (bound,) = re.findall(r'"triton>=(\d+)\.(\d+)"', (TESTS.parent / "pyproject.toml").read_text())
    assert min(named("oldest")).release[:2] == tuple(map(int, bound))
    assert tuple(map(int, bound)) == triton_target._OLDEST_TRITON


def test_the_installed_release_is_between_them():
    oldest, newest = (Version(version_of(release)) for release in RELEASES)
    assert oldest <= Version(triton.__version__) <= newest


@pytest.mark.parametrize("release", RELEASES)
def test_a_release_that_is_not_there_is_no_reason_to_skip(release, tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "UNPACKED", tmp_path)
    with pytest.raises(AssertionError, match=r"holds Triton \[\], not 3\..*: run `make tritons`"):
        compiled("compiled.py", "types:sm_90", release=release)
