"""The passes of the training objectives through the model, on packed sequences.

Texts keep their own lengths: no padding reaches attention or an expert. Both unimodal streams are
one pass, which the pairs of masked language modelling may join, and so are all pairs of a fusion.
Of the last block, only tokens that a head reads are projected and fed forward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmo.sequences import Chosen, Packed
from vlmo.transfer import upload

if TYPE_CHECKING:
    from vlmo.model import VLMo


class Texts(NamedTuple):
    """Texts end to end.

    Attributes:
        ids: ``[n]`` of all tokens.
        places: ``[n]``, of each token in its text.
        lengths: tokens of each text.
    """

    ids: Tensor
    places: Tensor
    lengths: list[int]


class Streams(NamedTuple):
    """Unit vectors ``[B, D]`` of images and texts; those of the VL tail are None without it."""

    image: Tensor
    text: Tensor
    vl_image: Tensor | None = None
    vl_text: Tensor | None = None


class Places(NamedTuple):
    """Some tokens of a batch of texts, in any order.

    Attributes:
        texts: ``[n]`` int64 on the CPU, the number of each token's text.
        places: ``[n]`` int64 on the CPU, its place in it.
    """

    texts: Tensor
    places: Tensor


def text_lengths(batch: Mapping[str, Any]) -> list[int]:
    """Tokens of each text, from ``text_lengths`` on the CPU; else from the masks, which may wait.

    Raises:
        ValueError: a text has no token, or its mask has a gap.
    """
    if "text_lengths" in batch:
        lengths = batch["text_lengths"].tolist()
    else:
        masks = batch["text_masks"].bool()
        counts = masks.sum(1)
        if (masks != (torch.arange(masks.shape[1], device=masks.device) < counts[:, None])).any():
            raise ValueError("text_masks: a text has padding before its last token")
        lengths = counts.tolist()
    if 0 in lengths:
        raise ValueError(f"text_lengths: text {lengths.index(0)} has no token")
    return lengths


def end_to_end(text_ids: Tensor, lengths: Sequence[int]) -> Texts:
    """Ids ``[B, T]`` without their padding."""
    capacity = text_ids.shape[1]
    place = torch.arange(capacity)
    inside = place < torch.tensor(lengths)[:, None]
    places = place.expand_as(inside)[inside]
    tokens = inside.flatten().nonzero()[:, 0]
    places, tokens = (upload(t, text_ids.device) for t in (places, tokens))
    return Texts(text_ids.flatten()[tokens], places, list(lengths))


class Words(NamedTuple):
    """Pairs of text b and image b that masked language modelling reads.

    Attributes:
        texts: as many as there are images.
        tokens: the masked ones.
    """

    texts: Texts
    tokens: Places


def encode_streams(
    model: VLMo, texts: Texts, patches: Tensor, *, vl_tail: bool, words: Words | None = None
) -> tuple[Streams, Tensor | None]:
    """Texts alone and images alone, in one pass; with ``vl_tail`` also through the VL experts.

    The blocks below the first VL block run once for both. One pass rather than two lets every block
    read its weights, and add to their gradients, once.

    Args:
        model: with the projections of ITC.
        texts: B texts.
        patches: ``[I, N, D]`` of :meth:`vlmo.VLMo.embed_image`.
        vl_tail: see above.
        words: pairs that are fused in the same pass.

    Returns:
        The streams, and ``[n, D]`` of the tokens of ``words``, if given, after the final norm.
    """
    count, images, length = len(texts.lengths), len(patches), patches.shape[1]
    # One embedding, whose gradient has the size of the vocabulary.
    given = [texts] if words is None else [texts, words.texts]
    ids, places = (torch.cat(tensors) for tensors in zip(*(t[:2] for t in given), strict=True))
    embedded = model.embed_text(ids, places).tensor_split([len(texts.ids)])
    x = torch.cat([embedded[0], patches.flatten(0, 1)])
    streams = _Sequences([*texts.lengths, *[0] * images], [*[0] * count, *[length] * images], False)
    pairs = _Sequences([], [], True)
    fused = x.new_empty(0, x.shape[1])
    if words is not None:
        pairs = _Sequences(words.texts.lengths, [length] * images, True)
        fused = _pairs(embedded[1], words.texts, patches, range(images)).to(x.dtype)
    start, runs = model.config.first_vl_block, [streams, pairs]
    both = model.run(torch.cat([x, fused]), _packed(model, runs, x.device), stop=start)
    if vl_tail:
        x, fused = both.split([len(x), len(fused)])
        both, runs = torch.cat([x, x, fused]), [streams, streams._replace(vl=True), pairs]
    layout = _packed(model, runs, x.device)
    first = torch.tensor(layout.starts[:-1])
    own = first[: len(first) - len(pairs.texts)]
    rows = own if words is None else torch.cat([own, _rows(first[len(own) :], words.tokens)])
    x, masked = _end(model, both, layout, rows, start=start).tensor_split([len(own)])
    text, image, *tail = x.split([count, images] * (2 if vl_tail else 1))
    found = Streams(model.project("itc_image_proj", image), model.project("itc_text_proj", text))
    if vl_tail:
        found = found._replace(
            vl_image=model.project("itc_vl_image_proj", tail[1]),
            vl_text=model.project("itc_vl_text_proj", tail[0]),
        )
    return found, None if words is None else masked


def encode_text(model: VLMo, texts: Texts, tokens: Places | None = None) -> Tensor:
    """Texts alone with their own experts.

    Args:
        model: any.
        texts: B texts.
        tokens: that are wanted; None for the first one of each text.

    Returns:
        ``[n, D]`` of the wanted tokens, after the final norm.
    """
    count = len(texts.lengths)
    x = model.embed_text(texts.ids, texts.places)
    layout = model.pack(texts.lengths, [0] * count, [False] * count, x.device)
    return _end(model, x, layout, _rows(torch.tensor(layout.starts[:-1]), tokens))


def encode_images(model: VLMo, patches: Tensor) -> Tensor:
    """``[I, D]`` of the first tokens of images alone, after the final norm.

    Args:
        model: any.
        patches: ``[I, N, D]`` of :meth:`vlmo.VLMo.embed_image`.
    """
    images = _Sequences([0] * len(patches), [patches.shape[1]] * len(patches), False)
    layout = _packed(model, [images], patches.device)
    return _end(model, patches.flatten(0, 1), layout, torch.tensor(layout.starts[:-1]))


def fuse(
    model: VLMo,
    texts: Texts,
    patches: Tensor,
    images: Sequence[int],
    tokens: Places | None = None,
) -> Tensor:
    """Pairs of text b and image ``images[b]``.

    Args:
        model: any.
        texts: B texts.
        patches: ``[I, N, D]`` of :meth:`vlmo.VLMo.embed_image`.
        images: for each text, the row of ``patches``.
        tokens: of the texts, that are wanted; None for the first one of each pair.

    Returns:
        ``[n, D]`` of the wanted tokens, after the final norm.
    """
    x = _pairs(model.embed_text(texts.ids, texts.places), texts, patches, images)
    pairs = _Sequences(texts.lengths, [patches.shape[1]] * len(images), True)
    layout = _packed(model, [pairs], x.device)
    return _end(model, x, layout, _rows(torch.tensor(layout.starts[:-1]), tokens))


class _Sequences(NamedTuple):
    """Text and image tokens of each of some sequences, and whether they go to VL experts."""

    texts: list[int]
    images: list[int]
    vl: bool


def _packed(model: VLMo, runs: Sequence[_Sequences], device: torch.device) -> Packed:
    texts = [length for run in runs for length in run.texts]
    images = [length for run in runs for length in run.images]
    return model.pack(texts, images, [run.vl for run in runs for _ in run.texts], device)


def _pairs(words: Tensor, texts: Texts, patches: Tensor, images: Sequence[int]) -> Tensor:
    """``[T, D]``: the embedded words of each text, then the patches of its image."""
    length = patches.shape[1]
    # Row of each token among all words, then all patches.
    word, rows = 0, []
    everything = torch.arange(len(words) + patches.shape[0] * length)
    for text, image in zip(texts.lengths, images, strict=True):
        first = len(words) + image * length
        rows += [everything[word : word + text], everything[first : first + length]]
        word += text
    places = upload(torch.cat(rows), words.device)
    # An embedding's gradient is the same on every run; that of an index adds in any order.
    return F.embedding(places, torch.cat([words, patches.flatten(0, 1).to(words.dtype)]))


def _rows(first: Tensor, tokens: Places | None) -> Tensor:
    """Of tokens, or the first ones, of sequences that begin at rows ``first``."""
    return first if tokens is None else first[tokens.texts] + tokens.places


def _end(model: VLMo, x: Tensor, layout: Packed, rows: Tensor, *, start: int = 0) -> Tensor:
    """Run the blocks from ``start`` on; ``[n, D]`` of the wanted rows after the final norm."""
    # Without any, as of a batch without masked words, one keeps the graph the same on every rank.
    chosen = Chosen(layout, rows if len(rows) else torch.zeros(1, dtype=torch.int64))
    return model.transformer.norm(model.run(x, layout, start=start, chosen=chosen))[: len(rows)]
