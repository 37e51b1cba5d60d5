"""How fast shared_attention may be on a V100, beside PyTorch's kernels: a model, no measurement.

    python benchmarks/modelled/volta_attention.py

runs the shipped sm_70 machine code in the emulator (tests/sm70), gives its trace to the timing
model of one multiprocessor, and writes ``benchmarks/results/volta_attention.md`` and ``.json``. No
GPU is needed; it takes minutes. ``--page`` only rewrites the page from the JSON file.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

import pages
from pages import assumed, assumptions_section
from vlmo.kernels import RelativePositionIndex
from vlmo.kernels._backends import cuda as cuda_target
from vlmo.kernels.attention.call import Call
from vlmo.kernels.attention.cuda import arguments as cuda_launch
from vlmo.kernels.attention.cuda import backward as cuda_backward
from vlmo.kernels.attention.cuda import bias_gradient as cuda_table
from vlmo.kernels.attention.cuda import forward as cuda_forward

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT / "tests" / part) for part in ("", "kernels")]

from emulated import PROGRAMS, emulated, kernel, memory_of  # noqa: E402
from sm70 import estimate  # noqa: E402

COMMAND = "python benchmarks/modelled/volta_attention.py"
MULTIPROCESSORS = 80
CLOCK = 1.53e9
BATCH, HEADS, DIM = 64, 12, 64
PAIRS = BATCH * HEADS
ROW_BYTES, SECTOR = 2 * DIM, 32
BAND = 4  # query tiles per band in the kernel of the table's gradient
# The CTAs 0, 81, 162, ... of the multiprocessor cover all tiles of a sequence.
STEP, SAMPLE = 81, 16
FLOPS = {"forward": 4 * DIM, "backward": 10 * DIM}  # times N * N

INDEXES: dict[int, Callable[[], RelativePositionIndex]] = {
    40: lambda: RelativePositionIndex.text(14, 40),
    128: lambda: RelativePositionIndex.text(14, 128),
    237: lambda: RelativePositionIndex.joint(14, 40),
    617: lambda: RelativePositionIndex.joint(24, 40),
    941: lambda: RelativePositionIndex.joint(30, 40),
}

# TFLOP/s of PyTorch's memory-efficient attention (CUTLASS, Sm70) in the same model, by bias and N.
# The second figure of the backward is for a cache that does not retain rows between tiles.
INCUMBENT: dict[bool, dict[str, dict[int, tuple[float, ...]]]] = {
    True: {
        "forward": {40: (8.0,), 128: (22.6,), 237: (22.7,), 617: (26.5,), 941: (27.9,)},
        "backward": {
            40: (7.2, 7.2),
            128: (19.6, 17.6),
            237: (19.6, 16.3),
            617: (22.7, 18.2),
            941: (23.7, 18.9),
        },
    },
    False: {
        "forward": {40: (9.5,), 128: (28.9,), 237: (30.2,), 617: (35.4,), 941: (37.2,)},
        "backward": {
            40: (7.9, 7.9),
            128: (23.5, 19.8),
            237: (24.5, 19.0),
            617: (27.0, 21.1),
            941: (28.9, 21.9),
        },
    },
}


class Part(NamedTuple):
    """A kernel in the model."""

    phase: str
    length: int
    bias: bool
    kernel: str
    cycles: float  # of a multiprocessor per sequence and head
    tensor: float  # busy shares
    issue: float
    load_store: float
    dram: float  # share of the L2 traffic


class Figure(NamedTuple):
    """A phase, whose kernels run one after the other."""

    phase: str
    length: int
    bias: bool
    cycles: float
    tflops: float
    incumbent: tuple[float, ...]

    @property
    def faster(self) -> tuple[float, ...]:
        return tuple(self.tflops / other for other in self.incumbent)


def aligned(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Zeros at an address that CUDA's allocator could return: a multiple of 512 bytes."""
    count = math.prod(shape)
    whole = torch.zeros(count + 512, dtype=dtype)
    skipped = -whole.data_ptr() % 512 // whole.element_size()
    return whole[skipped : skipped + count].view(shape)


def make_call(length: int, bias: bool) -> Call:
    """A call with packed q, k and v, as a projection returns them."""
    q, k, v = aligned(BATCH, length, 3, HEADS, DIM).unbind(2)
    call = Call(q, k, v, *(None,) * 7, 0, None, False, DIM**-0.5)
    if not bias:
        return call
    index = INDEXES[length]()
    table = torch.zeros(index.entries, HEADS)
    return call._replace(table=table, matrix=index.matrix, affine=index.affine, short=index.short)


def bytes_once(cubin: str, length: int, entries: int) -> float:
    """DRAM traffic of a sequence and head in bytes.

    The CTAs of a sequence run concurrently and share data in L2. The forward stores the
    log-sum-exps of a token's heads adjacently, but different heads do not run concurrently.
    """
    rows, values = {
        "attention_fwd": (4, SECTOR),
        "attention_bwd_q": (6, 2 * 4),
        "attention_bwd_kv": (6, 2 * 4),
    }[cubin]
    return (rows * ROW_BYTES + values) * length + 4 * entries / BATCH


def bytes_once_of_items(length: int, parts: int, sequences: int) -> float:
    """The same for an item of the table's gradient, where concurrent CTAs have adjacent tiles.

    CTAs take tiles in bands of query tiles, kBand of csrc/attention/attention_bwd_table.cu.
    """
    side = -(-length // cuda_table.SIDE)
    tiles_read = 0
    for first in range(0, side * side, parts):
        queries, keys = set(), set()
        for tile in range(first, min(first + parts, side * side)):
            band = tile // (BAND * side) * BAND
            height = min(BAND, side - band)
            queries.add(band + (tile - band * side) % height)
            keys.add((tile - band * side) // height)
        tiles_read += len(queries) + len(keys)
    # q and dout per query tile, k and v per key tile.
    return 2 * tiles_read * cuda_table.SIDE * ROW_BYTES * sequences / side**2


def part(phase: str, length: int, bias: bool, launch: tuple[Any, ...]) -> Part:
    cubin, name, _, programs, threads, shared_bytes, argument, tensors = launch
    per_pair, step = programs / PAIRS, STEP
    if cubin == cuda_table.CUBIN:
        # One CTA per item; in an actual launch a CTA processes several items.
        parts, tiles = argument.parts, (-(-length // cuda_table.SIDE)) ** 2
        items = tiles * -(-BATCH // argument.range)
        tensors = [*tensors[:-1], torch.zeros(HEADS, items, argument.call.bias.entries)]
        argument.partial, argument.parts = tensors[-1].data_ptr(), items
        programs, once = HEADS * items, bytes_once_of_items(length, parts, argument.range)
        step = next(s for s in range(programs // SAMPLE, 0, -1) if math.gcd(s, items) == 1)
        # The CTAs with one more item determine the duration.
        per_pair = PROGRAMS * MULTIPROCESSORS * -(-items // parts) / PAIRS
    else:
        once = bytes_once(cubin, length, argument.call.bias.entries) / per_pair
    ctas = range(0, min(programs, SAMPLE * step), step)

    def run(dram_fraction: float) -> dict[str, Any]:
        return estimate(
            *(kernel(cubin, name), programs, threads, [bytes(argument)], shared_bytes),
            ctas=ctas,
            launch_options={"buffers": memory_of(tensors), "slice": 300},
            dram_fraction=dram_fraction,
        )

    share = min(1.0, once * len(ctas) / (run(1.0)["l1_miss_sectors"] * SECTOR))
    found = run(share)
    return Part(
        *(phase, length, bias, name, found["cycles"] / len(ctas) * per_pair),
        tensor=found["tensor_utilisation"],
        issue=found["issue_utilisation"],
        load_store=found["lsu_utilisation"],
        dram=share,
    )


def launches(length: int, bias: bool) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The launches of a training step with their phase; nothing is run."""
    seen: list[tuple[Any, ...]] = []
    with (
        emulated(workers=PROGRAMS * MULTIPROCESSORS),
        mock.patch.object(cuda_target, "launch", lambda *launch: seen.append(launch)),
    ):
        prepared = cuda_launch.prepare(make_call(length, bias))
        out, dout, dq, dk, dv = (aligned(BATCH, length, HEADS, DIM) for _ in range(5))
        lse, delta = (aligned(HEADS, BATCH * length, dtype=torch.float32).t() for _ in range(2))
        forward_lse = aligned(BATCH, length, HEADS, dtype=torch.float32)
        cuda_forward.launch_forward(prepared, out, forward_lse)
        cuda_backward.launch_queries(prepared, out, dout, lse, dq, delta)
        cuda_backward.launch_keys(prepared, dout, lse, delta, dk, dv)
        if bias:
            cuda_table.launch_table(prepared, dout, lse, delta)
    for launch in seen:
        yield "forward" if launch[0] == cuda_forward.CUBIN else "backward", launch


def figures(parts: list[Part]) -> Iterator[Figure]:
    for phase, flops in FLOPS.items():
        for bias in (True, False):
            for length in INDEXES:
                case = phase, length, bias
                cycles = sum(part.cycles for part in parts if part[:3] == case)
                tflops = flops * length**2 / cycles * MULTIPROCESSORS * CLOCK / 1e12
                yield Figure(*case, cycles, tflops, INCUMBENT[bias][phase][length])


INTRODUCTION = f"""\
# shared_attention on a V100: MODELLED

No V100 was involved. `{COMMAND}` runs the shipped sm_70 machine
code in the emulator and its trace through the timing model of one multiprocessor
(`tests/sm70/README.md` says what is not modelled; it is not calibrated, so compare columns, do
not quote figures). Head dim {DIM}, {BATCH} sequences of {HEADS} heads without padding, q, k and v
packed; N = 40 and 128 are texts, 237, 617 and 941 joint sequences of 40 text tokens and an image of
224, 384 and 480 pixels. TFLOP/s: 4 N^2 {DIM} operations forward and 10 N^2 {DIM} backward for a
sequence and head, whatever is computed again, on {MULTIPROCESSORS} multiprocessors at
{CLOCK / 1e9} GHz. Cycles are those of one multiprocessor for a sequence and head. Launches and
their last wave do not count, but where CTAs of the table's gradient have unequal shares, the
longest does. Of the L2 traffic, what a launch has to move once goes to DRAM.

"PyTorch" is its memory-efficient attention (CUTLASS, Sm70) that went through the same model. Its
bias is a tensor [B, H, N, N] in half precision, and so is its gradient; to make the one, and to sum
the other up into a table, are further launches that do not count. Its second backward figure, the
likelier one from N = 237 on, has a cache in which rows do not survive from tile to tile.
"""


def markdown(table: Mapping[str, Any]) -> str:
    """The page with the results of :func:`compute`."""
    found = [Figure(*(f[name] for name in Figure._fields)) for f in table["figures"]]
    parts = [Part(**part) for part in table["kernels"]]
    lines = [INTRODUCTION]
    for phase in FLOPS:
        with_table = ", with the gradient of the table" if phase == "backward" else ""
        lines += [
            f"## {phase.capitalize()}\n",
            "| N | bias | cycles | TFLOP/s | PyTorch | faster |",
            "|---|---|---|---|---|---|",
        ]
        for f in found:
            if f.phase == phase:
                theirs = " to ".join(f"{x:.1f}" for x in dict.fromkeys(f.incumbent))
                faster = " to ".join(f"{x:.2f}" for x in dict.fromkeys(f.faster))
                bias = f"looked up{with_table}" if f.bias else "none"
                lines.append(
                    f"| {f.length} | {bias} | {f.cycles:,.0f} | {f.tflops:.1f} | {theirs} "
                    f"| {faster} x |"
                )
        lines.append("")
    lines += [
        "## Kernels\n",
        "| kernel | N | bias | cycles | tensor pipe | issue | load/store | DRAM share |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for p in parts:
        shares = (f"{x:.3f}" for x in (p.tensor, p.issue, p.load_store, p.dram))
        bias = "looked up" if p.bias else "none"
        lines.append(
            f"| {p.kernel} | {p.length} | {bias} | {p.cycles:,.0f} | {' | '.join(shares)} |"
        )
    return "\n".join([*lines, *assumptions_section(table)]) + "\n"


def compute() -> dict[str, Any]:
    """All figures."""
    torch.set_num_threads(1)
    parts = [
        part(phase, length, bias, launch)
        for length in INDEXES
        for bias in (True, False)
        for phase, launch in launches(length, bias)
    ]
    return {
        "modelled": True,
        "command": COMMAND,
        "figures": [f._asdict() | {"faster": f.faster} for f in figures(parts)],
        "kernels": [p._asdict() for p in parts],
        "assumptions": [
            [name, "by kernel (DRAM share)" if name == "dram_fraction" else value, meaning]
            for name, value, meaning in assumed()
        ],
    }


if __name__ == "__main__":
    pages.main("volta_attention", __doc__.splitlines()[0], compute, markdown)
