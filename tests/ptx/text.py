"""Parser for PTX text: statements with their operands, registers, parameters, labels."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

WIDTHS = {"pred": 0}  # bytes of each type
WIDTHS |= dict.fromkeys(("b8", "s8", "u8"), 1)
WIDTHS |= dict.fromkeys(("b16", "u16", "s16", "f16", "bf16"), 2)
WIDTHS |= dict.fromkeys(("b32", "u32", "s32", "f32", "f16x2", "bf16x2", "tf32"), 4)
WIDTHS |= dict.fromkeys(("b64", "u64", "s64", "f64", "f32x2"), 8)


class Unsupported(Exception):
    """PTX that this package does not support."""


class Statement(NamedTuple):
    """One instruction."""

    opcode: str
    operands: tuple[str, ...]
    guard: str | None  # the predicate that guards its execution
    negated: bool
    line: int  # its line in the PTX
    source: str  # file and line of its Python source
    text: str

    @property
    def parts(self) -> list[str]:
        return self.opcode.split(".")


class Parameter(NamedTuple):
    name: str
    offset: int
    type: str

    @property
    def width(self) -> int:
        return WIDTHS[self.type]


class Kernel(NamedTuple):
    """The only entry of a PTX module, as Triton emits it."""

    name: str
    threads: int
    parameters: list[Parameter]
    registers: dict[str, int]  # prefix of their names: bytes
    statements: list[Statement]
    labels: dict[str, int]  # the statement after each

    @property
    def parameter_bytes(self) -> int:
        last = self.parameters[-1]
        return last.offset + last.width


def split(text: str) -> list[str]:
    """Split at the commas that are not within brackets."""
    items, depth = [""], 0
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            items.append("")
        else:
            items[-1] += character
    return [item.strip() for item in items if item.strip()]


def in_braces(text: str) -> list[str]:
    """The registers of a list in braces, or the only register."""
    return split(text.strip().removeprefix("{").removesuffix("}"))


def parse(text: str) -> Kernel:
    """Parse a module with one entry.

    Raises:
        Unsupported: it has a construct that Triton did not emit when this was written.
    """
    entry = re.search(r"\.visible \.entry (\w+)\((.*?)\)\s*(.*?)\{", text, re.S)
    if entry is None:
        raise Unsupported("a module without an entry")
    name, parameters, directives = entry.groups()
    threads = re.search(r"\.reqntid (\d+)", directives)
    if threads is None:
        raise Unsupported("an entry without .reqntid")
    end = re.search(r"^\$L__func_end\d+", text, re.M)
    body = text[entry.end() : end.start() if end else None]
    body = re.split(r"^\s*\.section", body, maxsplit=1, flags=re.M)[0]
    registers, statements, labels = _body(
        _without_tables(_told_apart(body)),
        first_line=text[: entry.end()].count("\n") + 1,
        files=_files(text),
    )
    return Kernel(name, int(threads[1]), _parameters(parameters), registers, statements, labels)


def _told_apart(body: str) -> str:
    """Make names that are declared within braces unique: several blocks may declare the same name.

    Triton emits such blocks to wait for an mbarrier.
    """
    count = 0

    def rename(block: re.Match[str]) -> str:
        nonlocal count
        count, text = count + 1, block[0]
        for register in re.findall(r"^\s*\.reg \.\w+ (\w+);", text, re.M):
            text = re.sub(rf"(?<![\w.%$]){register}\b", f"%{register}_{count}", text)
        for label in re.findall(r"^\s*(\w+):", text, re.M):
            text = re.sub(rf"(?<![\w.%$]){label}\b", f"${label}_{count}", text)
        return text

    return re.sub(r"^\{\s*?\n.*?^\}", rename, body, flags=re.M | re.S)


def _without_tables(body: str) -> str:
    """Replace indexed branches by comparisons of the index with each number; keeps line numbers."""
    count = 0

    def compare(table: re.Match[str]) -> str:
        nonlocal count
        count += 1
        targets, index, equal = re.split(r",\s*", table[2].strip()), table[3], f"%indexed_{count}"
        branches = [
            f"setp.eq.u32 {equal}, {index}, {number}; @{equal} bra {target};"
            for number, target in enumerate(targets[:-1])
        ]
        lines = [f".reg .pred {equal};", f"{' '.join(branches)} bra {targets[-1]};"]
        return "\n".join(lines + [""] * (table[0].count("\n") - 1))

    branch = r"(\$\w+):\s*\.branchtargets\s+([^;]*);\s*brx\.idx\s+(%\w+),\s*\1;"
    return re.sub(branch, compare, body)


def _files(text: str) -> dict[str, str]:
    found = re.findall(r'\.file\s+(\d+)\s+"([^"]+)"', text)
    return {number: os.path.basename(path) for number, path in found}


def _parameters(text: str) -> list[Parameter]:
    parameters, offset = [], 0
    for declaration in filter(None, map(str.strip, text.split(",\n"))):
        found = re.match(r"\.param \.(\w+).*?(\w+)$", declaration, re.S)
        if found is None:
            raise Unsupported(declaration)
        width = WIDTHS[found[1]]
        offset = -(-offset // width) * width
        parameters.append(Parameter(found[2], offset, found[1]))
        offset += width
    return parameters


def _body(body: str, first_line: int, files: dict[str, str]):
    registers: dict[str, int] = {}
    statements: list[Statement] = []
    labels: dict[str, int] = {}
    source = ""
    for number, line in enumerate(body.split("\n"), first_line):
        line = re.sub(r"//.*", "", line).strip()
        if line.startswith(".loc"):
            _, file, row, *_ = line.split()
            source = f"{files.get(file, file)}:{row}"
            continue
        if declared := re.fullmatch(r"\.reg \.(\w+)\s+(%\w+)(?:<\d+>)?;", line):
            registers[declared[2]] = WIDTHS[declared[1]]
            continue
        if label := re.match(r"(\$[\w$]+):\s*(.*)$", line):
            labels[label[1]] = len(statements)
            line = label[2]
        if line.startswith("."):
            if not line.startswith((".pragma", ".shared", ".loc")):
                raise Unsupported(line)
            continue
        texts = [text.strip() for text in line.split(";")]
        statements += [_statement(t, number, source) for t in texts if t not in ("", "{", "}")]
    return registers, statements, labels


def _statement(text: str, line: int, source: str) -> Statement:
    found = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([\w.:]+)\s*(.*)", text, re.S)
    if found is None:
        raise Unsupported(f"line {line}: {text}")
    negated, guard, opcode, rest = found.groups()
    return Statement(opcode, tuple(split(rest)), guard, bool(negated), line, source, text)
