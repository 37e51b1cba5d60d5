"""The outputs of a model that tasks read: packed passes of VLMo, padded ones of BEiT-3.

The texts of a padded pass have the length of the longest; a padded token takes no part in
attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmo.model import packed
from vlmo.model.beit3 import BEiT3
from vlmo.model.layout import Texts, padded
from vlmo.model.models import Model
from vlmo.model.packed import Streams


def embed_images(model: Model, pixels: Tensor) -> Tensor:
    """Unit vectors ``[n, D]`` float32 of the dual encoder."""
    patches = model.embed_image(pixels)
    if isinstance(model, BEiT3):
        return image_stream(model, patches).float()
    return model.project("itc_image_proj", packed.encode_images(model, patches)).float()


def embed_texts(model: Model, texts: Texts) -> Tensor:
    """Unit vectors ``[n, D]`` float32 of the dual encoder."""
    if isinstance(model, BEiT3):
        return text_stream(model, texts).float()
    return model.project("itc_text_proj", packed.encode_text(model, texts)).float()


def streams(model: BEiT3, texts: Texts, patches: Tensor) -> Streams:
    """The dual encoder of BEiT-3 on texts and on images ``[I, N, D]``."""
    return Streams(image_stream(model, patches), text_stream(model, texts))


def image_stream(model: BEiT3, patches: Tensor) -> Tensor:
    embedding = model.encode_patches(patches).embedding
    assert embedding is not None
    return embedding


def text_stream(model: BEiT3, texts: Texts) -> Tensor:
    embedding = model.encode_text(*padded(texts)).embedding
    assert embedding is not None
    return embedding


def vqa_logits(model: Model, texts: Texts, patches: Tensor, images: Tensor | None = None) -> Tensor:
    """Logits ``[B, answers]`` of question b about image b, or ``images[b]``, of ``[I, N, D]``."""
    if isinstance(model, BEiT3):
        own = patches if images is None else patches[images.to(patches.device)]
        fused = model.fuse_patches(*padded(texts), own)
        return model.head(model.pooler(fused.image[:, 0]))
    images = torch.arange(patches.shape[0]) if images is None else images
    return model.vqa_classifier(model.pooler(packed.fuse(model, texts, patches, images)))


def nlvr2_logits(model: Model, texts: Texts, image_0: Tensor, image_1: Tensor) -> Tensor:
    """Logits ``[B, 2]`` of statement b being false or true of two images ``[B, 3, S, S]``."""
    if isinstance(model, BEiT3):
        return model.nlvr2_logits(*padded(texts), image_0, image_1)
    twice = Texts(*(torch.cat([part, part]) for part in texts))
    pixels = (image_0, image_1)
    patches = torch.cat([model.embed_image(image, n) for n, image in enumerate(pixels, 1)])
    cls = packed.fuse(model, twice, patches, torch.arange(patches.shape[0]))
    first, second = model.pooler(cls).chunk(2)
    return model.nlvr2_classifier(torch.cat([first, second], dim=1))
