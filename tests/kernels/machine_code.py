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
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import triton

_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_PRODUCTS = ("HGMMA", "HMMA", "UTCHMMA")
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
        return parse(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def parse(text: str) -> list[Block]:
    """The blocks of the only kernel in nvdisasm's output."""
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
    blocks: Sequence[Block], source: Path, wanted: Mapping[str, Sequence[str]], products: int
) -> dict[str, Phase]:
    """The phases with products of a kernel.

    Args:
        blocks: the kernel's machine code.
        source: the Python file of its phases.
        wanted: the names of the functions of each phase.
        products: product instructions of a warp in a step of a main loop.
    """
    loops = [*_loops(blocks)]
    owners = _owners(blocks, source, {n for functions in wanted.values() for n in functions})
    found = {}
    for name, functions in wanted.items():
        mine = {n for n, owner in enumerate(owners) if owner in functions}
        inside = min(
            (loop for loop in loops if _is_main(blocks, loop, mine)), key=len, default=set()
        )
        # Loops of one block without a product, for example over partial tiles, are rarely entered.
        rare = {n for n in mine if n in blocks[n].next} - inside
        # The compiler may have put a part of the loop, such as a wait, behind the phase.
        place = min(inside, default=0)
        order = sorted(mine - rare | inside, key=lambda n: (place if n in inside else n, n))
        line = [(n in inside, i) for n in order for i in blocks[n].instructions]
        found[name] = _phase(line, products)
    return found


def _is_main(blocks: Sequence[Block], loop: set[int], mine: Container[int]) -> bool:
    """Whether a loop has products, all of one phase; the loop over tickets has everything."""
    products = [n for n in loop if _multiplies(blocks, [n])]
    return bool(products) and not _takes_tickets(blocks, loop) and all(n in mine for n in products)


def _takes_tickets(blocks: Sequence[Block], loop: Iterable[int]) -> bool:
    return any(i.name == "ATOMG" for n in loop for i in blocks[n].instructions)


def loop_of(blocks: Sequence[Block]) -> list[Instruction]:
    """The instructions of all main loops, also of those that the compiler has unrolled.

    Without tensor cores, a main loop is one with at least 64 multiply-adds. The loop over tickets,
    which is around all others, is none.
    """
    found: list[Instruction] = []
    loops = [*_loops(blocks)]
    seen: set[int] = set()
    for n, block in enumerate(blocks):
        with_tensor_cores = _multiplies(blocks, [n])
        scalar = sum(i.name in ("FFMA", "FFMA2") for i in block.instructions)
        if n in seen or not (with_tensor_cores or scalar >= 64):
            continue
        inner = min((loop for loop in loops if n in loop), key=len, default=set())
        if inner and not _takes_tickets(blocks, inner):
            seen |= inner
            found += [i for k in sorted(inner) for i in blocks[k].instructions]
        elif with_tensor_cores:
            places = [k for k, i in enumerate(block.instructions) if i.name in _PRODUCTS]
            found += block.instructions[places[0] : places[-1] + 1]
    return found


def _phase(line: Sequence[tuple[bool, Instruction]], products: int) -> Phase:
    """A phase from its instructions; each says whether it is in a loop."""
    places = [n for n, (_, i) in enumerate(line) if i.name in _PRODUCTS]
    looped = [n for n, (inside, _) in enumerate(line) if inside]
    if looped:
        first, last = looped[0], looped[-1]
        in_loop = sum(inside and i.name in _PRODUCTS for inside, i in line)
        step = len(looped) * products / in_loop
    else:
        first, last = places[0], places[-1]
        step = (last - first + 1) * products / len(places)
    return Phase(first, step, Counter(i.name for _, i in line[last + 1 :]))


def _multiplies(blocks: Sequence[Block], chosen: Iterable[int]) -> bool:
    return any(i.name in _PRODUCTS for n in chosen for i in blocks[n].instructions)


def _owners(blocks: Sequence[Block], source: Path, wanted: Container[str]) -> list[str]:
    """The function of ``source`` that each block belongs to, "" if to none."""
    spans = functions_of(source)
    owners: list[str] = []
    for n, block in enumerate(blocks):
        counts = Counter(
            name
            for i in block.instructions
            if i.file.endswith(f"/{source.parent.name}/{source.name}")
            for first, last, name in spans
            if first <= i.line <= last
        )
        # Blocks may have moved lines of the kernel itself.
        owner = max(counts, key=lambda name: (name in wanted, counts[name])) if counts else ""
        if not owner and n and n in blocks[n - 1].next:
            owner = owners[-1]  # for example a main loop
        owners.append(owner)
    following = ""
    for n in reversed(range(len(blocks))):
        multiplies = _multiplies(blocks, [n])
        if multiplies and owners[n] not in wanted and n + 1 < len(blocks):
            owners[n] = owners[n + 1]
        if multiplies:
            following = owners[n]
        elif any(i.name == "UTMALDG" for i in blocks[n].instructions):
            owners[n] = following  # copies by tensor descriptors, before the first step
    return owners


def _loops(blocks: Sequence[Block]) -> Iterator[set[int]]:
    """The blocks of each loop: those that reach a branch back to its first block.

    The compiler puts what it expects to be rare behind the rest of the code, so that not every
    branch backward closes a loop, and not every block of a loop is between its ends.
    """
    before: list[list[int]] = [[] for _ in blocks]
    for n, block in enumerate(blocks):
        for target in block.next:
            if target < len(blocks):
                before[target].append(n)
    for n, block in enumerate(blocks):
        for first in block.next:
            if first <= n:
                body = _reaching(n, first, before)
                if first == 0 or 0 not in body:  # else control enters the loop elsewhere, too
                    yield body


def _reaching(last: int, first: int, before: Sequence[Sequence[int]]) -> set[int]:
    """The blocks from which control reaches ``last`` without passing ``first``, and ``first``."""
    body, open_ends = {first, last}, [last] if last != first else []
    while open_ends:
        for n in before[open_ends.pop()]:
            if n not in body:
                body.add(n)
                open_ends.append(n)
    return body
