"""Tile shapes of the Triton kernels: one row for each GPU generation and kind of operand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from vlmo.kernels import target


@dataclass(frozen=True)
class Tile:
    """One kernel's tile: block_t x block_n results, block_k deep at a time."""

    block_t: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    programs: int = 1  # resident on a multiprocessor, as registers and shared memory allow


@dataclass(frozen=True)
class Tiles:
    """The three kernels: the forward, the backward of the rows, the backward of the weights."""

    forward: Tile
    rows: Tile
    weights: Tile


class Generation(NamedTuple):
    """GPUs that share a row, by the least compute capability, and what a program may use there."""

    since: tuple[int, int]
    shared_bytes: int


GENERATIONS = {
    "sm_80": Generation((8, 0), 163 * 1024),
    "sm_86": Generation((8, 6), 99 * 1024),
    "sm_90": Generation((9, 0), 227 * 1024),
    "sm_100": Generation((10, 0), 227 * 1024),
    "sm_120": Generation((12, 0), 99 * 1024),
}

TABLE: dict[tuple[str, str], Tiles] = {
    ("sm_90", "16-bit"): Tiles(
        forward=Tile(128, 256, 64, 8, 3),
        rows=Tile(128, 256, 64, 8, 3),
        weights=Tile(128, 256, 64, 8, 3),
    ),
}

INTERPRETED = Tiles(
    forward=Tile(32, 64, 32, 4, 1),
    rows=Tile(32, 64, 32, 4, 1),
    weights=Tile(32, 64, 32, 4, 1),
)


def choose(device: torch.device, dtype: torch.dtype) -> Tiles:
    """The row for a device and the dtype of the products' operands."""
    if device.type == "cpu":
        return INTERPRETED
    capability = target.compute_capability(device)
    assert capability is not None, device
    return lookup(capability, dtype)


def lookup(capability: tuple[int, int], dtype: torch.dtype) -> Tiles:
    """The row of the newest generation that is not newer than ``capability``."""
    names = [name for name, generation in GENERATIONS.items() if generation.since <= capability]
    return TABLE[names[-1], "32-bit" if dtype == torch.float32 else "16-bit"]
