"""Forward passes of the training objectives, on packed sequences.

Texts keep their own lengths: attention and experts process no padding. Both unimodal streams form
one pass, which the pairs of masked language modelling may join; all pairs of a fusion form another.
The last block applies its output projection and experts only to tokens that a head reads.
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
    """Pairs of text b and image b for masked language modelling.

    Attributes:
        texts: as many as there are images.
        tokens: positions of the masked tokens.
    """

    texts: Texts
    tokens: Places


def encode_streams(
    model: VLMo, texts: Texts, patches: Tensor, *, vl_tail: bool, words: Words | None = None
) -> tuple[Streams, Tensor | None]:
    """Encode texts alone and images alone in one pass; with ``vl_tail`` also with the VL experts.

    The blocks below the first VL block run once for both streams. With one pass instead of two,
    every block reads its weights, and accumulates their gradients, once.

    Args:
        model: a model with the projections of ITC.
        texts: B texts.
        patches: ``[I, N, D]`` from :meth:`vlmo.VLMo.embed_image`.
        vl_tail: see above.
        words: pairs that are fused in the same pass.

    Returns:
        The streams, and the features ``[n, D]`` of the tokens of ``words``, if given, after the
        final norm.
    """
    count, images = texts.lengths.shape[0], patches.shape[0]
    # A single embedding call, because its gradient has the size of the vocabulary.
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
    """Encode texts alone with their own experts.

    Args:
        model: any model.
        texts: B texts.
        tokens: the tokens to return; None for the first token of each text.

    Returns:
        Features ``[n, D]`` of these tokens, after the final norm.
    """
    x = model.embed_text(texts.ids, texts.places)
    return _end(model, x, model.pack([_texts(texts)], x.device), [(0, tokens)])


def encode_images(model: VLMo, patches: Tensor) -> Tensor:
    """Features ``[I, D]`` of the first tokens of images alone, after the final norm.

    Args:
        model: any model.
        patches: ``[I, N, D]`` from :meth:`vlmo.VLMo.embed_image`.
    """
    layout = model.pack([_images(patches)], patches.device)
    return _end(model, patches.flatten(0, 1), layout, [(0, None)])


def fuse(
    model: VLMo, texts: Texts, patches: Tensor, images: Tensor, tokens: Places | None = None
) -> Tensor:
    """Encode pairs of text b and image ``images[b]`` jointly.

    Args:
        model: any model.
        texts: B texts.
        patches: ``[I, N, D]`` from :meth:`vlmo.VLMo.embed_image`.
        images: ``[B]`` int64, row of ``patches`` for each text.
        tokens: the text tokens to return; None for the first token of each pair.

    Returns:
        Features ``[n, D]`` of these tokens, after the final norm.
    """
    words = model.embed_text(texts.ids, texts.places)
    x = _pairs(words, texts, patches, upload(images, words.device))
    run = _texts(texts, patches.shape[1], vl=True)
    return _end(model, x, model.pack([run], x.device), [(0, tokens)])


def _texts(texts: Texts, image: int = 0, *, vl: bool = False) -> Run:
    """A run of texts, each followed by ``image`` image tokens."""
    return Run(texts.lengths.shape[0], texts.lengths, texts.ids.shape[0], image, vl)


def _images(patches: Tensor, *, vl: bool = False) -> Run:
    return Run(patches.shape[0], None, 0, patches.shape[1], vl)


def _pairs(words: Tensor, texts: Texts, patches: Tensor, images: Tensor) -> Tensor:
    """Embeddings ``[T, D]`` of each text's words followed by its image's patches."""
    length = patches.shape[1]
    own = upload(texts.lengths, words.device)
    count = texts.lengths.shape[0]
    pair, place = numbered(own + length, words.shape[0] + count * length)
    # Row of each token in the concatenation of all words and all patches.
    of_word = (own.cumsum(0) - own)[pair] + place
    of_patch = words.shape[0] + images[pair] * length + place - own[pair]
    rows = torch.where(place < own[pair], of_word, of_patch)
    # The gradient of embedding() is deterministic; that of indexing adds in arbitrary order.
    return F.embedding(rows, torch.cat([words, patches.flatten(0, 1).to(words.dtype)]))


def _end(
    model: VLMo,
    x: Tensor,
    layout: Packed,
    wanted: Sequence[tuple[int, Places | None]],
    *,
    start: int = 0,
) -> Tensor:
    """Run the blocks from ``start`` and the final norm; ``[n, D]`` of the wanted tokens."""
    chosen = layout.choose(wanted)
    count = chosen.index.shape[0]
    # Without masked words there may be no tokens; a dummy token keeps the graph equal on all ranks.
    spare = all(tokens is not None for _, tokens in wanted)
    if spare and (torch.compiler.is_compiling() or count == 0):
        first = torch.zeros(1, dtype=torch.int64, device=x.device)
        chosen = layout.choose([*wanted, (wanted[0][0], Places(first, first))])
    return model.transformer.norm(model.run(x, layout, start=start, chosen=chosen))[:count]
