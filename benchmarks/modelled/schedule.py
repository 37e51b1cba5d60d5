"""The work of each ticket of moe_ffn's launches in plain Python, and a simulation of its cost.

The kernels contain the same formulas (``locate`` in kernels/moe_ffn/triton/device.py, ``find_work``
in backward_weights.py beside it), and the tests compare both ticket by ticket.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from vlmo.kernels.moe_ffn import schedule
from vlmo.kernels.moe_ffn.schedule import TILE_OVERHEAD, Replay, shares_of, whole_tiles


class Task(NamedTuple):
    """The work of a ticket: one part of one row tile in one phase."""

    phase: int
    tile: int
    part: int


@dataclass(frozen=True)
class Banded(schedule.Banded):
    """:class:`vlmo.kernels.moe_ffn.schedule.Banded` with access to single tickets."""

    @property
    def total(self) -> int:
        return self.tiles * sum(self.tasks)

    def first_ticket(self, step: int) -> int:
        """Number of tickets before ``step``."""
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
    """Tickets of a launch whose tiles are long sums over tokens, and few (stream-K).

    As many whole tiles of each expert as fill all workers evenly come first: they process the same
    tokens at the same time, so these are read from DRAM once. The other tiles are concatenated,
    each after some empty positions, and divided into one share per worker; tickets start with the
    last share.

    Attributes:
        tiles: number of tiles of each expert.
        steps: steps of a tile of each expert.
        workers: number of resident programs.
        overhead: empty positions before each divided tile, without which a share of many short
            tiles would take longest.
    """

    tiles: tuple[int, ...]
    steps: tuple[int, ...]
    workers: int
    overhead: int = TILE_OVERHEAD

    @property
    def whole(self) -> tuple[int, ...]:
        """Number of tiles of each expert that are not divided."""
        return whole_tiles(self.tiles, self.workers)

    @property
    def share(self) -> int:
        """Positions per share of the divided tiles; the last shares may be shorter."""
        rest = zip(self.tiles, self.whole, self.steps, strict=True)
        positions = sum((tiles - whole) * (steps + self.overhead) for tiles, whole, steps in rest)
        return -(-positions // self.workers)

    @property
    def total(self) -> int:
        return sum(self.whole) + self.workers

    def share_of(self, ticket: int) -> int:
        """Number of a ticket's share; for a whole tile, a number that no share has."""
        return self.total - 1 - ticket

    def pieces(self, ticket: int) -> list[Piece]:
        """The pieces that the program with this ticket processes, in order."""
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
        """The shares that continue the tile of an owner's ``piece``, the last of its share."""
        missing = self.steps[piece.expert] - piece.last
        return range(number + 1, number + 1 + (-(-missing // self.share) if missing else 0))


def replay_split(split: Split, overhead: float, addition: float) -> Replay:
    """Simulate the tickets in order; a step costs 1.

    Args:
        overhead: cost of a piece in addition to its steps.
        addition: cost for an owner to add a partial tile to its own.

    Raises:
        AssertionError: an owner waits for a share with a later ticket, which could hang.
    """
    free = [0.0] * split.workers
    ready: dict[int, float] = {}  # time at which the partial tile of a share is ready
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
    """Makespan of consecutive launches (tiles, cost of a tile), as of a loop over experts."""
    return sum(-(-tiles // workers) * cost for tiles, cost in launches)
