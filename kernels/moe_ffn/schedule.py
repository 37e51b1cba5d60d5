"""The order of work inside a persistent launch, as far as the host decides it.

The kernels find the work of each ticket (``locate`` in triton/device.py, ``find_work`` in
triton/backward_weights.py); benchmarks/modelled/schedule.py says the same in plain Python, and the
tests compare the two ticket by ticket.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

# What the prologue and epilogue of a tile, or of a piece of one, cost in steps of its main loop: a
# guess. It steers the choice of the band and the equal shares of what is divided.
TILE_OVERHEAD = 3


@dataclass(frozen=True)
class Banded:
    """Tickets of a launch whose row tiles go through several phases.

    Row tiles are taken in bands. Step s works on band s in phase 0, band s - 1 in phase 1 and so
    on, so that a tile rarely waits for the phase before it, what one phase writes is still in L2
    when the next reads it, and the short tasks of one phase fill the gaps that the long ones of
    another leave. Within a band the parts are the outer loop: neighbours share a tile of weights.

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
        """Phase, row tiles and number of parts of the tickets that lie together, in their order."""
        for step in range(-(-self.tiles // self.band) + len(self.tasks) - 1):
            for phase, count in enumerate(self.tasks):
                band = range(self._begin(step - phase), self._begin(step - phase + 1))
                if band and count:
                    yield phase, band, count

    def _begin(self, band: int) -> int:
        """First row tile of a band."""
        return min(max(band, 0) * self.band, self.tiles)


class Replay(NamedTuple):
    """What came of playing a schedule with given costs."""

    makespan: float
    busy: float  # share of the workers' time spent in tasks
    waiting: float  # share spent in waits


def replay(schedule: Banded, workers: int, costs: Sequence[float]) -> Replay:
    """Play the tickets in order, each taken by the first worker that is free.

    A worker takes no ticket before it is done with its last one. Taken ahead, a ticket would lie
    behind a long task while others have nothing to do: that costs a fifth of the time at 8k tokens.

    Args:
        costs: time of one task of each phase.

    Raises:
        AssertionError: a task waits for one with a later ticket, which could hang.
    """
    free = [0.0] * workers  # a heap
    ready = [[0.0] * schedule.tiles for _ in schedule.tasks]
    done = [[0] * schedule.tiles for _ in schedule.tasks]
    waiting = 0.0
    # The innermost loop is what the host spends its time on when it chooses a band.
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
    """Of times that all workers together were busy and waiting."""
    time = workers * makespan
    return Replay(makespan, busy / time, waiting / time) if time else Replay(0.0, 1.0, 0.0)


# In twelfths of what keeps half of the workers busy with a band's longest tasks, and leaves as many
# for the others. The best band is seldom more than a percent better than the best of these.
_BANDS = (4, 6, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 20, 22, 24, 36)
# Above this many tickets a launch is so long that the choice of band hardly matters, and replaying
# it would take the host longer than it saves.
_REPLAYED = 6000


@functools.lru_cache(maxsize=1024)
def choose_band(tiles: int, tasks: tuple[int, ...], workers: int, costs: tuple[float, ...]) -> int:
    """Row tiles of a band: by replay for short launches, else half of the workers' worth."""
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
) -> int:
    """Row tiles of a band of a launch.

    Args:
        tiles: row tiles of the launch.
        tasks: tasks of a row tile in each phase.
        workers: programs that are resident at a time.
        depths: length of the products of each phase, None of one without products.
        step: length that one step of the main loop takes.
        rows_cost: steps that a task without products costs; it only steers the choice.
    """
    costs = (rows_cost if d is None else -(-d // step) + TILE_OVERHEAD for d in depths)
    return choose_band(tiles, tuple(tasks), workers, tuple(costs))


def whole_tiles(tiles: Sequence[int], workers: int) -> tuple[int, ...]:
    """Tiles of each expert that are not divided, of ``tiles`` whose sums over tokens are long.

    As many as fill all workers evenly: they run side by side through the same tokens, which are
    read from DRAM once. What is left is divided into equal shares, one for each worker (stream-K).
    """
    return tuple(count // workers * workers for count in tiles)
