"""Distributed evaluation: sharding, evaluation mode, gathering.

Results do not depend on the number of ranks.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vlmo.distributed import gather, rank, world_size
from vlmo.model.models import Model


def own_share(count: int) -> list[int]:
    """This rank's contiguous share of the numbers 0 .. count - 1, of equal size on every rank.

    The last shares are padded with the last number, because ranks that have different numbers of
    rows, or call a sharded model different numbers of times, would wait for each other forever.
    :func:`of_all` removes the padding.
    """
    size = -(-count // world_size())
    first = rank() * size
    return [min(number, count - 1) for number in range(first, first + size)]


def of_all(rows: Tensor, count: int) -> Tensor:
    """Gather the results for each number, ``[count, ...]``, from the ranks' :func:`own_share`."""
    return gather(rows)[:count]


def objects_of_all(rows: list[Any], count: int) -> list[Any]:
    """As :func:`of_all`, for a list of objects that can be pickled."""
    if world_size() == 1:
        return rows[:count]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, rows)
    return list(itertools.chain.from_iterable(gathered))[:count]


def even_batches(numbers: Sequence[int], batch_size: int) -> list[list[int]]:
    """Split ``numbers`` into as few batches as ``batch_size`` allows, of nearly equal sizes.

    Raises:
        ValueError: ``batch_size`` is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: {batch_size} is not positive")
    count = -(-len(numbers) // batch_size)
    edges = [len(numbers) * n // count for n in range(count + 1)] if count else [0]
    return [list(numbers[start:end]) for start, end in itertools.pairwise(edges)]


@contextlib.contextmanager
def evaluating(model: Model) -> Iterator[Callable[..., Any]]:
    """Put ``model`` into evaluation mode for the block and restore its mode afterwards.

    Yields:
        ``run(function, *arguments)``, which returns ``function(model, *arguments)`` from inside the
        model's forward: under FSDP2, the parts of a model can only be used there.
    """
    training = model.training
    model.eval()
    try:
        # Bind the arguments: FSDP2 moves the arguments of a forward to the GPU, including text
        # lengths.
        yield lambda function, *arguments: model(lambda module: function(module, *arguments))
    finally:
        model.train(training)


def precision(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """Matrix products in ``dtype`` inside the block; no change for None."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's parameters."""
    return next(model.parameters()).device
