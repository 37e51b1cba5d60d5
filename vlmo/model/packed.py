"""The passes of the training objectives through the model, on packed sequences.

Texts keep their own lengths: no padding reaches attention or an expert. Both unimodal streams are
one pass, which the pairs of masked language modelling may join, and so are all pairs of a fusion.
Of the last block, only tokens that a head reads are projected and fed forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmo.kernels.transfer import upload
from vlmo.model.layout import Packed, Places, Run, Texts, numbered
from vlmo.model.vlmo import VLMo


class Streams(NamedTuple):
    """Unit vectors ``[B, D]`` of images and texts; those of the VL tail are None without it."""

    image: Tensor
    text: Tensor
    vl_image: Tensor | None = None
    vl_text: Tensor | None = None


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
    count, images = texts.lengths.shape[0], patches.shape[0]
    # One embedding, whose gradient has the size of the vocabulary.
    given = [texts] if words is None else [texts, words.texts]
    ids, places = torch.cat([t.ids for t in given]), torch.cat([t.places for t in given])
    embedded = model.embed_text(ids, places).split([t.ids.shape[0] for t in given])
    x = torch.cat([embedded[0], patches.flatten(0, 1)])
    alone, pairs, fused = [_texts(texts), _images(patches)], [], []
    if words is not None:
        pairs = [_texts(words.texts, patches.shape[1], vl=True)]
        own = torch.arange(images, device=x.device)
        fused = [_pairs(embedded[1], words.texts, patches, own).to(x.dtype)]
    start, sizes = model.config.first_vl_block, [x.shape[0], *(f.shape[0] for f in fused)]
    layout = model.pack(alone + pairs, x.device)
    both = model.run(torch.cat([x, *fused]), layout, stop=start)
    if vl_tail:
        x, *fused = both.split(sizes)
        both = torch.cat([x, x, *fused])
        alone += [_texts(texts, vl=True), _images(patches, vl=True)]
        layout = model.pack(alone + pairs, x.device)
    wanted: list[tuple[int, Places | None]] = [(number, None) for number in range(len(alone))]
    if words is not None:
        wanted.append((len(alone), words.tokens))
    x = _end(model, both, layout, wanted, start=start)
    firsts = [count, images] * (2 if vl_tail else 1)
    text, image, *tail = x.split([*firsts, x.shape[0] - sum(firsts)])
    found = [model.project("itc_image_proj", image), model.project("itc_text_proj", text)]
    if vl_tail:
        found.append(model.project("itc_vl_image_proj", tail[1]))
        found.append(model.project("itc_vl_text_proj", tail[0]))
    return Streams(*found), None if words is None else tail[-1]


def encode_text(model: VLMo, texts: Texts, tokens: Places | None = None) -> Tensor:
    """Texts alone with their own experts.

    Args:
        model: any.
        texts: B texts.
        tokens: that are wanted; None for the first one of each text.

    Returns:
        ``[n, D]`` of the wanted tokens, after the final norm.
    """
    x = model.embed_text(texts.ids, texts.places)
    return _end(model, x, model.pack([_texts(texts)], x.device), [(0, tokens)])


def encode_images(model: VLMo, patches: Tensor) -> Tensor:
    """``[I, D]`` of the first tokens of images alone, after the final norm.

    Args:
        model: any.
        patches: ``[I, N, D]`` of :meth:`vlmo.VLMo.embed_image`.
    """
    layout = model.pack([_images(patches)], patches.device)
    return _end(model, patches.flatten(0, 1), layout, [(0, None)])


def fuse(
    model: VLMo, texts: Texts, patches: Tensor, images: Tensor, tokens: Places | None = None
) -> Tensor:
    """Pairs of text b and image ``images[b]``.

    Args:
        model: any.
        texts: B texts.
        patches: ``[I, N, D]`` of :meth:`vlmo.VLMo.embed_image`.
        images: ``[B]`` int64, the row of ``patches`` of each text.
        tokens: of the texts, that are wanted; None for the first one of each pair.

    Returns:
        ``[n, D]`` of the wanted tokens, after the final norm.
    """
    words = model.embed_text(texts.ids, texts.places)
    x = _pairs(words, texts, patches, upload(images, words.device))
    run = _texts(texts, patches.shape[1], vl=True)
    return _end(model, x, model.pack([run], x.device), [(0, tokens)])


def _texts(texts: Texts, image: int = 0, *, vl: bool = False) -> Run:
    """Texts, each before an image of so many tokens."""
    return Run(texts.lengths.shape[0], texts.lengths, texts.ids.shape[0], image, vl)


def _images(patches: Tensor, *, vl: bool = False) -> Run:
    return Run(patches.shape[0], None, 0, patches.shape[1], vl)


def _pairs(words: Tensor, texts: Texts, patches: Tensor, images: Tensor) -> Tensor:
    """``[T, D]``: the embedded words of each text, then the patches of its image."""
    length = patches.shape[1]
    own = upload(texts.lengths, words.device)
    count = texts.lengths.shape[0]
    pair, place = numbered(own + length, words.shape[0] + count * length)
    # Row of each token among all words, then all patches.
    of_word = (own.cumsum(0) - own)[pair] + place
    of_patch = words.shape[0] + images[pair] * length + place - own[pair]
    rows = torch.where(place < own[pair], of_word, of_patch)
    # An embedding's gradient is the same on every run; that of an index adds in any order.
    return F.embedding(rows, torch.cat([words, patches.flatten(0, 1).to(words.dtype)]))


def _end(
    model: VLMo,
    x: Tensor,
    layout: Packed,
    wanted: Sequence[tuple[int, Places | None]],
    *,
    start: int = 0,
) -> Tensor:
    """Run the blocks from ``start`` on; ``[n, D]`` of the wanted tokens after the final norm."""
    chosen = layout.choose(wanted)
    count = chosen.index.shape[0]
    # Without any, as of a batch without masked words, one keeps the graph the same on every rank.
    spare = all(tokens is not None for _, tokens in wanted)
    if spare and (torch.compiler.is_compiling() or count == 0):
        first = torch.zeros(1, dtype=torch.int64, device=x.device)
        chosen = layout.choose([*wanted, (wanted[0][0], Places(first, first))])
    return model.transformer.norm(model.run(x, layout, start=start, chosen=chosen))[:count]
