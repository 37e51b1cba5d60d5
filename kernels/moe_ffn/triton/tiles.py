"""Tile shapes of the Triton kernels: a row per GPU generation and kind of operand.

:func:`use_tiles` overrides the rows of TABLE. ``benchmarks/tune.py`` searches for the best row and
prints it; nothing is measured here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from ... import target
from ..._backends.triton import operands_of
from ...target import GENERATIONS, generation_of
from ..schedule import TILE_OVERHEAD


@dataclass(frozen=True)
class Tile:
    """The tile of a kernel: block_t x block_n results, in steps of depth block_k.

    Attributes:
        programs: resident programs per multiprocessor (registers, shared memory).
        descriptors: read operands in grouped order through tensor descriptors (TMA), provided that
            they have 16-bit numbers, that D and every F are multiples of 8, and that every weight
            begins at a multiple of 16 bytes. From Triton 3.6 on.
    """

    block_t: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    programs: int = 1
    descriptors: bool = False


@dataclass(frozen=True)
class Tiles:
    """Tiles of the forward, of the backward of rows (also with ``recompute``), and of weights."""

    forward: Tile
    rows: Tile
    recompute: Tile
    weights: Tile


class Overheads(NamedTuple):
    """Cost of the beginning and the end of a task of each product, in steps of its main loop."""

    hidden: int  # x w1^T and the activation
    output: int  # hidden w2^T
    differentiate: int  # dh2 w2 and the gradient of the activation
    multiply: int  # dpre w1
    weights: int  # dpre^T norm(x), dbranch^T hidden


# No row has been timed on a GPU yet. The rows were chosen from the reports of ptxas.
# tests/kernels/test_moe_ffn_compiled.py enforces the criteria: tensor cores in every product, no
# spill in a main loop, shared memory within the limit. Wider tiles read less from L2 per product
# (128 x 256: 11.7 bytes per 1000 FLOP; 128 x 128: 15.6), so each row has the widest tiles that do
# not spill. Bytes spilled per thread by some rejected tiles, for D 768, F 3072, bfloat16:
#
#   sm_90    recompute  128 x 256 x 64, 8 warps    1848
#   sm_100   recompute  128 x 256 x 64, 8 warps      32  (swiglu)
#   sm_100   weights    128 x 256 x 64, 8 warps     256
#   sm_80    recompute  128 x 128 x 32, 8 warps     240
#   sm_80    weights    128 x 256 x 32, 8 warps       8
#   sm_120   recompute  128 x 64 x 32, 8 warps       72  (3 stages)
#   sm_86    rows       64 x 64 x 32, 8 warps        64  (float32)
#   sm_100   weights    128 x 64 x 32, 8 warps       16  (float32)
#   sm_120   rows       64 x 64 x 32, 8 warps         8  (TF32)
#
# float32 without TF32 has no tensor cores; small tiles keep its operands in registers.
_SINGLE = Tiles(
    forward=Tile(64, 64, 32, 8, 3),
    rows=Tile(64, 64, 32, 8, 3),
    recompute=Tile(64, 64, 32, 8, 3),
    weights=Tile(128, 64, 32, 8, 3),
)
TABLE: dict[tuple[str, str], Tiles] = {
    ("sm_80", "16-bit"): Tiles(
        forward=Tile(128, 256, 32, 8, 4),
        rows=Tile(128, 256, 32, 8, 4),
        recompute=Tile(64, 128, 32, 8, 4),
        weights=Tile(256, 128, 32, 8, 4),
    ),
    ("sm_86", "16-bit"): Tiles(
        forward=Tile(128, 64, 32, 4, 3, programs=2),
        rows=Tile(128, 64, 32, 4, 3, programs=2),
        recompute=Tile(64, 128, 32, 8, 4),
        weights=Tile(128, 128, 32, 8, 3),
    ),
    ("sm_90", "16-bit"): Tiles(
        forward=Tile(128, 256, 64, 8, 4),
        rows=Tile(128, 256, 64, 8, 4),
        recompute=Tile(128, 128, 64, 8, 4),
        weights=Tile(128, 256, 64, 8, 4),
    ),
    ("sm_100", "16-bit"): Tiles(
        forward=Tile(128, 256, 64, 8, 4),
        rows=Tile(128, 256, 64, 8, 4),
        recompute=Tile(128, 128, 64, 8, 4),
        weights=Tile(128, 128, 64, 8, 4),
    ),
    ("sm_120", "16-bit"): Tiles(
        forward=Tile(128, 64, 32, 4, 3, programs=2),
        rows=Tile(128, 64, 32, 4, 3, programs=2),
        recompute=Tile(128, 64, 32, 8, 2),
        weights=Tile(128, 128, 32, 8, 3),
    ),
    **{(name, "32-bit"): _SINGLE for name in GENERATIONS},
    ("sm_86", "32-bit"): replace(
        _SINGLE, rows=Tile(64, 64, 16, 8, 3), recompute=Tile(64, 64, 16, 8, 3)
    ),
    ("sm_120", "32-bit"): replace(_SINGLE, rows=Tile(64, 64, 32, 4, 3)),
    ("sm_100", "32-bit"): replace(_SINGLE, weights=Tile(64, 64, 32, 4, 4)),
}

# From instructions counted in machine code and a model of a multiprocessor, by
# benchmarks/count_sass.py: MODELLED. The same model prefers two programs a multiprocessor on sm_86
# and sm_120, whose L2 is fast enough for their narrower tiles.
_GUESSED = Overheads(*[TILE_OVERHEAD] * 5)
OVERHEADS: dict[tuple[str, str], Overheads] = {
    **{(name, "32-bit"): _GUESSED for name in GENERATIONS},
    ("sm_80", "16-bit"): Overheads(8, 8, 10, 6, 9),
    ("sm_86", "16-bit"): Overheads(0, 0, 0, 0, 3),
    ("sm_90", "16-bit"): Overheads(6, 6, 7, 4, 7),
    ("sm_100", "16-bit"): Overheads(6, 6, 7, 4, 7),
    ("sm_120", "16-bit"): Overheads(0, 0, 0, 0, 3),
}

# The number of tokens from which each phase of the forward and of the backward of rows is a launch
# of its own, in which nothing waits. Without a row: never, because separate launches take 0.99 to
# 1.17 of the time of one launch in the same model.
SEPARATE: dict[tuple[str, str], int] = {}

INTERPRETED = Tiles(
    forward=Tile(32, 64, 32, 4, 1),
    rows=Tile(32, 64, 32, 4, 1),
    recompute=Tile(32, 64, 32, 4, 1),
    weights=Tile(32, 64, 32, 4, 1),
)


_forced: tuple[Tiles, int | None] | None = None


@contextlib.contextmanager
def use_tiles(tiles: Tiles, separate: int | None = None) -> Iterator[None]:
    """Run every kernel inside the ``with`` block with ``tiles``, on any device; process-wide.

    Args:
        separate: the number of tokens from which phases are separate launches, see SEPARATE.
    """
    global _forced
    previous, _forced = _forced, (tiles, separate)
    try:
        yield
    finally:
        _forced = previous


def choose(device: torch.device, dtype: torch.dtype) -> Tiles:
    """The row for a device and a dtype of the operands."""
    return _forced[0] if _forced else built_in(device, dtype)


def are_separate(device: torch.device, dtype: torch.dtype, tokens: int) -> bool:
    """Whether each phase is a launch of its own, see SEPARATE."""
    if _forced:
        least = _forced[1]
    else:
        least = SEPARATE.get(key_of(device, dtype)) if device.type == "cuda" else None
    return least is not None and tokens >= least


def built_in(device: torch.device, dtype: torch.dtype) -> Tiles:
    """The row of TABLE, or the row for Triton's interpreter."""
    return INTERPRETED if device.type == "cpu" else TABLE[key_of(device, dtype)]


def overheads(device: torch.device, dtype: torch.dtype) -> Overheads:
    """The row of OVERHEADS for a device and a dtype of the operands."""
    return _GUESSED if device.type != "cuda" else OVERHEADS[key_of(device, dtype)]


def key_of(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The key of a row: GPU generation and kind of operand."""
    if device.type == "cpu":
        return "interpreter", operands_of(dtype)
    capability = target.compute_capability(device)
    assert capability is not None, device
    return generation_of(capability), operands_of(dtype)
