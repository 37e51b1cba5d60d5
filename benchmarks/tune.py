"""Searches tile shapes of moe_ffn's Triton kernels on this GPU and prints a row for their table.

    python benchmarks/tune.py [--size SIZE] [--tokens N] [--split A:B] [--dtype DTYPE] [--quick]

The kernels are tuned one after the other. All candidates of a kernel are compiled in parallel; then
each is run, checked against float64 with the error bound of :mod:`vlmo.testing`, and timed in turn
with all others. At the end a step with the tiles found is timed against one with separate launches
(SEPARATE in :mod:`vlmo.kernels.moe_ffn.triton.tiles`) and against the backend "composed", whose
products are cuBLAS's. The row is for the table in the same module.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace

import torch

from bench_moe_ffn import SIZES, Sublayer, routed
from harness.contenders import Case, Work, leaves
from harness.meter import median_seconds
from harness.session import describe_error, why_inexact
from vlmo.device import versions
from vlmo.kernels._backends.triton import has_descriptors
from vlmo.kernels.moe_ffn.triton import tiles
from vlmo.kernels.moe_ffn.triton.tiles import Tile, Tiles, use_tiles
from vlmo.kernels.target import GENERATIONS, describe, interpreted

KERNELS = tuple(kernel.name for kernel in fields(Tiles))
OURS, COMPOSED = "vlmo:triton", "vlmo:composed"
# What is compared at the end: the contender, and from which number of tokens launches are separate.
FORMS = {
    OURS: (OURS, None),
    "vlmo:triton, separate launches": (OURS, 0),
    COMPOSED: (COMPOSED, None),
}
_REGISTERS = 65536  # 32-bit registers of a multiprocessor, in every generation


class Trial:
    """A call of the layer with every gradient, on which tiles are tried.

    A kernel of the backward is timed as part of a whole backward in which only its tile changes.

    Args:
        case: case of :mod:`bench_moe_ffn`, forward and backward.
        device: a GPU, or the CPU for Triton's interpreter.

    Raises:
        NotImplementedError: the kernels cannot run on this device.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        self.device, self.problem = device, Sublayer(case, device)
        ours = self.problem.entered[OURS]
        reason = ours.why_not()
        if reason is not None:
            raise NotImplementedError(reason)
        again = routed(self.problem.split, "triton", recompute=True)
        self._forms = {OURS: ours.make(None), "recompute": again}
        self.problem.entered["recompute"] = ours._replace(make=lambda chosen: again)

    def why_wrong(self, kernel: str) -> str | None:
        """Run the call with the current tiles; the reason if a result exceeds its error bound."""
        return why_inexact(OURS, self.problem.check(self._name(kernel)))

    def work(self, kernel: str) -> Work:
        """A function that launches the kernel with the tiles current at the time of its call."""
        form, problem = self._forms[self._name(kernel)], self.problem
        if kernel == "forward":
            return functools.partial(torch.no_grad()(form), problem.x.detach(), problem.parameters)
        y = form(problem.x, problem.parameters)
        inputs = [problem.x, *leaves(problem.parameters)]
        return functools.partial(torch.autograd.grad, y, inputs, problem.dy, retain_graph=True)

    def _name(self, kernel: str) -> str:
        return kernel if kernel == "recompute" else OURS


@dataclass
class Search:
    """The results for the candidates of a kernel."""

    seconds: dict[Tile, float] = field(default_factory=dict)
    dropped: dict[Tile, str] = field(default_factory=dict)

    @property
    def winner(self) -> Tile:
        return min(self.seconds, key=self.seconds.__getitem__)


def search(trial: Trial, kernel: str, base: Tiles, candidates: Sequence[Tile]) -> Search:
    """Time every candidate that passes the accuracy check; other kernels use the tiles of ``base``.

    Raises:
        RuntimeError: no candidate passes, or one has left the GPU in an error state.
    """
    found, works = Search(), {}
    rows = {
        tile: replace(base, **{kernel: tile})
        for tile in dict.fromkeys([getattr(base, kernel), *candidates])
    }
    with use_tiles(base):
        work = trial.work(kernel)
    _compile([functools.partial(_with, row, work) for row in rows.values()])
    for tile, row in rows.items():
        why = _why_dropped(trial, kernel, row)
        if why is None:
            works[tile] = functools.partial(_with, row, work)
        else:
            found.dropped[tile] = why
            print(f"{kernel}: dropped {tile}: {why}")
    if not works:
        raise RuntimeError(f"{kernel}: none of {len(found.dropped)} candidates runs and is right")
    turns = dict(calls=1, rounds=1) if interpreted() else dict(calls=50, rounds=10)
    times = median_seconds(list(works.values()), trial.device, **turns)
    found.seconds = dict(zip(works, times, strict=True))
    before = found.seconds.get(getattr(base, kernel))
    print(
        f"{kernel}: {found.winner}: {1e3 * found.seconds[found.winner]:.3f} ms, the tile of the "
        f"table {'does not run' if before is None else f'{1e3 * before:.3f} ms'}; "
        f"{len(works)} timed, {len(found.dropped)} dropped",
        flush=True,
    )
    return found


def _with(row: Tiles, work: Work, separate: int | None = None) -> object:
    with use_tiles(row, separate):
        return work()


def _compile(works: Iterable[Work]) -> None:
    """Compile in parallel; a candidate that does not compile is reported when it is run."""
    # Imported here because it imports Triton.
    from vlmo.kernels._backends.triton_launch import compile_only

    with compile_only():
        for work in works:
            with contextlib.suppress(Exception):
                work()


def _why_dropped(trial: Trial, kernel: str, row: Tiles) -> str | None:
    try:
        with use_tiles(row):
            return trial.why_wrong(kernel)
    except Exception as error:  # compiler errors have no common type; they are reported
        if torch.cuda.is_available():
            try:
                torch.cuda.synchronize()
            except RuntimeError as dead:  # no kernel can run in this process any more
                tile = getattr(row, kernel)
                raise RuntimeError(f"{tile} ended the search: {error}") from dead
        return describe_error(error)


def candidates(
    shared_bytes: int, itemsize: int, quick: bool = False, descriptors: bool = False
) -> list[Tile]:
    """The tiles that fit on a multiprocessor; each also with ``descriptors`` if that is set."""
    if quick:
        axes: tuple[Sequence[int], ...] = (
            (128,),
            (128, 256),
            (128 // itemsize,),
            (4, 8),
            (2, 3, 4),
            (1, 2),
        )
    else:
        axes = ((64, 128), (64, 128, 256), (32, 64), (4, 8), (2, 3, 4, 5), (1, 2))
    ways = (False, True) if descriptors else (False,)
    tiles_of = itertools.starmap(Tile, itertools.product(*axes, ways))
    return [tile for tile in tiles_of if _fits(tile, shared_bytes, itemsize)]


def _fits(tile: Tile, shared_bytes: int, itemsize: int) -> bool:
    # The operands of every stage must fit in shared memory, and the accumulators in half of the
    # registers, which leaves the other half for everything else.
    stage = (tile.block_t + tile.block_n) * tile.block_k * itemsize
    accumulators = tile.block_t * tile.block_n
    return (
        stage * tile.num_stages * tile.programs <= shared_bytes
        and accumulators * tile.programs <= _REGISTERS // 2
        and accumulators <= 128 * 32 * tile.num_warps
    )


def row_of(key: tuple[str, str], found: Tiles) -> str:
    """A row of the table as source code."""
    lines = [f"    {key!r}: Tiles(".replace("'", '"')]
    for kernel in KERNELS:
        tile = getattr(found, kernel)
        sizes = [tile.block_t, tile.block_n, tile.block_k, tile.num_warps, tile.num_stages]
        words = [*map(str, sizes)]
        words += [f"programs={tile.programs}"] if tile.programs != 1 else []
        words += ["descriptors=True"] if tile.descriptors else []
        lines.append(f"        {kernel}=Tile({', '.join(words)}),")
    return "\n".join([*lines, "    ),"])


def compare(trial: Trial, best: Tiles) -> None:
    """Print the times of a step with the tiles found, with separate launches, and composed."""
    problem, works = trial.problem, {}
    for label, (name, separate) in FORMS.items():
        if reason := problem.why_not(name):
            print(f"{label}: not timed: {reason}")
            continue
        with use_tiles(best, separate):
            if wrong := why_inexact(name, problem.check(name)):
                print(f"{label}: not timed: {wrong}")
                continue
        works[label] = functools.partial(_with, best, problem.work(name), separate)
    turns = dict(calls=1, rounds=1) if interpreted() else dict(calls=50, rounds=10)
    times = median_seconds(list(works.values()), trial.device, **turns)
    found = dict(zip(works, times, strict=True))
    shown = ", ".join(f"{label} {1e3 * time:.3f} ms" for label, time in found.items())
    print(f"forward and backward: {shown}; the fastest is {min(found, key=found.__getitem__)}")


def main() -> int:
    usual = dict(size="base", tokens=32768, split="40:197", dtype="bfloat16")
    if interpreted():
        usual = dict(size="tiny", tokens=14, split="3:4", dtype="float32")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, help=f"of the model ({usual['size']})")
    parser.add_argument("--tokens", type=int, help=f"of the batch ({usual['tokens']})")
    parser.add_argument("--split", help=f"tokens of each expert in a sequence ({usual['split']})")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--quick", action="store_true", help="try the likeliest tiles only")
    parser.set_defaults(**usual)
    given = parser.parse_args()
    if not interpreted() and not torch.cuda.is_available():
        parser.error("needs an NVIDIA GPU, and torch finds none here")

    device, dtype = torch.device("cpu"), getattr(torch, given.dtype)
    shapes = [Tile(16, 32, 16, 4, 1)]
    if interpreted():
        print("Interpreted: this shows that the search works; its times mean nothing.")
    else:
        device = torch.device("cuda", torch.cuda.current_device())
        generation = GENERATIONS[tiles.key_of(device, dtype)[0]]
        # Hopper and Blackwell have an engine for copies by tensor descriptors.
        described = dtype.itemsize == 2 and generation.since >= (9, 0) and has_descriptors()
        shapes = candidates(generation.shared_bytes, dtype.itemsize, given.quick, described)
    shape = dict(tokens=given.tokens, split=given.split)
    trial = Trial(Case("moe_ffn", given.size, dtype, "forward+backward", shape), device)
    best = tiles.choose(device, dtype)
    try:
        for kernel in KERNELS:
            best = replace(best, **{kernel: search(trial, kernel, best, shapes).winner})
    finally:  # also after an error or an interruption
        command = shlex.join(["benchmarks/tune.py", *sys.argv[1:]])
        print(f"\n    # {describe(device)}, {versions()}, {command}")
        print(row_of(tiles.key_of(device, dtype), best))
    compare(trial, best)
    return 0


if __name__ == "__main__":
    sys.exit(main())
