"""Counts the instructions of the Triton kernels in machine code, and models what follows from them.

    TRITON_INTERPRET=0 python benchmarks/count_sass.py [--before results/sass_counts.json]

writes ``results/sass_counts.json`` and ``.md`` beside this file. VLMo's layers are compiled for
each target with the tiles of the library's tables; no GPU is needed, and nothing is timed. With
``--before``, the page has the figures of an older file beside the new ones.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / part) for part in ("tests", "tests/kernels", "benchmarks/modelled")]

import torch  # noqa: E402
import triton  # noqa: E402
from triton.runtime import driver  # noqa: E402

import compiled  # noqa: E402
import compiled_attention  # noqa: E402
from compiled import with_descriptors  # noqa: E402
from machine_code import disassemble, loop_of, phases  # noqa: E402
from multiprocessor import (  # noqa: E402
    ACQUIRE,
    ASSUMPTIONS,
    DEPENDENT,
    GPUS,
    ISSUE,
    LAUNCH,
    OPERANDS,
    SHARED,
    SPECIAL,
    TICKET,
    Work,
    cycles_of,
    end_of,
    residents,
    step_of,
)
from schedule import Split, replay_split  # noqa: E402
from vlmo.files import replacing, write_json  # noqa: E402
from vlmo.kernels._backends import triton_launch  # noqa: E402
from vlmo.kernels._backends.triton import compile_options  # noqa: E402
from vlmo.kernels.attention.triton import tiles as attention_tiles  # noqa: E402
from vlmo.kernels.moe_ffn.schedule import Banded, choose_band, replay  # noqa: E402
from vlmo.kernels.moe_ffn.triton import arguments, tiles  # noqa: E402
from vlmo.kernels.moe_ffn.triton.tiles import Tile, Tiles  # noqa: E402

RESULTS = Path(__file__).parent / "results"
SOURCES = ROOT / "kernels"
DTYPE = torch.bfloat16
SIZES = {"base": (768, 3072), "large": (1024, 4096)}
TOKENS = {"8k": 8192, "32k": 32768, "128k": 131072}
SPLIT = (40, 197)  # text and image tokens of a sequence
# The phases with products of each kernel of moe_ffn, and the functions of each phase.
PHASES: dict[str, dict[str, tuple[str, ...]]] = {
    "fwd": {"hidden_tile": ("hidden_tile",), "output_tile": ("output_tile",)},
    "bwd_rows": {"differentiate": ("differentiate",), "multiply": ("multiply",)},
    "bwd_weights": {"weight_product": ("weight_product", "add_step", "finish_tile")},
}
DEPTHS = {"fwd": (768, 3072), "bwd_rows": (768, 3072), "bwd_weights": (8192,)}
FILES = {"fwd": "forward.py", "bwd_rows": "backward_rows.py", "bwd_weights": "backward_weights.py"}


class Kernel(NamedTuple):
    """A compiled kernel."""

    name: str
    tile: Any
    registers: int
    spilled_bytes: int
    shared_bytes: int
    cubin: bytes


@contextlib.contextmanager
def compiling(target: str, names: Container[str], prefix: str) -> Iterator[list[Kernel]]:
    """Compile for ``target`` what is launched inside the block; yields the kernels of ``names``."""
    found: list[Kernel] = []

    def compile_only(kernel: Any, device: Any, programs: int, tile: Any, *args: Any) -> None:
        name = kernel.fn.__name__.removeprefix(prefix).removesuffix("_kernel")
        if name in names:
            made = kernel.warmup(*args, grid=(programs,), **compile_options(tile))
            used = compiled.resources(made.asm["cubin"])
            sizes = used["REG"], used["STACK"] + used["LOCAL"], made.metadata.shared
            found.append(Kernel(name, tile, *sizes, made.asm["cubin"]))

    driver.set_active(compiled.NoDriver(target))
    with mock.patch.object(triton_launch, "launch", compile_only):
        yield found


def compile_for(target: str, row: Tiles | None = None) -> list[Kernel]:
    """The kernels of VLMo's layer of moe_ffn, with the tiles of the table or of ``row``."""

    def workers_on(device: torch.device, tile: Tile) -> int:
        return GPUS[target].multiprocessors * tile.programs

    chosen = tiles.TABLE[target, "16-bit"] if row is None else row
    with (
        compiling(target, PHASES, "moe_ffn_") as found,
        mock.patch.object(arguments, "workers_on", workers_on),
        mock.patch.object(tiles, "choose", return_value=chosen),
    ):
        compiled.run_case(DTYPE, **compiled.LAYERS["vlmo"])
    return found


def count(target: str, kernel: Kernel) -> dict[str, Any]:
    """The counts of a kernel of moe_ffn by phase, and its modelled cycles by size."""
    gpu, tile = GPUS[target], kernel.tile
    code = disassemble(kernel.cubin)
    # A product instruction of sm_90 is one of four warps.
    shape = (64, min(tile.block_n, 256), 16) if target == "sm_90" else (16, 8, 16)
    products = tile.block_t * tile.block_n * tile.block_k // (shape[0] * shape[1] * shape[2])
    products = products * 4 // tile.num_warps if target == "sm_90" else products // tile.num_warps
    source = SOURCES / "moe_ffn/triton" / FILES[kernel.name]
    found = phases(code, source, PHASES[kernel.name], products)
    elements = tile.block_t * tile.block_n / (32 * tile.num_warps)
    fits = residents(gpu, tile, kernel.registers, kernel.shared_bytes)
    return {
        "target": target,
        "kernel": kernel.name,
        "tile": [*astuple(tile)[:6]],  # without descriptors
        "registers": kernel.registers,
        "spilled_bytes": kernel.spilled_bytes,
        "spills_in_loops": sum(i.name in ("LDL", "STL") for i in loop_of(code)),
        "shared_bytes": kernel.shared_bytes,
        "fits": fits,
        "instructions": sum(len(block.instructions) for block in code),
        "phases": {
            name: {
                "start": phase.start,
                "step": round(phase.step, 1),
                "end": phase.end.total(),
                "end_an_element": round(phase.end.total() / elements, 2),
                "special": phase.end["MUFU"],
                "opcodes": dict(phase.end.most_common(12)),
            }
            for name, phase in found.items()
        },
    }


def moved_bytes(name: str, tile: Tile) -> float:
    """Bytes that the end of a tile reads and writes, of 16-bit numbers."""
    each = {
        "hidden_tile": 4,  # writes the pre-activation and the activation
        "output_tile": 4,  # reads the residual, writes y
        "differentiate": 6,  # reads the pre-activation, writes its gradient and the activation
        "multiply": 2,
        "weight_product": 2,
    }[name]
    return each * tile.block_t * tile.block_n


def tile_cycles(
    target: str, row: dict[str, Any], name: str, depth: int, acquire: float = ACQUIRE
) -> tuple[float, float]:
    """Modelled cycles of a tile of a phase, and those of a step of its main loop."""
    gpu, tile, phase = GPUS[target], Tile(*row["tile"]), row["phases"][name]
    step = step_of(gpu, tile, phase["step"], wgmma=target == "sm_90")
    end = end_of(gpu, tile, phase["end"], phase["special"], moved_bytes(name, tile))
    ticket = row["instructions"] - sum(
        p["end"] + p["start"] for p in row["phases"].values()
    )  # an upper bound: it includes the phases without products
    latency = TICKET + acquire + OPERANDS + DEPENDENT * min(ticket, 300) + phase["start"]
    steps = -(-depth // tile.block_k)
    programs = min(tile.programs, row["fits"])
    return cycles_of([step.times(steps), end], latency, programs), max(step)


def overhead(target: str, row: dict[str, Any], name: str, depth: int) -> float:
    """Cost of the beginning and end of a tile of a phase, in steps of its main loop."""
    steps = -(-depth // row["tile"][2])
    once, twice = (tile_cycles(target, row, name, n * depth)[0] for n in (1, 2))
    return once * steps / (twice - once) - steps


def shares(target: str, rows: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Modelled shares of the tensor cores' peak, by kernel, size and number of tokens."""
    gpu = GPUS[target]
    for size, (dim, hidden) in SIZES.items():
        for label, tokens in TOKENS.items():
            counts = [round(tokens * part / sum(SPLIT)) for part in SPLIT]
            for kernel in ("fwd", "bwd_rows"):
                row = rows[kernel]
                tile, names = Tile(*row["tile"]), [*row["phases"]]
                depths = (dim, hidden)
                costs, alone = (
                    [
                        tile_cycles(target, row, n, d, acquire)[0]
                        for n, d in zip(names, depths, strict=True)
                    ]
                    for acquire in (ACQUIRE, 0.0)
                )
                row_tiles = sum(-(-n // tile.block_t) for n in counts)
                tasks = (2, -(-hidden // tile.block_n), -(-dim // tile.block_n))
                workers = gpu.multiprocessors * min(tile.programs, row["fits"])
                # A pass over 64 rows: it reads and writes them.
                passes = TICKET + 64 * dim * 4 / gpu.l2_bytes
                all_costs = (passes, *costs)
                band = choose_band(row_tiles, tasks, workers, all_costs)
                time = replay(Banded(row_tiles, band, tasks), workers, all_costs).makespan
                separate = sum(
                    LAUNCH + -(-row_tiles * count // workers) * cost
                    for count, cost in zip(tasks, (passes, *alone), strict=True)
                )
                needed = 2 * sum(counts) * dim * hidden / gpu.multiply_adds
                share = needed / (gpu.multiprocessors * time)
                figures = dict(share=round(share, 4), separate=round(separate / time, 3))
                yield dict(kernel=kernel, size=size, tokens=label, **figures)
            row = rows["bwd_weights"]
            tile = Tile(*row["tile"])
            programs = min(tile.programs, row["fits"])
            whole, step = tile_cycles(target, row, "weight_product", tile.block_k)
            step *= programs
            shapes = ((hidden, dim), (dim, hidden))
            each = sum(-(-m // tile.block_t) * -(-n // tile.block_n) for m, n in shapes)
            steps = tuple(-(-n // tile.block_k) for n in counts)
            overhead = (whole - step) / step
            workers = gpu.multiprocessors * programs
            split = Split((each,) * len(counts), steps, workers, overhead=round(overhead))
            time = step * replay_split(split, overhead, addition=overhead).makespan
            share = (
                2 * sum(counts) * dim * hidden / gpu.multiply_adds / (gpu.multiprocessors * time)
            )
            yield dict(kernel="bwd_weights", size=size, tokens=label, share=round(share, 4))


ATTENTION = {"fwd": 2, "bwd_q": 3, "bwd_kv": 4, "bwd_table": 2}  # products of each kernel
LAYERS = {"dense": {}, "training": dict(packed=True, placed=True, distinct=True)}
LENGTHS = (197, 237, 617, 941)
HEAD_DIM = 64


def compile_attention(target: str, layer: str) -> list[Kernel]:
    """The kernels of VLMo's joint layer of attention, dense or as in training."""

    def choose(device: torch.device, dtype: torch.dtype, head_dim: int) -> attention_tiles.Tiles:
        return attention_tiles.TABLE[target, "16-bit", attention_tiles.width_of(head_dim)]

    multiprocessors = GPUS[target].multiprocessors
    host = compiled_attention.host
    with (
        compiling(target, ATTENTION, "attention_") as found,
        mock.patch.object(host.target, "multiprocessors", return_value=multiprocessors),
        mock.patch.object(attention_tiles, "choose", choose),
    ):
        compiled_attention.run(compiled_attention.layer(HEAD_DIM, DTYPE, **LAYERS[layer]))
    return found


def count_attention(target: str, layer: str, kernel: Kernel) -> dict[str, Any]:
    """The counts of a kernel of shared_attention, and its modelled share of the peak by length."""
    gpu, tile = GPUS[target], kernel.tile
    code = disassemble(kernel.cubin)
    loop = Counter(i.name for i in loop_of(code))
    threads = 32 * tile.num_warps
    pairs = tile.block_q * tile.block_k / threads
    fits = residents(gpu, tile, kernel.registers, kernel.shared_bytes)
    row = {
        "target": target,
        "kernel": f"attention_{kernel.name}, {layer}",
        "tile": [tile.block_q, tile.block_k, tile.num_warps, tile.num_stages],
        "registers": kernel.registers,
        "spilled_bytes": kernel.spilled_bytes,
        "spills_in_loops": loop["LDL"] + loop["STL"],
        "shared_bytes": kernel.shared_bytes,
        "fits": fits,
        "instructions": sum(len(block.instructions) for block in code),
        "loop": loop.total(),
        "loop_a_pair": round(loop.total() / pairs, 2),
        "opcodes": dict(loop.most_common(12)),
    }
    return row | {"shares": attention_shares(target, row, kernel.name)}


def attention_shares(target: str, row: dict[str, Any], name: str) -> dict[int, float]:
    """Modelled share of the tensor cores' peak of the operations that attention needs."""
    gpu = GPUS[target]
    block_q, block_k, warps, _ = row["tile"]
    products, own = ATTENTION[name], {"bwd_kv": block_k}.get(name, block_q)
    pairs = block_q * block_k
    moving = block_q if name == "bwd_kv" else block_k  # rows that each step loads, of two tensors
    operands = 2 * moving * HEAD_DIM * 2 + 2 * pairs  # and the bias, in 16 bits
    multiply = Work(
        tensor=products * pairs * HEAD_DIM / gpu.multiply_adds,
        shared=(3 * operands) / SHARED,  # written once, read by two groups of warps
        l2=operands / gpu.l2_bytes,
    )
    others = Work(
        issue=row["loop"] * warps / ISSUE, special=pairs / SPECIAL
    )  # the instructions of the products are few
    found = {}
    for length in LENGTHS:
        steps = -(-length // moving)
        parts = [multiply.times(steps), others.times(steps)]
        time = cycles_of(parts, OPERANDS + TICKET, row["fits"])
        tiles_needed = -(-length // own)
        needed = products * length**2 * HEAD_DIM / gpu.multiply_adds
        found[length] = round(row["fits"] * needed / (tiles_needed * time), 4)
    return found


def compute() -> dict[str, Any]:
    torch.backends.cuda.matmul.allow_tf32 = False
    counts: list[dict[str, Any]] = []
    modelled, faster, attention, overheads = [], [], [], {}
    for target in GPUS:
        rows = {kernel.name: count(target, kernel) for kernel in compile_for(target)}
        counts += rows.values()
        modelled += [dict(target=target, **share) for share in shares(target, rows)]
        if target == "sm_90":
            # What the largest uncertainty of the model does: enough bandwidth for every step.
            with mock.patch.dict(GPUS, sm_90=GPUS["sm_90"]._replace(l2_bytes=48)):
                faster = [dict(target="sm_90, L2 48", **share) for share in shares(target, rows)]
            # Not in the table: what reading through tensor descriptors would change.
            row = tiles.TABLE[target, "16-bit"]
            described = {
                k.name: count(target, k) for k in compile_for(target, with_descriptors(row))
            }
            name = "sm_90, descriptors"
            counts += [count | dict(target=name) for count in described.values()]
            modelled += [dict(target=name, **share) for share in shares(target, described)]
        overheads[target] = [
            round(overhead(target, rows[kernel], name, depth))
            for kernel, depths in DEPTHS.items()
            for name, depth in zip(PHASES[kernel], depths, strict=True)
        ]
        attention += [
            count_attention(target, layer, kernel)
            for layer in LAYERS
            for kernel in compile_attention(target, layer)
        ]
    return {
        "triton": triton.__version__,
        "dtype": str(DTYPE),
        "moe_ffn": counts,
        "overheads": overheads,
        "shares": modelled + faster,
        "attention": attention,
    }


Table = dict[str, Any]


def _both(new: str, old: str | None) -> str:
    return new if old in (None, new) else f"{old} -> {new}"


def _figures(row: dict[str, Any]) -> list[str]:
    """The columns that all kernels have."""
    spills = f"{row['spilled_bytes']} / {row['spills_in_loops']}"
    return [" x ".join(map(str, row["tile"])), str(row["registers"]), spills, str(row["fits"])]


def _line(cells: Sequence[str], before: Sequence[str] | None) -> list[str]:
    old = [None] * len(cells) if before is None else before
    return [_both(new, other) for new, other in zip(cells, old, strict=True)]


def _phases(row: dict[str, Any], name: str) -> list[str]:
    phase = row["phases"][name]
    return [f"{phase['start']}", f"{phase['step']:.0f}", f"{phase['end_an_element']:.1f}"]


def page(table: Table, before: Table | None) -> str:
    old = before or {"moe_ffn": [], "shares": [], "attention": []}
    old_rows = {(r["target"], r["kernel"]): r for r in old["moe_ffn"] + old["attention"]}
    old_shares = {
        (s["target"], s["kernel"], s["size"], s["tokens"]): s["share"] for s in old["shares"]
    }
    lines = [
        "# Counted in machine code, and modelled",
        "",
        "By `benchmarks/count_sass.py`, which says how: VLMo's layers in "
        f"{table['dtype'].removeprefix('torch.')}, D 768 and F 3072, Triton {table['triton']}.",
        "Counted and modelled, not measured: no GPU was involved. `a -> b`: before and now.",
        "",
        "Instructions are those of one warp. *start*: of a task before its first product;",
        "*step*: of one step of the main loop; *end*: after the last product, divided by the",
        "elements of the tile that a thread has. Branches that are rarely taken count as well.",
        "*Spills*: bytes of a thread, and instructions that access them inside a main loop.",
        "*Descriptors*: operands are read through tensor descriptors (TMA), which no row of the",
        "table of tiles does yet.",
        "*Fit*: programs that registers and shared memory of a multiprocessor can hold.",
        "",
        "## moe_ffn",
        "",
        "| GPU | kernel | tile | registers | spills | fit | phase | start | step | end |",
        "|---|---|---|--:|--:|--:|---|--:|--:|--:|",
    ]
    for row in table["moe_ffn"]:
        earlier = old_rows.get((row["target"], row["kernel"]))
        same = _line(_figures(row), earlier and _figures(earlier))
        for name in row["phases"]:
            counts = _line(_phases(row, name), earlier and _phases(earlier, name))
            cells = [row["target"], row["kernel"], *same, name, *counts]
            lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "### Modelled share of the tensor cores' peak",
        "",
        "Text and image tokens 40 : 197. The ticket order is replayed with the cycles of a tile",
        "from the model of a multiprocessor (`benchmarks/modelled/multiprocessor.py`). In",
        "brackets: the time of separate launches of each phase, divided by that of one launch.",
        "*L2 48*: if L2 gave a multiprocessor 48 bytes a cycle, which no step exceeds.",
        "",
        f"| GPU | kernel | size | {' | '.join(TOKENS)} |",
        "|---|---|---|" + "--:|" * len(TOKENS),
    ]
    found: dict[tuple[str, ...], list[str]] = {}
    for share in table["shares"]:
        key = share["target"], share["kernel"], share["size"]
        earlier = old_shares.get((share["target"], share["kernel"], share["size"], share["tokens"]))
        cell = _both(_percent(share["share"]), None if earlier is None else _percent(earlier))
        if "separate" in share:
            cell += f" ({share['separate']:.2f})"
        found.setdefault(key, []).append(cell)
    lines += [f"| {' | '.join([*key, *cells])} |" for key, cells in found.items()]
    lines += ["", "### Modelled cost of the beginning and end of a tile, in steps", ""]
    names = [name for kernel in PHASES.values() for name in kernel]
    lines += [f"| GPU | {' | '.join(names)} |", "|---|" + "--:|" * len(names)]
    for target, costs in table["overheads"].items():
        lines.append(f"| {target} | {' | '.join(map(str, costs))} |")
    lines += [
        "",
        "## shared_attention",
        "",
        f"Joint layer, head dim {HEAD_DIM}, without a mask or packed as in training. *A pair*:",
        "instructions of the main loop divided by the (query, key) pairs that a thread has in a",
        "step. The shares of the tensor cores' peak are modelled for the products that a kernel",
        "executes, without bank conflicts; [ptx_counts.md](ptx_counts.md) has these.",
        "",
        "| GPU | kernel | tile | registers | spills | fit | loop | a pair | "
        + " | ".join(f"N {n}" for n in LENGTHS)
        + " |",
        "|---|---|---|--:|--:|--:|--:|--:|" + "--:|" * len(LENGTHS),
    ]
    for row in table["attention"]:
        earlier = old_rows.get((row["target"], row["kernel"]))
        cells = _line(_attention_cells(row), earlier and _attention_cells(earlier))
        lines.append(f"| {row['target']} | {row['kernel']} | {' | '.join(cells)} |")
    lines += ["", "## Assumptions of the model", "", "| what | from where |", "|---|---|"]
    lines += [f"| {what} | {where} |" for what, where in ASSUMPTIONS]
    return "\n".join(lines) + "\n"


def _attention_cells(row: dict[str, Any]) -> list[str]:
    shares_of = (_percent(share) for share in row["shares"].values())
    return [*_figures(row), str(row["loop"]), f"{row['loop_a_pair']:.1f}", *shares_of]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, help="an older JSON file to compare with")
    given = parser.parse_args()
    before = json.loads(given.before.read_text()) if given.before else None
    table = compute()
    write_json(RESULTS / "sass_counts.json", table)
    with replacing(RESULTS / "sass_counts.md") as path:
        path.write_text(page(json.loads((RESULTS / "sass_counts.json").read_text()), before))


if __name__ == "__main__":
    main()
