"""Single-process and distributed training: the process group, and the wrapped model."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from vlmo.device import chosen_device
from vlmo.distributed import rank, world_size
from vlmo.model.models import Model, blocks_of

WAYS = ("ddp", "fsdp")
T = TypeVar("T")


@contextlib.contextmanager
def joined_group(device: str) -> Iterator[torch.device]:
    """Join the process group of torchrun, if there is one, for the duration of the block.

    It uses NCCL between GPUs, and gloo between CPUs and for host data.

    Args:
        device: a name for :func:`vlmo.device.chosen_device`; "auto" and "cuda" stand for the GPU
            with this process's LOCAL_RANK.

    Yields:
        The device of this process.

    Raises:
        ValueError: there is no such device, or there are fewer GPUs than processes.
    """
    chosen = chosen_device(device)
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield chosen
        return
    if chosen.type == "cuda":
        local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= count:
            raise ValueError(
                f"device: process {local} of this machine has none of its {count} GPUs"
            )
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
    dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield chosen
    finally:
        dist.destroy_process_group()


def check_way(way: str) -> None:
    """Raise ValueError if ``way`` is not in ``WAYS``, or is fsdp without a process group."""
    if way not in WAYS:
        raise ValueError(f"parallel: {way!r} is not one of {WAYS}")
    if way == "fsdp" and not dist.is_initialized():
        raise ValueError("parallel: 'fsdp' needs processes started by torchrun")


def wrapped(model: Model, way: str) -> nn.Module:
    """Wrap the model for :func:`vlmo.training.step.backward` on all ranks.

    Args:
        model: on its device, with the parameters that are not trained frozen.
        way: "ddp" keeps the whole model on each rank; "fsdp" (FSDP2) shards every parameter except
            the logit scales, which are scalars and stay whole.
    """
    if way == "fsdp":
        mesh = init_device_mesh(next(model.parameters()).device.type, (world_size(),))
        blocks = blocks_of(model)
        for block in blocks:
            fully_shard(block, mesh=mesh)
        scalars = {parameter for parameter in model.parameters() if parameter.dim() == 0}
        fully_shard(model, mesh=mesh, ignored_params=scalars)
        if mesh.device_type == "cpu":  # gloo of torch 2.8 silently sums instead of averaging
            for part in (*blocks, model):
                cast(FSDPModule, part).set_force_sum_reduction_for_comms(True)
        return model
    if world_size() == 1:
        return model
    # Buffers are constant. PyTorch 2.13 renames the option that synchronises them.
    known = inspect.signature(DistributedDataParallel).parameters
    still = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {still: False}
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **options)


class Agreement:
    """Maximum of a number over all ranks, available one step later.

    It does not wait for a device; the reduction between hosts overlaps with the step.
    """

    def __init__(self) -> None:
        self._pending: tuple[torch.Tensor, Any] | None = None

    def highest(self, own: int) -> int:
        """The maximum of the previous calls of all ranks; with a single process, ``own``."""
        if world_size() == 1:
            return own
        before = 0
        if self._pending is not None:
            value, work = self._pending
            work.wait()
            before = int(value)
        value = torch.tensor(own)
        self._pending = (value, dist.all_reduce(value, dist.ReduceOp.MAX, async_op=True))
        return before

    def close(self) -> None:
        """Wait for the pending reduction."""
        if self._pending is not None:
            self._pending[1].wait()
            self._pending = None


def on_first(function: Callable[[], T]) -> T:
    """Call a function on the first rank and return its result, or raise its error, on all ranks.

    This is a collective call.

    Raises:
        OSError, ValueError: raised by the function.
    """
    told: list[Any] = [None, None]
    if is_first():
        try:
            told[0] = function()
        except (OSError, ValueError) as error:
            if world_size() == 1:
                raise
            kind = OSError if isinstance(error, OSError) else ValueError
            told[1] = kind(str(error))
    if world_size() > 1:
        dist.broadcast_object_list(told, src=0, device=torch.device("cpu"))
    if told[1] is not None:
        raise told[1]
    return told[0]


def objects_of_ranks(own: T) -> list[T]:
    """Gather the objects of all ranks, in rank order, on every rank."""
    if world_size() == 1:
        return [own]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, own)
    return found


def highest(number: int) -> int:
    """The maximum of a number over all ranks; waits for all of them."""
    if world_size() == 1:
        return number
    value = torch.tensor(number)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


def is_first() -> bool:
    """Whether this process is the one that writes files and prints."""
    return rank() == 0
