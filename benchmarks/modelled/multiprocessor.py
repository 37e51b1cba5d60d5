"""A model of a multiprocessor that runs a persistent kernel's tiles: MODELLED, not measured.

A tile takes the longer of two times: the sum of its parts, one after the other (latency, main loop,
end), and, if several programs share the multiprocessor, the time for which they all occupy its
busiest resource. The resources are the issue slots (4 warp instructions a cycle), the tensor cores,
the units for special functions, shared memory (128 bytes a cycle) and the path from L2.
"""

from __future__ import annotations

from typing import NamedTuple

from vlmo.kernels._backends.triton import Options
from vlmo.kernels.moe_ffn.triton.tiles import Tile

ISSUE = 4  # warp instructions a cycle
SHARED = 128  # bytes a cycle
SPECIAL = 16  # special functions a cycle


class Gpu(NamedTuple):
    """A GPU, per multiprocessor and clock cycle."""

    name: str
    multiprocessors: int
    multiply_adds: int  # 16-bit products with float32 sums
    l2_bytes: float  # that all multiprocessors can read from L2 at a time, divided by their number
    registers: int = 65536
    shared_bytes: int = 0  # of a multiprocessor


GPUS = {
    "sm_80": Gpu("A100", 108, 1024, 30, shared_bytes=164 * 1024),
    "sm_90": Gpu("H100 SXM", 132, 2048, 36, shared_bytes=228 * 1024),
    "sm_120": Gpu("RTX 5090", 170, 256, 16, shared_bytes=100 * 1024),
}
# Cycles before the first product of a task that nothing hides unless another program does: the
# ticket's atomic and its way through shared memory, the acquire, and the first operands from L2.
TICKET, ACQUIRE, OPERANDS = 800, 700, 700
LAUNCH = 3500  # from the end of a launch to the first instructions of the next, about 2 us
DEPENDENT = 4  # cycles of an instruction of the ticket's arithmetic, which depend on each other

ASSUMPTIONS = [
    ("multiply-adds, issue slots, special functions, shared memory", "NVIDIA's documentation"),
    (
        "bytes from L2 a cycle and multiprocessor: "
        + ", ".join(f"{gpu.name} {gpu.l2_bytes:g}" for gpu in GPUS.values()),
        "published microbenchmarks, rounded; not confirmed here",
    ),
    (
        f"cycles of a ticket {TICKET}, of an acquire {ACQUIRE}, of the first operands {OPERANDS}, "
        f"between two launches {LAUNCH}",
        "a few round trips to L2 of 250 to 300 cycles; not confirmed here",
    ),
    (f"cycles of an instruction of the ticket's arithmetic: {DEPENDENT}", "its latency"),
    ("clock", "the same for all resources; no power limit"),
]


class Work(NamedTuple):
    """What a tile asks of a multiprocessor's resources, in cycles."""

    tensor: float = 0.0
    issue: float = 0.0
    special: float = 0.0
    shared: float = 0.0
    l2: float = 0.0

    def __add__(self, other: object) -> Work:
        assert isinstance(other, Work)
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, factor: float) -> Work:
        return Work(*(factor * part for part in self))


def residents(gpu: Gpu, tile: Options, registers: int, shared_bytes: int) -> int:
    """Programs that fit on a multiprocessor at a time."""
    # Registers are allocated to a warp in units of 256.
    of_program = tile.num_warps * -(-registers * 32 // 256) * 256
    return min(gpu.registers // of_program, gpu.shared_bytes // (shared_bytes + 1024))


def cycles_of(parts: list[Work], latency: float, programs: int) -> float:
    """Cycles of a tile; its parts are executed one after the other."""
    alone = latency + sum(max(part) for part in parts)
    whole = Work()
    for part in parts:
        whole += part
    return max(alone, programs * max(whole))


def step_of(gpu: Gpu, tile: Tile, instructions: float, wgmma: bool) -> Work:
    """A step of a main loop, with 16-bit operands."""
    rows, columns, depth = tile.block_t, tile.block_n, tile.block_k
    operands = 2 * depth * (rows + columns)
    if wgmma:  # four warps multiply 64 rows at a time, and read all columns for them
        read = 2 * depth * (rows + columns * -(-rows // 64))
    else:  # warps in two columns; each reads its rows and its columns
        across = 2
        read = 2 * depth * (rows * across + columns * tile.num_warps // across)
    return Work(
        tensor=rows * columns * depth / gpu.multiply_adds,
        issue=instructions * tile.num_warps / ISSUE,
        shared=(operands + read) / SHARED,
        l2=operands / gpu.l2_bytes,
    )


def end_of(gpu: Gpu, tile: Tile, instructions: int, special: int, moved: float) -> Work:
    """The end of a tile; ``moved`` bytes are read from or written to L2."""
    return Work(
        issue=instructions * tile.num_warps / ISSUE,
        special=special * tile.num_warps * 32 / SPECIAL,
        l2=moved / gpu.l2_bytes,
    )
