"""shared_attention on the CPU: sequences that are alike together, and no key that is masked.

The forward is PyTorch's flash attention for the CPU. It has no gradient of its mask, so the
backward makes the scores itself, of few sequences at a time, small enough to stay in cache, and
adds up their gradient over the sequences before the table sees it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from vlmo.kernels.attention.reference import Call

# Longer sequences are worth a call of their own; shorter ones are gathered from anywhere.
_SHORT = 64
_CACHE_BYTES = 4 * 2**20  # of the scores that the backward makes at once
_MAX_RUNS = 4  # of places in the bias that are copied as blocks


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int, entries: int) -> str | None:
    """One sentence that says why :func:`forward` cannot run, or None."""
    return None if device.type == "cpu" else f"{device.type} tensors: it is made for the CPU."


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """out, in the shape of q, and the scores' log-sum-exp in float32 or better, q.shape[:-1]."""
    batch = _Batch(call)
    out = call.q.new_empty(call.q.shape)
    lse = call.q.new_empty(call.q.shape[:-1], dtype=batch.wide)
    flat_out, flat_lse = batch.flat(out), batch.flat(lse)
    for group in batch.groups:
        if group.no_key:  # PyTorch's kernel divides by their number
            group.put(flat_out, 0)
            group.put(flat_lse, float("-inf"))
            continue
        q, k, v = (batch.take(t, group).transpose(1, 2) for t in (call.q, call.k, call.v))
        if group.keys is not None:
            k, v = k[:, :, group.keys], v[:, :, group.keys]
        mask, blind = batch.mask(group)
        # Private, but what scaled_dot_product_attention calls: that one does not give the lse.
        part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(q, k, v, 0.0, False), attn_mask=None if mask is None else mask[None], scale=call.scale
        )
        part, part_lse = part.transpose(1, 2), part_lse.transpose(1, 2)
        if blind is not None:
            part, part_lse = part.clone(), part_lse.clone()
            part[:, blind], part_lse[:, blind] = 0, float("-inf")
        group.put(flat_out, part)
        group.put(flat_lse, part_lse)
    return out, lse


def backward(dout: Tensor, out: Tensor, lse: Tensor, call: Call, needs_table: bool) -> list[Tensor]:
    """Gradients of q, k, v and the table (empty unless wanted)."""
    batch = _Batch(call)
    grads = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in call[:3]]
    flat = [batch.flat(grad) for grad in grads]
    dbias = torch.zeros_like(batch.bias) if needs_table and batch.bias is not None else None
    for group in batch.groups:
        if group.no_key:
            continue
        mask, blind = batch.mask(group)
        for part in group.chunks(call.q.shape[-2] * batch.wide.itemsize):
            tensors = [batch.take(t, part) for t in (call.q, call.k, call.v, dout)]
            found, dscores = _sequences_backward(tensors, mask, blind, part.keys, call.scale)
            for target, grad in zip(flat, found, strict=True):
                part.put(target, grad)
            if dbias is not None:
                part.add_to(dbias, dscores.sum(0))
    return [*grads, call.q.new_empty(0) if dbias is None else batch.table_gradient(dbias)]


def _sequences_backward(
    tensors: list[Tensor],  # q, k, v and dout, [n, L, H, K]
    mask: Tensor | None,  # [H or 1, L, keys]
    blind: Tensor | None,  # [L] bool
    keys: Tensor | None,
    scale: float,
) -> tuple[list[Tensor], Tensor]:
    """Gradients of q, k and v, ``[n, L, H, K]``, and of the scores ``[n, H, L, keys]``."""
    q, k, v, dout = (t.transpose(1, 2) for t in tensors)
    wide = torch.promote_types(q.dtype, torch.float32)
    if keys is not None:
        k, v = k[:, :, keys], v[:, :, keys]
    q, k, v, dout = (t.to(wide) for t in (q * scale, k, v, dout))
    scores = q @ k.transpose(2, 3)
    if mask is not None:
        scores += mask
    p = torch.softmax(scores, 3)
    if blind is not None:
        p[:, :, blind] = 0
    dp = torch.matmul(dout, v.transpose(2, 3), out=scores)
    # p (dp - sum(p dp)): a lone key gets exactly 0.
    ds = torch.ops.aten._softmax_backward_data(dp, p, 3, wide)
    found = [(ds @ k).mul_(scale), ds.transpose(2, 3) @ q, p.transpose(2, 3) @ dout]
    if keys is not None:
        shape = tensors[0].transpose(1, 2).shape
        for i in (1, 2):
            found[i] = found[i].new_zeros(shape).index_copy_(2, keys, found[i])
    return [t.transpose(1, 2) for t in found], ds


@dataclass
class _Group:
    """Sequences of one length whose keys and whose places in the bias are the same.

    Attributes:
        length: of each.
        keys: numbers of the keys that may be attended to; None for all.
        places: ``[length]``, rows of the bias; None without one.
        starts: first row of each sequence.
    """

    length: int
    keys: Tensor | None
    places: np.ndarray | None
    starts: list[int] = field(default_factory=list)

    def chunks(self, bytes_of_a_score: int) -> Iterator[_Group]:
        """The group in parts whose scores stay in cache."""
        scores = max(1, self.length * self.length * bytes_of_a_score)
        count = max(1, _CACHE_BYTES // scores)
        for i in range(0, len(self.starts), count):
            yield _Group(self.length, self.keys, self.places, self.starts[i : i + count])

    @functools.cached_property
    def rows(self) -> slice | Tensor:
        """Of all sequences: a slice if they are neighbours."""
        first, length = self.starts[0], self.length
        if self.starts == list(range(first, first + len(self.starts) * length, max(length, 1))):
            return slice(first, first + len(self.starts) * length)
        return (torch.tensor(self.starts)[:, None] + torch.arange(length)).flatten()

    @property
    def no_key(self) -> bool:
        """Whether nothing may be attended to."""
        return self.keys is not None and len(self.keys) == 0

    def put(self, flat: Tensor, part: Tensor | float) -> None:
        """Write ``[n, length, ...]``, or one number, into the rows of ``[T, ...]``."""
        if isinstance(part, Tensor):
            part = part.flatten(0, 1).to(flat.dtype)
        flat[self.rows] = part

    @functools.cached_property
    def _in_bias(self) -> tuple[np.ndarray, np.ndarray]:
        """Places of the queries and of the keys."""
        assert self.places is not None
        return self.places, self.places if self.keys is None else self.places[self.keys.numpy()]

    def of(self, bias: Tensor) -> Tensor:
        """``[H, length, keys]`` out of ``[H, M, M]``; a view where the places lie together."""
        places, key_places = self._in_bias
        rows, columns = _runs(places), _runs(key_places)
        if len(rows) == len(columns) == 1:
            return bias[:, rows[0][1], columns[0][1]]
        if max(len(rows), len(columns)) > _MAX_RUNS:
            return bias[:, torch.from_numpy(places)][:, :, torch.from_numpy(key_places)]
        found = bias.new_empty(len(bias), len(places), len(key_places))
        for here, there in rows:
            for key_here, key_there in columns:
                found[:, here, key_here] = bias[:, there, key_there]
        return found

    def add_to(self, dbias: Tensor, dscores: Tensor) -> None:
        """Add ``[H, length, keys]`` to where :meth:`of` reads."""
        places, key_places = self._in_bias
        rows, columns = _runs(places), _runs(key_places)
        if max(len(rows), len(columns)) > _MAX_RUNS:
            flat = places[:, None].astype(np.int64) * dbias.shape[2] + key_places
            dbias.flatten(1).index_add_(1, torch.from_numpy(flat.reshape(-1)), dscores.flatten(1))
            return
        for here, there in rows:
            for key_here, key_there in columns:
                dbias[:, there, key_there] += dscores[:, here, key_here]


class _Batch:
    """The sequences of one call, and their bias."""

    def __init__(self, call: Call):
        self.call = call
        self.wide = torch.promote_types(call.q.dtype, torch.float32)
        self.groups = self._groups()

    def flat(self, t: Tensor) -> Tensor:
        """``[T, ...]`` of a tensor of every token."""
        return t if self.call.offsets is not None else t.flatten(0, 1)

    def take(self, t: Tensor, group: _Group) -> Tensor:
        """``[n, length, ...]`` of a group; its last dimension is dense, as flash attention asks."""
        t = self.flat(t)[group.rows].unflatten(0, (len(group.starts), group.length))
        return t if t.stride(-1) == 1 else t.contiguous()

    @functools.cached_property
    def matrix(self) -> Tensor | None:
        """``[M, M]``, the table's rows as far as places go."""
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
        # Six times as fast as index_add_, and as repeatable.
        sums.scatter_add_(1, self.matrix.flatten().long().expand(heads, -1), dbias.flatten(1))
        return sums.t().to(self.call.table.dtype).contiguous()

    def mask(self, group: _Group) -> tuple[Tensor | None, Tensor | None]:
        """What to add to the scores, ``[H or 1, L, keys]``, and queries without a key, ``[L]``."""
        found = None if self.bias is None else group.of(self.bias)
        if not self.call.causal:
            return found, None
        keys = torch.arange(group.length) if group.keys is None else group.keys
        later = keys > torch.arange(group.length)[:, None]
        if found is None:
            found = torch.zeros(1, *later.shape, dtype=self.wide)
        blind = later.all(1)
        return found.masked_fill(later, float("-inf")), blind if blind.any() else None

    def _groups(self) -> list[_Group]:
        call = self.call
        if call.offsets is None:
            count, length = call.q.shape[:2]
            starts, lengths = [b * length for b in range(count)], [length] * count
        else:
            *starts, _ = call.offsets.tolist()
            lengths = call.offsets.diff().tolist()
        found: dict[tuple, _Group] = {}
        before, number = None, 0
        for b, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            keys, places = self._keys(b, length), self._places(b, start, length)
            alike = (length, *(None if t is None else t.tobytes() for t in (keys, places)))
            number += alike != before
            before = alike
            key = (alike, 0 if length <= _SHORT else number)
            if key not in found:
                kept = None if keys is None else torch.from_numpy(keys)
                found[key] = _Group(length, kept, places)
            found[key].starts.append(start)
        return [group for group in found.values() if group.length]

    def _keys(self, b: int, length: int) -> np.ndarray | None:
        call = self.call
        valid = torch.ones(length, dtype=torch.bool)
        if call.key_mask is not None:
            valid = valid & call.key_mask[b]
        if call.key_lengths is not None:
            valid = valid & (torch.arange(length) < call.key_lengths[b])
        return None if bool(valid.all()) else valid.nonzero()[:, 0].numpy()

    def _places(self, b: int, start: int, length: int) -> np.ndarray | None:
        call = self.call
        if call.table is None:
            return None
        if call.positions is None:
            return np.arange(length)
        return self.flat(call.positions)[start : start + length].numpy()


def _runs(places: np.ndarray) -> list[tuple[slice, slice]]:
    """Where places go on one by one: numbers of the tokens, and their places."""
    ends = [*(np.flatnonzero(np.diff(places) != 1) + 1).tolist(), len(places)]
    starts = [0, *ends[:-1]]
    return [
        (slice(start, end), slice(int(places[start]), int(places[start]) + end - start))
        for start, end in zip(starts, ends, strict=True)
        if end > start
    ]
