"""``vlmo tune``: search tile shapes of the routed feed-forward layer on this GPU.

The kernels are searched one after the other. All candidates of one are compiled, several at a time;
then each is run, held against float64 by the rule of :mod:`vlmo.parity`, and timed in turn with all
others. The table that comes out is what ``VLMO_TILES`` names (see
:mod:`vlmo.kernels.moe_ffn.triton.tiles`); it is written after each kernel.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from vlmo.files import write_json
from vlmo.kernels.moe_ffn.triton import backend as triton_impl
from vlmo.kernels.moe_ffn.triton import tiles
from vlmo.kernels.moe_ffn.triton.tiles import Tile, Tiles
from vlmo.kernels.target import describe, interpreted
from vlmo.machine import versions
from vlmo.timing import median_seconds
from vlmo.trial import TINY, Problem, Trial

KERNELS = tuple(kernel.name for kernel in fields(Tiles))
_REGISTERS = 65536  # of 32 bits, on a multiprocessor of every generation


def parse_problem(given: Mapping[str, Any]) -> Problem:
    """The call to tune for: the options that were given, and what is usual here for the others."""
    values = dict(given)
    if "split" in values:
        try:
            values["split"] = tuple(int(part) for part in values["split"].split(":"))
        except ValueError:
            raise ValueError(f"split: {given['split']!r} is not like 40:197") from None
    if "dtype" in values:
        values["dtype"] = getattr(torch, values["dtype"])
    return replace(TINY if interpreted() else Problem(), **values)


def tune(problem: Problem, output: Path, console: Console, *, quick: bool = False) -> Tiles:
    """Search all kernels and write the row into ``output``, beside rows of other GPUs.

    The file is written after each kernel, with the built-in tiles of those that are still to come,
    so that a search that is interrupted leaves what it has found.

    Raises:
        NotImplementedError: there is nothing here to tune for.
        ValueError: ``output`` is there and is not a table.
        OSError: ``output`` cannot be written.
    """
    device = _device(problem)
    others = _rows_to_keep(output, tiles.key_of(device, problem.dtype))
    if interpreted():
        console.print("Interpreted: this shows that the search works; its times mean nothing.")
    console.print(f"{describe(device)}: {problem.command}")
    trial = Trial(problem, device)
    best = tiles.built_in(device, problem.dtype)
    candidates = _candidates(problem, device, quick)
    results: dict[str, Any] = {}
    for kernel in KERNELS:
        found = search(trial, kernel, best, candidates, console)
        results[kernel] = found.record(getattr(best, kernel))
        best = replace(best, **{kernel: found.winner})
        row = _row(problem, device, best, results, quick)
        write_json(output, {"version": tiles.FILE_VERSION, "rows": [*others, row]})
    console.print(f"Wrote {output}. To use it: VLMO_TILES={output}", soft_wrap=True)
    return best


def _row(
    problem: Problem, device: torch.device, best: Tiles, results: Mapping[str, Any], quick: bool
) -> dict[str, Any]:
    """The row of a table that says what has been found so far."""
    generation, operands = tiles.key_of(device, problem.dtype)
    measured = {
        "gpu": describe(device),
        "versions": versions() | {"cuda": torch.version.cuda},
        "command": problem.command + (" --quick" if quick else ""),
        "times_mean_something": not interpreted(),
        "kernels": results,
    }
    return dict(generation=generation, operands=operands, tiles=asdict(best), measured=measured)


@dataclass
class Search:
    """What became of the candidates of one kernel."""

    seconds: dict[Tile, float] = field(default_factory=dict)
    dropped: dict[Tile, str] = field(default_factory=dict)

    @property
    def winner(self) -> Tile:
        return min(self.seconds, key=self.seconds.__getitem__)

    def record(self, built_in: Tile) -> dict[str, Any]:
        """For the table's readers: milliseconds of all candidates, the fastest first."""
        seconds = sorted(self.seconds.items(), key=lambda item: item[1])
        return {
            "winner_ms": 1e3 * self.seconds[self.winner],
            "built_in_ms": 1e3 * self.seconds[built_in] if built_in in self.seconds else None,
            "candidates": [asdict(tile) | {"ms": 1e3 * s} for tile, s in seconds],
            "dropped": [asdict(tile) | {"reason": why} for tile, why in self.dropped.items()],
        }


def search(
    trial: Trial, kernel: str, base: Tiles, candidates: Sequence[Tile], console: Console
) -> Search:
    """Time every candidate that runs and is right; the other kernels stay as in ``base``.

    Raises:
        RuntimeError: no candidate is left.
    """
    found, works = Search(), {}
    rows = {
        tile: replace(base, **{kernel: tile})
        for tile in dict.fromkeys([getattr(base, kernel), *candidates])
    }
    _compile(trial, kernel, rows.values())
    for tile, row in rows.items():
        why = _why_failed(functools.partial(trial.why_wrong, kernel, row), tile)
        if why is None:
            works[tile] = trial.work(kernel, row)
        else:
            found.dropped[tile] = why
            console.print(f"{kernel}: dropped {tile}: {why}", soft_wrap=True, markup=False)
    if not works:
        raise RuntimeError(f"{kernel}: none of {len(found.dropped)} candidates runs and is right")
    turns = dict(rounds=1, launches=1) if interpreted() else dict(rounds=10, launches=5)
    times = median_seconds(list(works.values()), trial.device, flush=True, **turns)
    found.seconds = dict(zip(works, times, strict=True))
    built_in, winner = found.seconds.get(getattr(base, kernel)), found.winner
    before = "does not run" if built_in is None else f"{1e3 * built_in:.3f} ms"
    console.print(
        f"{kernel}: {winner}: {1e3 * found.seconds[winner]:.3f} ms, built-in {before}; "
        f"{len(works)} timed, {len(found.dropped)} dropped",
        soft_wrap=True,
    )
    return found


def _compile(trial: Trial, kernel: str, rows: Iterable[Tiles]) -> None:
    """Several at a time; what does not compile is reported when it is run."""
    # Imported here because it imports Triton.
    from vlmo.kernels._backends.triton_launch import compile_only

    with compile_only():
        for row in rows:
            with contextlib.suppress(Exception):
                trial.run(kernel, row)


def _why_failed(check: Callable[[], str | None], tile: Tile) -> str | None:
    try:
        return check()
    except Exception as error:  # a compiler's refusal has no common type; it is reported
        if torch.cuda.is_available():
            try:
                torch.cuda.synchronize()
            except RuntimeError as dead:  # nothing can run in this process any more
                raise RuntimeError(f"{tile} ended the search: {error}") from dead
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]}"


def _candidates(problem: Problem, device: torch.device, quick: bool) -> list[Tile]:
    if device.type == "cpu":
        return [Tile(16, 32, 16, 4, 1)]
    generation = tiles.GENERATIONS[tiles.key_of(device, problem.dtype)[0]]
    return candidates(generation.shared_bytes, problem.dtype.itemsize, quick)


def candidates(shared_bytes: int, itemsize: int, quick: bool = False) -> list[Tile]:
    """The tiles that a multiprocessor has room for."""
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
    tiles_of = itertools.starmap(Tile, itertools.product(*axes))
    return [tile for tile in tiles_of if _fits(tile, shared_bytes, itemsize)]


def _fits(tile: Tile, shared_bytes: int, itemsize: int) -> bool:
    # The operands of every stage, and the accumulators in half of the registers, so that a thread
    # has as many left for all else.
    stage = (tile.block_t + tile.block_n) * tile.block_k * itemsize
    accumulators = tile.block_t * tile.block_n
    return (
        stage * tile.num_stages * tile.programs <= shared_bytes
        and accumulators * tile.programs <= _REGISTERS // 2
        and accumulators <= 128 * 32 * tile.num_warps
    )


def _device(problem: Problem) -> torch.device:
    if interpreted():
        device = torch.device("cpu")
    elif torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    else:
        raise NotImplementedError("tune: needs an NVIDIA GPU, and torch finds none here.")
    hidden = [problem.hidden] * len(problem.split)
    reason = triton_impl.why_not(device, problem.dtype, problem.dim, hidden, "gelu")
    if reason is not None:
        raise NotImplementedError(f"tune: {reason}")
    return device


def _rows_to_keep(output: Path, key: tuple[str, str]) -> list[dict[str, Any]]:
    """Rows of an older file that are not of this GPU's generation and kind of operand."""
    if not output.parent.is_dir():
        raise FileNotFoundError(f"{output}: its folder does not exist")
    if not output.exists():
        return []
    rows = tiles.rows_of(output)
    return [row for row in rows if (row["generation"], row["operands"]) != key]
