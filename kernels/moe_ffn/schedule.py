"""The order of work inside a persistent launch, as plain Python: what the kernels do, and its cost.

The kernels hold the same formulas (``triton_parts.locate``, ``triton_weights.find_work``), and the
tests compare the two ticket by ticket. Nothing here touches a tensor.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Task(NamedTuple):
    """What one ticket stands for: one part of one row tile in one phase."""

    phase: int
    tile: int
    part: int


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

    @property
    def total(self) -> int:
        return self.tiles * sum(self.tasks)

    def first_ticket(self, step: int) -> int:
        """Tickets before ``step``."""
        return sum(self._begin(step - p) * count for p, count in enumerate(self.tasks))

    def locate(self, ticket: int) -> Task:
        step = ticket // (self.band * sum(self.tasks))
        while self.first_ticket(step + 1) <= ticket:
            step += 1
        offset = ticket - self.first_ticket(step)
        for phase, count in enumerate(self.tasks):
            first = self._begin(step - phase)
            size = self._begin(step - phase + 1) - first
            if offset < size * count:
                return Task(phase, first + offset % size, offset // size)
            offset -= size * count
        raise ValueError(f"ticket: {ticket} is outside 0..{self.total - 1}")

    def __iter__(self) -> Iterator[Task]:
        """The tasks in the order of their tickets."""
        for step in range(-(-self.tiles // self.band) + len(self.tasks) - 1):
            for phase, count in enumerate(self.tasks):
                band = range(self._begin(step - phase), self._begin(step - phase + 1))
                for part in range(count):
                    yield from (Task(phase, tile, part) for tile in band)

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

    Args:
        costs: time of one task of each phase.

    Raises:
        AssertionError: a task waits for one with a later ticket, which could hang.
    """
    free = [0.0] * workers
    done = [[0] * schedule.tiles for _ in schedule.tasks]
    ready = [[0.0] * schedule.tiles for _ in schedule.tasks]
    before = [
        max((q for q in range(p) if schedule.tasks[q]), default=None)
        for p in range(len(schedule.tasks))
    ]
    waiting = busy = 0.0
    for phase, tile, _ in schedule:
        start = heapq.heappop(free)
        source = before[phase]
        if source is not None:
            assert done[source][tile] == schedule.tasks[source], (phase, tile)
            waiting += max(ready[source][tile] - start, 0.0)
            start = max(ready[source][tile], start)
        end = start + costs[phase]
        busy += costs[phase]
        done[phase][tile] += 1
        ready[phase][tile] = max(ready[phase][tile], end)
        heapq.heappush(free, end)
    makespan = max(free)
    if makespan == 0.0:
        return Replay(0.0, 1.0, 0.0)
    return Replay(makespan, busy / (workers * makespan), waiting / (workers * makespan))


# Usually a band's longest tasks keep half of the workers busy, and leave as many for the others.
_BANDS = (4, 6, 8, 11, 14, 16, 18, 20, 22, 24, 26, 28, 30, 33, 36, 40, 44, 52, 64)
# Above this many tickets a launch is so long that the choice of band hardly matters, and replaying
# it would take the host longer than it saves.
_REPLAYED = 3000


@functools.lru_cache(maxsize=1024)
def choose_band(tiles: int, tasks: tuple[int, ...], workers: int, costs: tuple[float, ...]) -> int:
    """Row tiles of a band: by replay for short launches, else half of the workers' worth."""
    longest = max(cost for cost, count in zip(costs, tasks, strict=True) if count)
    usual = max(1, workers // (2 * tasks[costs.index(longest)]))
    if tiles * sum(tasks) > _REPLAYED or tiles <= 1:
        return usual
    bands = [*(band for band in _BANDS if band < tiles), tiles]
    return min(bands, key=lambda b: replay(Banded(tiles, b, tasks), workers, costs).makespan)


class Piece(NamedTuple):
    """Steps [first, last) of one tile of one expert."""

    expert: int
    tile: int
    first: int
    last: int


@dataclass(frozen=True)
class Split:
    """Tickets of a launch whose tiles are sums over tokens, long and few.

    As many whole tiles of each expert as fill all workers evenly come first: they run side by side
    through the same tokens, which are read from DRAM once. What is left is laid end to end and cut
    into one share per worker, the last share first.

    Attributes:
        tiles: tiles of each expert.
        steps: steps of one tile of each expert.
        workers: programs that are resident together.
    """

    tiles: tuple[int, ...]
    steps: tuple[int, ...]
    workers: int

    @property
    def whole(self) -> tuple[int, ...]:
        """Tiles of each expert that are not divided."""
        return tuple(count // self.workers * self.workers for count in self.tiles)

    @property
    def share(self) -> int:
        """Steps of each share of the rest; the last ones may be shorter."""
        rest = zip(self.tiles, self.whole, self.steps, strict=True)
        return -(-sum((count - whole) * steps for count, whole, steps in rest) // self.workers)

    @property
    def total(self) -> int:
        return sum(self.whole) + self.workers

    def pieces(self, ticket: int) -> list[Piece]:
        """What the program with this ticket works on, in order."""
        for expert, whole in enumerate(self.whole):
            if ticket < whole:
                return [Piece(expert, ticket, 0, self.steps[expert])]
            ticket -= whole
        number = self.workers - 1 - ticket
        first, last = number * self.share, (number + 1) * self.share
        found, position = [], 0
        for expert, steps in enumerate(self.steps):
            for tile in range(self.whole[expert], self.tiles[expert]):
                begin, end = max(first - position, 0), min(last - position, steps)
                if begin < end:
                    found.append(Piece(expert, tile, begin, end))
                position += steps
        return found
