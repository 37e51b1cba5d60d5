"""Collective operations on the ranks of a process group; without a group there is one rank.

Every rank calls these functions in the same order and with the same number of rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from vlmo.kernels.transfer import upload


def rank() -> int:
    """Rank of this process, 0 without a group."""
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
    """Concatenate the rows ``[n, ...]`` of all ranks, in rank order, to ``[W * n, ...]``.

    Differentiable: the gradient of a row is the sum of its gradients on all ranks. If every rank's
    loss is a mean over its own rows and gradients are averaged over ranks, this is the gradient of
    the mean over all rows. (unilm, the reference implementation, gathers without a gradient, which
    makes the gradient of the encoders W times as small; see ``VLMoConfig.itc_grad_scale``.)
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
    """The mean of a tensor over all ranks, without a gradient."""
    if world_size() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


def fetch_rows(
    rows: Tensor,  # [n, ...]
    wanted: Sequence[Sequence[int]],
) -> Tensor:
    """Fetch rows from other ranks; a row is sent once to each rank that wants it.

    Args:
        rows: rows of this rank, without a gradient; the global index of row i is rank * n + i.
        wanted: for each rank, the global indices of the rows that it wants, all different; equal on
            all ranks.

    Returns:
        ``[len(wanted[rank]), ...]`` in ascending order of global indices.
    """
    count, own = len(rows), rank()
    if world_size() == 1:
        return rows[sorted(wanted[0])]
    # The rows that this rank sends to each receiver, and the number that it gets from each sender.
    sent = [sorted(number for number in numbers if number // count == own) for numbers in wanted]
    received = [
        sum(number // count == sender for number in wanted[own]) for sender in range(len(wanted))
    ]
    own_places = [number - own * count for numbers in sent for number in numbers]
    places = torch.tensor(own_places, dtype=torch.long)  # the dtype is needed if the list is empty
    outgoing = rows[upload(places, rows.device)]
    incoming = rows.new_empty((len(wanted[own]), *rows.shape[1:]))
    dist.all_to_all_single(incoming, outgoing, received, [len(numbers) for numbers in sent])
    return incoming
