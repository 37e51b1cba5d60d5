"""Reads whole data sets once, to find faults that training would otherwise meet only later."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from torch.utils.data import Dataset

from vlmo.data.loading import guarded_loader
from vlmo.data.samples import SPLITS, BadSample, Samples
from vlmo.data.sources import has_splits, holds_arrow

if TYPE_CHECKING:
    from vlmo.data.layout import Layout

# Fields of a record, and the task that they indicate; the first match counts.
_TASK_OF = {
    "question": "vqa",
    "statement": "nlvr2",
    "caption": "pretrain",
    "image": "pretrain",
    "file_name": "pretrain",
    "text": "textmlm",
}
_AT_ONCE = 32  # samples that a worker reads before it reports back


def check_samples(dataset: Dataset, *, workers: int = 0) -> Iterator[tuple[int, str]]:
    """Read every sample once, and each picture once, even if several samples show it.

    Args:
        dataset: from :func:`vlmo.data.open_data`, or one whose samples may raise
            :class:`BadSample`.
        workers: number of processes that read.

    Yields:
        The number of a sample that cannot be read, and the reason, which names file and row.
    """
    for _, faults in faults_of(dataset, workers=workers):
        for fault in faults:
            yield fault.index, str(fault)


def faults_of(dataset: Dataset, *, workers: int = 0) -> Iterator[tuple[int, list[BadSample]]]:
    """As :func:`check_samples`, but yields how many samples have been read, and their faults."""
    size = len(cast(Sized, dataset))
    parts = [range(size)[start : start + _AT_ONCE] for start in range(0, size, _AT_ONCE)]
    loaded = guarded_loader(
        _Reader(dataset), collate=None, batch_sampler=cast(Any, parts), num_workers=workers
    )
    for part, found in zip(parts, loaded, strict=True):
        yield len(part), [fault for faults in found for fault in faults]


def count_pictures(dataset: Dataset) -> int | None:
    """Number of different pictures; None for data that are not stored in files."""
    return int(_first_shown(dataset).sum()) if isinstance(dataset, Samples) else None


def splits_there(source: str, task: str, datasets: Sequence[str] | None = None) -> list[str]:
    """Splits that a source of :func:`vlmo.data.open_data` has; ``["train"]`` if it has no splits.

    Raises:
        OSError, ValueError: the source cannot be opened.
    """
    if source == "digits":
        return list(SPLITS)
    path = Path(source).absolute()
    if not path.exists():
        raise FileNotFoundError(f"source: {path} does not exist")
    if holds_arrow(path):
        from vlmo.data.arrow import DATASETS, chosen_datasets

        files = [DATASETS[name] for name in chosen_datasets(path, task, datasets)]
        stems = {split: [stem for of in files for stem in of.get(split, ())] for split in SPLITS}
        there = {file.stem for file in path.glob("*.arrow")}
        return [split for split in SPLITS if there & set(stems[split])] or ["train"]
    if not has_splits(path):
        return ["train"]
    return [split for split in SPLITS if _is_there(path, task, split)]


def tasks_of(source: str) -> list[str]:
    """Tasks that a source of :func:`vlmo.data.open_data` can serve, judged by its contents.

    unilm's Arrow files may serve several tasks; for a user's own data the first record decides.

    Raises:
        OSError, ValueError: the source cannot be opened, or its records fit no task.
    """
    if source == "digits":
        return ["pretrain"]
    path = Path(source).absolute()
    if not path.exists():
        raise FileNotFoundError(f"source: {path} does not exist")
    if holds_arrow(path):
        from vlmo.data.arrow import datasets_there

        return list(datasets_there(path)) or ["pretrain"]
    if path.suffix.lower() == ".txt":
        return ["textmlm"]
    from vlmo.data.records import file_rows

    for file in _any_files(path):
        if file.suffix.lower() == ".txt":
            return ["textmlm"]
        row = next(file_rows(file, tuple(_TASK_OF)), None)
        if row is not None:
            found = [task for name, task in _TASK_OF.items() if name in row.values]
            if not found:
                raise ValueError(f"{row.place}: has none of {', '.join(_TASK_OF)}")
            return found[:1]
    return ["pretrain"]


def official_datasets(source: str, task: str, split: str) -> tuple[str, ...] | None:
    """Data sets of unilm with Arrow files of a split in a source; None for other sources."""
    if source == "digits" or not holds_arrow(source):
        return None
    from vlmo.data.arrow import datasets_there

    return datasets_there(Path(source), split).get(task)


def _any_files(source: Path) -> Sequence[Path]:
    """Files of records or texts of some split; empty for pictures with caption files."""
    for task, split in itertools.product(("pretrain", "textmlm"), SPLITS):
        layout = _layout(source, task, split)
        if layout is not None:
            return layout.files
    from vlmo.data.layout import find

    return find(source, "pretrain", "train").files  # raises with its reason


def _layout(source: Path, task: str, split: str) -> Layout | None:
    from vlmo.data.layout import find

    try:
        return find(source, task, split)
    except (FileNotFoundError, ValueError):
        return None


def _is_there(source: Path, task: str, split: str) -> bool:
    from vlmo.data.layout import find, split_of
    from vlmo.data.records import file_rows

    try:
        layout = find(source, task, split)
    except FileNotFoundError:
        return False
    if not layout.mixed:
        return True
    names = (
        row.values.get("split") for file in layout.files for row in file_rows(file, ("split",))
    )
    return any(name is None or split_of(str(name)) in (split, None) for name in names)


class _Reader(Dataset):
    """The faults of each sample, found without transforming its pictures."""

    def __init__(self, dataset: Dataset):
        self._dataset = dataset
        self._first = _first_shown(dataset) if isinstance(dataset, Samples) else None

    def __len__(self) -> int:
        return len(cast(Sized, self._dataset))

    def __getitem__(self, index: int) -> list[BadSample]:
        names: list[str | None] = [None]
        if self._first is not None:
            shown = cast(Samples, self._dataset).picture_names
            names += [name for name, first in zip(shown, self._first[index], strict=True) if first]
        faults = [self._fault(index, name) for name in names]
        return [fault for fault in faults if fault is not None]

    def _fault(self, index: int, name: str | None) -> BadSample | None:
        try:
            if isinstance(self._dataset, Samples):
                self._dataset.read(index, name)
            else:
                self._dataset[index]
        except BadSample as error:
            return error
        return None


def _first_shown(dataset: Samples) -> np.ndarray:
    """Whether a sample is the first to show each of its P pictures, bool [N, P]."""
    shown = [dataset.picture_numbers(name) for name in dataset.picture_names]
    table = np.stack(shown, axis=1) if shown else np.empty((len(dataset), 0), np.int64)
    first = np.zeros(table.size, dtype=bool)
    first[np.unique(table, return_index=True)[1]] = True
    return first.reshape(table.shape)
