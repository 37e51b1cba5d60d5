"""The routing index in plain PyTorch: any device, no synchronisation with the host."""

from __future__ import annotations

import torch
from torch import Tensor


def why_not(ids: Tensor, num_experts: int, tile: int) -> str | None:
    return None


def index(ids: Tensor, num_experts: int, tile: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """rows [T], offsets [E + 1], tiles [ceil(T / tile) + E, 2], num_tiles [1]; all int32.

    Ids outside ``0..num_experts-1`` come behind all experts and belong to no tile.
    """
    experts = torch.arange(num_experts, device=ids.device)
    valid = (ids >= 0) & (ids < num_experts)
    rows = torch.where(valid, ids, num_experts).argsort(stable=True)

    counts = (ids[None, :] == experts[:, None]).sum(1)  # [E]
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])

    tiles_until = ((counts + tile - 1) // tile).cumsum(0)  # [E]
    number = torch.arange((ids.numel() + tile - 1) // tile + num_experts, device=ids.device)
    expert = torch.searchsorted(tiles_until, number, right=True)  # E behind the last tile
    used = expert < num_experts
    expert = expert.clamp(max=num_experts - 1)
    first_tile = tiles_until[expert] - (counts[expert] + tile - 1) // tile
    first = offsets[expert] + (number - first_tile) * tile
    tiles = torch.stack([torch.where(used, expert, -1), torch.where(used, first, 0)], dim=1)
    return rows.int(), offsets.int(), tiles.int(), tiles_until[-1:].int()
