"""Prepares the launches of a call: compile-time constants, addresses, the table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import target
from ..._backends import triton_launch
from ..._backends.triton import tf32_allowed
from ..._backends.triton_device import INTERPRETED, odd
from ..call import LOG2_E, Call
from .device import Config, Lookup, Sequences, View
from .tiles import Tile

_INTERPRETED_PROGRAMS = 6


def unit_of(*tensors: Tensor) -> int:
    """The largest power of two, up to 16 bytes, that divides addresses and strides, in elements.

    Triton itself only specialises on divisibility by 16. For rows of 34 elements it must know that
    pieces of 2 are aligned; otherwise it cannot use asynchronous copies.
    """
    size = tensors[0].element_size()
    numbers = 16 // size
    for tensor in tensors:
        for number in (tensor.data_ptr() // size, *tensor.stride()[:-1]):
            numbers = math.gcd(numbers, number)
    return numbers


def span_of(call: Call, length: int) -> int:
    """Upper bound of the offsets within a head of a sequence and within the index."""
    *_, heads, head_dim = call.q.shape
    strides = [tensor.stride() for tensor in (call.q, call.k, call.v)]
    spans = [length * row + head_dim * dim for *_, row, _, dim in strides]
    index = 0 if call.matrix is None else call.matrix.shape[0]
    return max(*spans, length * heads * head_dim, index * (index + 8))


def view_of(tensor: Tensor, unit: int) -> View:
    *outer, head, dim = tensor.stride()
    batch, row = outer if len(outer) == 2 else (0, *outer)
    return View(tensor, batch // unit, row // unit, head // unit, dim)


def sequences_of(call: Call) -> Sequences:
    heads = call.q.shape[-2]
    tokens = call.q.shape[:-2].numel()
    if call.offsets is not None:
        batch, length = call.offsets.numel() - 1, call.max_length
    else:
        batch, length = call.q.shape[:2]
    mask = None if call.key_mask is None else call.key_mask.contiguous().view(torch.uint8)
    lengths = None if call.key_lengths is None else call.key_lengths.contiguous()
    offsets = None if call.offsets is None else call.offsets.contiguous()
    return Sequences(batch, heads, length, tokens, offsets, lengths, mask)


def lookup_of(call: Call) -> Lookup | None:
    """The table of this call as [H, entries], so that the entries of a head stay in L1.

    In a layer's slice of a model-wide table, the entries of a head are far apart.
    """
    if call.table is None:
        return None
    assert call.matrix is not None and call.affine is not None and call.short is not None
    entries, heads = call.table.shape
    table = call.table.new_empty(heads, entries, dtype=torch.float32)
    torch.mul(call.table.t().float(), LOG2_E, out=table)
    pairs = call.short if call.short.numel() else call.matrix
    positions = None if call.positions is None else call.positions.contiguous()
    affine = call.affine.contiguous()
    return Lookup(table, entries, pairs.contiguous(), pairs.shape[1], affine, positions)


class Work:
    """A call in the form that its kernels take."""

    def __init__(self, call: Call) -> None:
        head_dim, unit = call.q.shape[-1], unit_of(call.q, call.k, call.v)
        self.device = call.q.device
        self.views = [view_of(tensor, unit) for tensor in (call.q, call.k, call.v)]
        self.sequences = sequences_of(call)
        self.lookup = lookup_of(call)
        self.scale = call.scale
        self.config = Config(
            head_dim=head_dim,
            block_d=max(16, 1 << (head_dim - 1).bit_length()),
            unit=unit,
            precision="tf32" if tf32_allowed() else "ieee",
            narrow=span_of(call, self.sequences.length) < 2**31,
            causal=call.causal,
            biased=call.table is not None,
            ragged=call.offsets is not None or call.key_lengths is not None,
            block_q=0,
            block_k=0,
        )

    def programs(self, block: int) -> int:
        """Grid size of a kernel that takes ``block`` tokens of one head of one sequence."""
        return -(-self.sequences.length // block) * self.sequences.batch * self.sequences.heads

    def table_shares(self, tile: Tile) -> tuple[int, int]:
        """Sequences that a tile is summed over, and programs per head (two per multiprocessor).

        Their scratch does not grow with N or B. If there are enough tiles, each program gets at
        least about four, so that the load is balanced.
        """
        batch, length = self.sequences.batch, self.sequences.length
        # The interpreter runs programs sequentially; a few suffice to test the division of work.
        programs = _INTERPRETED_PROGRAMS if INTERPRETED else 2 * target.multiprocessors(self.device)
        parts = -(-programs // self.sequences.heads)
        tiles = -(-length // tile.block_q) * -(-length // tile.block_k)
        chunk = -(-batch // min(batch, -(-4 * parts // tiles)))
        return chunk, min(parts, tiles * -(-batch // chunk))

    def launch(
        self, kernel: Any, tile: Tile, programs: int, tensors: Sequence[Tensor], *numbers: float
    ) -> None:
        config = self.config._replace(block_q=tile.block_q, block_k=tile.block_k)
        views = (view._replace(batch=odd(view.batch)) for view in self.views)
        counts = [self.sequences.batch, self.sequences.length, self.sequences.tokens]
        sequences = self.sequences._replace(batch=None, length=None, tokens=None)
        triton_launch.launch(
            *(kernel, self.device, programs, tile, *views, *tensors, sequences, *counts),
            *(self.lookup, self.scale * LOG2_E, *numbers, config),
        )
