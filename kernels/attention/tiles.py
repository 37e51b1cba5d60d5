"""Tile shapes of the Triton kernels: a row for each GPU generation, kind of operand and width."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlmo.kernels import target
from vlmo.kernels.moe_ffn.tiles import GENERATIONS, generation_of, operands_of


@dataclass(frozen=True)
class Tile:
    """One kernel's tile: block_q queries and block_k keys."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Tiles:
    """The forward; the backward of q, of k and v, and of the table."""

    forward: Tile
    q: Tile
    kv: Tile
    table: Tile


WIDTHS = (64, 128)  # a head dim belongs to the first that is not below it

_NARROW = Tiles(
    forward=Tile(128, 64, 4, 3),
    q=Tile(64, 64, 4, 2),
    kv=Tile(64, 64, 4, 2),
    table=Tile(64, 64, 4, 2),
)
_WIDE = _NARROW
_SINGLE = Tiles(
    forward=Tile(32, 32, 4, 2),
    q=Tile(32, 32, 4, 2),
    kv=Tile(32, 32, 4, 2),
    table=Tile(32, 32, 4, 2),
)
TABLE: dict[tuple[str, str, int], Tiles] = {
    **{(name, "16-bit", 64): _NARROW for name in GENERATIONS},
    **{(name, "16-bit", 128): _WIDE for name in GENERATIONS},
    **{(name, "32-bit", width): _SINGLE for name in GENERATIONS for width in WIDTHS},
}

INTERPRETED = Tiles(
    forward=Tile(128, 64, 4, 1),
    q=Tile(128, 64, 4, 1),
    kv=Tile(64, 128, 4, 1),
    table=Tile(64, 64, 4, 1),
)


def choose(device: torch.device, dtype: torch.dtype, head_dim: int) -> Tiles:
    """The row for a device, a dtype and a head dim."""
    if device.type == "cpu":
        return INTERPRETED
    capability = target.compute_capability(device)
    assert capability is not None, device
    return TABLE[generation_of(capability), operands_of(dtype), width_of(head_dim)]


def width_of(head_dim: int) -> int:
    return next(width for width in WIDTHS if head_dim <= width)
