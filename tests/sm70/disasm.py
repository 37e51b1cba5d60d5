"""Disassemble a cubin with cuobjdump and parse the listing.

sm_70 needs cuobjdump and nvdisasm older than 13.0. They are taken from $SM70_CUOBJDUMP_DIR if it is
set; otherwise they are extracted from the Triton 3.6.0 wheel, which ships version 12.8 (downloaded
once with pip; only these two programs are kept in the cache).

    python -m sm70.disasm kernel.cubin [kernel name]
"""

import argparse
import functools
import hashlib
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass, field

from .cache import cache_dir

TRITON = "triton==3.6.0"
TOOLS = ("cuobjdump", "nvdisasm")
PT = 7  # predicate register that is always true


class DisassemblerError(RuntimeError):
    """There is no usable cuobjdump, or it failed."""


@dataclass
class Control:
    """Scheduling fields of a 128-bit Volta instruction."""

    stall: int  # cycles before the next instruction of this warp
    yield_flag: int
    write_barrier: int  # scoreboard set when the result is written (7: none)
    read_barrier: int  # scoreboard set when the sources are read (7: none)
    wait: int  # mask of scoreboards to wait for
    reuse: int


@dataclass
class Instruction:
    """One SASS instruction."""

    pc: int
    text: str
    low: int  # the two halves of the 128-bit encoding
    high: int
    op: str = ""
    mods: list = field(default_factory=list)
    operands: list = field(default_factory=list)
    guard: int = PT
    guard_negated: bool = False

    @property
    def control(self) -> Control:
        c = (self.high >> 41) & 0x1FFFFF
        return Control(c & 15, c >> 4 & 1, c >> 5 & 7, c >> 8 & 7, c >> 11 & 63, c >> 17 & 15)

    @property
    def immediate(self) -> int:
        """The 32-bit immediate field."""
        return self.low >> 32 & 0xFFFFFFFF

    @property
    def target(self) -> int:
        """Destination of a branch or call (absolute, as printed by the disassembler)."""
        address = re.search(r"0x([0-9a-f]+)", self.operands[-1])
        assert address, self.text
        return int(address.group(1), 16)

    @property
    def access_bytes(self) -> int:
        """Bytes per lane of a memory instruction."""
        for mod, size in (
            ("128", 16),
            ("64", 8),
            ("F64", 8),
            ("S64", 8),
            ("U16", 2),
            ("S16", 2),
            ("U8", 1),
            ("S8", 1),
        ):
            if mod in self.mods:
                return size
        return 4


def parse_instruction(pc, text, low, high) -> Instruction:
    """Parse the text of one instruction into guard, opcode, modifiers and operands."""
    inst = Instruction(pc, text, low, high)
    if m := re.match(r"@(!?)P(\d|T)\s+(.*)", text):
        inst.guard_negated = m.group(1) == "!"
        inst.guard = PT if m.group(2) == "T" else int(m.group(2))
        text = m.group(3)
    head, _, tail = text.replace("] [", "][").partition(" ")
    inst.op, *inst.mods = head.split(".")
    inst.operands = (
        [x.strip().replace(".reuse", "") for x in tail.split(",")] if tail.strip() else []
    )
    if inst.op in ("RET", "BRX") and inst.operands:  # register and offset are separated by a space
        inst.operands = inst.operands[0].split()
    return inst


def parse_listing(listing: str) -> dict:
    """{kernel name: [Instruction]} from the output of `cuobjdump -sass`."""
    functions: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    lines = iter(listing.splitlines())
    for line in lines:
        if m := re.search(r"Function : (\S+)", line):
            current = functions.setdefault(m.group(1), [])
        elif m := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s+/\* 0x([0-9a-f]{16}) \*/", line):
            second = re.search(r"/\* 0x([0-9a-f]{16}) \*/", next(lines))
            assert second, line
            current.append(
                parse_instruction(
                    int(m.group(1), 16),
                    m.group(2).strip(),
                    int(m.group(3), 16),
                    int(second.group(1), 16),
                )
            )
    return functions


def extract_from_wheel(wheel, folder) -> None:
    """Extract cuobjdump and nvdisasm from a Triton wheel."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        members = {os.path.basename(x): x for x in archive.namelist() if "/nvidia/bin/" in x}
        for tool in TOOLS:
            if tool not in members:
                raise DisassemblerError(f"{os.path.basename(wheel)} holds no {tool}")
            temporary = folder / f"{tool}.{os.getpid()}.tmp"
            temporary.write_bytes(archive.read(members[tool]))
            temporary.chmod(0o755)
            os.replace(temporary, folder / tool)


def find_tools() -> pathlib.Path:
    """Folder with a cuobjdump and an nvdisasm that can decode sm_70."""
    configured = os.environ.get("SM70_CUOBJDUMP_DIR")
    if configured:
        missing = [t for t in TOOLS if not (pathlib.Path(configured) / t).exists()]
        if missing:
            raise DisassemblerError(
                f"SM70_CUOBJDUMP_DIR is set but has no {' and no '.join(missing)}"
            )
        return pathlib.Path(configured)
    folder = cache_dir() / "tools-12.8"
    if all((folder / t).exists() for t in TOOLS):
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            TRITON,
            "--no-deps",
            "--only-binary=:all:",
            "-d",
            scratch,
        ]
        result = subprocess.run(command, capture_output=True, text=True)
        wheels = list(pathlib.Path(scratch).glob("triton-*.whl"))
        if result.returncode or not wheels:
            raise DisassemblerError(
                f"cannot get cuobjdump 12.8: `pip download {TRITON} --no-deps` failed.\n"
                f"{result.stderr.strip()}\n"
                "Set SM70_CUOBJDUMP_DIR to a folder with cuobjdump and nvdisasm of CUDA 12.x."
            )
        extract_from_wheel(wheels[0], folder)
    return folder


@functools.lru_cache(maxsize=16)
def disassemble(image: bytes) -> dict:
    """{kernel name: [Instruction]} of a cubin; listings are cached by content.

    Callers share the returned object and must not modify it.
    """
    cached = cache_dir() / f"sass-{hashlib.sha256(image).hexdigest()[:20]}.txt"
    if cached.exists():
        return parse_listing(cached.read_text())
    tools = find_tools()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        environment = dict(os.environ, PATH=f"{tools}{os.pathsep}{os.environ.get('PATH', '')}")
        result = subprocess.run(
            [str(tools / "cuobjdump"), "-sass", file.name],
            capture_output=True,
            text=True,
            env=environment,
        )
    functions = parse_listing(result.stdout)
    if result.returncode or not functions:
        message = (result.stderr or result.stdout).strip() or "no code found"
        raise DisassemblerError(
            f"cuobjdump failed: {message}\n(sm_70 needs cuobjdump/nvdisasm older than 13.0)"
        )
    temporary = cached.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(result.stdout)
    os.replace(temporary, cached)
    return functions


def _mark(scoreboard):
    return "-" if scoreboard == 7 else str(scoreboard)


def main():
    parser = argparse.ArgumentParser(
        prog="python -m sm70.disasm",
        description="Print SASS with the control fields of each instruction.",
    )
    parser.add_argument("cubin", type=pathlib.Path)
    parser.add_argument("kernel", nargs="?")
    args = parser.parse_args()
    for name, instructions in disassemble(args.cubin.read_bytes()).items():
        if args.kernel and name != args.kernel:
            continue
        print(f"{name}:   (stall, write/read scoreboard, wait mask)")
        for inst in instructions:
            c = inst.control
            print(
                f"  {inst.pc:05x}  S{c.stall:<2d} W{_mark(c.write_barrier)} "
                f"R{_mark(c.read_barrier)} {c.wait:06b}  {inst.text}"
            )


if __name__ == "__main__":
    main()
