"""Host side of csrc/attention/attention_bwd_table.cu."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ... import target
from ..._backends import cuda as cuda_target
from . import arguments as host

CUBIN = "attention_bwd_table"
SIDE = 64  # queries and keys of a tile
_TOKEN_BYTES = 3 * 4 * SIDE  # per-token data of a tile


class BackwardTableArgument(ctypes.Structure):
    """``BackwardTable`` of csrc/attention/attention_bwd_table.cu."""

    _fields_ = [
        ("call", host.CallArgument),
        ("dout", host.Operand),
        ("delta", ctypes.c_void_p),
        ("partial", ctypes.c_void_p),
        ("parts", ctypes.c_int32),
        ("range", ctypes.c_int32),
    ]


def launch_table(call: host.Prepared, dout: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """Gradient of the table, [entries, H] float32; ``delta`` comes from ``launch_queries``."""
    assert call.table is not None
    heads, entries = call.table.shape
    dim = host.padded_dim(call.q.shape[-1])
    operands = 4 if dim == 64 else 2  # in shared memory at a time
    tiles = (-(-call.length // SIDE)) ** 2
    programs = max(1, programs_on(call.q.device) // heads)
    batch_range = 1 if call.positions is not None else choose_range(tiles, call.batch, programs)
    parts = min(programs, tiles * -(-call.batch // batch_range))
    partial = torch.zeros(heads, parts, entries, dtype=torch.float32, device=call.q.device)
    argument = BackwardTableArgument(
        host.call_argument(call, lse, 0),
        host.operand(dout),
        host.pointer(delta),
        host.pointer(partial),
        parts=parts,
        range=batch_range,
    )
    cuda_target.launch(
        *(CUBIN, f"{CUBIN}_{dim}", call.q.device),
        heads * parts,
        4 * host.WARP,
        operands * 2 * host.column_tile_bytes(dim) + 2 * _TOKEN_BYTES,
        argument,
        [*call.tensors, dout, lse, delta, partial],
    )
    return partial.sum(1).t()


def choose_range(tiles: int, batch: int, parts: int) -> int:
    """Number of sequences that are summed before a scatter.

    Long ranges need fewer scatters; short ones distribute the work more evenly over ``parts`` CTAs.
    In the model of a V100, a scatter costs about as much as SCATTER sequences.
    """

    def cost(batch_range: int) -> int:
        items = tiles * -(-batch // batch_range)
        return -(-items // parts) * (batch_range + SCATTER)

    return min(range(1, batch + 1), key=cost)


SCATTER = 3


def programs_on(device: torch.device) -> int:
    """Number of resident CTAs."""
    return 2 * target.multiprocessors(device)
