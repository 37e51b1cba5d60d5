"""Work divided among the ranks of a process group, so that the result does not depend on them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor

from vlmo.distributed import gather, rank, world_size


def own_share(count: int) -> list[int]:
    """This rank's contiguous share of the numbers 0 .. count - 1, as many on every rank.

    What the last ranks lack is filled up with the last number, because ranks that hold different
    numbers of rows, or call a sharded model different numbers of times, would wait for each other
    forever. :func:`of_all` takes the repeats out again.
    """
    size = -(-count // world_size())
    first = rank() * size
    return [min(number, count - 1) for number in range(first, first + size)]


def of_all(rows: Tensor, count: int) -> Tensor:
    """``[count, ...]``: what the ranks have found for each number, from their :func:`own_share`."""
    return gather(rows)[:count]


def even_batches(numbers: Sequence[int], batch_size: int) -> list[list[int]]:
    """``numbers`` in order, in as few batches as ``batch_size`` allows, none much smaller.

    Raises:
        ValueError: ``batch_size`` is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: {batch_size} is not positive")
    count = -(-len(numbers) // batch_size)
    edges = [len(numbers) * n // count for n in range(count + 1)] if count else [0]
    return [list(numbers[start:end]) for start, end in itertools.pairwise(edges)]
