"""Batches of digit scenes: tokenised, masked, and without equal meanings."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Sampler

from vlmo.data.digit_language import all_texts
from vlmo.data.digit_scenes import DigitScenes
from vlmo.data.masking import mask_whole_words
from vlmo.data.tokenizer import TextTokenizer, train_wordpiece


class DistinctBatches(Sampler[list[int]]):
    """Shuffled batches in which no two scenes mean the same, for ``DataLoader(batch_sampler=...)``.

    In a random batch of 128 a quarter of the scenes share their meaning with another one. The
    contrastive loss then calls a true caption false, and image-text matching seeks out exactly
    these pairs as its hard negatives.

    Every sample comes at most once a pass; the last batches, which cannot be filled, are dropped.

    Args:
        data: scenes of the tasks pretrain or retrieval.
        batch_size: at most the number of different meanings in the data.
        generator: of the order; None for torch's own.

    Raises:
        ValueError: fewer different meanings than ``batch_size``.
    """

    def __init__(
        self, data: DigitScenes, batch_size: int, *, generator: torch.Generator | None = None
    ):
        self._meanings = data.meaning_ids().tolist()
        different = len(set(self._meanings))
        if not 1 <= batch_size <= different:
            raise ValueError(f"batch_size: {batch_size} is not within 1..{different} meanings")
        self.batch_size, self.generator = batch_size, generator

    def __iter__(self) -> Iterator[list[int]]:
        waiting: list[dict[int, int]] = []  # batches being filled, meaning to sample
        for index in torch.randperm(len(self._meanings), generator=self.generator).tolist():
            meaning = self._meanings[index]
            batch = next((batch for batch in waiting if meaning not in batch), None)
            if batch is None:
                batch = {}
                waiting.append(batch)
            batch[meaning] = index
            if len(batch) == self.batch_size:
                waiting.remove(batch)
                yield list(batch.values())


@functools.cache
def _digit_wordpiece() -> Tokenizer:
    return train_wordpiece(all_texts(), vocab_size=256)


def digit_tokenizer(max_length: int = 16) -> TextTokenizer:
    """Tokenizer of everything that is said about digit scenes; the same ids on every run.

    The longest text is 12 tokens, [CLS] and [SEP] included.
    """
    return TextTokenizer(_digit_wordpiece(), max_length)


def collate(
    samples: Sequence[dict],
    tokenizer: TextTokenizer,
    *,
    mlm_probability: float | None = None,
    generator: torch.Generator | None = None,
) -> dict:
    """A batch of samples, for ``DataLoader(collate_fn=functools.partial(collate, tokenizer=...))``.

    Args:
        samples: of :class:`DigitScenes`.
        tokenizer: sets the length T.
        mlm_probability: share of the words to mask; None for no masked copy.
        generator: of the masking; None for torch's own.

    Returns:
        image (or image_0, image_1) float32 [B, 3, S, S]; text, list of B; text_ids, text_masks
        int64 [B, T]; answers int64 [B]; with masking text_ids_mlm, text_labels_mlm
        int64 [B, T].
    """
    batch: dict[str, Any] = {}
    for name in samples[0]:
        values = [sample[name] for sample in samples]
        if isinstance(values[0], Tensor):
            batch[name] = torch.stack(values)
        else:
            batch[name] = values if isinstance(values[0], str) else torch.tensor(values)
    batch |= tokenizer.encode(batch["text"])
    if mlm_probability is not None:
        batch["text_ids_mlm"], batch["text_labels_mlm"] = mask_whole_words(
            batch["text_ids"], tokenizer, mlm_probability, generator=generator
        )
    return batch
