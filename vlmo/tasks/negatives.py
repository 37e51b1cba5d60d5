"""Hard negatives of image-text matching, sampled from the batches of all ranks.

Ranks exchange only indices, token ids and the sampled images: an image is sent once, as stored, to
each rank that sampled it and lacks it. (unilm, the reference implementation, gathers all images on
every rank in float32, 616 MB a step for 1024 images at 224 pixels, and synchronises with the device
2 B times.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlmo import distributed
from vlmo.device import HostCopy
from vlmo.kernels.transfer import upload
from vlmo.model.layout import text_lengths


class Negatives(NamedTuple):
    """A negative text and a negative image for each of B rows.

    Attributes:
        text_ids: ``[B, T]``, ids of the negative texts.
        text_lengths: ``[B]`` int64 on the CPU, number of tokens of these texts.
        images: ``[B]`` int64 on the CPU, for each row the index of its negative image in the
            concatenation of the B images and ``pixels``.
        pixels: ``[n, 3, S, S]``, negative images that are not among the B.
    """

    text_ids: Tensor
    text_lengths: Tensor
    images: Tensor
    pixels: Tensor


def draw_negatives(
    logits: Tensor, generator: torch.Generator | None = None, *, rank: int = 0
) -> Tensor:
    """For each row of ``[B, G]`` logits, sample another column with its softmax probability.

    Does not synchronise with the device. The noise of all G rows is drawn, so the sample of a row
    does not depend on the number of ranks that share the batch. On the CPU the samples equal those
    of unilm, which calls ``torch.multinomial`` for each row, with the same seed.

    Args:
        logits: rows ``rank * B`` to ``rank * B + B - 1`` of a square matrix.
        generator: random number generator on the device; None for torch's own.
        rank: see ``logits``.

    Returns:
        ``[B]`` int64.

    Raises:
        ValueError: there is a single column, so there is no other one.
    """
    rows, columns = logits.shape
    if columns < 2:
        raise ValueError(f"logits: {columns} column holds no negative; image-text matching needs 2")
    weights = logits.detach().float().softmax(dim=1)
    place = torch.arange(rows, device=logits.device)
    own = (rank * rows + place)[:, None] == torch.arange(columns, device=logits.device)
    weights = weights.masked_fill(own, 0)
    # If softmax underflows to 0 outside the row's own column, the row still needs a distribution.
    empty = weights.sum(1, keepdim=True) == 0
    weights = torch.where(empty, (~own).float(), weights)
    noise = weights.new_empty(columns, columns).exponential_(generator=generator)
    return (weights / noise[rank * rows : (rank + 1) * rows]).argmax(1)


class PendingNegatives:
    """Negatives of this rank's rows, being copied to the host; :meth:`all` waits for the copy.

    The image negatives are sampled before the text negatives, as in unilm.

    Args:
        i2t: ``[B, W * B]`` logits of this rank's images against all texts.
        t2i: ``[B, W * B]`` logits of this rank's texts against all images.
        batch: batch of this rank, with ``image``, ``text_ids`` and their lengths.
        generator: see :func:`draw_negatives`.

    Raises:
        ValueError: the global batch is a single pair, which has no negative.
    """

    def __init__(
        self,
        i2t: Tensor,
        t2i: Tensor,
        batch: Mapping[str, Any],
        generator: torch.Generator | None = None,
    ):
        rank = distributed.rank()
        self._image = batch["image"]
        self._rows = i2t.shape[0]
        wrong_image = draw_negatives(t2i, generator, rank=rank)
        self._wrong_text = draw_negatives(i2t, generator, rank=rank)
        lengths = upload(text_lengths(batch), i2t.device)
        numbers = torch.stack([wrong_image, self._wrong_text, lengths], dim=1)
        self._numbers = HostCopy(distributed.gather(numbers))  # [W * B, 3]
        self._text_ids = distributed.gather(batch["text_ids"])[self._wrong_text]

    def all(self) -> Negatives:
        """The negatives of all rows of this rank."""
        if distributed.world_size() > 1:
            return self.parts(1)[0]
        wrong_image, wrong_text, lengths = self._numbers.get().unbind(1)
        return Negatives(self._text_ids, lengths[wrong_text], wrong_image, self._image[:0])

    def parts(self, count: int) -> list[Negatives]:
        """The negatives of each of ``count`` equal micro-batches; a collective call."""
        rows, rank = self._rows, distributed.rank()
        wrong_image, wrong_text, lengths = self._numbers.get().T.tolist()
        first = rank * rows
        wanted = [
            sorted({n for n in wrong_image[r * rows : (r + 1) * rows] if n // rows != r})
            for r in range(distributed.world_size())
        ]
        foreign = self._image[:0]
        if any(wanted):
            foreign = distributed.fetch_rows(self._image, wanted)
        place = {number: rows + i for i, number in enumerate(wanted[rank])}
        place |= {first + i: i for i in range(rows)}
        size = rows // count
        return [
            self._part(
                slice(start, start + size),
                [place[n] for n in wrong_image[first + start : first + start + size]],
                [lengths[n] for n in wrong_text[first + start : first + start + size]],
                foreign,
            )
            for start in range(0, rows, size)
        ]

    def _part(
        self, rows: slice, images: list[int], text_lengths: list[int], foreign: Tensor
    ) -> Negatives:
        """Negatives of ``rows``; ``images`` index this rank's images and then ``foreign``."""
        outside = sorted({n for n in images if not rows.start <= n < rows.stop})
        size = rows.stop - rows.start
        place = {number: size + i for i, number in enumerate(outside)}
        numbers = torch.tensor(outside, dtype=torch.long)
        own = upload(numbers[numbers < self._rows], foreign.device)
        far = upload(numbers[numbers >= self._rows] - self._rows, foreign.device)
        return Negatives(
            self._text_ids[rows],
            torch.tensor(text_lengths),
            torch.tensor([place.get(n, n - rows.start) for n in images]),
            torch.cat([self._image[own], foreign[far]]),
        )
