"""The gallery of a retrieval data set: each image once, with all of its texts."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sized
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vlmo.data import BadSample, TextTokenizer
from vlmo.data.loading import guarded_loader
from vlmo.tasks.inference import objects_of_all, own_share
from vlmo.tasks.retrieval import Gallery


def gallery_of(dataset: Dataset, tokenizer: TextTokenizer, *, workers: int = 0) -> Gallery:
    """The images and texts of a retrieval data set; an image with several texts is listed once.

    Images are loaded from the data set on access.

    Args:
        dataset: its samples have ``image``, ``text`` and ``image_id``. If it has ``image_ids`` (one
            per sample) and ``text(index)``, this function decodes no image.
        tokenizer: with the model's text length.
        workers: processes that read the samples if the data set has neither.

    Raises:
        ValueError: samples have no ``image_id``.
    """
    return readable_gallery(dataset, tokenizer, workers=workers, skips=False)[0]


def readable_gallery(
    dataset: Dataset, tokenizer: TextTokenizer, *, workers: int, skips: bool
) -> tuple[Gallery, list[tuple[int, str]]]:
    """As :func:`gallery_of`; with ``skips``, samples that cannot be read are left out.

    To find them, every image is decoded once.

    Returns:
        The gallery, and the number and reason of each sample that is left out.

    Raises:
        ValueError: samples have no ``image_id``, or none of them can be read.
    """
    pairs, bad = _pairs(dataset, workers, skips)
    first: dict[Hashable, int] = {}
    for row, (image, _) in pairs.items():
        first.setdefault(image, row)
    if skips:
        faults = dict(_faults(dataset, list(first.values()), workers))
        lost = {image: faults[row] for image, row in first.items() if row in faults}
        bad += [(row, lost[image]) for row, (image, _) in pairs.items() if image in lost]
        pairs = {row: pair for row, pair in pairs.items() if pair[0] not in lost}
        first = {image: row for image, row in first.items() if image not in lost}
    if not pairs:
        raise ValueError(f"dataset: no sample can be read, the first because of {bad[0][1]}")
    place = {image: number for number, image in enumerate(first)}
    words = tokenizer.encode([text for _, text in pairs.values()])
    gallery = Gallery(
        images=_Pictures(dataset, list(first.values())),
        text_ids=words["text_ids"],
        text_masks=words["text_masks"],
        image_of_text=torch.tensor([place[image] for image, _ in pairs.values()]),
    )
    return gallery, bad


def _pairs(
    dataset: Dataset, workers: int, skips: bool
) -> tuple[dict[int, tuple[Hashable, str]], list[tuple[int, str]]]:
    """Image id and text of every sample by its number; number and reason of those left out.

    With a process group, each rank reads its share of a data set without ``image_ids``.
    """
    size = len(cast(Sized, dataset))
    if hasattr(dataset, "image_ids"):
        told = cast(Any, dataset)
        found: Iterable[Any] = (
            _told(told, row, image, skips) for row, image in enumerate(told.image_ids)
        )
    else:
        read = _Read(dataset, skips)
        found = objects_of_all([*_each(read, own_share(size), workers)], size)
    pairs: dict[int, tuple[Hashable, str]] = {}
    bad: list[tuple[int, str]] = []
    for row, entry in enumerate(found):
        if isinstance(entry, str):
            bad.append((row, entry))
        else:
            pairs[row] = entry
    return pairs, bad


def _faults(dataset: Dataset, rows: list[int], workers: int) -> list[tuple[int, str]]:
    """The rows whose image cannot be read, with the reason; the ranks share the work."""
    share = [rows[number] for number in own_share(len(rows))]
    found = objects_of_all([*_each(_Read(dataset, True), share, workers)], len(rows))
    return [(row, entry) for row, entry in zip(rows, found, strict=True) if isinstance(entry, str)]


def _each(dataset: Dataset, rows: list[int], workers: int) -> Iterable[Any]:
    return guarded_loader(dataset, collate=None, sampler=rows, batch_size=None, num_workers=workers)


def _told(dataset: Any, row: int, image: Hashable, skips: bool) -> tuple[Hashable, str] | str:
    try:
        return image, dataset.text(row)
    except BadSample as error:
        if not skips:
            raise
        return str(error)


class _Read(Dataset):
    """Image id and text of samples; with ``skips``, the reason for one that cannot be read."""

    def __init__(self, dataset: Dataset, skips: bool):
        self.dataset, self.skips = dataset, skips

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))

    def __getitem__(self, row: int) -> tuple[Hashable, str] | str:
        try:
            sample = self.dataset[row]
        except BadSample as error:
            if not self.skips:
                raise
            return str(error)
        if "image_id" not in sample:
            raise ValueError(f"dataset: its samples have no image_id, only {sorted(sample)}")
        return sample["image_id"], sample["text"]


class _Pictures(Dataset):
    """The images of some samples, as a map-style data set."""

    def __init__(self, dataset: Dataset, rows: list[int]):
        self.dataset, self.rows = dataset, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Tensor:
        return self.dataset[self.rows[number]]["image"]
