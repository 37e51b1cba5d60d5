"""Where the tokens of a batch lie: sequences padded to one length, or packed end to end.

A sequence is a run of text tokens, then a run of image tokens; either may be empty. Blocks see a
batch through its layout alone: which expert each token goes to, how attention is kept within a
sequence, and which tokens stochastic depth drops together.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from vlmo.kernels import (
    ModalityRouting,
    RelativePositionBias,
    RelativePositionIndex,
    shared_attention,
)
from vlmo.transfer import upload

Project = Callable[[Tensor], Tensor]


class Experts(NamedTuple):
    """The experts that a block runs on a batch, and which of them each token goes to."""

    names: tuple[str, ...]  # out of "text", "imag", "vl"
    routing: ModalityRouting
    counts: tuple[int, ...]  # tokens of each, in one sequence if all are alike, else in the batch


class Tokens(Protocol):
    """What a block asks of tokens ``[B, N, D]`` or ``[T, D]`` that it takes one by one."""

    def experts(self, has_vl: bool) -> Experts:
        """For a block with (``has_vl``) or without a vision-language expert."""

    def by_modality(self, x: Tensor, text: Project, image: Project) -> Tensor:
        """``text`` of the text tokens and ``image`` of the image tokens, in their places."""

    def drop_path(self, rate: float, device: torch.device) -> Tensor:
        """Factor of the attention branch of each token: one draw a sequence."""

    def drop_path_of_experts(self, rate: float, has_vl: bool, device: torch.device) -> Tensor:
        """Factor of the expert's branch of each token: one draw for each run of one expert."""


class Layout(Tokens, Protocol):
    """What a block asks of whole sequences."""

    def attend(self, qkv: Tensor, table: Tensor | None, backend: str | None) -> Tensor:
        """Attention within each sequence: ``[..., 3, H, K]`` to ``[..., H, K]``."""


def survival(count: int, rate: float, device: torch.device) -> Tensor:
    """``[count]`` factors: 0 with probability ``rate``, else 1 / (1 - rate), as in timm."""
    keep = 1 - rate
    return torch.rand(count, device=device).add_(keep).floor_().div_(keep)


def _bias(table: Tensor | None, index: RelativePositionIndex | None) -> RelativePositionBias | None:
    return None if table is None or index is None else RelativePositionBias(table, index)


@dataclass(frozen=True)
class Padded:
    """Sequences of one length, ``[B, N, D]``: what compiles as one graph for every batch.

    Attributes:
        batch: B.
        text: leading tokens that are text.
        image: tokens of the image after them; N is their sum.
        vl: whether blocks that have a vision-language expert use it.
        index: of the relative position bias, None for a model without one.
        key_mask: ``[B, N]`` bool, False for padding; None if there is none.
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
        return Experts(names, ModalityRouting.segments([*enumerate(counts)]), counts)

    def attend(self, qkv: Tensor, table: Tensor | None, backend: str | None) -> Tensor:
        bias = _bias(table, self.index)
        return shared_attention(qkv, bias=bias, key_mask=self.key_mask, backend=backend)

    def by_modality(self, x: Tensor, text: Project, image: Project) -> Tensor:
        runs = ((text, x[:, : self.text]), (image, x[:, self.text :]))
        return torch.cat([project(run) for project, run in runs if run.shape[1]], dim=1)

    def drop_path(self, rate: float, device: torch.device) -> Tensor:
        return survival(self.batch, rate, device)[:, None].expand(-1, self.text + self.image)

    def drop_path_of_experts(self, rate: float, has_vl: bool, device: torch.device) -> Tensor:
        routing = self.experts(has_vl).routing
        draws = [
            survival(self.batch, rate, device)[:, None].expand(-1, length)
            for _, length in routing.pieces
        ]
        return torch.cat(draws, dim=1)


@dataclass(frozen=True)
class Packed:
    """Sequences of different lengths end to end, ``[T, D]``: nothing is spent on padding.

    Everything is worked out on the CPU from lengths that it knows; nothing waits for the device.

    Attributes:
        texts: text tokens of each sequence.
        images: image tokens of each sequence.
        vl: for each sequence, whether blocks that have a vision-language expert use it.
        device: of the tokens.
        index: of the relative position bias of joint sequences, None for a model without one.
        image_position: row of ``index`` of an image's first token.
    """

    texts: Sequence[int]
    images: Sequence[int]
    vl: Sequence[bool]
    device: torch.device
    index: RelativePositionIndex | None = None
    image_position: int = 0

    @functools.cached_property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [text + image for text, image in zip(self.texts, self.images, strict=True)]

    @functools.cached_property
    def starts(self) -> list[int]:
        """First row of each sequence, and T at the end."""
        return [0, *itertools.accumulate(self.lengths)]

    def experts(self, has_vl: bool) -> Experts:
        return self._experts_with_vl if has_vl else self._experts_without_vl

    def attend(self, qkv: Tensor, table: Tensor | None, backend: str | None) -> Tensor:
        bias = _bias(table, self.index)
        return shared_attention(
            qkv,
            bias=bias,
            offsets=self._offsets,
            max_length=max(self.lengths),
            positions=None if bias is None else self._positions,
            backend=backend,
        )

    def by_modality(self, x: Tensor, text: Project, image: Project) -> Tensor:
        if not any(self.images):
            return text(x)
        if not any(self.texts):
            return image(x)
        return _by_modality(x, self._text_first, sum(self.texts), text, image)

    def drop_path(self, rate: float, device: torch.device) -> Tensor:
        return survival(len(self.lengths), rate, device)[self._sequence]

    def drop_path_of_experts(self, rate: float, has_vl: bool, device: torch.device) -> Tensor:
        run = self._run_with_vl if has_vl else self._run_without_vl
        return survival(2 * len(self.lengths), rate, device)[run]

    def runs_of_tokens(self, has_vl: bool) -> Tensor:
        """``[T]`` on the CPU, the number in :meth:`runs` of each token's run."""
        return _numbers([length for _, length in self.runs(has_vl)])

    def runs(self, has_vl: bool) -> list[tuple[str, int]]:
        """(expert, length) of the two runs of every sequence, empty ones included."""
        runs = []
        for text, image, vl in zip(self.texts, self.images, self.vl, strict=True):
            joined = vl and has_vl
            runs += (
                [("vl", text + image), ("vl", 0)] if joined else [("text", text), ("imag", image)]
            )
        return runs

    def _experts(self, has_vl: bool) -> Experts:
        return _routed([run for run in self.runs(has_vl) if run[1]], self.device)

    # What every block asks for, made once.

    @functools.cached_property
    def _experts_with_vl(self) -> Experts:
        return self._experts(True)

    @functools.cached_property
    def _experts_without_vl(self) -> Experts:
        return self._experts(False)

    @functools.cached_property
    def _offsets(self) -> Tensor:
        return self._move(torch.tensor(self.starts, dtype=torch.int32))

    @functools.cached_property
    def _positions(self) -> Tensor:
        place = torch.arange(max(*self.texts, *self.images, 1), dtype=torch.int32)
        runs = []
        for text, image in zip(self.texts, self.images, strict=True):
            runs += [place[:text], place[:image] + self.image_position]
        return self._move(torch.cat(runs))

    @functools.cached_property
    def _text_first(self) -> Tensor:
        return self._move((self.runs_of_tokens(False) % 2).argsort(stable=True))

    @functools.cached_property
    def _sequence(self) -> Tensor:
        return self._move(_numbers(self.lengths))

    @functools.cached_property
    def _run_with_vl(self) -> Tensor:
        return self._move(self.runs_of_tokens(True))

    @functools.cached_property
    def _run_without_vl(self) -> Tensor:
        return self._move(self.runs_of_tokens(False))

    def _move(self, tensor: Tensor) -> Tensor:
        return upload(tensor, self.device)


@dataclass(frozen=True)
class Chosen:
    """Some tokens of packed sequences, ``[n, D]``: those that a head reads.

    All of the last block but its attention is spent on them alone.

    Attributes:
        packed: all tokens.
        rows: ``[n]`` int64 on the CPU, the chosen ones of them; n is not 0.
    """

    packed: Packed
    rows: Tensor

    @functools.cached_property
    def index(self) -> Tensor:
        """``rows`` on the device."""
        return upload(self.rows, self.packed.device)

    def experts(self, has_vl: bool) -> Experts:
        runs = self.packed.runs(has_vl)
        own = self.packed.runs_of_tokens(has_vl)[self.rows].tolist()
        return _routed([(runs[number][0], 1) for number in own], self.packed.device)

    def by_modality(self, x: Tensor, text: Project, image: Project) -> Tensor:
        is_image = self.packed.runs_of_tokens(False)[self.rows] % 2
        texts = len(x) - int(is_image.sum())
        if texts in (0, len(x)):
            return text(x) if texts else image(x)
        text_first = upload(is_image.argsort(stable=True), self.packed.device)
        return _by_modality(x, text_first, texts, text, image)

    def drop_path(self, rate: float, device: torch.device) -> Tensor:
        return self.packed.drop_path(rate, device)[self.index]

    def drop_path_of_experts(self, rate: float, has_vl: bool, device: torch.device) -> Tensor:
        return self.packed.drop_path_of_experts(rate, has_vl, device)[self.index]


def _routed(runs: Sequence[tuple[str, int]], device: torch.device) -> Experts:
    """Of ``(expert, length)`` runs, none of them empty."""
    used = {name for name, _ in runs}
    names = tuple(name for name in ("text", "imag", "vl") if name in used)
    counts = tuple(sum(length for name, length in runs if name == one) for one in names)
    if len(names) == 1:
        return Experts(names, ModalityRouting.segments([(0, counts[0])]), counts)
    pieces = [(names.index(name), length) for name, length in runs]
    return Experts(names, ModalityRouting.packed([pieces], device=device), counts)


def _by_modality(
    x: Tensor, text_first: Tensor, texts: int, text: Project, image: Project
) -> Tensor:
    """``text_first`` are the rows of ``x``, those of the text tokens first."""
    apart = x[text_first]
    out = torch.cat([text(apart[:texts]), image(apart[texts:])])
    return torch.empty_like(out).index_copy(0, text_first, out)


def _numbers(lengths: Sequence[int]) -> Tensor:
    """0 as often as the first length says, 1 as often as the second, ..."""
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
