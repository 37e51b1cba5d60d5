"""Losses of all tasks, as defined by unilm, the reference implementation.

Those of VLMo are in ``objectives.py`` of unilm's ``vlmo``. BEiT-3 has those of irtr, vqa and nlvr2,
which are the same (``engine_for_finetuning.py`` of ``beit3``).

A batch is a mapping. Each task reads:

=========  ==============================================================================
all        ``text_ids``, ``text_masks`` [B, T]
mlm        ``image`` [B, 3, S, S], ``text_ids_mlm``, ``text_labels_mlm`` [B, T]
textmlm    ``text_ids_mlm``, ``text_labels_mlm`` [B, T]
itc, irtr  ``image``
itm        ``image``; needs itc in the same step, which weights the hard negatives
vqa        ``image``, ``vqa_targets`` [B, answers] in [0, 1], or ``answers`` [B], one id each
nlvr2      ``image_0``, ``image_1``, ``answers`` [B] (1 for true)
=========  ==============================================================================

Images are uint8, or floats in [-1, 1]. Labels of -100 are ignored. With ``text_lengths`` [B] and
``mlm_tokens`` (the flat positions of the labels in ``text_labels_mlm``), both on the CPU, only the
hard negatives synchronise with the device: once, while masked language modelling runs.

The key of every loss ends with ``_loss``; ``loss`` is their sum. In a process group every rank has
the same number of rows; contrast and hard negatives span all ranks, and the mean of a loss over the
ranks is the loss of the global batch. The patches of each image are embedded once per step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmo import distributed
from vlmo.kernels.transfer import upload
from vlmo.model import packed
from vlmo.model.beit3 import BEiT3, BEiT3Config
from vlmo.model.config import TASKS, VLMoConfig
from vlmo.model.layout import Places, end_to_end, refuse, text_lengths
from vlmo.model.models import Config, Model, build, name_of
from vlmo.model.packed import Streams
from vlmo.model.vlmo import VLMo
from vlmo.tasks import heads
from vlmo.tasks.negatives import Negatives, PendingNegatives

Batch = Mapping[str, Any]
Output = dict[str, Tensor]

MLM_WEIGHT = 0.25  # as in unilm, relative to image-text contrast and matching


@dataclass(frozen=True)
class Whole:
    """What a micro-batch needs to know about the global batch (:mod:`vlmo.training.step`).

    Attributes:
        words: number of masked tokens of the global batch, divided by the number of micro-batches.
        losses: contrastive losses ``itc_loss`` and ``irtr_loss`` of the global batch.
        surrogate: maps the streams of this micro-batch to a scalar that has the gradient of those
            losses.
        negatives: hard negatives of the rows of this micro-batch.
    """

    words: Tensor
    losses: Output
    surrogate: Any = None
    negatives: Negatives | None = None


def compute_losses(
    model: Model,
    batch: Batch,
    *,
    whole: Whole | None = None,
    streams_only: bool = False,
    generator: torch.Generator | None = None,
) -> Output:
    """Losses, logits and labels of all tasks of ``model.config.tasks``; ``"loss"`` is the sum.

    Call it as ``model(compute_losses, batch)``, so that wrappers of the model
    (DistributedDataParallel, FSDP2, ``torch.compile``, PEFT) take part.

    Args:
        model: any model.
        batch: see the description of this module.
        whole: information about the global batch if ``batch`` is a micro-batch; None if ``batch``
            has all rows of this rank.
        streams_only: return only the inputs of the contrastive loss, under the names of
            :class:`vlmo.model.packed.Streams`.
        generator: random number generator for hard negatives, in the same state on all ranks; None
            for torch's own on each rank.

    Raises:
        KeyError: the batch lacks a tensor that a task reads.
        ValueError: a task has no loss, ITM is used without ITC, a text has no tokens, a label is on
            padding, or contrast has a single pair, whose loss is always 0.
    """
    tasks = model.config.tasks
    if not tasks or set(tasks) - set(TASKS):
        raise ValueError(f"tasks: {tasks} of {name_of(model.config)} are not all tasks with a loss")
    full = cast(VLMo, model)  # in tasks that BEiT-3 does not have
    if "itm" in tasks and "itc" not in tasks:
        raise ValueError(f"tasks: {tasks} have itm without itc, which weighs its negatives")
    if {"mlm", "textmlm"} & set(tasks):
        batch = {**batch, "mlm_tokens": masked_tokens(batch)}  # computed once
    patches = torch.empty(0)
    if set(tasks) - {"textmlm", "nlvr2"}:
        patches = model.embed_image(batch["image"])
    output: Output = {}
    negatives = None if whole is None else whole.negatives
    pending = None
    contrasts = bool({"itc", "irtr"} & set(tasks))
    # Micro-batches encode their streams twice with the same dropout, so nothing else may join.
    joined = "mlm" in tasks and contrasts and whole is None and not streams_only
    joined = joined and _joins(patches.device)
    if contrasts:
        words = _words(batch) if joined else None
        streams, masked = encode_streams(model, batch, patches, words)
        if masked is not None:
            output |= _mlm_output(full, batch, masked, whole, weight=MLM_WEIGHT)
        if streams_only:
            return {name: v for name, v in streams._asdict().items() if v is not None}
        if whole is None:
            output |= contrast(model, streams)
            if "itm" in tasks:
                logits = output["itc_i2t_logits"], output["itc_t2i_logits"]
                pending = PendingNegatives(*logits, batch, generator)
        else:
            surrogate = whole.surrogate(streams)
            first, *others = whole.losses
            output |= {name: whole.losses[name] for name in others}
            output[first] = whole.losses[first] + surrogate - surrogate.detach()
    if "textmlm" in tasks:
        output |= text_mlm(full, batch, whole)
    if "mlm" in tasks and not joined:
        output |= mlm(full, batch, patches, whole)
    if pending is not None:
        negatives = pending.all()
    if negatives is not None:
        output |= itm(full, batch, patches, negatives)
    if "vqa" in tasks:
        output |= vqa(model, batch, patches)
    if "nlvr2" in tasks:
        output |= nlvr2(model, batch)
    return with_total(output)


def _joins(device: torch.device) -> bool:
    """Whether masked language modelling joins the pass of the streams.

    This saves one pass in which the blocks read their weights and accumulate their gradients, which
    matters on a CPU. On a GPU it is better to run it later, where it keeps the GPU busy while the
    host waits for the hard negatives.
    """
    return device.type == "cpu"


def with_total(output: Output) -> Output:
    """``output`` with the sum of its losses as ``"loss"``."""
    losses = [value for key, value in output.items() if key.endswith("_loss")]
    return output | {"loss": torch.stack(losses).sum()}


def mlm(model: VLMo, batch: Batch, patches: Tensor, whole: Whole | None = None) -> Output:
    """Masked language modelling on fused features, with weight 0.25.

    Returns:
        ``mlm_loss``; ``mlm_logits`` [M, V] and ``mlm_labels`` [M] of the M masked tokens.
    """
    texts, tokens = _words(batch)
    x = packed.fuse(model, texts, patches, torch.arange(patches.shape[0]), tokens)
    return _mlm_output(model, batch, x, whole, weight=MLM_WEIGHT)


def text_mlm(model: VLMo, batch: Batch, whole: Whole | None = None) -> Output:
    """Masked language modelling on text alone (stage-2 pre-training); returns as :func:`mlm`."""
    x = packed.encode_text(model, *_words(batch))
    return _mlm_output(model, batch, x, whole, weight=1.0)


def masked_tokens(batch: Batch) -> Tensor:
    """Flat positions of the labels in ``text_labels_mlm``, ``[M]`` int64 on the CPU."""
    if "mlm_tokens" in batch:
        return batch["mlm_tokens"]
    return (batch["text_labels_mlm"].flatten() >= 0).nonzero()[:, 0].cpu()


def _words(batch: Batch) -> packed.Words:
    texts = end_to_end(batch["text_ids_mlm"], text_lengths(batch))
    masked, capacity = masked_tokens(batch), batch["text_labels_mlm"].shape[1]
    padding = masked % capacity >= texts.lengths[masked // capacity]
    refuse(padding, "text_labels_mlm: a label stands on padding")
    masked = upload(masked, texts.ids.device)
    return packed.Words(texts, Places(masked // capacity, masked % capacity))


def _mlm_output(
    model: VLMo,
    batch: Batch,
    x: Tensor,  # [M, D]
    whole: Whole | None,
    weight: float,
) -> Output:
    """Logits, labels and loss; the loss is the mean over the global batch's masked tokens."""
    tokens = masked_tokens(batch)
    logits = model.mlm_score(x)
    labels = batch["text_labels_mlm"].flatten()[upload(tokens, x.device)]
    total = F.cross_entropy(logits.float(), labels, reduction="sum")
    if whole is None:
        count = torch.full((), tokens.shape[0], dtype=torch.float32, device=x.device)
        words = distributed.mean_over_ranks(count)
    else:
        words = whole.words
    loss = total / torch.where(words > 0, words, 1)
    return {"mlm_loss": weight * loss, "mlm_logits": logits, "mlm_labels": labels}


def encode_streams(
    model: Model, batch: Batch, patches: Tensor, words: packed.Words | None = None
) -> tuple[Streams, Tensor | None]:
    """Inputs of the contrastive loss, with the configured gradient scale, and masked tokens.

    See :func:`vlmo.model.packed.encode_streams`.
    """
    texts = end_to_end(batch["text_ids"], text_lengths(batch))
    if isinstance(model, BEiT3):
        return heads.streams(model, texts, patches), None
    vl_tail = "itc" in model.config.tasks
    streams, masked = packed.encode_streams(model, texts, patches, vl_tail=vl_tail, words=words)
    scale = model.config.itc_grad_scale
    if scale != 1:
        streams = Streams._make(
            v if v is None else v * scale + v.detach() * (1 - scale) for v in streams
        )
    return streams, masked


def contrast(model: Model, streams: Streams) -> Output:
    """Image-text contrast of itc (streams and VL streams, averaged) or irtr (streams only).

    Returns:
        ``itc_loss`` and, for this rank's rows against all rows, ``itc_i2t_logits`` and
        ``itc_t2i_logits`` [B, W * B]; for irtr the same with the prefix ``irtr_``.
    """
    if streams.image.shape[0] * distributed.world_size() < 2:
        raise ValueError(
            f"batch: 1 pair leaves nothing for {' and '.join(model.config.tasks)} to compare it "
            "with; the batches of all ranks together need at least 2"
        )
    everything = [v for v in streams if v is not None]
    everyone = distributed.gather(torch.cat(everything, 1)).split(model.config.dim, 1)
    i2t, t2i, loss = _directions(streams.image, streams.text, everyone[:2], model.logit_scale)
    output: Output = {}
    if "itc" in model.config.tasks:
        assert streams.vl_image is not None and streams.vl_text is not None
        *_, vl_loss = _directions(
            streams.vl_image, streams.vl_text, everyone[2:], cast(VLMo, model).logit_vl_scale
        )
        halved = 0.5 * (loss + vl_loss)
        output |= {"itc_loss": halved, "itc_i2t_logits": i2t, "itc_t2i_logits": t2i}
    if "irtr" in model.config.tasks:
        output |= {"irtr_loss": loss, "irtr_i2t_logits": i2t, "irtr_t2i_logits": t2i}
    return output


def _directions(
    image: Tensor,  # [B, D]
    text: Tensor,  # [B, D]
    everyone: Sequence[Tensor],  # [W * B, D] of images and of texts
    log_scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits ``[B, W * B]`` of this rank's images and texts, and the loss of both directions."""
    images, texts = everyone
    i2t = log_scale.exp() * image @ texts.T
    t2i = log_scale.exp() * text @ images.T
    rows = image.shape[0]
    label = distributed.rank() * rows + torch.arange(rows, device=image.device)
    loss = F.cross_entropy(i2t.float(), label) + F.cross_entropy(t2i.float(), label)
    return i2t, t2i, loss / 2


def itm(model: VLMo, batch: Batch, patches: Tensor, negatives: Negatives) -> Output:
    """Image-text matching against hard negatives, 3 B rows in one fused pass.

    Row order: B true pairs, B texts with a wrong image, B images with a wrong text.
    """
    own = torch.arange(patches.shape[0])
    lengths = text_lengths(batch)
    ids = torch.cat([batch["text_ids"], batch["text_ids"], negatives.text_ids])
    texts = end_to_end(ids, torch.cat([lengths, lengths, negatives.text_lengths]))
    if negatives.pixels.shape[0]:
        patches = torch.cat([patches, model.embed_image(negatives.pixels)])
    cls = packed.fuse(model, texts, patches, torch.cat([own, negatives.images, own]))
    logits = model.itm_score(model.pooler(cls))
    labels = (torch.arange(3 * own.shape[0], device=cls.device) < own.shape[0]).long()
    loss = F.cross_entropy(logits.float(), labels)
    return {"itm_loss": loss, "itm_logits": logits, "itm_labels": labels}


def vqa(model: Model, batch: Batch, patches: Tensor) -> Output:
    """VQA as classification with soft targets: mean BCE times the number of answers."""
    texts = end_to_end(batch["text_ids"], text_lengths(batch))
    logits = heads.vqa_logits(model, texts, patches)
    if "vqa_targets" in batch:
        targets = batch["vqa_targets"]
    else:
        targets = F.one_hot(batch["answers"], logits.shape[1]).to(logits.dtype)
    if targets.shape != logits.shape:
        raise ValueError(f"vqa_targets: shape {tuple(targets.shape)} is not {tuple(logits.shape)}")
    loss = F.binary_cross_entropy_with_logits(logits.float(), targets.float())
    return {"vqa_loss": loss * targets.shape[1], "vqa_logits": logits, "vqa_targets": targets}


def nlvr2(model: Model, batch: Batch) -> Output:
    """NLVR2: each text with each of its images, 2 B rows in one pass, and a joint classifier."""
    texts = end_to_end(batch["text_ids"], text_lengths(batch))
    logits = heads.nlvr2_logits(model, texts, batch["image_0"], batch["image_1"])
    labels = batch["answers"].long()
    loss = F.cross_entropy(logits.float(), labels)
    return {"nlvr2_loss": loss, "nlvr2_logits": logits, "nlvr2_labels": labels}


def unused_parameters(config: Config) -> set[str]:
    """Names of the parameters that do not affect any output of ``config.tasks``.

    They get no gradient, or zeros, and must be frozen before the model is wrapped in
    DistributedDataParallel, which otherwise waits for their gradients.
    """
    if isinstance(config, BEiT3Config):
        unused = _unused_by_beit3(config)
    else:
        unused = _unused_by_vlmo(config)
    with torch.device("meta"):
        names = [name for name, _ in build(config).named_parameters()]
    return {name for name in names if name.startswith(tuple(unused))}


def _unused_by_beit3(config: BEiT3Config) -> list[str]:
    """Prefixes of the names of the unused parameters."""
    tasks, layers = set(config.tasks), "beit3.encoder.layers."
    parts = ["beit3.vision_embed.mask_token"]
    reads = ["self_attn.q_proj", "self_attn.inner_attn_ln", "self_attn.out_proj"]
    reads += ["final_layer_norm", "ffn"]
    if tasks == {"classification"}:  # images alone
        parts += ["beit3.text_embed.", "beit3.encoder.embed_positions.B."]
        every = [*reads, "self_attn_layer_norm", "self_attn.k_proj", "self_attn.v_proj"]
        parts += [f"{layers}{n}.{module}.B." for n in range(config.depth) for module in every]
    elif tasks == {"vqa"}:  # of the last layer, the head reads the first image token alone
        parts += [f"{layers}{config.depth - 1}.{module}.B." for module in reads]
    elif tasks == {"captioning"}:  # of the last layer, the head reads text tokens alone
        parts += [f"{layers}{config.depth - 1}.{module}.A." for module in reads]
        parts.append("beit3.encoder.layer_norm.A.")
    return parts


def _unused_by_vlmo(config: VLMoConfig) -> list[str]:
    """Prefixes of the names of the unused parameters."""
    tasks = set(config.tasks)
    alone, fused = bool(tasks & {"itc", "irtr"}), bool(tasks & {"mlm", "itm", "vqa", "nlvr2"})
    pictures = alone or fused
    parts = []
    if not config.absolute_position:
        parts.append("text_embeddings.position_embeddings.")
    if not pictures:
        parts += ["transformer.patch_embed.", "transformer.cls_token", "transformer.pos_embed"]
    if not tasks & {"itm", "vqa", "nlvr2"}:
        parts.append("pooler.")
    for number in range(config.depth):
        block, top = f"transformer.blocks.{number}.", number >= config.first_vl_block
        # Texts alone and pairs below the top blocks use the expert of text; likewise for images.
        used = {"text"} if "textmlm" in tasks or alone or not top else set()
        used |= {"imag"} if alone or (fused and not top) else set()
        used |= {"vl"} if fused or "itc" in tasks else set()
        for expert in {"text", "imag", "vl"} - used:
            parts += [f"{block}norm2_{expert}.", f"{block}mlp_{expert}."]
        if config.separate_attention and not top and not pictures:
            parts.append(f"{block}attn.")
    return parts
