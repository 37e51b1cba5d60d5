"""Layouts of a batch's tokens: sequences padded to one length, or packed without padding.

A sequence is a run of text tokens followed by a run of image tokens; either may be empty. Blocks
access a batch only through its layout: it determines the expert of each token, restricts attention
to each sequence, and determines which tokens stochastic depth drops together.

A layout is computed from tensors before the first block. It does not depend on values that
``torch.compile`` cannot see, so one graph serves texts of all lengths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmo.kernels import (
    ModalityRouting,
    RelativePositionBias,
    RelativePositionIndex,
    shared_attention,
)
from vlmo.kernels.transfer import upload


class Experts(NamedTuple):
    """The experts that a block runs on a batch, and the routing of tokens to them."""

    names: tuple[str, ...]  # out of "text", "imag", "vl"
    routing: ModalityRouting
    counts: tuple[int, ...]  # number of tokens for each expert


class Tokens(Protocol):
    """What a block needs for token-wise operations on tokens ``[B, N, D]`` or ``[T, D]``."""

    def experts(self, has_vl: bool) -> Experts:
        """The experts of all blocks with (``has_vl``) or without a vision-language expert."""

    def drop_path(self, rate: float, device: torch.device) -> Tensor:
        """Factor of the attention branch for each token: one random draw per sequence."""

    def drop_path_of_experts(self, rate: float, has_vl: bool, device: torch.device) -> Tensor:
        """Factor of the expert branch for each token: one random draw per run of one expert."""


class Layout(Tokens, Protocol):
    """What a block needs for operations on whole sequences."""

    def attend(self, qkv: Tensor, table: Tensor | None, backend: str | None) -> Tensor:
        """Attention within each sequence: ``[..., 3, H, K]`` to ``[..., H, K]``."""


def survival(count: int, rate: float, device: torch.device) -> Tensor:
    """Factors ``[count]``: 0 with probability ``rate``, else 1 / (1 - rate), as in timm."""
    keep = 1 - rate
    return torch.rand(count, device=device).add_(keep).floor_().div_(keep)


def numbered(lengths: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """For concatenated runs: the index of each token's run, and the token's position in its run.

    Does not synchronise with the device.

    Args:
        lengths: ``[n]`` int64, number of tokens of each run.
        total: sum of ``lengths``.

    Returns:
        Two ``[total]`` int64 tensors.
    """
    run = torch.repeat_interleave(lengths, output_size=total)
    first = lengths.cumsum(0) - lengths
    return run, torch.arange(total, device=lengths.device) - first[run]


class Texts(NamedTuple):
    """Texts, concatenated without padding.

    Attributes:
        ids: ``[n]``, ids of all tokens.
        places: ``[n]``, position of each token in its text.
        lengths: ``[B]`` int64 on the CPU, number of tokens of each text.
    """

    ids: Tensor
    places: Tensor
    lengths: Tensor


def text_lengths(batch: Mapping[str, Any]) -> Tensor:
    """Number of tokens of each text, ``[B]`` int64 on the CPU: ``text_lengths``, or from the masks.

    Raises:
        ValueError: the number of lengths is not the number of texts, a text has no token or more
            tokens than ``text_ids``, or its mask has a gap.
    """
    rows, capacity = batch["text_ids"].shape
    if "text_lengths" in batch:
        lengths = batch["text_lengths"].to("cpu", torch.int64)
        if lengths.shape != (rows,):
            raise ValueError(f"text_lengths: shape {tuple(lengths.shape)} for {rows} texts")
    else:
        masks = batch["text_masks"].bool()
        counts = masks.sum(1)
        gaps = masks != (torch.arange(masks.shape[1], device=masks.device) < counts[:, None])
        refuse(gaps.any(1), "text_masks: {} has padding before its last token")
        lengths = counts.cpu()
    refuse(lengths < 1, "text_lengths: {} has no token")
    refuse(lengths > capacity, f"text_lengths: {{}} has more tokens than text_ids, {capacity}")
    return lengths


def refuse(wrong: Tensor, complaint: str) -> None:
    """Raise ValueError if any text is ``wrong`` ``[B]``; a compiled graph asserts instead.

    ``{}`` in the complaint is replaced by the text's index.
    """
    if torch.compiler.is_compiling():
        torch._assert_async(~wrong.any(), complaint.format("a text"))
    elif wrong.any():
        raise ValueError(complaint.format(f"text {int(wrong.long().argmax())}"))


def end_to_end(text_ids: Tensor, lengths: Tensor) -> Texts:
    """Remove the padding of ids ``[B, T]``; ``lengths`` ``[B]`` are on the CPU."""
    total = cast(int, lengths.sum().item())  # int() would break the graph
    torch._check(total >= 0)  # gives a compiled graph a bound
    text, places = numbered(upload(lengths, text_ids.device), total)
    return Texts(text_ids[text, places], places, lengths)


def padded(texts: Texts) -> tuple[Tensor, Tensor]:
    """Ids ``[B, T]`` and mask ``[B, T]`` bool of texts, with the length of the longest as T."""
    columns = torch.arange(int(texts.lengths.max()))
    mask = upload(columns < texts.lengths[:, None], texts.ids.device)
    ids = torch.zeros(mask.shape, dtype=texts.ids.dtype, device=texts.ids.device)
    text, _ = numbered(upload(texts.lengths, texts.ids.device), texts.ids.shape[0])
    return ids.index_put((text, texts.places), texts.ids), mask


def _bias(table: Tensor | None, index: RelativePositionIndex | None) -> RelativePositionBias | None:
    return None if table is None or index is None else RelativePositionBias(table, index)


@dataclass(frozen=True)
class Padded:
    """Sequences of one length, ``[B, N, D]``; compiles to one graph for every batch.

    Attributes:
        batch: B.
        text: number of text tokens at the start of each sequence.
        image: number of image tokens after them; N is the sum of both.
        vl: whether blocks that have a vision-language expert use it.
        index: relative position index of the bias, None for a model without relative positions.
        key_mask: ``[B, N]`` bool, False for padding; None if there is no padding.
    """

    batch: int
    text: int
    image: int
    vl: bool
    index: RelativePositionIndex | None
    key_mask: Tensor | None

    def experts(self, has_vl: bool) -> Experts:
        if self.vl and has_vl:
            runs = [("vl", self.text + self.image)]
        else:
            runs = [run for run in (("text", self.text), ("imag", self.image)) if run[1]]
        names, counts = zip(*runs, strict=True)
        routing = ModalityRouting.segments([*enumerate(counts)])
        return Experts(names, routing, tuple(self.batch * count for count in counts))

    def attend(self, qkv: Tensor, table: Tensor | None, backend: str | None) -> Tensor:
        bias = _bias(table, self.index)
        return shared_attention(qkv, bias=bias, key_mask=self.key_mask, backend=backend)

    def drop_path(self, rate: float, device: torch.device) -> Tensor:
        return survival(self.batch, rate, device)[:, None].expand(-1, self.text + self.image)

    def drop_path_of_experts(self, rate: float, has_vl: bool, device: torch.device) -> Tensor:
        routing = self.experts(has_vl).routing
        draws = [
            survival(self.batch, rate, device)[:, None].expand(-1, length)
            for _, length in routing.pieces
        ]
        return torch.cat(draws, dim=1)


class Run(NamedTuple):
    """Consecutive sequences of a packed batch that differ only in the lengths of their texts.

    Attributes:
        sequences: number of sequences.
        texts: ``[sequences]`` int64 on the CPU, text tokens of each; None for images alone.
        words: sum of ``texts``.
        image: image tokens of each sequence; 0 for texts alone.
        vl: whether blocks that have a vision-language expert use it.
    """

    sequences: int
    texts: Tensor | None
    words: int
    image: int
    vl: bool

    def experts_of(self, has_vl: bool) -> list[tuple[str, int]]:
        """Pairs (expert, number of tokens) for each modality."""
        text = [] if self.texts is None else [("text", self.words)]
        image = [("imag", self.sequences * self.image)] if self.image else []
        if self.vl and has_vl:
            return [("vl", tokens) for _, tokens in text + image]
        return text + image


class Places(NamedTuple):
    """Positions of some tokens in the texts of a run, in any order.

    Attributes:
        texts: ``[n]`` int64, index of each token's text in the run.
        places: ``[n]`` int64, position of the token in its text.
    """

    texts: Tensor
    places: Tensor


@dataclass(frozen=True)
class Packed:
    """Sequences of different lengths, concatenated to ``[T, D]`` without padding.

    Use :meth:`of` to create one. Its tensors are on the device of the tokens.

    Attributes:
        runs: all sequences, in order.
        offsets: ``[S + 1]`` int32, first row of each sequence, and T at the end.
        max_length: upper bound of the sequence lengths.
        sequence: ``[T]`` int64, index of each token's sequence.
        is_image: ``[T]`` bool.
        joined: ``[T]`` bool, True for tokens of sequences that use the vision-language expert; None
            if no sequence does.
        index: relative position index of joint sequences, None for a model without relative
            positions.
        positions: ``[T]`` int32, row of ``index`` for each token; None without an index.
    """

    runs: tuple[Run, ...]
    offsets: Tensor
    max_length: int
    sequence: Tensor
    is_image: Tensor
    joined: Tensor | None
    index: RelativePositionIndex | None
    positions: Tensor | None

    @classmethod
    def of(
        cls,
        runs: Sequence[Run],
        device: torch.device,
        *,
        longest_text: int,
        index: RelativePositionIndex | None = None,
        image_position: int = 0,
    ) -> Packed:
        """The layout of some runs; does not synchronise with the device.

        Args:
            runs: all sequences, in order.
            device: device of the tokens.
            longest_text: upper bound of the text lengths, used where lengths have no values (in a
                graph).
            index: see :class:`Packed`.
            image_position: row of ``index`` for the first token of an image.
        """

        def of_each(values: Sequence[Tensor | int | bool]) -> Tensor:
            """Concatenate one tensor or number per run to ``[S]``."""
            parts = [
                upload(value, device)
                if isinstance(value, Tensor)
                else torch.full((run.sequences,), value, device=device)
                for run, value in zip(runs, values, strict=True)
            ]
            return torch.cat(parts)

        texts = of_each([0 if run.texts is None else run.texts for run in runs])
        lengths = texts + of_each([run.image for run in runs])
        total = sum(run.words + run.sequences * run.image for run in runs)
        sequence, place = numbered(lengths, total)
        own_text = texts[sequence]
        is_image = place >= own_text
        positions = None
        if index is not None:
            of_image = place - own_text + image_position
            positions = torch.where(is_image, of_image, place).int()
        joined = of_each([run.vl for run in runs])[sequence] if any(r.vl for r in runs) else None
        return cls(
            runs=tuple(runs),
            offsets=F.pad(lengths.cumsum(0), (1, 0)).int(),
            max_length=max(_longest(run, longest_text) for run in runs),
            sequence=sequence,
            is_image=is_image,
            joined=joined,
            index=index,
            positions=positions,
        )

    def experts(self, has_vl: bool) -> Experts:
        found = [expert for run in self.runs for expert in run.experts_of(has_vl)]
        names = _names(found)
        ids = self.sequence
        if len(names) > 1:
            number = {name: names.index(name) for name in names}
            ids = torch.where(self.is_image, number.get("imag", 0), number.get("text", 0))
            if "vl" in number:
                assert self.joined is not None
                ids = torch.where(self.joined, number["vl"], ids)
        return _routed(found, ids)

    def attend(self, qkv: Tensor, table: Tensor | None, backend: str | None) -> Tensor:
        bias = _bias(table, self.index)
        return shared_attention(
            qkv,
            bias=bias,
            offsets=self.offsets,
            max_length=self.max_length,
            positions=None if bias is None else self.positions,
            distinct=bias is not None,
            validate=False,  # valid by construction, and shared by all layers
            backend=backend,
        )

    def drop_path(self, rate: float, device: torch.device) -> Tensor:
        return survival(self.offsets.shape[0] - 1, rate, device)[self.sequence]

    def drop_path_of_experts(self, rate: float, has_vl: bool, device: torch.device) -> Tensor:
        second = self.is_image
        if has_vl and self.joined is not None:
            second = second & ~self.joined
        draws = survival(2 * (self.offsets.shape[0] - 1), rate, device)
        return draws[2 * self.sequence + second]

    def choose(self, wanted: Sequence[tuple[int, Places | None]]) -> Chosen:
        """Some tokens of some runs; each run is given by index, and None selects first tokens."""
        first, rows, parts = self.offsets[:-1].long(), [], []
        for number, tokens in wanted:
            run, start = self.runs[number], sum(run.sequences for run in self.runs[:number])
            own = first[start : start + run.sequences]
            rows.append(own if tokens is None else own[tokens.texts] + tokens.places)
            parts.append(Part(run.texts is None, run.vl, rows[-1].shape[0]))
        return Chosen(self, torch.cat(rows), tuple(parts))


class Part(NamedTuple):
    """Consecutive chosen tokens of one modality.

    Attributes:
        image: whether they are image tokens.
        vl: whether blocks that have a vision-language expert use it.
        tokens: number of tokens.
    """

    image: bool
    vl: bool
    tokens: int


@dataclass(frozen=True)
class Chosen:
    """Some tokens of packed sequences, ``[n, D]``: those that a head reads.

    The last block computes everything except attention for these tokens only.

    Attributes:
        packed: layout of all tokens.
        index: ``[n]`` int64 on the device, rows of the chosen tokens; n is not 0.
        parts: runs of chosen tokens of one modality, in order.
    """

    packed: Packed
    index: Tensor
    parts: tuple[Part, ...]

    def experts(self, has_vl: bool) -> Experts:
        found = [
            ("vl" if part.vl and has_vl else "imag" if part.image else "text", part.tokens)
            for part in self.parts
        ]
        names, device = _names(found), self.index.device
        numbers = [torch.full((count,), names.index(name), device=device) for name, count in found]
        return _routed(found, torch.cat(numbers))

    def drop_path(self, rate: float, device: torch.device) -> Tensor:
        return self.packed.drop_path(rate, device)[self.index]

    def drop_path_of_experts(self, rate: float, has_vl: bool, device: torch.device) -> Tensor:
        return self.packed.drop_path_of_experts(rate, has_vl, device)[self.index]


def _longest(run: Run, longest_text: int) -> int:
    """Upper bound of the sequence lengths of a run."""
    if run.texts is None or run.sequences == 0:
        return run.image
    if torch.compiler.is_compiling():
        return longest_text + run.image
    return int(run.texts.max()) + run.image


def _names(found: Sequence[tuple[str, int]]) -> tuple[str, ...]:
    """The experts that occur, in the order of the blocks."""
    used = [name for name, _ in found]
    return tuple(name for name in ("text", "imag", "vl") if name in used)


def _routed(found: Sequence[tuple[str, int]], ids: Tensor) -> Experts:
    """Experts from (expert, number of tokens) pairs and the expert of each token, ``ids`` ``[T]``.

    ``ids`` is not used if there is a single expert. All layers share the grouping of rows by
    expert.
    """
    names = _names(found)
    counts = tuple(sum(tokens for name, tokens in found if name == one) for one in names)
    if len(names) == 1:
        return Experts(names, ModalityRouting.segments([(0, 1)]), counts)
    routing = ModalityRouting(len(names), ids=ids.int(), counts=counts)
    return Experts(names, routing.grouped(), counts)
