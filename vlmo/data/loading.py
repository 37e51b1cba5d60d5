"""Batches for the model: tokenised, masked, stacked, loaded by workers, moved to the device.

A data set gives one dictionary per sample; which keys it holds depends on the task:

- image, or image_0 and image_1: uint8 [3, S, S]
- text: str
- answers: int, 1 for a true statement and 0 for a false one (nlvr2)
- answer_labels, answer_scores: ids and soft scores of the right answers (vqa)
- image_id, question_id, identifier, table_name: what the source calls the sample
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlmo.data.draws import Draw
from vlmo.data.masking import IGNORE, mask_whole_words
from vlmo.data.tokenizer import TextTokenizer

HOST_KEYS = ("text_lengths", "mlm_tokens")  # read on the CPU, to lay out a packed batch


def collate(
    samples: Sequence[Mapping[str, Any]],
    tokenizer: TextTokenizer,
    *,
    mask_share: float | None = None,
    official_masking: bool = False,
    seeds: Sequence[int] | None = None,
    answers: int | None = None,
) -> dict[str, Any]:
    """A batch of B samples.

    Args:
        samples: as listed in this module's description; all of them hold the same keys.
        tokenizer: sets the length T.
        mask_share: share of the words to mask; None for no masked copy.
        official_masking: see :func:`mask_whole_words`.
        seeds: of each sample, for masking; None for 0.
        answers: number A of the answers of vqa.

    Returns:
        On the CPU, text_ids and text_masks int64 [B, T]; text_lengths int64 [B]; image, image_0,
        image_1 uint8 [B, 3, S, S]; vqa_targets float32 [B, A]; answers int64 [B]; the other keys
        as lists of B. With masking text_ids_mlm and text_labels_mlm int64 [B, T], and mlm_tokens
        int64 [M]: the flat places row * T + column of the labels that are not -100.

    Raises:
        ValueError: no samples, an answer's id is not below A, or A is missing.
    """
    if not samples:
        raise ValueError("samples: none were given")
    columns = {name: [sample[name] for sample in samples] for name in samples[0]}
    batch: dict[str, Any] = {}
    if "answer_labels" in columns:
        right, scores = columns.pop("answer_labels"), columns.pop("answer_scores")
        batch["vqa_targets"] = _soft_targets(right, scores, answers)
    for name, values in columns.items():
        if isinstance(values[0], Tensor):
            batch[name] = torch.stack(values)
        else:
            batch[name] = torch.tensor(values) if name == "answers" else values
    batch |= tokenizer.encode(columns["text"])
    batch["text_lengths"] = batch["text_masks"].sum(1)
    if mask_share is not None:
        batch["text_ids_mlm"], labels = mask_whole_words(
            batch["text_ids"],
            tokenizer,
            mask_share,
            seeds=[0] * len(samples) if seeds is None else seeds,
            official=official_masking,
        )
        batch["text_labels_mlm"] = labels
        batch["mlm_tokens"] = (labels.flatten() != IGNORE).nonzero()[:, 0]
    return batch


def to_device(batch: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    """The batch with its tensors on the device, but ``HOST_KEYS``; nothing waits for the copies."""
    return {
        name: value.to(device, non_blocking=True)
        if isinstance(value, Tensor) and name not in HOST_KEYS
        else value
        for name, value in batch.items()
    }


class Batches(Protocol):
    """Which samples make up this rank's batches, as :class:`vlmo.data.GlobalBatches` tells."""

    size: int  # of the data set

    def __iter__(self) -> Iterator[list[Draw]]: ...


def loader(
    dataset: Dataset,
    batches: Batches,
    tokenizer: TextTokenizer,
    *,
    mask_share: float | None = None,
    workers: int = 0,
    official_masking: bool = False,
) -> DataLoader:
    """Batches of :func:`collate`, in the order of ``batches``.

    They are the same for any number of workers. With a CUDA device they lie in pinned memory.

    Args:
        dataset: takes a :class:`Draw` as index.
        batches: this rank's shares of the global batches.
        tokenizer: sets the length T.
        mask_share: share of the words to mask; None for no masked copy.
        workers: processes that make samples; 0 for none.
        official_masking: see :func:`mask_whole_words`.

    Raises:
        ValueError: negative ``workers``, or ``batches`` of another number of samples.
    """
    size = len(cast(Sized, dataset))
    if batches.size != size:
        raise ValueError(f"batches: of {batches.size} samples, the data set has {size}")
    if workers < 0:
        raise ValueError(f"workers: {workers} is negative")
    names = getattr(dataset, "answers", None)
    function = functools.partial(
        _collate_seeded,
        tokenizer=tokenizer,
        mask_share=mask_share,
        official_masking=official_masking,
        answers=None if names is None else len(names),
    )
    return DataLoader(
        _Seeded(dataset),
        batch_sampler=cast(Any, batches),  # yields lists; needs nothing else
        collate_fn=function,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker,
        # Of nothing that is used here; without one, every epoch would advance torch's own.
        generator=torch.Generator(),
    )


class _Seeded(Dataset):
    """Samples with the seeds they were drawn with, which masking needs as well."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))

    def __getitems__(self, draws: Sequence[Draw]) -> list[tuple[dict[str, Any], int]]:
        if hasattr(self.dataset, "__getitems__"):
            samples = self.dataset.__getitems__(draws)
        else:
            samples = [self.dataset[cast(int, draw)] for draw in draws]
        return [(sample, draw.seed) for sample, draw in zip(samples, draws, strict=True)]


def _collate_seeded(drawn: Sequence[tuple[dict[str, Any], int]], **options: Any) -> dict[str, Any]:
    samples, seeds = zip(*drawn, strict=True)
    return collate(samples, seeds=seeds, **options)


def _start_worker(worker: int) -> None:
    # The tokenizer would warn of the threads that a forked process does not have.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _soft_targets(
    labels: Sequence[Sequence[int]], scores: Sequence[Sequence[float]], answers: int | None
) -> Tensor:
    """Scores float32 [B, answers] of the answers that are right, 0 for the others."""
    if answers is None:
        raise ValueError("answers: their number is needed for samples with answer_labels")
    targets = torch.zeros(len(labels), answers)
    rows = [row for row, found in enumerate(labels) for _ in found]
    places = torch.tensor([label for found in labels for label in found], dtype=torch.int64)
    if len(places) and not 0 <= int(places.min()) <= int(places.max()) < answers:
        raise ValueError(f"answer_labels: {places.tolist()} are not within 0..{answers - 1}")
    values = torch.tensor([score for found in scores for score in found], dtype=torch.float32)
    targets[torch.tensor(rows, dtype=torch.int64), places] = values
    return targets
