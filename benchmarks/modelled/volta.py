"""How busy moe_ffn keeps a V100's tensor cores, beside CUTLASS: a model, no measurement.

    python benchmarks/modelled/volta.py

runs the shipped sm_70 machine code in the emulator (tests/sm70), gives its trace to the timing
model of one multiprocessor, replays the tickets of whole launches with the cycles found there, and
writes ``benchmarks/results/volta.md`` and ``.json``. No GPU is needed; it takes minutes.
``--page`` only rewrites the page from the JSON file.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

import pages
from pages import assumed, assumptions_section
from vlmo.kernels import ModalityRouting, moe_ffn
from vlmo.kernels._backends import cuda as cuda_target
from vlmo.kernels.moe_ffn.cuda import arguments as cuda_launch
from vlmo.kernels.moe_ffn.schedule import Banded, band_of, replay

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT / "tests" / part) for part in ("", "kernels")]

from emulated import emulated, kernel, memory_of  # noqa: E402
from sm70 import estimate  # noqa: E402

COMMAND = "python benchmarks/modelled/volta.py"
MULTIPROCESSORS = 80
PROGRAMS = cuda_launch.PROGRAMS
DRAM_FRACTION = 0.125  # of L2 traffic, with good rasterisation
SIZES = {"base": (768, 3072), "large": (1024, 4096)}  # D, F
TOKENS = {"8k": 8192, "15k": 64 * 237}
SPLIT = (40, 197)  # text and image tokens of a sequence
TILE = cuda_launch.TILE


class Incumbent(NamedTuple):
    """A CUTLASS 2.x Sm70 product, 128 x 128 tiles, two CTAs per multiprocessor, in the same model.

    Cycles per tile with bias were computed for three depths, and with GELU for one; others are
    interpolated.
    """

    with_bias: dict[int, int]
    of_gelu: int

    def cycles(self, depth: int, gelu: bool = False) -> float:
        known = sorted(self.with_bias)
        low = max([d for d in known if d <= depth] or known[:1])
        high = min([d for d in known if d > low] or known[-1:])
        if low == high:
            low = known[-2]
        share = (depth - low) / (high - low)
        cycles = self.with_bias[low] + share * (self.with_bias[high] - self.with_bias[low])
        return cycles + (self.of_gelu if gelu else 0)


INCUMBENT = Incumbent({768: 34_181, 3072: 120_653, 4096: 159_636}, 36_535 - 34_181)


class Product(NamedTuple):
    """One kind of tile in the model."""

    name: str
    depth: int
    cycles: float  # of a multiprocessor per tile
    incumbent: float  # the same for CUTLASS

    @property
    def busy(self) -> float:
        return TILE * TILE * self.depth / 512 / self.cycles

    @property
    def incumbent_busy(self) -> float:
        return TILE * TILE * self.depth / 512 / self.incumbent


class Launch(NamedTuple):
    """A forward over both experts."""

    size: str
    tokens: str
    band: int
    fill: float  # share of the multiprocessors' time spent in tasks
    milliseconds: float  # at 1.53 GHz
    speedup: float  # over the incumbent's launches


Captured = dict[str, tuple[Any, list[torch.Tensor | None]]]


def capture(tokens: int, dim: int, hidden: int, norm: str = "none", train: bool = True) -> Captured:
    """Arguments and tensors of the launches of a call, by kernel; nothing is launched."""
    found: Captured = {}

    def launch(cubin, name, device, programs, threads, shared_bytes, argument, tensors):
        for tensor in tensors:
            if tensor is not None and tensor.dtype == torch.int32:
                tensor.zero_()
        found[cubin] = argument, list(tensors)

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=torch.float16, requires_grad=train)

    with emulated(), mock.patch.object(cuda_target, "launch", launch):
        y = moe_ffn(
            *(zeros(tokens, dim), ModalityRouting.segments([(0, tokens)], num_experts=1)),
            *([zeros(hidden, dim)], [zeros(dim, hidden)]),
            b1=[zeros(hidden)],
            b2=[zeros(dim)],
            norm=norm,
            norm_weight=None if norm == "none" else [zeros(dim)],
            residual=torch.zeros(tokens, dim, dtype=torch.float16),
            backend="cuda",
        )
        if train:
            y.backward(y)
    return found


def cycles_of(found: Captured, cubin: str, phase: int | None, tasks: int) -> float:
    """Cycles of one multiprocessor per task, for ``tasks`` tasks of its concurrent CTAs.

    Args:
        phase: the only phase that remains in the launch; None for all phases.
    """
    argument, tensors = found[cubin]
    all_tasks = list(argument.call.tasks)
    argument.call.stagger = cuda_launch.STAGGER  # as in a launch with many tiles
    name = cubin if cubin == "moe_ffn_bwd_weights" else f"{cubin}_gelu"
    if phase is not None:
        for p, count in enumerate(all_tasks):
            argument.call.tasks[p] = count if p == phase else 0
    result = estimate(
        *(kernel(cubin, name), PROGRAMS, cuda_launch.THREADS, [bytes(argument)]),
        # Short slices, so that the emulated CTAs share the tickets as on a GPU.
        launch_options={"buffers": memory_of(tensors), "slice": 300},
        dram_fraction=DRAM_FRACTION,
    )
    argument.call.tasks[:] = all_tasks
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.int32:
            tensor.zero_()
    return result["cycles"] / tasks


def product(name: str, found: Captured, cubin: str, phase: int, depth: int) -> Product:
    argument, _ = found[cubin]
    tiles = argument.call.tasks[phase] * argument.call.bound
    gelu = cubin == "moe_ffn_fwd" and phase == 1
    cycles = cycles_of(found, cubin, phase, tiles)
    return Product(name, depth, cycles, INCUMBENT.cycles(depth, gelu))


def products(size: str) -> list[Product]:
    """Every product of a training step of one size, computed from two or more rows of tiles."""
    dim, hidden = SIZES[size]
    wide, narrow = 1024, 768  # columns to compute, just enough tiles
    first, rows = "moe_ffn_fwd", "moe_ffn_bwd_rows"
    inference, training = capture(512, dim, wide, train=False), capture(512, dim, wide)
    second, backward = capture(512, narrow, hidden, train=False), capture(512, narrow, hidden)
    return [
        product("fc1, GELU", inference, first, 1, dim),
        product("fc1, GELU, pre-activation kept", training, first, 1, dim),
        product("fc2, residual", second, first, 2, hidden),
        product("dpre = act'(pre) (dh2 W2), hidden again, sums", training, rows, 1, dim),
        product("dx = dpre W1", backward, rows, 2, hidden),
        weights(2048),
    ]


def weights(tokens: int) -> Product:
    """dW1 and dW2 for a number of tokens, in whole tiles."""
    width = 2 * TILE
    found = capture(tokens, width, width)
    argument, _ = found["moe_ffn_bwd_weights"]
    argument.workers = PROGRAMS
    argument.sum_blocks[:] = [0, 0, 0, 0]
    tiles = 2 * (width // TILE) ** 2
    cycles = cycles_of(found, "moe_ffn_bwd_weights", None, tiles)
    return Product("dW1, dW2", tokens, cycles, INCUMBENT.cycles(tokens))


def norm_cycles(dim: int) -> float:
    """Cycles of one multiprocessor for a task of the norm phase."""
    found = capture(512, dim, TILE, norm="layer", train=False)
    argument, _ = found["moe_ffn_fwd"]
    tasks = argument.call.tasks[0] * argument.call.bound
    return cycles_of(found, "moe_ffn_fwd", 0, tasks)


def launches(size: str, found: Sequence[Product]) -> Iterator[Launch]:
    """Complete forwards without the norm, for which CUTLASS would need another launch."""
    dim, hidden = SIZES[size]
    fc1, _, fc2, *_ = found
    costs = (0.0, PROGRAMS * fc1.cycles, PROGRAMS * fc2.cycles)
    workers = PROGRAMS * MULTIPROCESSORS
    for tokens, count in TOKENS.items():
        text = round(count * SPLIT[0] / sum(SPLIT))
        rows = [-(-part // TILE) for part in (text, count - text)]
        tasks = (0, -(-hidden // TILE), -(-dim // TILE))
        band = band_of(
            *(sum(rows), tasks, workers, (None, dim, hidden)),
            step=cuda_launch.STEP,
            rows_cost=cuda_launch.ROWS_COST,
        )
        played = replay(Banded(sum(rows), band, tasks), workers, costs)
        theirs = sum(
            -(-tiles * per_row // workers) * PROGRAMS * cycles
            for tiles, (per_row, cycles) in itertools.product(
                rows, ((tasks[1], fc1.incumbent), (tasks[2], fc2.incumbent))
            )
        )
        milliseconds = played.makespan / 1.53e6
        yield Launch(size, tokens, band, played.busy, milliseconds, theirs / played.makespan)


INTRODUCTION = f"""\
# moe_ffn on a V100: MODELLED

No V100 was involved. `{COMMAND}` runs the shipped sm_70 machine code in the
emulator and its trace through the timing model of one multiprocessor (`tests/sm70/README.md` says
what is not modelled; it is not calibrated, so compare columns, do not quote cycles). Two CTAs share
the multiprocessor; prologue, tickets, epilogue and the stagger of the CTAs count; {DRAM_FRACTION}
of the L2 traffic goes to DRAM. Where a run's tensors happen to lie moves a figure by up to 3 %.

"CUTLASS" is a CUTLASS 2.x Sm70 product (128 x 128 tiles, 64 x 64 warp tiles, two stages, bias and,
for fc1, exact GELU in the epilogue) that went through the same model with the same DRAM share. Its
cycles were found at depths 768, 3072 and 4096, GELU at 768; the rest is interpolated. It keeps no
pre-activation and makes no sums.
"""


def markdown(table: Mapping[str, Any]) -> str:
    """The page with the results of :func:`compute`."""
    results = {
        size: [Product(*(p[name] for name in Product._fields)) for p in found]
        for size, found in table["products"].items()
    }
    lines = [INTRODUCTION, "## Tensor pipe busy in a tile of 128 x 128\n"]
    lines += ["| size | product | depth | cycles | busy | CUTLASS |", "|---|---|---|---|---|---|"]
    for size, found in results.items():
        for p in found:
            cells = size, p.name, p.depth, f"{p.cycles:,.0f}", f"{p.busy:.3f}"
            lines.append(f"| {' | '.join(map(str, cells))} | {p.incumbent_busy:.3f} |")
    lines += [
        f"\n## Forward in one launch, {SPLIT[0]}:{SPLIT[1]} tokens,"
        f" {MULTIPROCESSORS} multiprocessors\n",
        "Beside a CUTLASS launch for each product of each expert, in whole waves of "
        f"{PROGRAMS * MULTIPROCESSORS} tiles. Without norm.\n",
        "| size | tokens | band | fill | ms at 1.53 GHz | faster |",
        "|---|---|---|---|---|---|",
    ]
    for f in (Launch(**launch) for launch in table["launches"]):
        cells = f.size, f.tokens, f.band, f"{f.fill:.3f}", f"{f.milliseconds:.3f}"
        lines.append(f"| {' | '.join(map(str, cells))} | {f.speedup:.2f} x |")
    lines.append("\n## The norm's phase\n")
    for size, cycles in table["norm_cycles"].items():
        (dim, hidden), (fc1, _, fc2, *_) = SIZES[size], results[size]
        of_products = fc1.cycles * hidden / TILE + fc2.cycles * dim / TILE
        share = cycles * TILE / cuda_launch.NORM_ROWS / of_products
        lines.append(
            f"* {size}: {cycles:,.0f} cycles of a multiprocessor for {cuda_launch.NORM_ROWS} rows, "
            f"{100 * share:.1f} % of the forward's products."
        )
    return "\n".join([*lines, *assumptions_section(table)]) + "\n"


def compute() -> dict[str, Any]:
    """All figures."""
    torch.set_num_threads(1)
    results = {size: products(size) for size in SIZES}
    forwards = [launch for size in SIZES for launch in launches(size, results[size])]
    return {
        "modelled": True,
        "command": COMMAND,
        "products": {s: [p._asdict() | {"busy": p.busy} for p in ps] for s, ps in results.items()},
        "launches": [f._asdict() for f in forwards],
        "norm_cycles": {size: norm_cycles(dim) for size, (dim, _) in SIZES.items()},
        "assumptions": assumed(dram_fraction=DRAM_FRACTION),
    }


if __name__ == "__main__":
    pages.main("volta", __doc__.splitlines()[0], compute, markdown)
