"""VLMo as unilm, the reference implementation, computes it: the baseline of the model suite.

Parameters and mathematics are those of :class:`vlmo.VLMo`. The differences: batches are padded to
the maximum text length; tokens are sliced by modality, fed through their experts and concatenated;
the bias of all layers is looked up at once into ``[N, N, H * layers]``; and the scores of all heads
are materialised in float32 (``multiway_transformer.py``, ``vlmo_module.py``, ``objectives.py``). In
a 16-bit model, the product for the scores has 16-bit operands and a 16-bit result: unilm specifies
float32, but is trained under autocast, which overrides this.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.contenders import without_fallback
from vlmo.model.config import VLMoConfig
from vlmo.model.layers import Block
from vlmo.model.layout import Chosen, Layout, Padded
from vlmo.model.vlmo import VLMo
from vlmo.tasks.losses import MLM_WEIGHT, with_total


class SwitchedVLMo(VLMo):
    """A VLMo that can also run its padded passes as unilm does, with the same parameters."""

    def __init__(self, config: VLMoConfig) -> None:
        super().__init__(config)
        # Attributes of every instance from the beginning: Dynamo guards on which there are.
        self._block: Any = None
        self._biases: list[Tensor | None] = []  # of every layer in the current pass

    @contextlib.contextmanager
    def as_unilm(self, *, compiler: str | None = None, wide_scores: bool = False) -> Iterator[None]:
        """Run :meth:`fuse`, :meth:`encode_text` and :meth:`encode_image` as unilm does, in a block.

        Args:
            compiler: backend of ``torch.compile`` for each block; None for eager execution.
            wide_scores: multiply queries and keys in float32, as unilm specifies.

        Raises:
            torch._dynamo.exc.FailOnRecompileLimitHit: more graphs are needed than the limit allows,
                so some blocks would run uncompiled.
        """
        self._block = functools.partial(block, wide_scores=wide_scores)
        limits: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if compiler is not None:
            self._block = _compiled_block(compiler)
            limits = without_fallback()
        try:
            with limits:
                yield
        finally:
            self._block, self._biases = None, []

    def run(
        self,
        x: Tensor,
        layout: Layout,
        *,
        start: int = 0,
        stop: int | None = None,
        chosen: Chosen | None = None,
    ) -> Tensor:
        """Blocks ``start`` to ``stop``; see :meth:`VLMo.run`."""
        if self._block is None:
            return super().run(x, layout, start=start, stop=stop, chosen=chosen)
        assert isinstance(layout, Padded) and chosen is None
        if start == 0:
            self._biases = self._spread(layout)
        for number in range(start, self.config.depth if stop is None else stop):
            x = self._block(self.transformer.blocks[number], x, layout, self._biases[number])
        return x

    def _spread(self, layout: Padded) -> list[Tensor | None]:
        """``[H, N, N]`` of every layer, which ``get_rel_pos_bias`` computes once per pass."""
        table, depth = self.relative_position_bias_table, self.config.depth
        if table is None or layout.index is None:
            return [None] * depth
        spread = F.embedding(layout.index.matrix.long(), table)  # [N, N, H * layers]
        return list(spread.permute(2, 0, 1).contiguous().chunk(depth))


def block(
    weights: Block, x: Tensor, layout: Padded, bias: Tensor | None, *, wide_scores: bool = False
) -> Tensor:
    """One block: attention over materialised scores, then each expert on its slice."""
    qkv = weights.attn.project(weights.norm1(x)).unflatten(-1, (3, weights.attn.heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scores = scores_of(q * q.shape[-1] ** -0.5, k, wide=wide_scores)
    if bias is not None:
        scores = scores + bias[None]
    if layout.key_mask is not None:
        scores = scores.masked_fill(~layout.key_mask[:, None, None, :], float("-inf"))
    attended = (scores.softmax(-1).type_as(x) @ v).transpose(1, 2).flatten(2)
    x = x + _scaled(weights.attn.proj(attended), weights.gamma_1)
    names, routing, _ = layout.experts(weights.has_vl)
    if len(names) == 1:
        return _expert(weights, names[0], x)
    parts = x.split([length for _, length in routing.pieces], dim=1)
    return torch.cat([_expert(weights, n, part) for n, part in zip(names, parts, strict=True)], 1)


def scores_of(q: Tensor, k: Tensor, *, wide: bool) -> Tensor:
    """``q k^T`` in float32 or better; unless ``wide``, the product is in the dtype of q."""
    if wide:
        q, k = _wide(q), _wide(k)
    return _wide(q @ k.transpose(-1, -2))


@functools.cache
def _compiled_block(compiler: str) -> Callable[..., Tensor]:
    return torch.compile(block, dynamic=False, backend=compiler)


def pretraining(model: VLMo, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Losses of MLM, ITC and ITM in a single process, composed as in unilm.

    There are six passes on padded batches: fusion for MLM, images and texts alone with their tails,
    and matching in three calls. Sampling hard negatives synchronises with the device for every row
    (``compute_itm_hardneg``). The passes are methods of ``model``.

    Args:
        model: a model with the tasks mlm, itc and itm.
        batch: as documented in :mod:`vlmo.tasks.losses`, with images as floats.
    """
    ids, masks, image = batch["text_ids"], batch["text_masks"], batch["image"]
    words = model.mlm_score(model.fuse(batch["text_ids_mlm"], masks, image).text)
    labels = batch["text_labels_mlm"].flatten()
    mlm = MLM_WEIGHT * F.cross_entropy(_wide(words.flatten(0, 1)), labels)

    images = model.encode_image(image, vl_tail=True)
    texts = model.encode_text(ids, masks, vl_tail=True)
    assert images.vl_embedding is not None and texts.vl_embedding is not None
    i2t = model.logit_scale.exp() * images.embedding @ texts.embedding.T
    vl_i2t = model.logit_vl_scale.exp() * images.vl_embedding @ texts.vl_embedding.T
    label = torch.arange(len(ids), device=ids.device)
    four = [F.cross_entropy(_wide(x), label) for x in (i2t, i2t.T, vl_i2t, vl_i2t.T)]
    itc = torch.stack(four).sum() / 4

    wrong_images = torch.stack([image[row] for row in _draw(i2t.T)])
    drawn = _draw(i2t)
    wrong_ids = torch.stack([ids[row] for row in drawn])
    wrong_masks = torch.stack([masks[row] for row in drawn])
    pairs = ((ids, masks, image), (ids, masks, wrong_images), (wrong_ids, wrong_masks, image))
    logits = torch.cat([model.itm_score(model.fuse(*pair).pooled) for pair in pairs])
    matches = torch.arange(len(logits), device=ids.device) < len(ids)
    itm = F.cross_entropy(_wide(logits), matches.long())
    return with_total({"mlm_loss": mlm, "itc_loss": itc, "itm_loss": itm})


def vqa(model: VLMo, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The loss of VQA on a padded batch; arguments as for :func:`pretraining`."""
    fused = model.fuse(batch["text_ids"], batch["text_masks"], batch["image"])
    logits, targets = model.vqa_classifier(fused.pooled), batch["vqa_targets"]
    loss = F.binary_cross_entropy_with_logits(_wide(logits), _wide(targets))
    return with_total({"vqa_loss": loss * targets.shape[1]})


def _expert(weights: Block, name: str, x: Tensor) -> Tensor:
    mlp, norm = getattr(weights, f"mlp_{name}"), getattr(weights, f"norm2_{name}")
    return x + _scaled(mlp.fc2(F.gelu(mlp.fc1(norm(x)))), weights.gamma_2)


def _scaled(branch: Tensor, gamma: Tensor | None) -> Tensor:
    return branch if gamma is None else gamma * branch


def _wide(t: Tensor) -> Tensor:
    """Convert to float32 or better."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _draw(logits: Tensor) -> list[int]:
    weights = _wide(logits.detach()).softmax(1)
    itself = torch.eye(len(weights), dtype=torch.bool, device=weights.device)
    return [int(torch.multinomial(row, 1)) for row in weights.masked_fill(itself, 0)]
