"""Image-text retrieval: encoding, recall, and re-ranking with the fusion encoder.

A text belongs to one image; an image may have several texts, as in COCO. The full matrix of all
texts against all images is never stored: recall and shortlists are computed for a few rows at a
time.

With a process group the ranks share the work, and every rank gets the whole result.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlmo.data.loading import guarded_loader
from vlmo.model import packed
from vlmo.model.layout import Texts, end_to_end
from vlmo.model.models import Model
from vlmo.model.vlmo import VLMo
from vlmo.tasks.heads import embed_images as embed_images
from vlmo.tasks.heads import embed_texts as embed_texts
from vlmo.tasks.inference import device_of, evaluating, even_batches, of_all, own_share, precision

RECALL_AT = (1, 5, 10)
_CELLS = 2**24  # scores that are computed at a time, 64 MB


@dataclass(frozen=True)
class Gallery:
    """The images and texts of one retrieval test.

    Attributes:
        images: I images ``[3, S, S]`` as the model reads them, uint8 or scaled to [-1, 1]: a tensor
            ``[I, 3, S, S]``, or a map-style data set that decodes an image on access.
        text_ids: ``[J, T]`` int64.
        text_masks: ``[J, T]``.
        image_of_text: ``[J]`` int64, the index of the image that each text belongs to.

    Raises:
        ValueError: there is no image or no text, or the shapes of the tensors do not match.
    """

    images: Any
    text_ids: Tensor
    text_masks: Tensor
    image_of_text: Tensor

    def __post_init__(self):
        if not len(self.images) or not len(self.text_ids):
            counts = f"{len(self.images)} images and {len(self.text_ids)} texts"
            raise ValueError(f"gallery: {counts} are nothing to search")
        if self.text_masks.shape != self.text_ids.shape:
            raise ValueError(
                f"text_masks: shape {tuple(self.text_masks.shape)} is not that of text_ids "
                f"{tuple(self.text_ids.shape)}"
            )
        _check_relation(self.image_of_text, len(self.text_ids), len(self.images))


class Embeddings(NamedTuple):
    """Unit vectors from the dual encoder.

    Attributes:
        image: ``[I, D]`` float32.
        text: ``[J, D]`` float32.
    """

    image: Tensor
    text: Tensor


class Shortlist(NamedTuple):
    """The best candidates for each query of one direction.

    Attributes:
        rows: ``[Q, k]`` int64, indices of the candidates.
        scores: ``[Q, k]`` float32.
    """

    rows: Tensor
    scores: Tensor

    def best(self, count: int) -> Tensor:
        """The ``count`` candidates with the highest scores, best first, ``[Q, count]``."""
        order = self.scores.sort(dim=1, descending=True, stable=True).indices
        return self.rows.gather(1, order[:, :count])


class Shortlists(NamedTuple):
    """The candidates of both directions.

    Attributes:
        image: images for each text (called IR in the papers).
        text: texts for each image (called TR in the papers).
    """

    image: Shortlist
    text: Shortlist


class Recall(NamedTuple):
    """Recall at k: share of queries with a match in the first k, ``{k: share}`` by direction."""

    image: dict[int, float]
    text: dict[int, float]

    @property
    def mean(self) -> float:
        """Mean of all values of both directions."""
        values = [*self.image.values(), *self.text.values()]
        return sum(values) / len(values)


@torch.no_grad()
def encode(
    model: Model,
    gallery: Gallery,
    *,
    batch_size: int = 256,
    workers: int = 0,
    autocast: torch.dtype | None = None,
) -> Embeddings:
    """Encode all images and texts with the dual encoder.

    Args:
        model: a model with the retrieval heads.
        gallery: I images and J texts.
        batch_size: images or texts per batch on one rank.
        workers: processes that load images.
        autocast: dtype of the model's matrix products.

    Returns:
        Embeddings on the model's device, equal on all ranks.
    """
    device = device_of(model)
    images, texts = own_share(len(gallery.images)), torch.tensor(own_share(len(gallery.text_ids)))
    # Sort texts by length: the longest text of a batch determines its cost.
    order = gallery.text_masks[texts].sum(1).argsort(stable=True)
    with evaluating(model) as run, precision(device, autocast):
        of_images = [
            run(embed_images, pixels)
            for pixels in _pixels(gallery.images, even_batches(images, batch_size), device, workers)
        ]
        of_texts = [
            run(embed_texts, _texts(gallery, texts[rows], device))
            for rows in even_batches(order.tolist(), batch_size)
        ]
    in_order = torch.cat(of_texts)[order.argsort().to(device)]
    return Embeddings(
        of_all(torch.cat(of_images), len(gallery.images)), of_all(in_order, len(gallery.text_ids))
    )


def matching_logits(model: VLMo, texts: Texts, pixels: Tensor, images: Sequence[int]) -> Tensor:
    """Logits ``[n, 2]`` float32 of ITM for text b and image ``images[b]``; 1 is a match."""
    cls = packed.fuse(model, texts, model.embed_image(pixels), torch.tensor([*images]))
    return model.itm_score(model.pooler(cls)).float()


@torch.no_grad()
def shortlist(embeddings: Embeddings, k: int) -> Shortlists:
    """The k candidates with the highest cosine for each query, or all if there are fewer.

    Raises:
        ValueError: ``k`` is not positive.
    """
    if k < 1:
        raise ValueError(f"k: {k} is not positive")

    def nearest(queries: Tensor, candidates: Tensor) -> Shortlist:
        count = min(k, len(candidates))
        parts = [scores.topk(count, dim=1) for _, scores in _cosines(queries, candidates)]
        return Shortlist(
            torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts])
        )

    image, text = embeddings
    return Shortlists(nearest(text, image), nearest(image, text))


@torch.no_grad()
def rerank(
    model: VLMo,
    gallery: Gallery,
    shortlists: Shortlists,
    *,
    scale: float = 1.0,
    batch_size: int = 256,
    workers: int = 0,
    autocast: torch.dtype | None = None,
) -> Shortlists:
    """Re-score the candidates of each query with the fusion encoder.

    The new score is the raw matching logit plus ``scale`` times the old score. A pair that is a
    candidate in both directions is encoded once.

    unilm, the reference implementation, adds the plain cosine (``compute_irtr_rerank``, which it
    never calls): scale 1, with k = 32 for Table 2 of the supplement. The range of a logit is then
    much larger than that of a cosine, so the dual encoder hardly affects the result. With the
    temperature of the contrastive training, ``model.logit_scale.exp()``, both terms are log-odds.

    Args:
        model: a model with the ITM head.
        gallery: I images and J texts.
        shortlists: from :func:`shortlist`, on the model's device.
        scale: factor of the old scores.
        batch_size: pairs per batch of the fusion encoder on one rank.
        workers: processes that load images.
        autocast: dtype of the model's matrix products.

    Returns:
        The same candidates in the same order with their new scores, equal on all ranks.

    Raises:
        ValueError: ``shortlists`` do not belong to this gallery.
    """
    texts, images = len(gallery.text_ids), len(gallery.images)
    for name, found, queries in (
        ("image", shortlists.image, texts),
        ("text", shortlists.text, images),
    ):
        if len(found.rows) != queries:
            raise ValueError(f"shortlists: {len(found.rows)} queries of {name} are not {queries}")
    # The number of a pair is image * J + text: pairs of one image are adjacent and load it once.
    every = torch.arange(max(texts, images), device=shortlists.image.rows.device)[:, None]
    numbers = (
        shortlists.image.rows * texts + every[:texts],
        every[:images] * texts + shortlists.text.rows,
    )
    pairs = torch.cat([n.flatten() for n in numbers]).unique()
    logits = _match(model, gallery, pairs.cpu(), batch_size, workers, autocast)
    return Shortlists(
        *(
            Shortlist(found.rows, logits[torch.searchsorted(pairs, number)] + scale * found.scores)
            for found, number in zip(shortlists, numbers, strict=True)
        )
    )


def _match(
    model: VLMo,
    gallery: Gallery,
    pairs: Tensor,  # [P], image * J + text
    batch_size: int,
    workers: int,
    autocast: torch.dtype | None,
) -> Tensor:
    """Matching logits ``[P]`` of the pairs, on the model's device."""
    device, count = device_of(model), len(gallery.text_ids)
    own = pairs[own_share(len(pairs))]
    batches = [own[rows] for rows in even_batches(range(len(own)), batch_size)]
    # For each batch, the images in it and the index of each pair's image among them.
    images = [(batch // count).unique(return_inverse=True) for batch in batches]
    pixels = _pixels(gallery.images, [numbers.tolist() for numbers, _ in images], device, workers)
    logits = []
    with evaluating(model) as run, precision(device, autocast):
        for batch, (_, place), fetched in zip(batches, images, pixels, strict=True):
            texts = _texts(gallery, batch % count, device)
            logits.append(run(matching_logits, texts, fetched, place.tolist())[:, 1])
    return of_all(torch.cat(logits), len(pairs))


def recall_at(
    found: Embeddings | Shortlists,
    image_of_text: Tensor,  # [J]
    ks: Sequence[int] = RECALL_AT,
) -> Recall:
    """Recall at each k in both directions, from the cosines of embeddings or from shortlists.

    A query by image is a hit if any of its texts is among the first k. Images without a text are
    candidates, but not queries. Among equal scores the match is ranked last, so that uninformative
    scores have no recall; NaN is ranked as the worst case. A match that is not in the shortlist is
    a miss.

    Raises:
        ValueError: ``image_of_text`` does not fit the embeddings or shortlists.
    """
    if isinstance(found, Embeddings):
        texts, images, device = len(found.text), len(found.image), found.image.device
    else:
        texts, images = len(found.image.rows), len(found.text.rows)
        device = found.image.rows.device
    _check_relation(image_of_text, texts, images)
    owner = image_of_text.to(device)
    has_text = torch.zeros(images, dtype=torch.bool, device=device)
    has_text[owner] = True
    every = torch.arange(images, device=device)
    if isinstance(found, Embeddings):
        image, text = _ranks_of_embeddings(found, owner, every)
    else:
        image, text = _ranks_on_shortlists(found, owner, every)
    return Recall(
        *({k: float((ranks < k).double().mean()) for k in ks} for ranks in (image, text[has_text]))
    )


def chance(image_of_text: Tensor, images: int, ks: Sequence[int] = RECALL_AT) -> Recall:
    """Expected recall of a random ranking, for texts that belong to ``images`` images."""
    texts = len(image_of_text)
    counts = torch.bincount(image_of_text, minlength=images)
    own = [int(count) for count in counts if count]

    def miss(count: int, k: int) -> float:
        return math.comb(texts - count, min(k, texts)) / math.comb(texts, min(k, texts))

    return Recall(
        {k: min(k, images) / images for k in ks},
        {k: 1 - sum(miss(count, k) for count in own) / len(own) for k in ks},
    )


def _ranks_of_embeddings(found: Embeddings, owner: Tensor, every: Tensor) -> tuple[Tensor, Tensor]:
    image, text = found
    return (
        torch.cat([_ranks(s, owner[rows, None] == every) for rows, s in _cosines(text, image)]),
        torch.cat([_ranks(s, every[rows, None] == owner) for rows, s in _cosines(image, text)]),
    )


def _ranks_on_shortlists(found: Shortlists, owner: Tensor, every: Tensor) -> tuple[Tensor, Tensor]:
    image, text = found
    return (
        _ranks(image.scores, image.rows == owner[:, None]),
        _ranks(text.scores, owner[text.rows] == every[:, None]),
    )


def _ranks(
    scores: Tensor,  # [Q, C] queries against candidates
    own: Tensor,  # [Q, C] bool, which candidates match
) -> Tensor:
    """Number of wrong candidates ranked before each query's best match, ``[Q]``."""
    # NaN is the worst case: a match with NaN is ranked last, another candidate with NaN first.
    best = scores.masked_fill(~own | scores.isnan(), float("-inf")).amax(1, keepdim=True)
    before = (~own & ~(scores < best)).sum(1)
    return before.masked_fill(~own.any(1), torch.iinfo(torch.int64).max)


def _cosines(queries: Tensor, candidates: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Cosines ``[q, C]`` for a few queries at a time, with their rows, in full precision."""
    size = max(1, _CELLS // len(candidates))
    for start in range(0, len(queries), size):
        rows = slice(start, start + size)
        with torch.autocast(queries.device.type, enabled=False):
            scores = queries[rows].float() @ candidates.float().T
        yield rows, scores


def _check_relation(image_of_text: Tensor, texts: int, images: int) -> None:
    if image_of_text.shape != (texts,):
        raise ValueError(f"image_of_text: shape {tuple(image_of_text.shape)} is not ({texts},)")
    if ((image_of_text < 0) | (image_of_text >= images)).any():
        raise ValueError(f"image_of_text: holds a value outside 0..{images - 1}")


def _pixels(
    images: Any, batches: Iterable[list[int]], device: torch.device, workers: int
) -> Iterator[Tensor]:
    """Images ``[n, 3, S, S]`` of each batch, loaded ahead by ``workers`` processes."""
    loader = guarded_loader(
        images, batch_sampler=batches, num_workers=workers, pin_memory=device.type == "cuda"
    )
    return (pixels.to(device, non_blocking=True) for pixels in loader)


def _texts(gallery: Gallery, rows: Tensor | list[int], device: torch.device) -> Texts:
    lengths = gallery.text_masks[rows].sum(1)
    return end_to_end(gallery.text_ids[rows].to(device, non_blocking=True), lengths)
