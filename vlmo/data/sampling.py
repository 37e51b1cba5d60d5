"""The samples of every global batch, independent of the number of ranks and of the first step."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Hashable, Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

from vlmo.data.draws import Draw, hashed

_TRIES = 4  # attempts to find a partner for a row
_CHUNK = 4096  # rows that are converted to Python integers at a time
_SPARES = 0x5BA2E  # separates the hashes of spares from those of rows


class GlobalBatches(Sampler[list[Draw]]):
    """Endless shuffled batches, for ``DataLoader(batch_sampler=...)`` on every rank.

    The global batch of step n depends only on the data, ``batch_size``, ``seed`` and n. Each rank
    gets a contiguous share of it, so all ranks together see what a single process would see, and a
    training that is resumed at ``first_step`` sees what an uninterrupted one would have seen.

    An epoch consists of ``steps_per_epoch`` batches of a new permutation; the samples at its end
    that do not fill a batch are dropped.

    With ``keys``, no two samples of a global batch have equal keys. In a random batch of 128 digit
    scenes, a quarter of the scenes share their meaning with another one: the contrastive loss would
    treat a true caption as false, and image-text matching would select exactly these pairs as hard
    negatives. A sample that does not fit waits for the next batch; an epoch then repeats a few
    samples if the last ones do not fit together. With ``groups`` as well, half of a batch are
    partners, each added by a row of its group: pictures of the same digits in another arrangement,
    which random batches rarely contain.

    With ``spares``, every draw names samples to use instead if its own sample cannot be read. They
    also depend only on the data, ``seed`` and the step, and their keys do not occur in the global
    batch. Different draws have different spares unless the data are too few.

    Args:
        size: number of samples.
        batch_size: size of the global batch, a multiple of ``world_size``.
        rank: 0 .. ``world_size`` - 1.
        world_size: number of ranks.
        seed: determines the order and the seeds of the samples, not negative.
        first_step: number of the first batch, from 0.
        steps: number of batches to yield; None for no end.
        keys: one per sample; an integer array is fastest.
        groups: one per sample; needs ``keys``.
        spares: number of spares per draw.

    Attributes:
        steps_per_epoch: ``size // batch_size``.

    Raises:
        ValueError: an argument is outside the ranges above, or there are fewer samples or different
            keys than ``batch_size``.
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
        keys: Sequence[Hashable] | np.ndarray | None = None,
        groups: Sequence[Hashable] | None = None,
        spares: int = 0,
    ):
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: {rank} is not within 0..{world_size - 1}")
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"batch_size: {batch_size} is not a multiple of {world_size} ranks")
        if batch_size > size:
            raise ValueError(f"batch_size: {batch_size} exceeds the {size} samples")
        numbers = {"seed": seed, "first_step": first_step, "steps": steps or 0, "spares": spares}
        for name, value in numbers.items():
            if value < 0:
                raise ValueError(f"{name}: {value} is negative")
        _check_lengths(keys, groups, size)
        self.size, self.batch_size = size, batch_size
        self.rank, self.world_size = rank, world_size
        self.seed, self.first_step, self.steps = seed, first_step, steps
        self.steps_per_epoch = size // batch_size
        self.spares = spares
        self._codes = None if keys is None else _codes(keys)
        self._groups = groups
        if self._codes is not None:
            _check_different(self._codes, batch_size)

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
                spares = self._spares(step, rows)[mine]
                yield [*map(Draw, rows[mine].tolist(), seeds, spares)]
                step += 1

    def _epoch(self, epoch: int, first: int) -> Iterator[np.ndarray]:
        """Rows ``[batch_size]`` of an epoch's global batches, starting with batch ``first``."""
        generator = torch.Generator().manual_seed(int(hashed(self.seed, epoch)))
        if self._codes is not None:
            if self._groups is None:
                batches = _distinct(self._codes, self.batch_size, generator)
            else:
                batches = _partnered(self._codes, self._groups, self.batch_size, generator)
            for number in range(self.steps_per_epoch):
                rows = next(batches)
                if number >= first:
                    yield rows
            return
        order = torch.randperm(self.size, generator=generator).numpy()
        for number in range(first, self.steps_per_epoch):
            yield order[number * self.batch_size : (number + 1) * self.batch_size]

    def _spares(self, step: int, rows: np.ndarray) -> list[tuple[int, ...]]:
        """Rows that may replace each row ``[batch_size]`` of the global batch of a step."""
        count = len(rows)
        wanted = self.spares * count
        if not wanted:
            return [()] * count
        tries = max(_CHUNK, 8 * wanted)
        if tries < self.size:
            drawn = hashed(self.seed, step, _SPARES, np.arange(tries)) % self.size
        else:
            drawn = np.argsort(hashed(self.seed, step, _SPARES, np.arange(self.size)))
        codes, taken = drawn, rows
        if self._codes is not None:
            codes, taken = self._codes[drawn], self._codes[rows]
        first = np.sort(np.unique(codes, return_index=True)[1])  # of each code, in drawn order
        fit = drawn[first[~np.isin(codes[first], taken)]][:wanted]
        # If they are too few, rows share them; neighbouring rows still have different first spares.
        table = np.resize(fit, (self.spares, count)) if len(fit) else np.empty((0, count), int)
        return [tuple(dict.fromkeys(column)) for column in table.T.tolist()]


def _distinct(
    codes: np.ndarray,  # [N] int64
    batch_size: int,
    generator: torch.Generator,
) -> Iterator[np.ndarray]:
    """Endless rows ``[batch_size]`` of different codes; no row repeats before all were used."""
    # Rows that did not fit, by code. They come first in the next batch, which always has room for
    # them: their codes are a subset of those of the previous batch.
    held: dict[int, deque[int]] = {}
    fresh: Iterator[tuple[int, int]] = iter(())
    while True:
        rows: list[int] = []
        seen = set(held)
        for code in list(held):
            rows.append(held[code].popleft())
            if not held[code]:
                del held[code]
        while len(rows) < batch_size:
            row, code = next(fresh, (-1, -1))
            if row < 0:
                fresh = _shuffled(codes, [*itertools.chain(*held.values())], generator)
            elif code in seen:
                held.setdefault(code, deque()).append(row)
            else:
                rows.append(row)
                seen.add(code)
        yield np.array(rows)


def _shuffled(
    codes: np.ndarray, without: Sequence[int], generator: torch.Generator
) -> Iterator[tuple[int, int]]:
    """All rows except ``without`` in random order, with their codes."""
    order = torch.randperm(len(codes), generator=generator).numpy()
    if without:
        wanted = np.ones(len(codes), dtype=bool)
        wanted[without] = False
        order = order[wanted[order]]
    for start in range(0, len(order), _CHUNK):
        part = order[start : start + _CHUNK]
        yield from zip(part.tolist(), codes[part].tolist(), strict=True)


def _partnered(
    codes: np.ndarray,  # [N] int64
    groups: Sequence[Hashable],
    batch_size: int,
    generator: torch.Generator,
) -> Iterator[np.ndarray]:
    """As :func:`_distinct`, but half of the rows are partners from the group of another row."""
    keys: list[int] = codes.tolist()
    waiting: deque[int] = deque()
    members: dict[Hashable, deque[int]] = {}
    unused: set[int] = set()
    while True:
        rows: list[int] = []
        seen: set[int] = set()
        held: list[int] = []
        while len(rows) < batch_size:
            if not waiting:
                order = torch.randperm(len(keys), generator=generator).tolist()
                # Rows held back come first in the next batch; do not add them a second time.
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
            if len(rows) == batch_size:
                continue
            partner = _partner(members[groups[row]], keys, seen, unused)
            if partner is not None:
                rows.append(partner)
                seen.add(keys[partner])
                unused.discard(partner)
        waiting.extendleft(reversed(held))
        yield np.array(rows)


def _by_group(groups: Sequence[Hashable], rows: Sequence[int]) -> dict[Hashable, deque[int]]:
    members: dict[Hashable, deque[int]] = {}
    for row in rows:
        members.setdefault(groups[row], deque()).append(row)
    return members


def _partner(
    candidates: deque[int], keys: Sequence[int], seen: set[int], unused: set[int]
) -> int | None:
    """Remove an unused row with a new key from the candidates; None if the first few do not fit."""
    for _ in range(_TRIES):
        while candidates and candidates[-1] not in unused:
            candidates.pop()
        if not candidates:
            return None
        if keys[candidates[-1]] not in seen:
            return candidates.pop()
        candidates.rotate(1)
    return None


def _codes(keys: Sequence[Hashable] | np.ndarray) -> np.ndarray:
    """Numbers int64 [N], equal for equal keys."""
    if isinstance(keys, np.ndarray) and keys.dtype.kind == "i":
        return keys.astype(np.int64, copy=False)
    numbers: dict[Hashable, int] = {}
    return np.fromiter((numbers.setdefault(key, len(numbers)) for key in keys), np.int64, len(keys))


def _check_lengths(
    keys: Sequence[Hashable] | np.ndarray | None, groups: Sequence[Hashable] | None, size: int
) -> None:
    if keys is None and groups is not None:
        raise ValueError("groups: given without keys")
    for name, values in (("keys", keys), ("groups", groups)):
        if values is not None and len(values) != size:
            raise ValueError(f"{name}: {len(values)} of them is not one for each of {size} samples")


def _check_different(codes: np.ndarray, batch_size: int) -> None:
    different = len(np.unique(codes))
    if batch_size > different:
        raise ValueError(
            f"batch_size: {batch_size} exceeds the {different} different keys (pictures): the same "
            "picture would be in a batch twice, and be a negative of its own captions; vlmo train "
            "--official-batches allows it"
        )
