"""Opens any source of data with one function."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlmo.data.digits.language import ANSWERS
from vlmo.data.digits.scenes import DigitScenes
from vlmo.data.samples import SPLITS

if TYPE_CHECKING:
    from vlmo.data.samples import Samples

TASKS = ("textmlm", "pretrain", "retrieval", "vqa", "nlvr2")
_DIGIT_SIZES = {"train": 16384, "val": 512, "test": 1024}
_DIGIT_GALLERY = 256  # pairs with different meanings, to search among


def open_data(
    source: str | os.PathLike[str],
    task: str,
    split: str,
    *,
    image_size: int,
    train: bool = False,
    answers: Sequence[str] | None = None,
    datasets: Sequence[str] | None = None,
    answer_minimum: int = 1,
    flip: bool = True,
    allow_missing: bool = False,
) -> Samples | DigitScenes:
    """Open a data set of one split; :func:`~vlmo.data.collate` makes batches of its samples.

    docs/data.md shows an example of every kind of source.

    Args:
        source: "digits" for :class:`~vlmo.data.DigitScenes`; a folder of unilm's Arrow files; a
            .jsonl, .json, .csv, .tsv, .parquet or .txt file, or a folder with one for each split; a
            folder of pictures with a metadata file, or with a .txt file beside each picture that
            has a caption on every line; a folder that Hugging Face's ``save_to_disk`` wrote.
        task: "textmlm", "pretrain", "retrieval", "vqa" or "nlvr2".
        split: "train", "val" or "test".
        image_size: S, side of the pictures in pixels.
        train: augment pictures (:class:`~vlmo.data.transforms.SquareTransform`); digit scenes are
            never augmented.
        answers: the answers of vqa, in the order of their ids; None for those of the source: the
            answers that the Arrow files name, or those of the train split's records.
        datasets: which of unilm's data sets to open, see :mod:`vlmo.data.arrow`; None for those
            that unilm uses for the task.
        answer_minimum: for a user's own data, number of questions that an answer must be the major
            answer of, see :func:`~vlmo.data.answers.vocabulary`; VQAv2 uses 9.
        flip: mirror half of the augmented pictures, as unilm does for every task.
        allow_missing: missing pictures of records make bad samples when they are read
            (:class:`~vlmo.data.BadSample`), instead of an error now.

    Returns:
        A map-style data set. ``.answers`` is the list of answers of vqa, in the order of their ids;
        ``.text(index)`` and ``.image_ids`` describe samples without decoding pictures; ``.keys``
        and ``.groups`` are for :class:`~vlmo.data.GlobalBatches`.

    Raises:
        FileNotFoundError: the source, or files that it needs or names, are missing.
        ImportError: an extra of ``vlmo[train]`` is missing.
        ValueError: an argument is invalid, or the data have another form.
    """
    if task not in TASKS:
        raise ValueError(f"task: {task!r} is not one of {TASKS}")
    if split not in SPLITS:
        raise ValueError(f"split: {split!r} is not one of {SPLITS}")
    if answer_minimum < 1:
        raise ValueError(f"answer_minimum: {answer_minimum} is not positive")
    if source == "digits":
        return _open_digits(task, split, image_size, answers, datasets)
    path = Path(source).absolute()  # for workers, and in case the working directory changes
    if not path.exists():
        raise FileNotFoundError(f"source: {path} does not exist")
    try:
        from vlmo.data.arrow import open_arrow
        from vlmo.data.own import open_own
        from vlmo.data.transforms import SquareTransform
    except ImportError as error:
        raise ImportError(f"data in files needs {error.name}: pip install 'vlmo[train]'") from error
    transform = SquareTransform(image_size, train, flip)
    if holds_arrow(path):
        return open_arrow(path, task, split, transform, answers=answers, datasets=datasets)
    if datasets is not None:
        raise ValueError(f"datasets: {list(datasets)} can be chosen from Arrow files only")
    return open_own(
        path,
        task,
        split,
        transform,
        answers=answers,
        answer_minimum=answer_minimum,
        allow_missing=allow_missing,
    )


def has_splits(source: str | os.PathLike[str]) -> bool:
    """Whether a source of :func:`open_data` distinguishes splits; else it serves as any split."""
    if source == "digits" or holds_arrow(source):
        return True
    from vlmo.data import own

    return own.has_splits(Path(source))


def texts_of(dataset: Samples | DigitScenes) -> Iterator[str]:
    """The caption, question, statement or text of each sample of a data set, one after another.

    Raises:
        BadSample: a text cannot be read.
    """
    return (dataset.text(index) for index in range(len(dataset)))


def holds_arrow(source: str | os.PathLike[str]) -> bool:
    """Whether a source is a folder with Arrow files of unilm."""
    from vlmo.data.layout import is_hidden, is_saved_by_hugging_face

    folder = Path(source)
    found = any(not is_hidden(path.name) for path in folder.glob("*.arrow"))
    return found and not is_saved_by_hugging_face(folder)


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
