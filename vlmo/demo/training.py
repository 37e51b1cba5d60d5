"""The model, the batches and the steps of the demo."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmo import VLMo, VLMoConfig, objectives
from vlmo.data import DigitScenes, GlobalBatches, TextTokenizer, loader, to_device
from vlmo.demo.steps import StepRecord, train_steps
from vlmo.negatives import PendingNegatives
from vlmo.placement import autocast_dtype
from vlmo.recipes import tiny
from vlmo.training.initial import start_wide
from vlmo.training.optimizer import adamw, linear_schedule


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
    sizes = dict(
        max_text_length=tokenizer.max_length,
        text_capacity=tokenizer.max_length,
        vocab_size=tokenizer.vocab_size,
    )
    return tiny(**{**sizes, **changes})


def tiny_model(config: VLMoConfig, seed: int) -> VLMo:
    """A new model that starts wide."""
    torch.manual_seed(seed)
    model = VLMo(config)
    start_wide(model)
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
    order = GlobalBatches(
        len(scenes), batch_size, seed=seed, steps=steps, keys=scenes.keys, groups=scenes.groups
    )
    for batch in loader(scenes, order, tokenizer, mask_share=mask_share):
        yield to_device(batch, device)


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
