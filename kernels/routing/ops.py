"""The torch.library operation behind ModalityRouting.index."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmo.kernels.dispatch import Absent, Backend
from vlmo.kernels.routing import cuda_impl, reference

BACKENDS: dict[str, Backend] = {
    "cuda": cuda_impl,
    "triton": Absent("the routing index has no Triton kernel."),
    "cpu": Absent("the routing index is made by the reference on a CPU."),
    "reference": reference,
}
_IMPLEMENTATIONS = {"cuda": cuda_impl.index, "reference": reference.index}


@torch.library.custom_op("vlmo::routing_index", mutates_args=())
def routing_index(
    ids: Tensor, num_experts: int, tile: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """rows, offsets, tiles and num_tiles of a :class:`vlmo.kernels.RoutingIndex`."""
    return _IMPLEMENTATIONS[backend](ids, num_experts, tile)


@routing_index.register_fake
def _(ids: Tensor, num_experts: int, tile: int, backend: str):
    max_tiles = (ids.numel() + tile - 1) // tile + num_experts
    new = ids.new_empty
    shapes = ((ids.numel(),), (num_experts + 1,), (max_tiles, 2), (1,))
    return tuple(new(shape, dtype=torch.int32) for shape in shapes)
