"""Counts the instructions of a compiled Triton kernel by what they are for, from its machine code.

A kernel consists of phases (functions whose names the caller gives), and most phases have a matrix
product. The instructions of such a phase are those before the first product (``start``), the main
loop, and those after the last product (``end``). nvdisasm names the Python line of an instruction;
a block of instructions belongs to the phase that most of its lines belong to.
"""

from __future__ import annotations

import ast
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import triton

_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_PRODUCTS = ("HGMMA", "HMMA")
_LINE = re.compile(r'\s*//## File "([^"]+)", line (\d+)')
_LABEL = re.compile(r"(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,6}\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")
_ENDS = ("BRA", "EXIT", "RET", "BRX")


class Instruction(NamedTuple):
    """An instruction: opcode, operands, whether it is predicated, and its Python line."""

    opcode: str
    operands: str
    predicated: bool
    file: str
    line: int

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]


class Block(NamedTuple):
    """Instructions that are executed one after the other, and the blocks that may follow."""

    instructions: list[Instruction]
    next: list[int]


class Phase(NamedTuple):
    """The instructions of a warp in one task of a phase with a product."""

    start: int  # before the first product
    step: float  # in a step of the main loop
    end: Counter[str]  # after the last product, by opcode


def disassemble(cubin: bytes) -> list[Block]:
    """The blocks of the only kernel in a cubin, in the order of their addresses."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_BIN / "nvdisasm"), "-gi", "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    labels: dict[str, int] = {}
    blocks: list[list[Instruction]] = [[]]
    place = ("", 0)
    for line in text.splitlines():
        if found := _LINE.match(line):
            place = found[1], int(found[2])
        elif found := _LABEL.match(line):
            if blocks[-1]:
                blocks.append([])
            labels[found[1]] = len(blocks) - 1
        elif found := _INSTRUCTION.match(line):
            opcode, operands = found[2], found[3]
            blocks[-1].append(Instruction(opcode, operands, found[1] is not None, *place))
            if opcode.split(".")[0] in _ENDS:
                blocks.append([])
    if not blocks[-1]:
        blocks.pop()
    return [Block(block, [*_followers(n, block, labels)]) for n, block in enumerate(blocks)]


def _followers(
    number: int, block: Sequence[Instruction], labels: Mapping[str, int]
) -> Iterator[int]:
    last = block[-1]
    if last.name == "BRA":
        found = re.search(r"\.L_x_\d+", last.operands)
        assert found is not None, last
        yield labels[found[0]]
    if last.name not in _ENDS or last.predicated or "," in last.operands:
        yield number + 1


def functions_of(file: Path) -> list[tuple[int, int, str]]:
    """First line, last line and name of the functions of a Python file."""
    nodes = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.FunctionDef)]
    return [(node.lineno, node.end_lineno or node.lineno, node.name) for node in nodes]


def phases(
    blocks: Sequence[Block], source: Path, steps: Mapping[str, int], products: int
) -> dict[str, Phase]:
    """The phases with products of a kernel.

    Args:
        blocks: the kernel's machine code.
        source: the Python file of its phases.
        steps: steps of the main loop in each phase, if the compiler has unrolled it.
        products: product instructions of a warp in a step.
    """
    owners = _owners(blocks, source, steps)
    found = {}
    for name in steps:
        mine = [n for n, owner in enumerate(owners) if owner == name]
        loops = [loop for loop in _loops(blocks) if _multiplies(blocks, loop) and loop <= {*mine}]
        if not any(_multiplies(blocks, [n]) for n in mine):
            continue
        inner = min(loops, key=len) if loops else set()
        found[name] = _phase([(n in inner, blocks[n]) for n in mine], steps[name], products)
    return found


def _phase(blocks: Sequence[tuple[bool, Block]], steps: int, products: int) -> Phase:
    """A phase from its blocks; each says whether it is in the main loop."""
    line = [(inside, i) for inside, block in blocks for i in block.instructions]
    places = [n for n, (_, i) in enumerate(line) if i.name in _PRODUCTS]
    first, last = places[0], places[-1]
    looped = sum(inside for inside, _ in line)
    if looped:
        in_loop = sum(inside and i.name in _PRODUCTS for inside, i in line)
        first = next(n for n, (inside, _) in enumerate(line) if inside)
        last = max(n for n, (inside, _) in enumerate(line) if inside)
        step = looped * products / in_loop
    else:
        step = (last - first + 1) / (len(places) / products)
    return Phase(first, step, Counter(i.name for _, i in line[last + 1 :]))


def _multiplies(blocks: Sequence[Block], chosen: Iterable[int]) -> bool:
    return any(i.name in _PRODUCTS for n in chosen for i in blocks[n].instructions)


def _owners(blocks: Sequence[Block], source: Path, names: Iterable[str]) -> list[str]:
    """The phase of each block, "" if it belongs to none."""
    spans = [span for span in functions_of(source) if span[2] in names]
    votes: list[str] = []
    for block in blocks:
        counts = Counter(
            name
            for i in block.instructions
            for first, last, name in spans
            if i.file.endswith(source.name) and first <= i.line <= last
        )
        votes.append(counts.most_common(1)[0][0] if counts else "")
    # A block without such lines, for example a main loop, belongs to the phase around it.
    for n, block in enumerate(blocks):
        if not votes[n] and n and votes[n - 1] and n in blocks[n - 1].next:
            votes[n] = votes[n - 1]
        if not votes[n] and _multiplies(blocks, [n]):
            votes[n] = next((vote for vote in votes[n:] if vote), "")
    return votes


def _loops(blocks: Sequence[Block]) -> Iterator[set[int]]:
    """The blocks of each loop: those between a backward branch and its target."""
    for n, block in enumerate(blocks):
        for target in block.next:
            if target <= n:
                yield set(range(target, n + 1))
