"""Tile shapes of the Triton kernels: a row per GPU generation, kind of operand and head dim."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ... import target
from ..._backends.triton import operands_of
from ...target import GENERATIONS, generation_of


@dataclass(frozen=True)
class Tile:
    """The tile of a kernel: block_q queries and block_k keys."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Tiles:
    """Tiles of the forward, and of the backward of q, of k and v, and of the table."""

    forward: Tile
    q: Tile
    kv: Tile
    table: Tile


WIDTHS = (64, 128)  # a head dim uses the rows of the first width that is not below it

# No row has been timed on a GPU yet. The rows were chosen from the reports of ptxas for head dims
# 64, 34 and 128. tests/kernels/test_attention_compiled.py enforces the criteria: tensor cores in
# every product, no spill in a main loop, shared memory within the limit. Among these tiles, each
# row has those that copy the fewest bytes for a pair of tokens, that is, with the most queries (for
# the kernel of k and v: keys; of the table: of both); among these the one with more warps resident
# or, where warps read the operands of their products themselves (mma.sync), more rows for each
# warp. The backward's tiles for head dim 64 on sm_80, sm_86, sm_90 and sm_120 are instead those for
# which benchmarks/count_sass.py models the largest share of the tensor cores' peak: four warps, of
# which two or three programs fit on a multiprocessor, instead of eight, of which one does.
#
# With an expanded bias, registers hold products, not the bias: 120 to 132 a thread for the forward
# on sm_90, where a lookup takes 202. Bytes spilled per thread by some rejected tiles, in bfloat16,
# for VLMo's joint layer, the most of head dims 64 and 34:
#
#   sm_80    forward  128 x 64, 4 warps    56
#   sm_80    q        128 x 32, 4 warps   128  (with a lookup)
#   sm_80    kv        64 x 64, 4 warps    64
#   sm_80    table     64 x 64, 8 warps   160
#   sm_86    table     64 x 64, 8 warps    64
#   sm_90    table    128 x 64, 8 warps   304
#   sm_100   table     64 x 64, 8 warps    40
#   sm_120   q         64 x 64, 4 warps    32
#   sm_120   kv        64 x 64, 4 warps   112
#   sm_120   table     64 x 32, 8 warps    24
#
# float32 without TF32 has no tensor cores; small tiles keep its operands in registers.
_AMPERE = {
    64: Tiles(
        forward=Tile(128, 32, 4, 3),
        q=Tile(128, 32, 4, 3),
        kv=Tile(32, 64, 4, 3),
        table=Tile(64, 32, 4, 2),
    ),
    128: Tiles(
        forward=Tile(128, 64, 8, 3),
        q=Tile(128, 32, 8, 3),
        kv=Tile(64, 64, 8, 3),
        table=Tile(64, 32, 8, 2),
    ),
}
_SMALL = {
    64: _AMPERE[64],
    128: Tiles(
        forward=Tile(128, 32, 8, 3),
        q=Tile(128, 32, 8, 2),
        kv=Tile(64, 64, 8, 2),
        table=Tile(64, 32, 8, 2),
    ),
}
_HOPPER = {
    64: Tiles(
        forward=Tile(128, 64, 8, 3),
        q=Tile(128, 32, 4, 3),
        kv=Tile(64, 64, 4, 3),
        table=Tile(64, 32, 4, 2),
    ),
    128: Tiles(
        forward=Tile(128, 64, 8, 3),
        q=Tile(128, 64, 8, 3),
        kv=Tile(64, 64, 8, 3),
        table=Tile(64, 64, 8, 2),
    ),
}
_16_BIT = {
    "sm_80": _AMPERE,
    "sm_86": {**_SMALL, 128: replace(_SMALL[128], table=Tile(32, 64, 8, 2))},
    "sm_90": _HOPPER,
    "sm_100": {
        64: replace(
            _HOPPER[64],
            q=Tile(128, 32, 8, 3),
            kv=Tile(64, 128, 8, 3),
            table=Tile(32, 64, 8, 3),
        ),
        128: replace(_HOPPER[128], q=Tile(128, 32, 8, 3)),
    },
    "sm_120": _SMALL,
}
_SINGLE = Tiles(
    forward=Tile(32, 32, 8, 2),
    q=Tile(32, 32, 8, 2),
    kv=Tile(16, 32, 4, 2),
    table=Tile(32, 32, 8, 2),
)
TABLE: dict[tuple[str, str, int], Tiles] = {
    **{(name, "16-bit", width): _16_BIT[name][width] for name in GENERATIONS for width in WIDTHS},
    **{(name, "32-bit", width): _SINGLE for name in GENERATIONS for width in WIDTHS},
}

INTERPRETED = Tiles(
    forward=Tile(128, 64, 4, 1),
    q=Tile(128, 64, 4, 1),
    kv=Tile(64, 128, 4, 1),
    table=Tile(64, 64, 4, 1),
)


# Of the kernel that expands the bias, on every GPU: four pairs a thread, for a few heads.
EXPAND = Tile(32, 32, 8, 1)


def choose(device: torch.device, dtype: torch.dtype, head_dim: int) -> Tiles:
    """The row of the table for a device, a dtype and a head dim."""
    if device.type == "cpu":
        return INTERPRETED
    capability = target.compute_capability(device)
    assert capability is not None, device
    return TABLE[generation_of(capability), operands_of(dtype), width_of(head_dim)]


def width_of(head_dim: int) -> int:
    return next(width for width in WIDTHS if head_dim <= width)
