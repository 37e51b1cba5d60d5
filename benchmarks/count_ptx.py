"""Counts the PTX instructions that the Triton kernels execute besides matrix products.

    TRITON_INTERPRET=0 python benchmarks/count_ptx.py

writes ``results/ptx_counts.json`` and ``.md`` beside this file. The emulator of tests/ptx runs
VLMo's layer as compiled for each target and counts; no GPU is needed, and nothing is timed. PTX is
not machine code: ptxas removes most moves, and expands a division or an approximated function to
several instructions.
"""

from __future__ import annotations

import ast
import functools
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests" / part) for part in ("", "kernels")]

import torch  # noqa: E402
import triton  # noqa: E402

import attention_cases  # noqa: E402
import moe_ffn_cases  # noqa: E402
from ptx.driver import TARGETS, Launch, emulated  # noqa: E402
from ptx.flow import END, blocks_of, dominators  # noqa: E402
from ptx.machine import Interleaving  # noqa: E402
from ptx.text import WIDTHS, Kernel, Statement, in_braces  # noqa: E402
from vlmo.files import replacing  # noqa: E402

RESULTS = Path(__file__).parent / "results"
DTYPE = torch.bfloat16
# Full tiles of 128 tokens, and of 64 queries and keys.
SIZES = {"base": (768, 3072), "large": (1024, 4096)}
TOKENS = (128, 256)  # per expert
BATCH, LENGTH, HEADS, HEAD_DIM = 2, 256, 2, 64  # two sequences: the bias is expanded
AT_ONCE = Interleaving(resident=4, races=False, skew=False, quantum=1000, conflicts=True)

# The class of an opcode is that of the first pattern that matches.
CLASSES = {
    "products": r"mma|wgmma\.mma_async",
    "waits, branches": r"bra|bar|ret|fence|wgmma|cp\.async\.(commit|wait)",
    "global memory": r"(ld|st|atom|red)\.global|(atom|red)\.|cp\.async",
    "shared memory": r"(ld|st)\.shared(::cta)?|ldmatrix|stmatrix",
    "exchange": r"shfl|redux",
    "special functions": r"ex2|lg2|rcp|rsqrt|sqrt|tanh|div\.full|div\.rn\.f",
    "conversions": r"cvt",
    "moves": r"mov|selp|prmt|ld\.param",
    "comparisons": r"setp|(and|or|xor|not)\.pred",
    "float arithmetic": r"\w+(\.\w+)*\.(f32|f64|f16|bf16|f32x2|f16x2|bf16x2)$",
    "integer arithmetic": r"",
}


def class_of(statement: Statement) -> str:
    return next(name for name, pattern in CLASSES.items() if re.match(pattern, statement.opcode))


def main_loops(kernel: Kernel) -> set[int]:
    """Statements of the innermost loops with products, and of other blocks with products."""
    blocks = blocks_of(kernel)
    edges = [[n for n in block.next if n != END] for block in blocks]
    above = dominators(edges, 0)

    def dominates(a: int, b: int) -> bool:
        while b != a and b != above[b]:
            b = above[b]
        return a == b

    before: dict[int, list[int]] = {n: [] for n in range(len(blocks))}
    for number, targets in enumerate(edges):
        for target in targets:
            before[target].append(number)
    loops = []
    for number in above:
        for head in edges[number]:
            if dominates(head, number):
                inside, stack = {head}, [number]
                while stack:
                    if (block := stack.pop()) not in inside:
                        inside.add(block)
                        stack += before[block]
                loops.append(inside)
    found: set[int] = set()
    for number, part in enumerate(blocks):
        if any(class_of(s) == "products" for s in kernel.statements[part.first : part.end]):
            inner = min((loop for loop in loops if number in loop), key=len, default={number})
            # The loop over tickets contains everything.
            found |= inner if len(inner) < len(blocks) / 2 else {number}
    return {s for n in found for s in range(blocks[n].first, blocks[n].end)}


def multiplications(statement: Statement) -> int:
    """Number of multiplications of one warp in one instruction."""
    shape = re.search(r"\.m(\d+)n(\d+)k(\d+)", statement.opcode)
    if class_of(statement) != "products" or shape is None:
        return 0
    m, n, k = map(int, shape.groups())
    return m * n * k // (4 if statement.parts[0] == "wgmma" else 1)


def lane_bytes(statement: Statement) -> tuple[str, float]:
    """Memory access of a lane: "read" or "written" (global memory), or "shared"; and bytes."""
    parts, operands = statement.parts, statement.operands
    if parts[:2] == ["cp", "async"] and len(operands) >= 3:
        return "read", int(operands[2], 0)
    if parts[0] in ("ld", "st") and parts[1].removesuffix("::cta") in ("global", "shared"):
        values = in_braces(operands[0 if parts[0] == "ld" else 1])
        of_global = "read" if parts[0] == "ld" else "written"
        kind = "shared" if parts[1].startswith("shared") else of_global
        return kind, WIDTHS[parts[-1]] * len(values)
    if parts[0] in ("ldmatrix", "stmatrix"):
        return "shared", 4 * len(in_braces(operands[0 if parts[0] == "ldmatrix" else 1]))
    if parts[0] == "wgmma" and multiplications(statement):
        m, n, k = map(int, re.search(r"m(\d+)n(\d+)k(\d+)", statement.opcode).groups())  # type: ignore[union-attr]
        size = 4 if "tf32" in parts else 2
        left = 0 if operands[1].startswith("{") else m * k
        return "shared", (left + n * k) * size / 128  # shared by a group of four warps
    return "", 0


@functools.cache
def functions_of(folder: str, file: str) -> list[tuple[int, int, str]]:
    path = ROOT / "kernels" / folder / file
    if not path.exists():
        path = ROOT / "kernels" / file
    if not path.exists():
        return []
    tree = ast.parse(path.read_text())
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [(node.lineno, node.end_lineno or node.lineno, node.name) for node in nodes]


def function_of(folder: str, source: str) -> str:
    """The function of this library that a statement was compiled from."""
    if ":" not in source:
        return "no line"
    file, line = source.split(":")
    spans = functions_of(folder, file)
    return next((n for a, b, n in spans if a <= int(line) <= b), "Triton's own functions")


def count(launch: Launch, folder: str, elements: int, needed: int) -> dict[str, Any]:
    """The counts of a launch, per element: divided by ``elements``."""
    kernel, result = launch.machine.kernel, launch.results[0]
    inside = main_loops(kernel)
    classes: dict[str, Counter[str]] = {"main loops": Counter(), "elsewhere": Counter()}
    functions: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    conflicts: Counter[str] = Counter()  # passes through the banks, beyond one an access
    made = products = 0
    for number, statement in enumerate(kernel.statements):
        warps, lanes = int(result.warp_count[number]), int(result.lane_count[number])
        region = "main loops" if number in inside else "elsewhere"
        classes[region][class_of(statement)] += warps
        if number not in inside:
            functions[function_of(folder, statement.source)] += warps
        kind, size = lane_bytes(statement)
        if kind:
            moved[kind] += int(lanes * size)
        extra = int(result.wavefronts[number]) - int(result.ideal_wavefronts[number])
        if extra:
            conflicts[function_of(folder, statement.source)] += extra
        made += warps * multiplications(statement)
        products += warps * (multiplications(statement) > 0)
    return {
        "kernel": launch.kernel.removesuffix("_kernel"),
        "multiplications": made,
        "needed": needed,
        "products": products,
        "classes": {region: dict(counter.most_common()) for region, counter in classes.items()},
        "functions": dict(functions.most_common()),
        "bytes": {"tensors": launch.memory_bytes, **moved},
        "wavefronts": [int(result.wavefronts.sum()), int(result.ideal_wavefronts.sum())],
        "conflicts": dict(conflicts.most_common(4)),
        "elements": elements,
    }


def moe_ffn(target: str, size: str) -> Iterator[dict[str, Any]]:
    """VLMo's layer on full tiles. Elements: hidden units, T x F, or gradients of weights."""
    dim, hidden = SIZES[size]
    case = moe_ffn_cases.Case(
        pieces=tuple(enumerate(TOKENS)), batch=1, dim=dim, hidden=(hidden, hidden)
    )
    routing = moe_ffn_cases.make_routing(case, "cpu")
    with emulated(target, [AT_ONCE]) as gpu:
        moe_ffn_cases.outputs_and_gradients(
            lambda tensors: moe_ffn_cases.call(case, routing, tensors, backend="triton"),
            moe_ffn_cases.make_tensors(case, "cpu", DTYPE),
        )
    activations, gradients = sum(TOKENS) * hidden, 2 * len(TOKENS) * dim * hidden
    for launch in gpu.launches:
        elements = gradients if "weights" in launch.kernel else activations
        yield count(launch, "moe_ffn", elements, needed=2 * activations * dim)


def attention(target: str, size: str) -> Iterator[dict[str, Any]]:
    """VLMo's joint layer with its relative position bias. Elements: (query, key) pairs."""
    case = attention_cases.Case(
        *("joint", LENGTH, BATCH, HEADS, HEAD_DIM), mask=None, grid=(14, 14), text=LENGTH - 197
    )
    tensors = attention_cases.make_tensors(case, "cpu", DTYPE)
    with emulated(target, [AT_ONCE]) as gpu:
        attention_cases.outputs_and_gradients(
            lambda t: attention_cases.call(case, t, {}, backend="triton"), tensors
        )
    elements = BATCH * HEADS * LENGTH**2
    products = {"fwd": 2, "bwd_q": 3, "bwd_kv": 4, "bwd_table": 2}
    for launch in gpu.launches:
        each = products.get(launch.kernel.removeprefix("attention_").removesuffix("_kernel"))
        if each is not None:  # the kernel that expands the bias has no products
            yield count(launch, "attention", elements, needed=each * elements * HEAD_DIM)


RUNS: list[tuple[Callable[[str, str], Iterator[dict[str, Any]]], str]] = [
    *((moe_ffn, size) for size in SIZES),
    (attention, "head dim 64"),
]


def rows() -> Iterator[dict[str, Any]]:
    for target in TARGETS:
        for run, size in RUNS:
            for row in run(target, size):
                yield {"target": target, "size": size, **row}


def table(found: list[dict[str, Any]]) -> list[str]:
    """Markdown table with a line for each kernel and target."""
    lines = [
        "| kernel | size | target | multiplied / needed | instructions a product, main loop "
        "| instructions an element elsewhere "
        "| bytes an element: tensors | read | written | shared | bank conflicts |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in found:
        loops, elsewhere = (sum(row["classes"][r].values()) for r in ("main loops", "elsewhere"))
        kinds = ("tensors", "read", "written", "shared")
        moved = [row["bytes"].get(kind, 0) / row["elements"] for kind in kinds]
        ratio = row["multiplications"] / row["needed"]
        lines.append(
            f"| {row['kernel']} | {row['size']} | {row['target']} | {ratio:.2f} "
            f"| {loops / max(row['products'], 1):.1f} | {32 * elsewhere / row['elements']:.1f} | "
            + " | ".join(f"{size:.1f}" for size in moved)
            + f" | {row['wavefronts'][0] / max(row['wavefronts'][1], 1):.2f} |"
        )
    return lines


def details(found: list[dict[str, Any]]) -> list[str]:
    """Markdown table of the instructions outside the main loops, by class and function."""
    lines = [
        "| kernel | target | outside the main loops, instructions an element |",
        "|---|---|---|",
    ]
    for row in found:
        if row["size"] == "large":
            continue
        scale = 32 / row["elements"]
        kinds, places = (
            ", ".join(f"{n} {c * scale:.2f}" for n, c in [*counts.items()][:6])
            for counts in (row["classes"]["elsewhere"], row["functions"])
        )
        banks = ", ".join(f"{n} {c * scale:.2f}" for n, c in row["conflicts"].items())
        conflicts = f"; passes through banks by conflicts: {banks}" if banks else ""
        lines.append(f"| {row['kernel']} | {row['target']} | {kinds}; in {places}{conflicts} |")
    return lines


def write(found: list[dict[str, Any]]) -> None:
    data = {"triton": triton.__version__, "dtype": str(DTYPE), "tokens": TOKENS, "rows": found}
    with replacing(RESULTS / "ptx_counts.json") as path:
        path.write_text(json.dumps(data, indent=1) + "\n")
    text = [
        "# Counted in PTX",
        "",
        f"By `benchmarks/count_ptx.py`, which says how; {data['dtype']}, Triton {data['triton']}. ",
        "Counted, not measured. An element is a hidden activation in moe_ffn, a gradient in its",
        "backward of the weights, a pair of query and key in attention. 1.00 multiplied for each",
        "needed: no padding. Ideal are 1 instruction a product and, for the memory, the bytes of",
        "all tensors of a launch, each once; what is read more often comes from L2. Bank",
        "conflicts: passes of loads, stores, copies and ldmatrix through the banks of shared",
        "memory for each that is needed without conflicts, 1.00 at best; the operands that",
        "wgmma reads are not included.",
        "",
        *table(found),
        "",
        *details(found),
    ]
    with replacing(RESULTS / "ptx_counts.md") as path:
        path.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    write([*rows()])
