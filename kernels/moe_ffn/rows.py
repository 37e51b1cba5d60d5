"""How a kernel locates the rows of each expert, and the number of row tiles."""

from __future__ import annotations

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
    starts, lengths, length = [0] * len(call.w1), [0] * len(call.w1), 0
    for expert, count in zip(call.pieces[::2], call.pieces[1::2], strict=True):
        if count:
            starts[expert], lengths[expert] = length, count
            length += count
    sequences = call.x.shape[0] // length
    return Rows(tuple(starts), tuple(lengths), sequences, length, None, None)


def bound_on_tiles(call: Call, rows: Rows, block_t: int) -> int:
    """The number of row tiles for segments, else an upper bound."""
    if rows.offsets is not None:
        return -(-call.x.shape[0] // block_t) + len(call.w1)
    return sum(-(-rows.sequences * length // block_t) for length in rows.lengths)
