"""ModalityRouting: the expert of each token, built once per batch."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import check_tensor, check_values
from .dispatch import exporting, runs_eagerly
from .routing_index import group_rows, routing_index
from .transfer import upload

Piece = tuple[int, int]


class Grouping(NamedTuple):
    """Token rows grouped by expert, for kernels that cannot compute them.

    Five tokens with ``ids = [1, 0, 1, 3, 1]`` and four experts give::

        rows    = [1, 0, 2, 4, 3]    token numbers, expert by expert, ascending within one
        offsets = [0, 1, 4, 4, 5]    expert e owns rows[offsets[e] : offsets[e + 1]]
    """

    ids: Tensor  # [T] int32
    rows: Tensor  # [T] int32
    offsets: Tensor  # [E + 1] int32


@dataclass(frozen=True, eq=False)
class ModalityRouting:
    """The assignment of tokens to ``num_experts`` experts.

    It is built once per batch by one of three constructors and shared by all layers and operations:

    * :meth:`segments`: every sequence consists of the same pieces. Kernels compute the rows of an
      expert, unless it has two pieces that are not adjacent.
    * :meth:`packed`: concatenated sequences of different lengths, each with its own pieces.
    * :meth:`from_ids`: one expert id per token, in any order.

    Experts may be empty. Tokens are never reordered: operations gather and scatter their rows.

    Attributes:
        num_experts: number of experts E.
        pieces: ``(expert, length)`` runs of every sequence, none of them empty, adjacent ones of
            different experts; empty unless created by :meth:`segments`.
        ids: ``[T]`` int32, the expert of each token; None for :meth:`segments`.
        offsets: ``[B + 1]`` int32, first token of each sequence and T at the end (``cu_seqlens``);
            only for :meth:`packed`. :func:`vlmo.kernels.shared_attention` takes the same tensor.
        max_length: length of the longest sequence; 0 for :meth:`from_ids`, which has none.
        counts: number of tokens of each expert, for :meth:`segments` in one sequence; empty if only
            the device knows them, as after :meth:`from_ids`.
    """

    num_experts: int
    pieces: tuple[Piece, ...] = ()
    ids: Tensor | None = None
    offsets: Tensor | None = None
    max_length: int = 0
    counts: tuple[int, ...] = ()
    _grouping: dict[tuple, Grouping] = field(default_factory=dict, repr=False)
    _grouped: Grouping | None = field(default=None, repr=False)  # of grouped()

    @classmethod
    def segments(
        cls, pieces: Sequence[Piece], *, num_experts: int | None = None
    ) -> ModalityRouting:
        """Route sequences that all consist of the same ``(expert, length)`` pieces.

        VLMo's joint forward at 224 pixels is ``ModalityRouting.segments([(0, 40), (1, 197)])``:
        40 text tokens to expert 0, then 197 image tokens to expert 1.

        Raises:
            TypeError, ValueError: a piece is not a pair of integers, a length is negative, an
                expert is out of range, or the sequence is empty.
        """
        pieces = _check_pieces("pieces", pieces)
        num_experts = _check_experts(num_experts, pieces)
        length = sum(length for _, length in pieces)
        if length == 0:
            raise ValueError(f"pieces: {list(pieces)} hold no token")
        counts = _counts(num_experts, pieces)
        return cls(num_experts, pieces=_merge(pieces), max_length=length, counts=counts)

    @classmethod
    def packed(
        cls,
        sequences: Sequence[Sequence[Piece]],
        *,
        num_experts: int | None = None,
        device: torch.device | str = "cpu",
    ) -> ModalityRouting:
        """Route sequences of different lengths that are concatenated without padding.

        A caption of 7 tokens with its image, followed by a caption of 12 tokens alone:
        ``ModalityRouting.packed([[(0, 7), (1, 197)], [(0, 12)]])``.

        Raises:
            TypeError, ValueError: as for :meth:`segments`.
        """
        runs = [_check_pieces(f"sequences[{i}]", pieces) for i, pieces in enumerate(sequences)]
        flat = tuple(piece for run in runs for piece in run)
        num_experts = _check_experts(num_experts, flat)
        experts = torch.tensor([expert for expert, _ in flat], dtype=torch.int32)
        counts = torch.tensor([length for _, length in flat], dtype=torch.int64)
        lengths = [sum(length for _, length in run) for run in runs]
        offsets = torch.zeros(len(runs) + 1, dtype=torch.int32)
        offsets[1:] = torch.tensor(lengths, dtype=torch.int64).cumsum(0)
        return cls(
            num_experts,
            ids=upload(experts.repeat_interleave(counts), device),
            offsets=upload(offsets, device),
            max_length=max(lengths, default=0),
            counts=_counts(num_experts, flat),
        )

    @classmethod
    def from_ids(cls, ids: Tensor, num_experts: int) -> ModalityRouting:
        """Route by one expert id per token, in any order; ``ids`` is flattened in row-major order.

        Ids on the CPU are checked here. Ids on a GPU are checked asynchronously: an id out of range
        raises a device-side assertion that names the argument.

        Raises:
            TypeError: ``ids`` is not an integer tensor.
            ValueError: ``num_experts`` is not positive, or an id is outside ``0..num_experts-1``.
        """
        check_tensor("ids", ids)
        if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
            raise TypeError(f"ids: dtype {ids.dtype} is not an integer type")
        num_experts = _check_experts(num_experts, ())
        flat = ids.reshape(-1)
        # Unsigned types have no comparisons; a uint64 from 2**63 on becomes negative.
        wide = flat if flat.dtype.is_signed or flat.dtype == torch.uint8 else flat.to(torch.int64)
        wrong = (wide < 0) | (wide >= num_experts)
        check_values("ids", flat, wrong, f"outside the experts 0..{num_experts - 1}")
        # A copy, because the caller may overwrite its tensor with values that are not checked.
        return cls(num_experts, ids=wide.to(torch.int32, copy=True))

    @property
    def sequence_length(self) -> int | None:
        """Number of tokens of each sequence for :meth:`segments`, else None."""
        return self.max_length if self.pieces else None

    def to(self, device: torch.device | str) -> ModalityRouting:
        """The same routing with its tensors on ``device``."""
        if self.ids is None or self.ids.device == torch.device(device):
            return self
        offsets = None if self.offsets is None else self.offsets.to(device, non_blocking=True)
        ids = self.ids.to(device, non_blocking=True)
        return ModalityRouting(self.num_experts, (), ids, offsets, self.max_length, self.counts)

    def expert_ids(self, num_tokens: int, device: torch.device | str) -> Tensor:
        """``[num_tokens]`` int32, the expert of each token."""
        if self.ids is not None:
            return self.ids
        runs = [torch.full((n,), e, dtype=torch.int32, device=device) for e, n in self.pieces]
        return torch.cat(runs).repeat(num_tokens // self.max_length)

    def check_tokens(self, shape: torch.Size, device: torch.device) -> None:
        """Raise ValueError unless tokens of this shape (``x.shape[:-1]``) fit the routing."""
        tokens = math.prod(shape)  # numel() of a torch.Size cannot be traced
        if self.ids is not None:
            if self.ids.numel() != tokens:
                raise ValueError(
                    f"routing: made for {self.ids.numel()} tokens, but x has {tokens} "
                    f"(shape {tuple(shape)} before the model dimension)"
                )
            if self.ids.device != device:
                raise ValueError(f"routing: on {self.ids.device}, but x is on {device}")
        elif tokens % self.max_length or (len(shape) > 1 and shape[-1] != self.max_length):
            raise ValueError(
                f"routing: made for sequences of {self.max_length} tokens, but x has shape "
                f"{tuple(shape)} before the model dimension"
            )

    @property
    def by_arithmetic(self) -> bool:
        """Whether each expert has at most one run of tokens, the same in every sequence."""
        return self.ids is None and len({e for e, _ in self.pieces}) == len(self.pieces)

    def grouping(self, num_tokens: int, device: torch.device) -> Grouping:
        """Rows grouped by expert on ``device``, cached for reuse.

        A requested backend has no effect here; it concerns the operation that reads the rows.
        """
        if self._grouped is not None:
            return self._grouped
        key = (num_tokens, device)
        grouping = self._grouping.get(key)
        if grouping is None:
            grouping = self._group(num_tokens, device)
            # Not while tracing: activation checkpointing does not support a graph with this side
            # effect, and a CUDA graph reuses its buffers.
            if runs_eagerly(grouping):
                self._grouping[key] = grouping
        return grouping

    def _group(self, num_tokens: int, device: torch.device) -> Grouping:
        # A grouping cached during inference must be usable by autograd in a later training step.
        with torch.inference_mode(False):
            ids = self.expert_ids(num_tokens, device)
            group = group_rows if exporting() else routing_index
            rows, offsets = group(ids, self.num_experts)
        return Grouping(ids, rows, offsets)

    def grouped(self) -> ModalityRouting:
        """The same routing with its rows already grouped by expert; not for :meth:`segments`.

        Eager calls group the rows when first needed and cache the result. A graph of
        :func:`torch.compile` or ``torch.export`` that builds its routing cannot use this cache:
        call this method before the layers, or each of them groups the rows again.
        """
        assert self.ids is not None
        return replace(self, _grouped=self._group(self.ids.shape[0], self.ids.device))


def _check_pieces(name: str, pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    checked = []
    for piece in pieces:
        if not (isinstance(piece, (tuple, list)) and len(piece) == 2):
            raise TypeError(f"{name}: {piece!r} is not an (expert, length) pair")
        if not all(_is_integer(number) for number in piece):
            raise TypeError(f"{name}: {piece!r} is not a pair of integers")
        expert, length = map(int, piece)
        if length < 0:
            raise ValueError(f"{name}: length {length} of {piece!r} is negative")
        checked.append((expert, length))
    return tuple(checked)


def _is_integer(value: object) -> bool:
    """Whether ``value`` is a Python or NumPy integer."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _merge(pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    """Remove empty runs and merge adjacent runs of the same expert."""
    merged: list[Piece] = []
    for expert, length in pieces:
        if merged and merged[-1][0] == expert:
            length += merged.pop()[1]
        if length:
            merged.append((expert, length))
    return tuple(merged)


def _counts(num_experts: int, pieces: Iterable[Piece]) -> tuple[int, ...]:
    """Number of tokens of each expert."""
    counts = [0] * num_experts
    for expert, length in pieces:
        counts[expert] += length
    return tuple(counts)


def _check_experts(num_experts: int | None, pieces: Iterable[Piece]) -> int:
    """The number of experts: as given, or else the largest expert that occurs plus one."""
    experts = [expert for expert, _ in pieces]
    count = max([0, *experts]) + 1 if num_experts is None else num_experts
    if not _is_integer(count) or count < 1:
        raise ValueError(f"num_experts: {num_experts!r} is not a positive integer")
    count = int(count)
    for expert in experts:
        if not 0 <= expert < count:
            raise ValueError(f"pieces: expert {expert} is outside 0..{count - 1}")
    return count
