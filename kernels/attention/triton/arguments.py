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
from .device import PITCH, Bias, Config, Sequences, View
from .expand import EXPANDED_HEADS, attention_expand_kernel
from .tiles import EXPAND, Tile

_INTERPRETED_PROGRAMS = 6
_NO_BIAS = Bias(*(None,) * len(Bias._fields))


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
    return max(*spans, length * heads * head_dim, index * pitch_of(index))


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
    # A product whose operand depends on numbers of 8 bits gets a layout for operands of 8 bits.
    mask = None if call.key_mask is None else call.key_mask.to(torch.int16).contiguous()
    lengths = None if call.key_lengths is None else call.key_lengths.contiguous()
    offsets = None if call.offsets is None else call.offsets.contiguous()
    return Sequences(batch, heads, length, tokens, offsets, lengths, mask)


def pitch_of(size: int) -> int:
    return -(-size // PITCH) * PITCH


def source_dtype(q: Tensor) -> torch.dtype:
    """The dtype of an expanded bias.

    float16 has eight times the precision of bfloat16, in which the probabilities are rounded. With
    operands of float16 its rounding errors would be as large as theirs.
    """
    return torch.float16 if q.dtype == torch.bfloat16 else torch.float32


def expands(call: Call) -> bool:
    """Whether the bias of all pairs of positions is expanded in memory, or looked up for each pair.

    Expanding takes another launch, which computes H M^2 numbers. It pays if the batch has at least
    twice as many pairs of tokens, so that each number is read more than once, and if they stay in
    L2 beside q, k and v: they get a quarter of it. Without the guarantee that positions are
    distinct, several tokens may have one position, which the inverse of the positions cannot hold.
    """
    if call.table is None or (call.positions is not None and not call.distinct):
        return False
    assert call.matrix is not None
    size, heads = call.matrix.shape[0], call.q.shape[-2]
    length = call.max_length if call.offsets is not None else call.q.shape[1]
    pairs = call.q.shape[:-2].numel() * length
    volume = heads * size * pitch_of(size) * source_dtype(call.q).itemsize
    return pairs >= 2 * size**2 and 4 * volume <= target.l2_bytes(call.q.device)


def bias_of(call: Call, sequences: Sequences, backward: bool) -> Bias:
    """The bias of a call; an expanded one is not written yet."""
    if call.table is None:
        return _NO_BIAS
    assert call.matrix is not None and call.affine is not None and call.short is not None
    (entries, heads), size = call.table.shape, call.matrix.shape[0]
    pairs = call.short if call.short.numel() else call.matrix
    positions = None if call.positions is None else call.positions.contiguous()
    bias = _NO_BIAS._replace(
        entries=entries,
        size=size,
        pairs=pairs.contiguous(),
        pair_stride=pairs.shape[1],
        positions=positions,
    )
    if not expands(call):
        # The entries of a head stay in L1. In a layer's slice of a model-wide table, they are far
        # apart.
        table = call.table.new_empty(heads, entries, dtype=torch.float32)
        torch.mul(call.table.t().float(), LOG2_E, out=table)
        return bias._replace(table=table, affine=call.affine.contiguous())
    pitch = pitch_of(size)
    shape, dtype = (heads, size, pitch), source_dtype(call.q)
    bias = bias._replace(by_query=call.q.new_empty(shape, dtype=dtype), pitch=pitch)
    if backward:
        bias = bias._replace(by_key=call.q.new_empty(shape, dtype=dtype))
    if positions is None:
        return bias
    return bias._replace(
        rows=positions.new_empty(sequences.batch, pitch, dtype=torch.int32),
        spans=positions.new_empty(sequences.batch, 2, dtype=torch.int32),
    )


class Work:
    """A call in the form that its kernels take."""

    def __init__(self, call: Call, backward: bool = False) -> None:
        head_dim, unit = call.q.shape[-1], unit_of(call.q, call.k, call.v)
        self.device = call.q.device
        self.views = [view_of(tensor, unit) for tensor in (call.q, call.k, call.v)]
        self.sequences = sequences_of(call)
        self.bias = bias_of(call, self.sequences, backward)
        self.scale = call.scale
        self.config = Config(
            head_dim=head_dim,
            block_d=max(16, 1 << (head_dim - 1).bit_length()),
            unit=unit,
            precision="tf32" if tf32_allowed() else "ieee",
            narrow=span_of(call, self.sequences.length) < 2**31,
            causal=call.causal,
            biased=call.table is not None,
            expanded=self.bias.by_query is not None,
            ragged=call.offsets is not None or call.key_lengths is not None,
            block_q=0,
            block_k=0,
        )
        if self.config.expanded:
            assert call.table is not None
            self._expand(call.table)

    def programs(self, block: int) -> int:
        """Grid size of a kernel that takes ``block`` tokens of one head of one sequence."""
        return -(-self.sequences.length // block) * self.sequences.batch * self.sequences.heads

    def table_shares(self, tile: Tile) -> tuple[int, int]:
        """Sequences that a tile is summed over, and programs per head (two per multiprocessor).

        Their scratch does not grow with N or B. If there are enough tiles, each program gets at
        least about four, so that the load is balanced.
        """
        batch, length = self.sequences.batch, self.sequences.length
        if self.bias.rows is not None:
            length = self.bias.size
        # The interpreter runs programs sequentially; a few suffice to test the division of work.
        programs = _INTERPRETED_PROGRAMS if INTERPRETED else 2 * target.multiprocessors(self.device)
        parts = -(-programs // self.sequences.heads)
        tiles = -(-length // tile.block_q) * -(-length // tile.block_k)
        chunk = -(-batch // min(batch, -(-4 * parts // tiles)))
        return chunk, min(parts, tiles * -(-batch // chunk))

    def launch(
        self, kernel: Any, tile: Tile, programs: int, tensors: Sequence[Tensor], *numbers: float
    ) -> None:
        views = [view._replace(batch=odd(view.batch)) for view in self.views]
        self._launch(kernel, tile, programs, [*views, *tensors], self.scale * LOG2_E, *numbers)

    def _launch(
        self, kernel: Any, tile: Tile, programs: int, tensors: Sequence[Any], *numbers: float
    ) -> None:
        config = self.config._replace(block_q=tile.block_q, block_k=tile.block_k)
        counts = [self.sequences.batch, self.sequences.length, self.sequences.tokens]
        sequences = self.sequences._replace(batch=None, length=None, tokens=None)
        triton_launch.launch(
            *(kernel, self.device, programs, tile, *tensors, sequences, *counts),
            *(self.bias, *numbers, config),
        )

    def _expand(self, table: Tensor) -> None:
        """Writes the expanded bias and the inverse of the positions."""
        tiles = (self.bias.pitch // EXPAND.block_q) * (self.bias.pitch // EXPAND.block_k)
        tiles *= -(-self.sequences.heads // EXPANDED_HEADS)
        programs = tiles + (0 if self.bias.rows is None else self.sequences.batch)
        numbers = (*table.stride(), tiles)
        self._launch(attention_expand_kernel, EXPAND, programs, (table,), *numbers)
