"""How a kernel locates the rows of each expert, and the number of row tiles."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from .call import Call


class Rows(NamedTuple):
    """Locates the rows of experts: by arithmetic for segments, by an index for other routings."""

    starts: Any  # E x first token of the expert's run in a sequence; None with an index
    lengths: Any  # E x number of tokens of the run
    sequences: Any  # sequences in the batch
    length: Any  # tokens of a sequence
    tokens: Any  # [T] int32, token of each grouped row; None in the segment form
    offsets: Any  # [E + 1] int32


def rows_of(call: Call) -> Rows:
    """The description of the rows of each expert for the kernels."""
    if call.rows is not None:
        return Rows(None, None, 0, 0, call.rows, call.offsets)
    return _segments(tuple(call.pieces), len(call.w2), call.tokens)


@functools.lru_cache(maxsize=256)
def _segments(pieces: tuple[int, ...], experts: int, tokens: int) -> Rows:
    starts, lengths, length = [0] * experts, [0] * experts, 0
    for expert, count in zip(pieces[::2], pieces[1::2], strict=True):
        if count:
            starts[expert], lengths[expert] = length, count
            length += count
    return Rows(tuple(starts), tuple(lengths), tokens // length, length, None, None)


def bound_on_tiles(call: Call, rows: Rows, block_t: int) -> int:
    """The number of row tiles for segments, else an upper bound."""
    return tiles_of(call.tokens, len(call.w2), rows.lengths, rows.sequences, block_t)


def tiles_of(
    tokens: int, experts: int, lengths: tuple[int, ...] | None, sequences: int, block_t: int
) -> int:
    """:func:`bound_on_tiles` of rows with these lengths and sequences; no lengths with an index."""
    if lengths is None:
        return -(-tokens // block_t) + experts
    return sum(-(-sequences * length // block_t) for length in lengths)
