"""The schedule of a persistent kernel, as far as the host determines it.

The kernels compute the work of each ticket (``locate`` in triton/device.py, ``find_work`` in
triton/backward_weights.py). benchmarks/modelled/schedule.py implements the same in plain Python,
and the tests compare both ticket by ticket.
"""

from __future__ import annotations

import functools
import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

# Estimated cost of the beginning and the end of a tile, or of a piece of one, in steps of its main
# loop, where nothing better is known. It affects the choice of the band, and the equal shares of
# tiles that are divided. The Triton backend has costs of each product in its tile table.
TILE_OVERHEAD = 3


@dataclass(frozen=True)
class Banded:
    """Tickets of a launch whose row tiles pass through several phases.

    Row tiles are processed in bands. Step s processes band s in phase 0, band s - 1 in phase 1 and
    so on. A tile therefore rarely waits for its previous phase, the output of a phase is still in
    L2 when the next one reads it, and short tasks of one phase fill the gaps between long tasks of
    another. Within a band the outer loop is over parts, so adjacent tickets share a weight tile.

    ``tasks`` counts the tasks of one row tile in each phase. Three row tiles in bands of two, one
    task in phase 0 and two in phase 1 give::

        step 0   phase 0: tiles 0 1
        step 1   phase 0: tile  2     phase 1: tiles 0 1 (part 0), 0 1 (part 1)
        step 2                        phase 1: tile  2 (part 0), 2 (part 1)
    """

    tiles: int
    band: int
    tasks: tuple[int, ...]

    def runs(self) -> Iterator[tuple[int, range, int]]:
        """Phase, row tiles and number of parts of each run of consecutive tickets, in order."""
        for step in range(-(-self.tiles // self.band) + len(self.tasks) - 1):
            for phase, count in enumerate(self.tasks):
                band = range(self._begin(step - phase), self._begin(step - phase + 1))
                if band and count:
                    yield phase, band, count

    def _begin(self, band: int) -> int:
        """First row tile of a band."""
        return min(max(band, 0) * self.band, self.tiles)


class Replay(NamedTuple):
    """Result of simulating a schedule with given costs."""

    makespan: float
    busy: float  # share of the workers' time spent on tasks
    waiting: float  # share spent on waiting


def replay(schedule: Banded, workers: int, costs: Sequence[float]) -> Replay:
    """Simulate the tickets in order; the first free worker takes the next one.

    A worker takes a ticket only after its last task is finished. If it took tickets in advance,
    some would wait for a long task while other workers are idle, which costs a fifth of the time at
    8k tokens.

    Args:
        costs: time of a task of each phase.

    Raises:
        AssertionError: a task waits for one with a later ticket, which could hang.
    """
    free = [0.0] * workers  # a heap
    ready = [[0.0] * schedule.tiles for _ in schedule.tasks]
    done = [[0] * schedule.tiles for _ in schedule.tasks]
    waiting = 0.0
    # Most of the time for choosing a band is spent in the innermost loop.
    for phase, band, parts in schedule.runs():
        cost, ends, before = costs[phase], ready[phase], _phase_before(phase, schedule.tasks)
        starts = [0.0] * schedule.tiles if before is None else ready[before]
        for tile in band:
            assert before is None or done[before][tile] == schedule.tasks[before], (phase, tile)
            done[phase][tile] += parts
        for _ in range(parts):
            for tile in band:
                start = free[0]
                if starts[tile] > start:
                    waiting += starts[tile] - start
                    start = starts[tile]
                end = start + cost
                if end > ends[tile]:
                    ends[tile] = end
                heapq.heapreplace(free, end)
    busy = schedule.tiles * sum(c * n for c, n in zip(costs, schedule.tasks, strict=True))
    return shares_of(max(free), busy, waiting, workers)


def _phase_before(phase: int, tasks: Sequence[int]) -> int | None:
    """The phase that a task of ``phase`` waits for: the last one before it that has tasks."""
    return max((p for p in range(phase) if tasks[p]), default=None)


def shares_of(makespan: float, busy: float, waiting: float, workers: int) -> Replay:
    """A result from the total times that all workers were busy and waiting."""
    time = workers * makespan
    return Replay(makespan, busy / time, waiting / time) if time else Replay(0.0, 1.0, 0.0)


# Candidates for a band, in twelfths of the band whose longest tasks occupy half of the workers,
# leaving the other half for the other tasks. The best band is rarely more than a percent better
# than the best of these.
_BANDS = (4, 6, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 20, 22, 24, 36)
# With more tickets than this, the choice of the band hardly matters, and simulating the launch
# would take the host longer than it saves.
_REPLAYED = 6000


@functools.lru_cache(maxsize=1024)
def choose_band(tiles: int, tasks: tuple[int, ...], workers: int, costs: tuple[float, ...]) -> int:
    """Row tiles per band: by simulation for short launches, else enough for half of the workers."""
    _, longest = max((cost, n) for cost, n in zip(costs, tasks, strict=True) if n)
    if tiles * sum(tasks) > _REPLAYED:
        return max(1, workers // (2 * longest))
    bands = sorted({min(max(workers * n // (24 * longest), 1), max(tiles, 1)) for n in _BANDS})
    return min(bands, key=lambda b: replay(Banded(tiles, b, tasks), workers, costs).makespan)


def band_of(
    tiles: int,
    tasks: Sequence[int],
    workers: int,
    depths: Sequence[int | None],
    *,
    step: int,
    rows_cost: int,
    overheads: Sequence[int] | None = None,
) -> int:
    """Row tiles per band of a launch.

    Args:
        tiles: row tiles of the launch.
        tasks: tasks of a row tile in each phase.
        workers: number of resident programs.
        depths: depth of the products of each phase, None for a phase without products.
        step: depth of a step of the main loop.
        rows_cost: estimated cost of a task without products, in steps.
        overheads: of the phases with products, in steps, instead of TILE_OVERHEAD.
    """
    each = itertools.repeat(TILE_OVERHEAD) if overheads is None else iter(overheads)
    costs = (rows_cost if d is None else -(-d // step) + next(each) for d in depths)
    return choose_band(tiles, tuple(tasks), workers, tuple(costs))


def whole_tiles(tiles: Sequence[int], workers: int) -> tuple[int, ...]:
    """The number of tiles of each expert that are not divided, of its ``tiles``.

    There are as many as fill all workers evenly: they process the same tokens at the same time, so
    these are read from DRAM once. The other tiles are divided into equal shares, one per worker
    (stream-K).
    """
    return tuple(count // workers * workers for count in tiles)
