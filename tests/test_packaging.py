"""A wheel built from this tree installs and imports where there is no compiler."""

import os
import pathlib
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]

USE_WHEEL = """
import pathlib, shutil, sys
import vlmo
from vlmo import _C
from vlmo.kernels import moe_ffn

assert pathlib.Path(vlmo.__file__).is_relative_to(sys.argv[1]), vlmo.__file__
assert pathlib.Path(_C.__file__).is_relative_to(sys.argv[1]), _C.__file__
assert not any(map(shutil.which, ("g++", "gcc", "c++", "cc", "cmake", "ninja", "nvcc")))
assert ("routing_index", "sm_70") in _C.cubins(), _C.cubins()
assert _C.image("routing_index", "sm_75").startswith(b"\\x7fELF")
assert callable(moe_ffn)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel as a user would build it, by way of the source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    # The sdist needs no build requirement but setuptools; `pip wheel` isolates the rest.
    build = "import setuptools.build_meta as b, sys; print(b.build_sdist(sys.argv[1]))"
    run = subprocess.run(
        [sys.executable, "-c", build, str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    sdist = folder / run.stdout.split()[-1]
    subprocess.run([*PIP, "wheel", "-q", "--no-deps", "-w", str(folder), str(sdist)], check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_wheel_holds_the_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert sum(name.startswith("vlmo/_C.") and name.endswith(".so") for name in names) == 1
    sources = {
        *("vlmo" / path.relative_to(ROOT) for path in (ROOT / "kernels").rglob("*.py")),
        *(path.relative_to(ROOT) for path in (ROOT / "vlmo").rglob("*.py")),
    }
    assert {str(path) for path in sources} <= set(names)
    assert "vlmo/kernels.pyi" not in names, "it would hide vlmo/kernels/ from type checkers"
    assert {name.split("/")[0] for name in names} == {"vlmo", "vlmo-0.1.0.dist-info"}


@pytest.mark.slow
def test_wheel_runs_without_compilers(wheel, tmp_path):
    site, elsewhere, empty = (tmp_path / name for name in ("site", "elsewhere", "empty"))
    elsewhere.mkdir()
    empty.mkdir()
    environment = {**os.environ, "PATH": str(empty)}
    install = [*PIP, "install", "-q", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, env=environment, check=True)
    environment["PYTHONPATH"] = str(site)
    command = [sys.executable, "-c", USE_WHEEL, str(site)]
    subprocess.run(command, cwd=elsewhere, env=environment, check=True)


def test_kernels_refuses_another_name():
    command = [sys.executable, "-c", "import kernels"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "this package is vlmo.kernels, not 'kernels'" in run.stderr
