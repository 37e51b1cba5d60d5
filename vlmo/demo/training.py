"""The model, the batches and the steps of the demo."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmo import VLMo, VLMoConfig, objectives
from vlmo.data import DigitScenes, TextTokenizer, mask_whole_words, normalise
from vlmo.negatives import PendingNegatives
from vlmo.placement import autocast_dtype
from vlmo.train import StepRecord, adamw, linear_schedule, train_steps

_TRIES = 4  # to find a row's partner


@dataclass(frozen=True)
class Recipe:
    """How the demo trains.

    Attributes:
        steps: in all.
        contrast: share of the steps, the first ones, with the contrastive loss alone. They cost a
            third of the others, and fusion learns faster from features that already agree.
        batch_size: samples of a step.
        lr: highest learning rate.
        warmup: share of the steps until it is reached.
        hardness: factor of the contrastive logits by which the negatives of matching are drawn. It
            grows from 0, even chances, in the first half of the fusion steps: from the hardest
            negatives alone, matching would learn nothing in so short a time.
        mlm_weight, itm_weight: factors of these losses beside their official weights.
        clip_norm: largest norm of the gradient.
        mask_share: of the words, to predict; captions are short.
    """

    steps: int = 560
    contrast: float = 0.32
    batch_size: int = 64
    lr: float = 1e-3
    warmup: float = 0.06
    hardness: float = 0.3
    mlm_weight: float = 2.0
    itm_weight: float = 2.0
    clip_norm: float = 1.0
    mask_share: float = 0.25

    @property
    def contrast_steps(self) -> int:
        """Number of the steps with the contrastive loss alone."""
        return int(self.contrast * self.steps)

    def hardness_at(self, step: int) -> float:
        """Factor of the logits that negatives are drawn by, for a step from 0."""
        done = (step - self.contrast_steps) / (self.steps - self.contrast_steps)
        return self.hardness * min(1.0, max(0.0, 2 * done))


def tiny_config(tokenizer: TextTokenizer, **changes: Any) -> VLMoConfig:
    """A VLMo for 32-pixel pictures that trains in two minutes on two CPU cores."""
    sizes: dict[str, Any] = dict(
        dim=96,
        depth=3,
        heads=4,
        mlp_ratio=2.0,
        vl_start=2,
        image_size=32,
        patch_size=16,
        max_text_length=tokenizer.max_length,
        text_capacity=tokenizer.max_length,
        vocab_size=tokenizer.vocab_size,
        # Learned positions beside the relative bias: [CLS] sees through them where a digit lies.
        absolute_position=True,
        layer_scale=1.0,
        drop_path=0.0,
    )
    return VLMoConfig(**{**sizes, **changes})


def tiny_model(config: VLMoConfig, seed: int) -> VLMo:
    """A new model whose blocks and patch positions start wider than the official ones.

    The official deviation of 0.02 suits width 768. At an eighth of the width it makes all branches
    next to nothing, and positions next to nothing beside the patches: a short training would be
    spent on growing them.
    """
    torch.manual_seed(seed)
    model = VLMo(config)
    with torch.no_grad():
        for parameter in model.transformer.blocks.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.8 * config.dim**-0.5)
        if model.transformer.pos_embed is not None:
            model.transformer.pos_embed.normal_(std=0.5)
    return model


def pretrain_batches(
    scenes: DigitScenes,
    tokenizer: TextTokenizer,
    *,
    batch_size: int,
    steps: int,
    mask_share: float,
    seed: int,
    device: torch.device,
) -> Iterator[dict[str, Tensor]]:
    """Batches for :mod:`vlmo.objectives`: scenes of different meanings, many of the same digits.

    Args:
        scenes: with captions.
        tokenizer: masks the captions.
        batch_size: samples of a batch.
        steps: number of batches.
        mask_share: of the words, to predict.
        seed: of order and masks.
        device: where the batches are put.
    """
    generator = torch.Generator().manual_seed(seed)
    stored = scenes.materialise(tokenizer)
    keys = [scenes.scene(row).key for row in range(len(scenes))]
    groups = [frozenset(key.digits) for key in keys]
    for rows in itertools.islice(distinct_rows(keys, groups, batch_size, generator), steps):
        ids = stored["text_ids"][rows]
        masked, labels = mask_whole_words(ids, tokenizer, mask_share, generator=generator)
        batch = {
            "image": normalise(stored["image"][rows]),
            "text_ids": ids,
            "text_masks": stored["text_masks"][rows],
            "text_ids_mlm": masked,
            "text_labels_mlm": labels,
        }
        yield {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def distinct_rows(
    keys: Sequence[Hashable],
    groups: Sequence[Hashable],
    batch_size: int,
    generator: torch.Generator,
) -> Iterator[Tensor]:
    """Rows ``[batch_size]`` with different keys, half of them drawn, half similar to those.

    A batch with two pictures of one meaning would teach that the one's caption is false of the
    other. And a batch drawn at random seldom holds two scenes that differ in their arrangement
    alone, so that contrast would learn to count digits and matching would find no hard negative.

    Args:
        keys: rows with equal keys never share a batch.
        groups: each drawn row brings a random one of its group along, if there is one that fits.
        batch_size: rows of a batch.
        generator: of the order; all rows are drawn about equally often.

    Raises:
        ValueError: there are fewer different keys than ``batch_size``.
    """
    different = len(set(keys))
    if different < batch_size:
        raise ValueError(f"batch_size: {batch_size} exceeds the {different} different keys")
    members: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    waiting: list[int] = []
    while True:
        rows: list[int] = []
        seen: set[Hashable] = set()
        held: list[int] = []
        while len(rows) < batch_size:
            if not waiting:
                waiting = torch.randperm(len(keys), generator=generator).tolist()
            row = waiting.pop()
            if keys[row] in seen:
                held.append(row)
                continue
            similar = members[groups[row]]
            picks = torch.randint(len(similar), (_TRIES,), generator=generator).tolist()
            partners = (similar[pick] for pick in picks if keys[similar[pick]] not in seen)
            partner = next((other for other in partners if keys[other] != keys[row]), None)
            for chosen in (row, partner):
                if chosen is not None and len(rows) < batch_size:
                    rows.append(chosen)
                    seen.add(keys[chosen])
        waiting += held
        yield torch.tensor(rows)


def pretrain_steps(
    model: VLMo, batches: Iterator[dict[str, Tensor]], recipe: Recipe
) -> Iterator[StepRecord]:
    """Train by the recipe: contrast alone, then contrast, matching and masked words together."""
    device = next(model.parameters()).device
    optimizer = adamw(model, lr=recipe.lr)
    warmup = max(1, int(recipe.warmup * recipe.steps))
    schedule = linear_schedule(optimizer, warmup=warmup, total=recipe.steps)
    counter = itertools.count()

    def objective(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        step = next(counter)
        patches = model.embed_image(batch["image"])
        output = objectives.contrast(model, objectives.encode_streams(model, batch, patches))
        if step >= recipe.contrast_steps:
            words = objectives.mlm(model, batch, patches)
            words["mlm_loss"] = recipe.mlm_weight * words["mlm_loss"]
            hardness = recipe.hardness_at(step)
            i2t, t2i = (hardness * output[f"itc_{way}_logits"] for way in ("i2t", "t2i"))
            negatives = PendingNegatives(i2t, t2i, batch).all()
            pairs = objectives.itm(model, batch, patches, negatives)
            pairs["itm_loss"] = recipe.itm_weight * pairs["itm_loss"]
            output |= words | pairs
        return objectives.with_total(output)

    model.train()
    return train_steps(
        objective,
        batches,
        optimizer,
        schedule,
        clip_norm=recipe.clip_norm,
        autocast=autocast_dtype(device),
    )
