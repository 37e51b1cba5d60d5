"""A wheel built from this tree installs and imports without a compiler."""

import os
import pathlib
import subprocess
import sys
import tarfile
import zipfile

import pytest

pytestmark = pytest.mark.heavy

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
def sdist(tmp_path_factory):
    """The source distribution, which needs no build requirement but setuptools."""
    folder = tmp_path_factory.mktemp("sdist")
    build = "import setuptools.build_meta as b, sys; print(b.build_sdist(sys.argv[1]))"
    run = subprocess.run(
        [sys.executable, "-c", build, str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return folder / run.stdout.split()[-1]


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """The wheel as a user would build it: in isolation, with all kernels compiled."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([*PIP, "wheel", "-q", "--no-deps", "-w", str(folder), str(sdist)], check=True)
    (built,) = folder.glob("*.whl")
    return built


def assert_packages(names: set[str]) -> None:
    sources = {
        *("vlmo" / path.relative_to(ROOT) for path in (ROOT / "kernels").rglob("*.py")),
        *(path.relative_to(ROOT) for path in (ROOT / "vlmo").rglob("*.py")),
        *("vlmo/py.typed", "vlmo/data/digits/vocab.txt"),
    }
    assert {str(path) for path in sources} <= names
    assert "vlmo/kernels.pyi" not in names, "it would hide vlmo/kernels/ from type checkers"


def test_sdist_holds_what_a_build_takes(sdist, tmp_path):
    """The packages as a wheel gets them, and the sources of the extension."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.iterdir()
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "lib")]
    subprocess.run(command, cwd=tree, check=True)
    built = {str(path.relative_to(tmp_path / "lib")) for path in (tmp_path / "lib").rglob("*.*")}
    assert_packages(built)
    assert {name.split("/")[0] for name in built} == {"vlmo"}
    needed = {*(ROOT / "csrc").rglob("*.*"), ROOT / "CMakeLists.txt"}
    needed = {path for path in needed if "__pycache__" not in path.parts}
    assert ROOT / "csrc" / "nvrtc.py" in needed
    assert not [path for path in needed if not (tree / path.relative_to(ROOT)).is_file()]
    assert not (tree / "tests" / "sm70").exists(), "the build takes nothing of the tests"


@pytest.mark.slow
def test_wheel_holds_the_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert sum(name.startswith("vlmo/_C.") and name.endswith(".so") for name in names) == 1
    assert_packages(set(names))
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
