"""The passes of the training objectives through the model, on packed sequences.

Texts keep their own lengths: no padding reaches attention or an expert. Both unimodal streams are
one pass, and so are all pairs of a fusion. Of the last block, only tokens that a head reads are
projected and fed forward.
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


def encode_streams(model: VLMo, texts: Texts, patches: Tensor, *, vl_tail: bool) -> Streams:
    """Texts alone and images alone, in one pass; with ``vl_tail`` also through the VL experts.

    The blocks below the first VL block run once for both.

    Args:
        model: with the projections of ITC.
        texts: B texts.
        patches: ``[I, N, D]`` of :meth:`VLMo.embed_image`.
        vl_tail: see above.
    """
    x = torch.cat([model.embed_text(texts.ids, texts.places), patches.flatten(0, 1)])
    count, images = len(texts.lengths), len(patches)
    text_tokens = [*texts.lengths, *[0] * images]
    image_tokens = [*[0] * count, *[patches.shape[1]] * images]
    own = [False] * (count + images)
    start = model.config.first_vl_block
    layout = model.pack(text_tokens, image_tokens, own, x.device)
    x = model.run(x, layout, stop=start)
    if vl_tail:
        x = torch.cat([x, x])
        use_vl = own + [True] * len(own)
        layout = model.pack(text_tokens * 2, image_tokens * 2, use_vl, x.device)
    x = _end(model, x, layout, None, start=start)
    text, image, *tail = x.split([count, images] * (2 if vl_tail else 1))
    streams = Streams(model.project("itc_image_proj", image), model.project("itc_text_proj", text))
    if not vl_tail:
        return streams
    return streams._replace(
        vl_image=model.project("itc_vl_image_proj", tail[1]),
        vl_text=model.project("itc_vl_text_proj", tail[0]),
    )


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
    return _end(model, x, layout, tokens)


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
        patches: ``[I, N, D]`` of :meth:`VLMo.embed_image`.
        images: for each text, the row of ``patches``.
        tokens: of the texts, that are wanted; None for the first one of each pair.

    Returns:
        ``[n, D]`` of the wanted tokens, after the final norm.
    """
    words = model.embed_text(texts.ids, texts.places)
    count, length = len(images), patches.shape[1]
    layout = model.pack(texts.lengths, [length] * count, [True] * count, words.device)
    # Row of each token among all words, then all patches.
    word, rows = 0, []
    everything = torch.arange(len(words) + patches.shape[0] * length)
    for text, image in zip(texts.lengths, images, strict=True):
        first = len(words) + image * length
        rows += [everything[word : word + text], everything[first : first + length]]
        word += text
    places = upload(torch.cat(rows), words.device)
    # An embedding's gradient is the same on every run; that of an index adds in any order.
    x = F.embedding(places, torch.cat([words, patches.flatten(0, 1).to(words.dtype)]))
    return _end(model, x, layout, tokens)


def _end(
    model: VLMo, x: Tensor, layout: Packed, tokens: Places | None, *, start: int = 0
) -> Tensor:
    """Run the blocks from ``start`` on; ``[n, D]`` of the wanted tokens after the final norm."""
    first = torch.tensor(layout.starts[:-1])
    rows = first if tokens is None else first[tokens.texts] + tokens.places
    # Without any, as of a batch without masked words, one keeps the graph the same on every rank.
    chosen = Chosen(layout, rows if len(rows) else first[:1])
    return model.transformer.norm(model.run(x, layout, start=start, chosen=chosen))[: len(rows)]
