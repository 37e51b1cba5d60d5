"""Attention weights between the tokens of a text and an image, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from vlmo.model.layout import Packed, Run, Texts
from vlmo.model.vlmo import VLMo


class AttentionMaps(NamedTuple):
    """Attention weights of one sequence of N tokens: text tokens followed by image tokens.

    Attributes:
        weights: float32 ``[layers, heads, N, N]``, or ``[heads, N, N]`` for one layer. Row q,
            column k is the weight of key token k for query token q; each row sums to 1.
        words: the text's tokens, including ``[CLS]`` and ``[SEP]``; they are the first of the N
            positions.
        grid: side of the image in patches; 0 if there is no image. After the words come the image's
            own ``[CLS]`` and then ``grid * grid`` patches row by row.
    """

    weights: Tensor
    words: list[str]
    grid: int


@dataclass(frozen=True)
class _Watched(Packed):
    """A layout that records the attention weights of every layer."""

    weights: list[Tensor] = field(default_factory=list)

    def attend(self, qkv: Tensor, table: Tensor | None, backend: str | None) -> Tensor:
        self.weights.append(self._softmax(qkv, table))
        return super().attend(qkv, table, backend)

    def _softmax(self, qkv: Tensor, table: Tensor | None) -> Tensor:
        """Attention weights ``[H, N, N]`` float32 from packed ``qkv`` ``[N, 3, H, K]``."""
        q, k, _ = qkv.float().unbind(1)
        scores = torch.einsum("qhk,nhk->hqn", q * q.shape[-1] ** -0.5, k)
        if table is not None and self.index is not None:
            places = self.positions
            rows = self.index.matrix[places][:, places].long()
            scores = scores + table.float()[rows].movedim(-1, 0)
        return scores.softmax(2)


def attention_weights(
    model: VLMo, texts: Texts | None, pixels: Tensor | None, layer: int | None
) -> Tensor:
    """Weights ``[layers, heads, N, N]``, or ``[heads, N, N]`` for one layer, float32 on the CPU.

    They are computed in plain PyTorch, separately from the model's own attention, with any backend.

    Args:
        model: in evaluation mode.
        texts: one text; None for an image alone.
        pixels: ``[1, 3, S, S]``; None for a text alone.
        layer: number of the layer, -1 for the last one; None for all layers.
    """
    parts, run = [], Run(1, None, 0, 0, vl=texts is not None and pixels is not None)
    if texts is not None:
        parts.append(model.embed_text(texts.ids, texts.places))
        run = run._replace(texts=texts.lengths, words=len(parts[-1]))
    if pixels is not None:
        parts.append(model.embed_image(pixels)[0])
        run = run._replace(image=len(parts[-1]))
    x = torch.cat(parts)
    packed = model.pack([run], x.device)
    watched = _Watched(**vars(packed))
    stop = None if layer is None else range(model.config.depth)[layer] + 1
    model.run(x, watched, stop=stop)
    found = watched.weights if layer is None else watched.weights[-1]
    return (torch.stack(found) if isinstance(found, list) else found).cpu()
