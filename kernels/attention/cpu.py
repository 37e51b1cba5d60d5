"""shared_attention on the CPU: batches similar sequences and skips masked keys.

Scores are computed for a few heads of a few sequences at a time, so that they stay in cache, and
are recomputed in the backward. They are float32 products, which take twice as long as bfloat16
ones: on a CPU PyTorch has no product of 16-bit operands with a float32 result, and oneDNN computes
in float32 whatever ``torch.backends.mkldnn.matmul.fp32_precision`` allows. On a CPU without
instructions for 16-bit operands, the other products use float32 too, converted piece by piece.

PyTorch's flash attention for the CPU does not differentiate its mask. On 8 sequences of 237 tokens
at base size, on two cores of an EPYC, it took 12.5 ms in float32 against 14.3 ms here, and 14.0 ms
in bfloat16 against 13.2 ms here.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .._backends import cpu as cpu_target
from .call import Call

# Sequences up to this length are gathered into one group; longer ones are grouped only if adjacent.
_SHORT = 64
_CACHE_BYTES = 4 * 2**20  # of scores in memory at a time
_MAX_RUNS = 4  # of consecutive bias positions; more are gathered instead of copied as blocks


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int, entries: int) -> str | None:
    """The reason why :func:`forward` cannot run, or None."""
    return None if device.type == "cpu" else f"{device.type} tensors: it is made for the CPU."


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """out, in the shape of q, and zeros, because this backward needs no log-sum-exp."""
    batch = _Batch(call)
    out = batch.new_like(call.q)
    for group in batch.groups:
        for piece in group.pieces(batch):
            q, k, v = (piece.take(batch.flat(t)).to(batch.operand) for t in call[:3])
            p = _probabilities(q, group.of_keys(k), group, batch.bias_of(piece), call.scale)
            piece.put(batch.flat(out), p.to(v.dtype) @ group.of_keys(v))
    return out, call.q.new_zeros(call.q.shape[:-1], dtype=batch.wide)


def backward(
    dout: Tensor, out: Tensor, lse: Tensor, call: Call, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of q, k and v, and of the table if there is one (None if not needed)."""
    batch = _Batch(call)
    grads = [batch.new_like(t) for t in call[:3]]
    flat = [batch.flat(grad) for grad in grads]
    dbias = None if batch.bias is None or not needs[3] else torch.zeros_like(batch.bias)
    for group in batch.groups:
        for piece in group.pieces(batch):
            taken = (piece.take(batch.flat(t)) for t in (call.q, call.k, call.v, dout))
            tensors = [t.to(batch.operand) for t in taken]
            found, dscores = _piece_backward(tensors, group, batch.bias_of(piece), call.scale)
            for target, grad in zip(flat, found, strict=True):
                piece.put(target, grad)
            if dbias is not None:
                group.add_to_bias(dbias[piece.heads], _sum_of_first(dscores))
    if batch.bias is None:
        return [*grads]
    return [*grads, None if dbias is None else batch.table_gradient(dbias)]


def _probabilities(
    q: Tensor, k: Tensor, group: _Group, bias: Tensor | None, scale: float
) -> Tensor:
    """``[n, h, L, keys]`` in float32 or better; zeros for a query without a valid key."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) * scale) @ k.to(wide).transpose(2, 3)
    if bias is not None:
        group.add_bias(scores, bias)
    if not group.causal:
        return torch.softmax(scores, 3)
    later = group.later
    p = torch.softmax(scores.masked_fill_(later, float("-inf")), 3)
    return p.masked_fill_(later.all(1, keepdim=True), 0)


def _piece_backward(
    tensors: list[Tensor],  # q, k, v and dout, [n, h, L, K]
    group: _Group,
    bias: Tensor | None,  # [h, M, M]
    scale: float,
) -> tuple[list[Tensor], Tensor]:
    """Gradients of q, k and v, ``[n, h, L, K]``, and of the scores ``[n, h, L, keys]``.

    The scores are in float32 or better; the other products use the dtype of the operands, as in
    flash attention.
    """
    q, k, v, dout = tensors
    k, v = group.of_keys(k), group.of_keys(v)
    p = _probabilities(q, k, group, bias, scale)
    dp = (dout @ v.transpose(2, 3)).to(p.dtype)
    # p (dp - sum(p dp)); the gradient of a single key is exactly 0.
    ds = torch.ops.aten._softmax_backward_data(dp, p, 3, p.dtype)
    p, narrow = p.to(q.dtype), ds.to(q.dtype)
    dq, dk = (narrow @ k).mul_(scale), (narrow.transpose(2, 3) @ q).mul_(scale)
    dv = p.transpose(2, 3) @ dout
    return [dq, group.to_keys(dk), group.to_keys(dv)], ds


@dataclass
class _Group:
    """Sequences that have the same length, valid keys and positions in the bias.

    Attributes:
        length: number of tokens of each sequence.
        keys: indices of the keys that may be attended to, at least one; None for all.
        places: ``[length]``, rows of the bias; None without a bias.
        causal: whether a query attends to no later key.
        starts: first row of each sequence.
    """

    length: int
    keys: Tensor | None
    places: np.ndarray | None
    causal: bool
    starts: list[int] = field(default_factory=list)

    def pieces(self, batch: _Batch) -> Iterator[_Piece]:
        """The group, split into parts whose scores fit in cache."""
        heads = batch.call.q.shape[-2]
        count = max(1, _CACHE_BYTES // (self.length * self.length * batch.wide.itemsize))
        sequences = max(1, count // heads)
        for i in range(0, len(self.starts), sequences):
            starts = self.starts[i : i + sequences]
            for head in range(0, heads, count):
                yield _Piece(self.length, starts, slice(head, head + count))

    def of_keys(self, t: Tensor) -> Tensor:
        """Select the valid keys: ``[n, h, length, K]`` to ``[n, h, keys, K]``."""
        return t if self.keys is None else t[:, :, self.keys]

    def to_keys(self, t: Tensor) -> Tensor:
        """The inverse of :meth:`of_keys`, with zeros for the other keys."""
        if self.keys is None:
            return t
        shape = (*t.shape[:2], self.length, t.shape[3])
        return t.new_zeros(shape).index_copy_(2, self.keys, t)

    @functools.cached_property
    def _in_bias(self) -> tuple[np.ndarray, np.ndarray]:
        """Bias positions of the queries and of the keys."""
        assert self.places is not None
        return self.places, self.places if self.keys is None else self.places[self.keys.numpy()]

    @functools.cached_property
    def _blocks(self) -> list[tuple[tuple[slice, slice], tuple[slice, slice]]] | None:
        """Pairs of slices, of the scores and of the bias, of corresponding blocks; None if many."""
        rows, columns = map(_runs, self._in_bias)
        if max(len(rows), len(columns)) > _MAX_RUNS:
            return None
        return [
            ((here, key_here), (there, key_there))
            for here, there in rows
            for key_here, key_there in columns
        ]

    @functools.cached_property
    def later(self) -> Tensor:
        """``[length, keys]`` bool: True for keys after the query."""
        keys = torch.arange(self.length) if self.keys is None else self.keys
        return keys > torch.arange(self.length)[:, None]

    def add_bias(self, scores: Tensor, bias: Tensor) -> None:
        """Add the bias ``[h, M, M]`` of the group's positions to ``[n, h, length, keys]``."""
        if self._blocks is None:
            places, key_places = map(torch.from_numpy, self._in_bias)
            scores += bias[:, places][:, :, key_places]
            return
        for (row, column), (place, key_place) in self._blocks:
            scores[:, :, row, column] += bias[:, place, key_place]

    def add_to_bias(self, bias: Tensor, scores: Tensor) -> None:
        """Add ``[h, length, keys]`` to ``[h, M, M]`` at the group's positions."""
        if self._blocks is None:
            places, key_places = self._in_bias
            flat = places[:, None].astype(np.int64) * bias.shape[2] + key_places
            found = torch.from_numpy(flat.reshape(-1))
            bias.flatten(1).index_add_(1, found, scores.flatten(1))
            return
        for (row, column), (place, key_place) in self._blocks:
            bias[:, place, key_place] += scores[:, row, column]


@dataclass(frozen=True)
class _Piece:
    """Some sequences and some heads of a group."""

    length: int
    starts: list[int]
    heads: slice

    @functools.cached_property
    def rows(self) -> slice | Tensor:
        """Rows of all sequences: a slice if they are adjacent."""
        first, length = self.starts[0], self.length
        if self.starts == list(range(first, first + len(self.starts) * length, length)):
            return slice(first, first + len(self.starts) * length)
        return (torch.tensor(self.starts)[:, None] + torch.arange(length)).flatten()

    def take(self, flat: Tensor) -> Tensor:
        """Read ``[n, h, length, K]`` from ``[T, H, K]``."""
        found = flat[self.rows, self.heads]
        return found.view(len(self.starts), self.length, *found.shape[1:]).transpose(1, 2)

    def put(self, flat: Tensor, part: Tensor) -> None:
        """Write ``[n, h, length, K]`` to the elements that :meth:`take` reads."""
        flat[self.rows, self.heads] = part.transpose(1, 2).flatten(0, 1).to(flat.dtype)


class _Batch:
    """The sequences of a call, and their bias."""

    def __init__(self, call: Call):
        self.call = call
        self.wide = torch.promote_types(call.q.dtype, torch.float32)
        self.operand = cpu_target.operand_dtype(call.q.dtype)  # dtype of the products
        self.groups = self._groups()

    def flat(self, t: Tensor) -> Tensor:
        """A tensor with a row for every token as ``[T, H, K]``."""
        return t if self.call.offsets is not None else t.flatten(0, 1)

    def new_like(self, t: Tensor) -> Tensor:
        """A tensor for all tokens; zeros if some tokens are in no group, else uninitialised."""
        written = sum(len(group.starts) * group.length for group in self.groups)
        new = torch.empty_like if written == self.flat(t).shape[0] else torch.zeros_like
        return new(t, memory_format=torch.contiguous_format)

    @functools.cached_property
    def matrix(self) -> Tensor | None:
        """``[M, M]``, table rows for the positions that occur."""
        call = self.call
        if call.matrix is None or call.positions is not None:
            return call.matrix
        length = call.q.shape[1] if call.offsets is None else call.max_length
        return call.matrix[:length, :length]

    @functools.cached_property
    def bias(self) -> Tensor | None:
        """``[H, M, M]``."""
        if self.call.table is None or self.matrix is None:
            return None
        rows = self.call.table.t().to(self.wide).contiguous()
        return rows.index_select(1, self.matrix.flatten()).unflatten(1, self.matrix.shape)

    def table_gradient(self, dbias: Tensor) -> Tensor:
        """``[entries, H]`` from the gradient of :attr:`bias`."""
        assert self.call.table is not None and self.matrix is not None
        entries, heads = self.call.table.shape
        sums = dbias.new_zeros(heads, entries)
        # Six times as fast as index_add_, and equally deterministic.
        sums.scatter_add_(1, self.matrix.flatten().long().expand(heads, -1), dbias.flatten(1))
        return sums.t().to(self.call.table.dtype).contiguous()

    def bias_of(self, piece: _Piece) -> Tensor | None:
        """``[h, M, M]`` for the heads of a piece."""
        return None if self.bias is None else self.bias[piece.heads]

    def _groups(self) -> list[_Group]:
        """All groups; sequences without a valid key are left out."""
        call = self.call
        if call.offsets is None:
            count, length = call.q.shape[:2]
            bounds = np.arange(count + 1) * length
        else:
            bounds = call.offsets.numpy()
        masks = None if call.key_mask is None else call.key_mask.numpy()
        limits = None if call.key_lengths is None else call.key_lengths.tolist()
        found: dict[tuple, _Group] = {}
        before, number = None, 0
        for b, (start, stop) in enumerate(itertools.pairwise(bounds.tolist())):
            length = stop - start
            keys = _keys(length, *(None if t is None else t[b] for t in (masks, limits)))
            places = self._places(start, stop)
            if not length or (keys is not None and not len(keys)):
                continue
            alike = (length, *(None if t is None else t.tobytes() for t in (keys, places)))
            number += alike != before
            before = alike
            key = (alike, 0 if length <= _SHORT else number)
            if key not in found:
                kept = None if keys is None else torch.from_numpy(keys)
                found[key] = _Group(length, kept, places, call.causal)
            found[key].starts.append(start)
        return list(found.values())

    def _places(self, start: int, stop: int) -> np.ndarray | None:
        call = self.call
        if call.table is None:
            return None
        if call.positions is None:
            return np.arange(stop - start)
        return self.flat(call.positions).numpy()[start:stop]


def _sum_of_first(t: Tensor) -> Tensor:
    """The sum over the first dimension; without a copy if its size is 1."""
    return t[0] if len(t) == 1 else t.sum(0)


def _keys(length: int, mask: np.ndarray | None, limit: int | None) -> np.ndarray | None:
    """Indices of the keys that may be attended to; None for all."""
    if mask is None and (limit is None or limit >= length):
        return None
    valid = np.ones(length, dtype=bool) if mask is None else mask[:length].copy()
    if limit is not None:
        valid[limit:] = False
    return None if valid.all() else valid.nonzero()[0]


def _runs(places: np.ndarray) -> list[tuple[slice, slice]]:
    """Runs of consecutive positions: a slice of the tokens and a slice of their positions."""
    ends = [*(np.flatnonzero(np.diff(places) != 1) + 1).tolist(), len(places)]
    starts = [0, *ends[:-1]]
    return [
        (slice(start, end), slice(int(places[start]), int(places[start]) + end - start))
        for start, end in zip(starts, ends, strict=True)
        if end > start
    ]
