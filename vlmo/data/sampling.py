"""Which samples make up which global batch: the same for any number of ranks, from any step on."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

from vlmo.data.draws import Draw, hashed

_TRIES = 4  # to find a row's partner


class GlobalBatches(Sampler[list[Draw]]):
    """Shuffled batches without end, for ``DataLoader(batch_sampler=...)`` on every rank.

    The global batch of step n depends on the data, ``batch_size``, ``seed`` and n alone. Each rank
    gets its contiguous share of it, so ranks together see what one process would see, and a
    training that goes on at ``first_step`` sees what an uninterrupted one would have seen.

    An epoch is ``steps_per_epoch`` batches of a new permutation; the samples at its end that fill
    no batch are left out.

    With ``keys`` no two samples of a global batch have equal keys. In a random batch of 128 digit
    scenes a quarter share their meaning with another one: contrast would call a true caption false,
    and matching would seek out exactly these pairs as its hard negatives. A sample that does not
    fit waits for the next batch; an epoch then repeats a few samples where the last ones do not fit
    together. With ``groups`` as well, half of a batch are partners that an equal group brought
    along: pictures of the same digits in another arrangement, which random batches seldom hold.

    Args:
        size: number of samples.
        batch_size: of the global batch, a multiple of ``world_size``.
        rank: 0 .. ``world_size`` - 1.
        world_size: number of ranks.
        seed: of the order and of the samples' own seeds, not negative.
        first_step: number of the first batch, from 0.
        steps: number of batches to yield; None for no end.
        keys: one per sample.
        groups: one per sample; needs ``keys``.

    Attributes:
        steps_per_epoch: ``size // batch_size``.

    Raises:
        ValueError: an argument outside what is listed, fewer samples or different keys than
            ``batch_size``.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        first_step: int = 0,
        steps: int | None = None,
        keys: Sequence[Hashable] | None = None,
        groups: Sequence[Hashable] | None = None,
    ):
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: {rank} is not within 0..{world_size - 1}")
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"batch_size: {batch_size} is not a multiple of {world_size} ranks")
        if batch_size > size:
            raise ValueError(f"batch_size: {batch_size} exceeds the {size} samples")
        for name, value in (("seed", seed), ("first_step", first_step), ("steps", steps or 0)):
            if value < 0:
                raise ValueError(f"{name}: {value} is negative")
        _check_keys(keys, groups, size, batch_size)
        self.size, self.batch_size = size, batch_size
        self.rank, self.world_size = rank, world_size
        self.seed, self.first_step, self.steps = seed, first_step, steps
        self.steps_per_epoch = size // batch_size
        self._keys, self._groups = keys, groups

    def __len__(self) -> int:
        if self.steps is None:
            raise TypeError("steps: None has no length")
        return self.steps

    def __iter__(self) -> Iterator[list[Draw]]:
        share = self.batch_size // self.world_size
        mine = slice(self.rank * share, (self.rank + 1) * share)
        step = self.first_step
        end = None if self.steps is None else step + self.steps
        while end is None or step < end:
            epoch, first = divmod(step, self.steps_per_epoch)
            for rows in self._epoch(epoch, first):
                if step == end:
                    return
                seeds = hashed(self.seed, step, rows[mine]).tolist()
                yield [*map(Draw, rows[mine].tolist(), seeds)]
                step += 1

    def _epoch(self, epoch: int, first: int) -> Iterator[np.ndarray]:
        """Rows ``[batch_size]`` of an epoch's global batches from batch ``first`` on."""
        generator = torch.Generator().manual_seed(int(hashed(self.seed, epoch)))
        if self._keys is not None:
            batches = _distinct(self._keys, self._groups, self.batch_size, generator)
            for number in range(self.steps_per_epoch):
                rows = next(batches)
                if number >= first:
                    yield rows
            return
        order = torch.randperm(self.size, generator=generator).numpy()
        for number in range(first, self.steps_per_epoch):
            yield order[number * self.batch_size : (number + 1) * self.batch_size]


def _distinct(
    keys: Sequence[Hashable],
    groups: Sequence[Hashable] | None,
    batch_size: int,
    generator: torch.Generator,
) -> Iterator[np.ndarray]:
    """Rows ``[batch_size]`` with different keys, without end; every row before any comes again."""
    waiting: deque[int] = deque()
    members: dict[Hashable, deque[int]] = {}
    unused: set[int] = set()
    while True:
        rows: list[int] = []
        seen: set[Hashable] = set()
        held: list[int] = []
        while len(rows) < batch_size:
            if not waiting:
                order = torch.randperm(len(keys), generator=generator).tolist()
                # Rows held back come first in the next batch; they are not needed twice.
                waiting.extend(row for row in order if row not in unused)
                unused.update(order)
                members = _by_group(groups, [*held, *waiting])
            row = waiting.popleft()
            if row not in unused:
                continue
            if keys[row] in seen:
                held.append(row)
                continue
            rows.append(row)
            seen.add(keys[row])
            unused.discard(row)
            if groups is None or len(rows) == batch_size:
                continue
            partner = _partner(members[groups[row]], keys, seen, unused)
            if partner is not None:
                rows.append(partner)
                seen.add(keys[partner])
                unused.discard(partner)
        waiting.extendleft(reversed(held))
        yield np.array(rows)


def _by_group(groups: Sequence[Hashable] | None, rows: Sequence[int]) -> dict[Hashable, deque[int]]:
    members: dict[Hashable, deque[int]] = {}
    if groups is not None:
        for row in rows:
            members.setdefault(groups[row], deque()).append(row)
    return members


def _partner(
    candidates: deque[int], keys: Sequence[Hashable], seen: set[Hashable], unused: set[int]
) -> int | None:
    """An unused row of a new key, taken out of the candidates; None if the first few do not fit."""
    for _ in range(_TRIES):
        while candidates and candidates[-1] not in unused:
            candidates.pop()
        if not candidates:
            return None
        if keys[candidates[-1]] not in seen:
            return candidates.pop()
        candidates.rotate(1)
    return None


def _check_keys(
    keys: Sequence[Hashable] | None,
    groups: Sequence[Hashable] | None,
    size: int,
    batch_size: int,
) -> None:
    if keys is None:
        if groups is not None:
            raise ValueError("groups: given without keys")
        return
    for name, values in (("keys", keys), ("groups", groups)):
        if values is not None and len(values) != size:
            raise ValueError(f"{name}: {len(values)} of them is not one for each of {size} samples")
    different = len(set(keys))
    if batch_size > different:
        raise ValueError(f"batch_size: {batch_size} exceeds the {different} different keys")
