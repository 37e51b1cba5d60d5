"""The C++ of the CPU kernels, compiled for each instruction set: warnings, symbols, sanitizers."""

import functools
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from vlmo import _C

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).parents[2]
CMAKE = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
COMPILER = os.environ.get("CXX", "g++")


def builds() -> dict[str, tuple[list[str], list[str]]]:
    """Sources and compiler flags of each instruction set, as CMakeLists.txt has them."""
    variables = dict(re.findall(r"set\((\w+) ((?:-m|csrc)[^)]*)\)", CMAKE))
    calls = re.findall(r"^ *vlmo_cpu_kernels\((\w+) ([^\s)]+)([^)]*)\)", CMAKE, re.MULTILINE)

    def words(text: str) -> list[str]:
        while "${" in text:
            text = re.sub(r"\$\{(\w+)\}", lambda match: variables[match[1]], text)
        return text.replace('"', "").split()

    return {name: (words(files), words(flags)) for name, files, flags in calls if name != "name"}


BUILDS = builds()
FLAGS = {instructions: flags for instructions, (_, flags) in BUILDS.items()}
SOURCES = BUILDS["portable"][0]
COMPILED = [
    (source, instructions) for instructions, (files, _) in BUILDS.items() for source in files
]
# Sources, and the name of the table of kernels that each defines.
TABLES = {source: Path(source).stem for source in SOURCES}


def test_what_is_compiled_is_found():
    assert {*_C.instruction_sets()} <= {*FLAGS} and "portable" in FLAGS
    assert FLAGS["portable"] == [] and "-mavx512bf16" in FLAGS["avx512_bf16"]
    assert {f"csrc/cpu/{name}" for names in DRIVERS.values() for name in names} == {*SOURCES}


@functools.cache
def require(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"there is no {program} on PATH")
    return path


def compile_with(compiler: str, instructions: str, *arguments: str) -> None:
    command = [require(compiler), "-std=c++17", "-Wall", "-Wextra", "-Werror", "-Icsrc"]
    if "clang" not in compiler:
        command += ["-Wno-psabi"]  # a note, that vectors are passed differently by older releases
    command += [f"-DVLMO_INSTRUCTIONS={instructions}", *FLAGS[instructions], *arguments]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def skip_on_other_machines(instructions: str) -> None:
    if instructions != "portable" and platform.machine() != "x86_64":
        pytest.skip(f"{instructions} is for x86")


@pytest.mark.parametrize(("source", "instructions"), COMPILED)
def test_an_object_defines_its_table_alone(source, instructions, tmp_path):
    """No function that the linker could take for another object's, of fewer instructions.

    Without optimisation, so that functions which would be inlined are in the object as well.
    """
    skip_on_other_machines(instructions)
    compiled = tmp_path / "kernels.o"
    compile_with(COMPILER, instructions, "-O0", "-c", source, "-o", str(compiled))
    command = [require("nm"), "--demangle", "--defined-only", str(compiled)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    symbols = [line.split(maxsplit=2)[1:] for line in listing.splitlines()]
    # A lower-case letter is a local symbol, except for weak and unique ones.
    shared = {name for kind, name in symbols if kind.isupper() or kind in "uvw"}
    assert shared == {f"vlmo::{instructions}::{TABLES[source]}"}


@pytest.mark.parametrize("compiler", ["clang++", "aarch64-linux-gnu-g++"])
@pytest.mark.parametrize("source", SOURCES)
def test_other_compilers(source, compiler, tmp_path):
    for file, instructions in COMPILED:
        if file != source or (compiler != "clang++" and instructions != "portable"):
            continue
        skip_on_other_machines(instructions)
        compile_with(compiler, instructions, "-O0", "-c", source, "-o", str(tmp_path / "kernels.o"))


# Programs that call kernels, and the files of these.
DRIVERS = {
    "attention_cpu_memory.cpp": ["attention.cpp"],
    "moe_ffn_cpu_memory.cpp": ["matmul.cpp", "rows.cpp"],
}


def driven() -> list:
    """Drivers and instruction sets; of these the widest of each kind, as they differ in little."""
    pairs = []
    for driver, files in DRIVERS.items():
        kinds = set()
        for name in _C.instruction_sets():
            if (f"csrc/cpu/{files[0]}", name) not in COMPILED:
                continue
            kind = name if name.endswith("_bf16") else "all types"
            marks = [pytest.mark.slow] if kind in kinds else []
            pairs.append(pytest.param(driver, name, marks=marks))
            kinds.add(kind)
    return pairs


@pytest.mark.parametrize(("driver", "instructions"), driven())
def test_kernels_stay_inside_their_tensors(driver, instructions, tmp_path):
    program = tmp_path / "driver"
    compile_with(
        COMPILER,
        instructions,
        *("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
        "-Wno-maybe-uninitialized",  # GCC 12: of its own headers
        *(f"csrc/cpu/{name}" for name in DRIVERS[driver]),
        *(f"tests/kernels/{driver}", "-o", str(program)),
    )
    process = subprocess.run([program], capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
