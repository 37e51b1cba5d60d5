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
# every product, no spill, shared memory within the limit. Among the tiles without a spill, each row
# has the one with the most queries (for the kernel of k and v: keys), because fewer tiles read k
# and v less often. Most registers go to the bias: a float32 and an address per pair, one block
# ahead. Bytes spilled per thread by some rejected tiles, in bfloat16, for VLMo's joint layer:
#
#   sm_80    forward  128 x 64, 4 warps   152
#   sm_80    q         64 x 64, 4 warps    24  (head dim 34: 64)
#   sm_80    kv        64 x 64, 4 warps    24  (head dim 34: 80)
#   sm_80    table     64 x 64, 4 warps   400
#   sm_86    table     64 x 32, 8 warps    16  (head dim 128)
#   sm_90    kv       128 x 64, 8 warps   192
#   sm_90    table     64 x 64, 4 warps   184
#   sm_100   forward  128 x 64, 8 warps   112  (head dim 34)
#   sm_100   table     64 x 64, 4 warps   256
#
# float32 without TF32 has no tensor cores; small tiles keep its operands in registers.
_AMPERE = {
    64: Tiles(
        forward=Tile(128, 64, 8, 2),
        q=Tile(64, 64, 8, 2),
        kv=Tile(32, 64, 4, 2),
        table=Tile(64, 32, 8, 2),
    ),
    128: Tiles(
        forward=Tile(64, 64, 8, 2),
        q=Tile(64, 64, 8, 2),
        kv=Tile(64, 32, 4, 2),
        table=Tile(64, 32, 8, 2),
    ),
}
_SMALL = {
    64: replace(_AMPERE[64], forward=Tile(64, 64, 8, 2), q=Tile(128, 32, 8, 2)),
    128: replace(_AMPERE[128], table=Tile(32, 64, 8, 2)),
}
_16_BIT = {
    "sm_80": _AMPERE,
    "sm_86": _SMALL,
    "sm_90": {
        64: Tiles(
            forward=Tile(128, 64, 8, 2),
            q=Tile(128, 64, 8, 2),
            kv=Tile(64, 64, 4, 2),
            table=Tile(64, 32, 8, 2),
        ),
        128: Tiles(
            forward=Tile(64, 64, 8, 2),
            q=Tile(64, 64, 8, 2),
            kv=Tile(64, 64, 8, 2),
            table=Tile(64, 32, 8, 2),
        ),
    },
    "sm_100": {
        64: Tiles(
            forward=Tile(64, 64, 8, 2),
            q=Tile(128, 64, 8, 2),
            kv=Tile(64, 64, 8, 2),
            table=Tile(64, 32, 8, 2),
        ),
        128: Tiles(
            forward=Tile(64, 64, 8, 2),
            q=Tile(64, 64, 8, 2),
            kv=Tile(64, 64, 8, 2),
            table=Tile(64, 32, 8, 2),
        ),
    },
    "sm_120": {
        64: replace(_SMALL[64], table=Tile(32, 64, 8, 2)),
        128: _SMALL[128],
    },
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
