"""Any source of data by one call."""

from __future__ import annotations

import os
from collections.abc import Sequence

from torch.utils.data import Dataset

from vlmo.data.digit_language import ANSWERS
from vlmo.data.digit_scans import SPLITS
from vlmo.data.digit_scenes import DigitScenes

TASKS = ("textmlm", "pretrain", "retrieval", "vqa", "nlvr2")
_DIGIT_SIZES = {"train": 16384, "val": 512, "test": 1024}
_DIGIT_GALLERY = 256  # pairs of different meanings, to search among


def open_data(
    source: str | os.PathLike[str],
    task: str,
    split: str,
    *,
    image_size: int,
    train: bool = False,
    answers: Sequence[str] | None = None,
    datasets: Sequence[str] | None = None,
) -> Dataset:
    """A data set of one split, whose samples :func:`~vlmo.data.collate` puts together.

    Args:
        source: "digits" for :class:`~vlmo.data.DigitScenes`.
        task: "textmlm", "pretrain", "retrieval", "vqa" or "nlvr2".
        split: "train", "val" or "test".
        image_size: S, side of the pictures in pixels.
        train: augment pictures; digit scenes are never augmented.
        answers: of vqa, in the order of their ids; None for the source's own.
        datasets: which of a source's data sets to open.

    Returns:
        A map-style data set with ``.answers`` for vqa, a list of str in the order of their ids.

    Raises:
        ValueError: an argument outside what is listed.
    """
    if task not in TASKS:
        raise ValueError(f"task: {task!r} is not one of {TASKS}")
    if split not in SPLITS:
        raise ValueError(f"split: {split!r} is not one of {SPLITS}")
    if source == "digits":
        return _open_digits(task, split, image_size, answers, datasets)
    raise ValueError(f"source: {os.fspath(source)!r} is not known")


def _open_digits(
    task: str,
    split: str,
    image_size: int,
    answers: Sequence[str] | None,
    datasets: Sequence[str] | None,
) -> DigitScenes:
    if answers is not None and list(answers) != list(ANSWERS):
        raise ValueError(f"answers: {list(answers)} are not those of digit scenes {list(ANSWERS)}")
    if datasets is not None:
        raise ValueError(f"datasets: {list(datasets)} cannot be chosen from digit scenes")
    gallery = task == "retrieval" and split != "train"
    return DigitScenes(
        split,
        _DIGIT_GALLERY if gallery else _DIGIT_SIZES[split],
        image_size=image_size,
        task=task,
        distinct=gallery,
        paraphrase=False,
    )
