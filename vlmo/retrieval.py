"""Image-text retrieval: encode, recall, and re-ranking with the fusion encoder.

Scores are ``[J, I]`` matrices of J texts against I images. A text belongs to one image; an image
may have several texts, as in COCO.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from vlmo.model import VLMo

RECALL_AT = (1, 5, 10)
_CELLS = 2**24  # comparisons at a time, so that 25,000 texts against 5,000 images need no matrix


def _unchanged(images: Tensor) -> Tensor:
    return images


@dataclass(frozen=True)
class Gallery:
    """The images and texts of one retrieval test.

    Attributes:
        images: ``[I, ...]``, in the form it is stored.
        text_ids: ``[J, T]`` int64.
        text_masks: ``[J, T]``.
        image_of_text: ``[J]`` int64, the image each text belongs to.
        prepare: from stored images ``[n, ...]`` to the model's ``[n, 3, S, S]``.
    """

    images: Tensor
    text_ids: Tensor
    text_masks: Tensor
    image_of_text: Tensor
    prepare: Callable[[Tensor], Tensor] = _unchanged

    def pixels(self, rows: Tensor | slice, device: torch.device) -> Tensor:
        """The model's input for some images, ``[n, 3, S, S]``."""
        return self.prepare(self.images[rows]).to(device)

    def texts(self, rows: Tensor | slice, device: torch.device) -> tuple[Tensor, Tensor]:
        """Ids and masks of some texts, each ``[n, T]``."""
        return self.text_ids[rows].to(device), self.text_masks[rows].to(device)


class Directions(NamedTuple):
    """Something for both directions of retrieval.

    Attributes:
        image: images found for a text (IR of the papers).
        text: texts found for an image (TR of the papers).
    """

    image: Tensor
    text: Tensor


class Recall(NamedTuple):
    """Share of the queries whose match is among the first k: ``{k: share}`` per direction."""

    image: dict[int, float]
    text: dict[int, float]

    @property
    def mean(self) -> float:
        """Mean of all recalls of both directions."""
        values = [*self.image.values(), *self.text.values()]
        return sum(values) / len(values)


@torch.no_grad()
def encode(model: VLMo, gallery: Gallery, *, batch_size: int = 256) -> Directions:
    """Unit vectors of the dual encoder: images ``[I, D]`` and texts ``[J, D]``, on the CPU."""
    device = next(model.parameters()).device
    with evaluating(model):
        images = [
            model.encode_image(gallery.pixels(rows, device)).embedding
            for rows in _slices(len(gallery.images), batch_size)
        ]
        texts = [
            model.encode_text(*gallery.texts(rows, device)).embedding
            for rows in _slices(len(gallery.text_ids), batch_size)
        ]
    return Directions(torch.cat(images).float().cpu(), torch.cat(texts).float().cpu())


def dual_scores(model: VLMo, gallery: Gallery, *, batch_size: int = 256) -> Tensor:
    """Cosines ``[J, I]`` of all texts and images."""
    image, text = encode(model, gallery, batch_size=batch_size)
    return text @ image.T


@torch.no_grad()
def rerank(
    model: VLMo,
    gallery: Gallery,
    scores: Tensor,
    k: int = 32,
    *,
    scale: float = 1.0,
    batch_size: int = 256,
) -> Directions:
    """Score the best k candidates of each query anew with the fusion encoder.

    The new score is the raw matching logit plus ``scale`` times the old score; everything else gets
    -inf. A pair that is a candidate in both directions is fused once.

    The official code (``compute_irtr_rerank``) adds the plain cosine: scale 1. A logit says far
    more than a cosine then, so the dual encoder's opinion is nearly lost. With the temperature
    that contrast was trained with, ``model.logit_scale.exp()``, both terms are log-odds.

    Args:
        model: with the head of ITM.
        gallery: of I images and J texts.
        scores: ``[J, I]``, of :func:`dual_scores`.
        k: candidates of each text among the images, and of each image among the texts.
        scale: factor of ``scores``.
        batch_size: pairs fused at a time.

    Returns:
        ``[J, I]`` scores for finding images and ``[J, I]`` scores for finding texts.

    Raises:
        ValueError: ``k`` is not positive, or ``scores`` does not have the gallery's shape.
    """
    shape = (len(gallery.text_ids), len(gallery.images))
    if scores.shape != shape:
        raise ValueError(f"scores: shape {tuple(scores.shape)} is not {shape} (texts, images)")
    if k < 1:
        raise ValueError(f"k: {k} is not positive")
    chosen = Directions(_candidates(scores, k, dim=1), _candidates(scores, k, dim=0))
    texts, images = (chosen.image | chosen.text).nonzero(as_tuple=True)
    device = next(model.parameters()).device
    logits = []
    with evaluating(model):
        for rows in _slices(len(texts), batch_size):
            pixels = gallery.pixels(images[rows], device)
            pooled = model.fuse(*gallery.texts(texts[rows], device), pixels).pooled
            logits.append(model.itm_score(pooled)[:, 1].float().cpu())
    fused = scale * scores
    fused[texts, images] += torch.cat(logits)
    return Directions(*(fused.masked_fill(~mask, float("-inf")) for mask in chosen))


def recall_at(
    scores: Tensor | Directions,  # [J, I], one for both directions or one for each
    image_of_text: Tensor,  # [J]
    ks: Sequence[int] = RECALL_AT,
) -> Recall:
    """Recall at each k in both directions.

    An image's texts are found when any of its own is among the first k; images without a text are
    no queries, but can be found in error. Among equal scores the match comes last, so that scores
    without information recall nothing; NaN counts as such.

    Raises:
        ValueError: ``image_of_text`` does not fit the scores.
    """
    both = scores if isinstance(scores, Directions) else Directions(scores, scores)
    texts, images = both.image.shape
    if image_of_text.shape != (texts,):
        raise ValueError(f"image_of_text: shape {tuple(image_of_text.shape)} is not ({texts},)")
    if ((image_of_text < 0) | (image_of_text >= images)).any():
        raise ValueError(f"image_of_text: holds a value outside 0..{images - 1}")
    found_image = _ranks(both.image, image_of_text, image_of_text.new_tensor(range(images)))
    found_text = _ranks(both.text.T, None, image_of_text)
    has_text = torch.zeros(images, dtype=torch.bool)
    has_text[image_of_text] = True
    return Recall(
        *(
            {k: float((ranks < k).float().mean()) for k in ks}
            for ranks in (found_image, found_text[has_text])
        )
    )


def chance(image_of_text: Tensor, images: int, ks: Sequence[int] = RECALL_AT) -> Recall:
    """The recall of a random order, for texts that belong to ``images`` images."""
    texts = len(image_of_text)
    counts = torch.bincount(image_of_text, minlength=images)
    own = [int(count) for count in counts if count]

    def miss(count: int, k: int) -> float:
        return math.comb(texts - count, min(k, texts)) / math.comb(texts, min(k, texts))

    return Recall(
        {k: min(k, images) / images for k in ks},
        {k: 1 - sum(miss(count, k) for count in own) / len(own) for k in ks},
    )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put ``model`` into evaluation mode for the block, and back into the mode it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _ranks(
    scores: Tensor,  # [Q, C] queries against candidates
    owner: Tensor | None,  # [Q] what a query belongs to; None for its own number
    owners: Tensor,  # [C] what a candidate belongs to
) -> Tensor:
    """How many wrong candidates stand before each query's best match, ``[Q]``."""
    queries = len(scores)
    owner = torch.arange(queries, device=owners.device) if owner is None else owner
    ranks = []
    for rows in _slices(queries, max(1, _CELLS // max(len(owners), 1))):
        part = scores[rows].to(owners.device)
        own = owner[rows, None] == owners
        # Both fills treat NaN as the worst case: as a match it is last, as a rival it is first.
        best = part.masked_fill(~own | part.isnan(), float("-inf")).amax(1, keepdim=True)
        ranks.append((~own & ~(part < best)).sum(1))
    return torch.cat(ranks) if ranks else owners.new_zeros(0)


def _candidates(scores: Tensor, k: int, dim: int) -> Tensor:
    """Which entries are among the best k along ``dim``, bool in the shape of ``scores``."""
    best = scores.topk(min(k, scores.shape[dim]), dim=dim).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(dim, best, True)


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, count, size))
