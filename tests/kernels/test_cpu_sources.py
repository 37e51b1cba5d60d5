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


def flags_by_instructions() -> dict[str, list[str]]:
    """Compiler flags of each instruction set, as CMakeLists.txt has them."""
    variables = dict(re.findall(r"set\((\w+) (-m[^)]*)\)", CMAKE))
    calls = re.findall(r"^ *vlmo_cpu_kernels\((\w+)([^)]*)\)", CMAKE, re.MULTILINE)
    expanded = {
        name: re.sub(r"\$\{(\w+)\}", lambda match: variables[match[1]], flags)
        for name, flags in calls
        if name != "name"
    }
    return {name: flags.split() for name, flags in expanded.items()}


def sources() -> list[str]:
    found = re.search(r"add_library\(cpu_\$\{name\} OBJECT ([^)]*)\)", CMAKE)
    assert found
    return found[1].split()


FLAGS, SOURCES = flags_by_instructions(), sources()
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


@pytest.mark.parametrize("instructions", FLAGS)
@pytest.mark.parametrize("source", SOURCES)
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
    for instructions in FLAGS if compiler == "clang++" else ["portable"]:
        skip_on_other_machines(instructions)
        compile_with(compiler, instructions, "-O0", "-c", source, "-o", str(tmp_path / "kernels.o"))


def instruction_sets() -> list:
    """The widest one in make test; they differ in little that matters here."""
    first, *others = _C.instruction_sets()
    return [first, *(pytest.param(name, marks=pytest.mark.slow) for name in others)]


# Programs that call kernels, and the files of these.
DRIVERS = {
    "attention_cpu_memory.cpp": ["attention.cpp"],
    "moe_ffn_cpu_memory.cpp": ["matmul.cpp", "rows.cpp"],
}


@pytest.mark.parametrize("instructions", instruction_sets())
@pytest.mark.parametrize("driver", DRIVERS)
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
