"""Which compiled kernel a launch runs, with every release of Triton that is supported."""

import pytest

from compiling import RELEASES, compiled

pytestmark = pytest.mark.heavy


@pytest.mark.parametrize("release", ["installed", *RELEASES])
def test_launches_are_those_of_triton(release):
    """tests/kernels/launching.py, which says what it checks."""
    (report,) = compiled("launching.py", release=release)
    assert report["launches"] > 200
