"""The losses of VLMo's tasks, as the official code computes them (``objectives.py``).

A batch is a mapping of tensors. What each task reads:

=========  ==============================================================================
all        ``text_ids``, ``text_masks`` [B, T]
mlm        ``image`` [B, 3, S, S], ``text_ids_mlm``, ``text_labels_mlm`` [B, T]
textmlm    ``text_ids_mlm``, ``text_labels_mlm`` [B, T]
itc, irtr  ``image``
itm        ``image``; needs itc in the same step, which weighs the hard negatives
vqa        ``image``, ``vqa_targets`` [B, answers] in [0, 1], or ``answers`` [B], one right each
nlvr2      ``image_0``, ``image_1``, ``answers`` [B] (1 for true)
=========  ==============================================================================

Labels of -100 are ignored. Every loss is a key that ends in ``_loss``; ``loss`` is their sum.
Contrastive pairs and hard negatives come from the batch of this process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from vlmo.model import VLMo

Batch = Mapping[str, Tensor]
Output = dict[str, Tensor]


def compute(model: VLMo, batch: Batch) -> Output:
    """All tasks of ``model.config.tasks``, in the official order.

    Raises:
        KeyError: the batch lacks a tensor that a task reads.
        ValueError: ITM without ITC.
    """
    tasks = model.config.tasks
    output: Output = {}
    if "textmlm" in tasks:
        output |= text_mlm(model, batch)
    if "mlm" in tasks:
        output |= mlm(model, batch)
    if "itc" in tasks:
        output |= itc(model, batch)
    if "itm" in tasks:
        if "itc" not in tasks:
            raise ValueError(f"tasks: {tasks} have itm without itc, which weighs its negatives")
        output |= itm(model, batch, output["itc_i2t_logits"], output["itc_t2i_logits"])
    if "vqa" in tasks:
        output |= vqa(model, batch)
    if "nlvr2" in tasks:
        output |= nlvr2(model, batch)
    if "irtr" in tasks:
        output |= irtr(model, batch)
    return with_total(output)


def with_total(output: Output) -> Output:
    """``output`` and, as ``"loss"``, the sum of its losses."""
    losses = [value for key, value in output.items() if key.endswith("_loss")]
    return output | {"loss": torch.stack(losses).sum()}


def mlm(model: VLMo, batch: Batch) -> Output:
    """Masked language modelling on fused features; the official weight is 0.25."""
    fused = model.fuse(batch["text_ids_mlm"], batch["text_masks"], batch["image"])
    return _mlm_output(model, fused.text, batch["text_labels_mlm"], weight=0.25)


def text_mlm(model: VLMo, batch: Batch) -> Output:
    """Masked language modelling on text alone (stage-2 pre-training)."""
    features = model.text_features(batch["text_ids_mlm"], batch["text_masks"])
    return _mlm_output(model, features, batch["text_labels_mlm"], weight=1.0)


def _mlm_output(model: VLMo, features: Tensor, labels: Tensor, weight: float) -> Output:
    logits = model.mlm_score(features)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
    return {"mlm_loss": weight * loss, "mlm_logits": logits, "mlm_labels": labels}


def itc(model: VLMo, batch: Batch) -> Output:
    """Image-text contrast, of the unimodal streams and of their vision-language tails, halved."""
    text = model.encode_text(batch["text_ids"], batch["text_masks"], vl_tail=True)
    image = model.encode_image(batch["image"], vl_tail=True)
    assert text.vl_embedding is not None and image.vl_embedding is not None
    i2t, loss = contrast(image.embedding, text.embedding, model.logit_scale)
    _, vl_loss = contrast(image.vl_embedding, text.vl_embedding, model.logit_vl_scale)
    return {"itc_loss": 0.5 * (loss + vl_loss), "itc_i2t_logits": i2t, "itc_t2i_logits": i2t.T}


def irtr(model: VLMo, batch: Batch) -> Output:
    """Retrieval fine-tuning: contrast of the unimodal streams alone."""
    text = model.encode_text(batch["text_ids"], batch["text_masks"])
    image = model.encode_image(batch["image"])
    i2t, loss = contrast(image.embedding, text.embedding, model.logit_scale)
    return {"irtr_loss": loss, "irtr_i2t_logits": i2t, "irtr_t2i_logits": i2t.T}


def contrast(image: Tensor, text: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Image-to-text logits ``[B, B]`` of unit vectors ``[B, D]``, and the loss of both ways."""
    i2t = log_scale.exp() * image @ text.T
    label = torch.arange(len(i2t), device=i2t.device)
    loss = F.cross_entropy(i2t.float(), label) + F.cross_entropy(i2t.T.float(), label)
    return i2t, loss / 2


def itm(model: VLMo, batch: Batch, i2t: Tensor, t2i: Tensor) -> Output:
    """Image-text matching against hard negatives, 3 B rows in one fused pass.

    Row order: B true pairs, B texts with a wrong image, B images with a wrong text. The image
    negatives are drawn before the text negatives, each with the softmax of its logits as weights.
    """
    count = len(i2t)
    with torch.no_grad():
        wrong_image = draw_negatives(t2i)
        wrong_text = draw_negatives(i2t)
    own = torch.arange(count, device=i2t.device)
    texts = torch.cat([own, own, wrong_text])
    images = torch.cat([own, wrong_image, own])
    fused = model.fuse(batch["text_ids"][texts], batch["text_masks"][texts], batch["image"][images])
    logits = model.itm_score(fused.pooled)
    labels = (torch.arange(3 * count, device=i2t.device) < count).long()
    loss = F.cross_entropy(logits.float(), labels)
    return {"itm_loss": loss, "itm_logits": logits, "itm_labels": labels}


def draw_negatives(logits: Tensor) -> Tensor:
    """For each row of ``[B, B]`` logits, a column other than its own, drawn by softmax weight.

    Nothing waits for the device. On the CPU the draws are those of the official code's one call per
    row, from the same seed.
    With a single row there is no negative, and its own column is returned.
    """
    weights = logits.detach().float().softmax(dim=1)
    weights.fill_diagonal_(0)
    # A row whose softmax left nothing beside the diagonal still needs a valid distribution.
    empty = weights.sum(1, keepdim=True) == 0
    uniform = 1 - torch.eye(len(weights), device=weights.device, dtype=weights.dtype)
    weights = torch.where(empty, uniform if len(weights) > 1 else torch.ones_like(weights), weights)
    return torch.multinomial(weights, 1)[:, 0]


def vqa(model: VLMo, batch: Batch) -> Output:
    """VQA as classification with soft targets: mean BCE times the number of answers."""
    fused = model.fuse(batch["text_ids"], batch["text_masks"], batch["image"])
    logits = model.vqa_classifier(fused.pooled)
    if "vqa_targets" in batch:
        targets = batch["vqa_targets"]
    else:
        targets = F.one_hot(batch["answers"], logits.shape[1]).to(logits.dtype)
    if targets.shape != logits.shape:
        raise ValueError(f"vqa_targets: shape {tuple(targets.shape)} is not {tuple(logits.shape)}")
    loss = F.binary_cross_entropy_with_logits(logits.float(), targets.float())
    return {"vqa_loss": loss * targets.shape[1], "vqa_logits": logits, "vqa_targets": targets}


def nlvr2(model: VLMo, batch: Batch) -> Output:
    """NLVR2: two fused passes, one per image, and a classifier of both pooled features."""
    pooled = [
        model.fuse(
            batch["text_ids"], batch["text_masks"], batch[f"image_{i}"], image_type=i + 1
        ).pooled
        for i in range(2)
    ]
    logits = model.nlvr2_classifier(torch.cat(pooled, dim=1))
    labels = batch["answers"].long()
    loss = F.cross_entropy(logits.float(), labels)
    return {"nlvr2_loss": loss, "nlvr2_logits": logits, "nlvr2_labels": labels}
