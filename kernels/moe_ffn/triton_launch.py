"""From a call to a launch: rows, constants, counters, and the one place that launches."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmo.kernels import target
from vlmo.kernels.moe_ffn.reference import GATED, Call
from vlmo.kernels.moe_ffn.schedule import TILE_OVERHEAD, choose_band
from vlmo.kernels.moe_ffn.tiles import Tile
from vlmo.kernels.moe_ffn.triton_parts import INTERPRETED, Config, Rows

# What a task without products costs in steps of a main loop: a guess that only steers the choice of
# the band.
_ROWS_COST = 2
# The interpreter runs one program after the other; more than one, so that work is divided.
_INTERPRETED_PROGRAMS = 5


def common_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """A kernel takes the tensors of all experts in one dtype, also where their norms differ."""
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def pointers(tensors: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
    """One contiguous tensor per expert, all of one dtype, or None where the call has none."""
    if not tensors:
        return None
    dtype = common_dtype(tensors)
    return tuple(tensor.to(dtype).contiguous() for tensor in tensors)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def rows_of(call: Call) -> Rows:
    """How the kernels find the rows of each expert."""
    if call.rows is not None:
        return Rows(None, None, 0, 0, call.rows, call.offsets)
    starts, lengths, length = [0] * len(call.w1), [0] * len(call.w1), 0
    for expert, count in zip(call.pieces[::2], call.pieces[1::2], strict=True):
        if count:
            starts[expert], lengths[expert] = length, count
            length += count
    sequences = call.x.shape[0] // length
    return Rows(tuple(starts), tuple(lengths), sequences, length, None, None)


def bound_on_tiles(call: Call, rows: Rows, block_t: int) -> int:
    """Row tiles: their number in the segment form, else as many as there can be."""
    if rows.offsets is not None:
        return -(-call.x.shape[0] // block_t) + len(call.w1)
    return sum(-(-rows.sequences * length // block_t) for length in rows.lengths)


@functools.lru_cache(maxsize=256)
def make_config(
    dim: int, hidden: tuple[int, ...], norm: str, activation: str, precision: str, tile: Tile
) -> Config:
    """What is compiled into a kernel; its phases are left to the kernel's launcher."""
    gated = activation in GATED
    halves = 2 if gated else 1
    block_d = 1 << (dim - 1).bit_length()
    return Config(
        dim=dim,
        hidden=hidden,
        max_hidden=max(hidden),
        norm=norm,
        activation=activation,
        gated=gated,
        halves=halves,
        max_pre=max(hidden) * halves,
        precision=precision,
        tasks=(),
        even_dim=dim % tile.block_k == 0,
        even_hidden=all(f % tile.block_k == 0 for f in hidden),
        even=all(
            size % block == 0
            for size in (dim, *hidden)
            for block in (tile.block_t, tile.block_n, tile.block_k)
        ),
        block_t=tile.block_t,
        block_n=tile.block_n,
        block_f=tile.block_n // halves,
        block_k=tile.block_k,
        block_d=block_d,
        block_r=max(1, min(tile.block_t, 16384 // block_d)),
        row_steps=1,
    )


def config_of(call: Call, tile: Tile) -> Config:
    hidden = tuple(weight.shape[1] for weight in call.w2)
    precision = "tf32" if _tf32_allowed() else "ieee"
    return make_config(call.x.shape[1], hidden, call.norm, call.activation, precision, tile)


def band_of(tiles: int, config: Config, workers: int, depths: Sequence[int | None]) -> int:
    """Row tiles of a band; ``depths`` is the length of each phase's products, None without."""
    costs = tuple(
        _ROWS_COST if depth is None else -(-depth // config.block_k) + TILE_OVERHEAD
        for depth in depths
    )
    return choose_band(tiles, config.tasks, workers, costs)


def workers_on(device: torch.device, tile: Tile) -> int:
    """Programs that are resident at a time."""
    if INTERPRETED:
        return _INTERPRETED_PROGRAMS
    return target.multiprocessors(device) * tile.programs


def launch(kernel: Any, device: torch.device, programs: int, tile: Tile, *args: Any) -> None:
    """Run ``kernel`` on the current stream of ``device``."""
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        kernel[(programs,)](*args, num_warps=tile.num_warps, num_stages=tile.num_stages)


def _tf32_allowed() -> bool:
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # since torch 2.9, where reading the other may raise
        return matmul.fp32_precision == "tf32"
    return matmul.allow_tf32


class Counters:
    """int32 counters that are zero between launches, because every launch zeroes them again.

    One buffer per device and stream, as launches on a stream come one after another; so a call
    costs one launch, not two. While a graph is captured, and in the private pool that surrounds
    such a capture, a buffer is made for the call alone: the graph may be replayed on any stream,
    and nothing of a pool may outlive it. A launch that raised leaves its buffer to be thrown away.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[torch.device, int], Tensor] = {}

    @contextlib.contextmanager
    def take(self, device: torch.device, size: int) -> Iterator[Tensor]:
        """A zeroed buffer of at least ``size`` counters, for one launch inside the block."""
        if _capturing(device):
            yield torch.zeros(size, dtype=torch.int32, device=device)
            return
        key = (device, _stream(device))
        # Taken out while in use: if the launch raises, the buffer is not put back.
        buffer = self._kept.pop(key, None)
        if buffer is not None and buffer.numel() >= size:
            yield buffer
        else:
            buffer = torch.zeros(max(size, 4096), dtype=torch.int32, device=device)
            yield buffer
            if _in_private_pool(buffer):
                return
        self._kept[key] = buffer


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _in_private_pool(tensor: Tensor) -> bool:
    if tensor.device.type != "cuda":
        return False
    address = tensor.data_ptr()
    for segment in torch.cuda.memory_snapshot():
        if segment["address"] <= address < segment["address"] + segment["total_size"]:
            return tuple(segment["segment_pool_id"]) != (0, 0)
    return False


COUNTERS = Counters()
