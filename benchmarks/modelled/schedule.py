"""What moe_ffn's kernels do with each ticket of a launch, in plain Python, and what that costs.

The kernels hold the same formulas (``locate`` in kernels/moe_ffn/triton/device.py, ``find_work`` in
backward_weights.py beside it), and the tests compare the two ticket by ticket.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from vlmo.kernels.moe_ffn import schedule
from vlmo.kernels.moe_ffn.schedule import TILE_OVERHEAD, Replay, shares_of, whole_tiles


class Task(NamedTuple):
    """What one ticket stands for: one part of one row tile in one phase."""

    phase: int
    tile: int
    part: int


@dataclass(frozen=True)
class Banded(schedule.Banded):
    """The tickets of :class:`vlmo.kernels.moe_ffn.schedule.Banded`, one by one."""

    @property
    def total(self) -> int:
        return self.tiles * sum(self.tasks)

    def first_ticket(self, step: int) -> int:
        """Tickets before ``step``."""
        return sum(self._begin(step - p) * count for p, count in enumerate(self.tasks))

    def locate(self, ticket: int) -> Task:
        if not 0 <= ticket < self.total:
            raise IndexError(f"ticket: {ticket} is outside [0, {self.total})")
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
        raise AssertionError(ticket)

    def __iter__(self) -> Iterator[Task]:
        """The tasks in the order of their tickets."""
        for phase, band, count in self.runs():
            for part in range(count):
                yield from (Task(phase, tile, part) for tile in band)


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
    through the same tokens, which are read from DRAM once. What is left is laid end to end, each
    tile behind some empty positions, and cut into one share per worker, the last share first.

    Attributes:
        tiles: tiles of each expert.
        steps: steps of one tile of each expert.
        workers: programs that are resident together.
        overhead: empty positions before each tile that is divided, or a share of many short tiles
            would be the last to end.
    """

    tiles: tuple[int, ...]
    steps: tuple[int, ...]
    workers: int
    overhead: int = TILE_OVERHEAD

    @property
    def whole(self) -> tuple[int, ...]:
        """Tiles of each expert that are not divided."""
        return whole_tiles(self.tiles, self.workers)

    @property
    def share(self) -> int:
        """Positions of each share of the rest; the last ones may be shorter."""
        rest = zip(self.tiles, self.whole, self.steps, strict=True)
        positions = sum((tiles - whole) * (steps + self.overhead) for tiles, whole, steps in rest)
        return -(-positions // self.workers)

    @property
    def total(self) -> int:
        return sum(self.whole) + self.workers

    def share_of(self, ticket: int) -> int:
        """Number of a ticket's share; a ticket for a whole tile gets one that no share has."""
        return self.total - 1 - ticket

    def pieces(self, ticket: int) -> list[Piece]:
        """What the program with this ticket works on, in order."""
        number = self.share_of(ticket)
        for expert, whole in enumerate(self.whole):
            if ticket < whole:
                return [Piece(expert, ticket, 0, self.steps[expert])]
            ticket -= whole
        first, last = number * self.share, (number + 1) * self.share
        found, position = [], 0
        for expert, steps in enumerate(self.steps):
            for tile in range(self.whole[expert], self.tiles[expert]):
                position += self.overhead
                begin, end = max(first - position, 0), min(last - position, steps)
                if begin < end:
                    found.append(Piece(expert, tile, begin, end))
                position += steps
        return found

    def peers(self, number: int, piece: Piece) -> range:
        """The shares that go on where an owner's ``piece``, the last of its share, breaks off."""
        missing = self.steps[piece.expert] - piece.last
        return range(number + 1, number + 1 + (-(-missing // self.share) if missing else 0))


def replay_split(split: Split, overhead: float, addition: float) -> Replay:
    """Play the tickets in order; a step costs 1.

    Args:
        overhead: what each piece costs beside its steps.
        addition: what it costs an owner to add one partial tile to its own.

    Raises:
        AssertionError: an owner waits for a share with a later ticket, which could hang.
    """
    free = [0.0] * split.workers
    ready: dict[int, float] = {}  # when the partial tile of a share is there
    busy = waiting = 0.0
    for ticket in range(split.total):
        time = free[0]
        share = split.share_of(ticket)
        for piece in split.pieces(ticket):
            cost = piece.last - piece.first + overhead
            time, busy = time + cost, busy + cost
            if piece.first > 0:
                ready[share] = time
                continue
            for peer in split.peers(share, piece):
                assert peer in ready, (ticket, peer)
                waiting += max(ready[peer] - time, 0.0)
                time, busy = max(ready[peer], time) + addition, busy + addition
        heapq.heapreplace(free, time)
    return shares_of(max(free), busy, waiting, split.workers)


def in_waves(launches: Iterable[tuple[int, float]], workers: int) -> float:
    """Makespan of separate launches of (tiles, cost of one): what a loop over experts gives."""
    return sum(-(-tiles // workers) * cost for tiles, cost in launches)
