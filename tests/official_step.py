"""The pre-training step as the official code composes it, on padded batches, and what a step costs.

Six passes: fusion for MLM, images and texts alone with their tails, and matching in three calls,
with a draw that waits for the device for every row (``objectives.py``, ``compute_itm_hardneg``).
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmo import VLMo, layers, sequences


def official_step(model: VLMo, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Losses of MLM, ITC and ITM in one process."""
    ids, masks, image = batch["text_ids"], batch["text_masks"], batch["image"]
    words = model.mlm_score(model.fuse(batch["text_ids_mlm"], masks, image).text)
    mlm = 0.25 * F.cross_entropy(words.flatten(0, 1), batch["text_labels_mlm"].flatten())

    images = model.encode_image(image, vl_tail=True)
    texts = model.encode_text(ids, masks, vl_tail=True)
    i2t = model.logit_scale.exp() * images.embedding @ texts.embedding.T
    vl_i2t = model.logit_vl_scale.exp() * images.vl_embedding @ texts.vl_embedding.T
    label = torch.arange(len(ids))
    four = [F.cross_entropy(x, label) for x in (i2t, i2t.T, vl_i2t, vl_i2t.T)]
    itc = torch.stack(four).sum() / 4

    wrong_images = torch.stack([image[row] for row in _draw(i2t.T)])
    drawn = _draw(i2t)
    wrong_ids = torch.stack([ids[row] for row in drawn])
    wrong_masks = torch.stack([masks[row] for row in drawn])
    pairs = ((ids, masks, image), (ids, masks, wrong_images), (wrong_ids, wrong_masks, image))
    logits = torch.cat([model.itm_score(model.fuse(*pair).pooled) for pair in pairs])
    itm = F.cross_entropy(logits, (torch.arange(len(logits)) < len(ids)).long())
    return {"mlm_loss": mlm, "itc_loss": itc, "itm_loss": itm, "loss": mlm + itc + itm}


def _draw(logits: Tensor) -> list[int]:
    weights = logits.detach().softmax(1)
    weights = weights.masked_fill(torch.eye(len(weights), dtype=torch.bool), 0)
    return [torch.multinomial(row, 1).item() for row in weights]


_WAITS = {
    getattr(Tensor, name)
    for name in (
        *("item", "tolist", "numpy", "cpu", "nonzero"),
        *("__bool__", "__int__", "__float__", "__index__"),
    )
}


class OnDevice(Tensor):
    """A tensor that counts what would wait for a GPU; whatever is computed from it is another."""

    waits = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        leaves = func in _WAITS or (func is Tensor.to and "cpu" in args)
        if leaves:
            OnDevice.waits += 1
            args = [plain(arg) if isinstance(arg, OnDevice) else arg for arg in args]
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})


def plain(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(Tensor)


@contextlib.contextmanager
def counting() -> Iterator[Counter]:
    """Counts what runs inside: token-layers, launches of both operations, images embedded, waits.

    A launch is a call of one of the two operations.
    """
    counts: Counter = Counter()
    OnDevice.waits = 0

    def wrapped(function, tokens):
        def call(x, *args, **kwargs):
            counts["launches"] += 1
            counts["token_layers"] += tokens(x)
            return function(x, *args, **kwargs)

        return call

    embed = layers.PatchEmbedding.forward

    def embed_counting(self, image):
        counts["images_embedded"] += len(image)
        return embed(self, image)

    with (
        mock.patch.object(
            layers, "moe_ffn", wrapped(layers.moe_ffn, lambda x: x.shape[:-1].numel())
        ),
        mock.patch.object(
            sequences, "shared_attention", wrapped(sequences.shared_attention, lambda x: 0)
        ),
        mock.patch.object(layers.PatchEmbedding, "forward", embed_counting),
    ):
        yield counts
    counts["waits"] = OnDevice.waits
