"""What the ranks of a process group tell each other; without a group, a world of one.

Every rank calls these in the same order and holds the same number of rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from vlmo.kernels.transfer import upload


def rank() -> int:
    """Number of this process, 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        return _all_rows(tensor)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total.chunk(world_size())[rank()]


def gather(tensor: Tensor) -> Tensor:
    """Rows ``[n, ...]`` of all ranks ``[W * n, ...]``, in the order of the ranks.

    Differentiable: a row's gradient is the sum of what all ranks have for it. With every rank's
    loss a mean over its own rows and gradients averaged over ranks, that is the gradient of the
    mean over all rows. (The official code gathers without a gradient, which makes that of the
    encoders W times as small; see ``VLMoConfig.itc_grad_scale``.)
    """
    if world_size() == 1:
        return tensor
    if tensor.requires_grad and torch.is_grad_enabled():
        return _Gather.apply(tensor)
    return _all_rows(tensor)


def _all_rows(tensor: Tensor) -> Tensor:
    tensor = tensor.contiguous()
    rows = tensor.new_empty((world_size() * tensor.shape[0], *tensor.shape[1:]))
    dist.all_gather(list(rows.chunk(world_size())), tensor)
    return rows


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean of a tensor that each rank has one of; without a gradient."""
    if world_size() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


def fetch_rows(
    rows: Tensor,  # [n, ...]
    wanted: Sequence[Sequence[int]],
) -> Tensor:
    """Some rows of other ranks, each sent once to each rank that wants it, and to no other.

    Args:
        rows: this rank's; the number of a row among all is rank * n + its place. No gradient.
        wanted: for each rank, the numbers of the rows it wants, all different; the same on all
            ranks.

    Returns:
        ``[len(wanted[rank]), ...]`` in ascending order of their numbers.
    """
    count, own = len(rows), rank()
    if world_size() == 1:
        return rows[sorted(wanted[0])]
    # For each receiver what this rank has of it, and for each sender what this rank gets.
    sent = [sorted(number for number in numbers if number // count == own) for numbers in wanted]
    received = [
        sum(number // count == sender for number in wanted[own]) for sender in range(len(wanted))
    ]
    own_places = [number - own * count for numbers in sent for number in numbers]
    places = torch.tensor(own_places, dtype=torch.long)  # also if nobody wants any
    outgoing = rows[upload(places, rows.device)]
    incoming = rows.new_empty((len(wanted[own]), *rows.shape[1:]))
    dist.all_to_all_single(incoming, outgoing, received, [len(numbers) for numbers in sent])
    return incoming
