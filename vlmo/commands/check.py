"""``vlmo check``: reads all samples of some data once, and lists those that cannot be read."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.progress import Progress
from torch.utils.data import Dataset

from vlmo.commands.outputs import check_outputs
from vlmo.commands.records import to_json
from vlmo.data import open_data
from vlmo.data.check import count_pictures, faults_of, official_datasets, splits_there, tasks_of
from vlmo.data.digit_scans import SPLITS
from vlmo.files import replacing
from vlmo.loading import read_answers

_IMAGE_SIZE = 32  # which nothing is resized to


@dataclass(frozen=True)
class Settings:
    """What the command line decides.

    Attributes:
        data: source for :func:`vlmo.data.open_data`.
        task: as of :func:`vlmo.data.open_data`; None for those that the data serve.
        split: "train", "val" or "test"; None for all that there are.
        datasets: of the official data; None for the task's.
        answers: JSON list of VQA's answers; None for those of the data.
        workers: processes that read.
        output: file for what is found; None for none.
    """

    data: str
    task: str | None = None
    split: str | None = None
    datasets: tuple[str, ...] | None = None
    answers: Path | None = None
    workers: int = 0
    output: Path | None = None


def run(settings: Settings, console: Console) -> int:
    """Number of texts and pictures that cannot be read; all of them are printed.

    Raises:
        ValueError, OSError: the data cannot be opened; nothing has been written.
    """
    if settings.workers < 0:
        raise ValueError(f"workers: {settings.workers} is negative")
    data = None if settings.data == "digits" else Path(settings.data)
    check_outputs({"output": settings.output}, given={"data": data, "answers": settings.answers})
    if settings.answers is not None and settings.task not in (None, "vqa"):
        raise ValueError(f"answers: {settings.answers} does not suit {settings.task}, only vqa")
    opened = dict(_opened(settings))
    found: list[dict[str, Any]] = []
    for (task, split), dataset in opened.items():
        faults = _check(split, dataset, settings.workers, console)
        found += [{"task": task, **fault} for fault in faults]
        summary = _summary(split, dataset, len(faults))
        if settings.task is None:  # say which were found
            summary = f"{task}, {summary}"
        console.print(summary, highlight=False, soft_wrap=True)
    if settings.output is not None:
        with replacing(settings.output) as temporary:
            temporary.write_text("".join(to_json(fault) + "\n" for fault in found), "utf-8")
        console.print(f"Written: {settings.output}", highlight=False, soft_wrap=True)
    return len(found)


def _opened(settings: Settings) -> Iterator[tuple[tuple[str, str], Dataset]]:
    """The data sets of all tasks and splits."""
    data, datasets = settings.data, settings.datasets
    for task in [settings.task] if settings.task else tasks_of(data):
        there: dict[str, tuple[str, ...] | None] = {}
        if settings.task is None and datasets is None:
            found = {split: official_datasets(data, task, split) for split in SPLITS}
            there = {split: names for split, names in found.items() if names}
        if settings.split:
            splits = [settings.split]
        else:
            splits = list(there) or splits_there(data, task, datasets)
        for split in splits:
            yield (task, split), _open(settings, task, split, there.get(split, datasets))


def _open(settings: Settings, task: str, split: str, datasets: tuple[str, ...] | None) -> Dataset:
    answers = None if settings.answers is None else read_answers(settings.answers)
    return open_data(
        settings.data,
        task,
        split,
        image_size=_IMAGE_SIZE,
        answers=answers if task == "vqa" else None,
        datasets=datasets,
        allow_missing=True,
    )


def _check(split: str, dataset: Dataset, workers: int, console: Console) -> list[dict[str, Any]]:
    found = []
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(split, total=len(cast(Sized, dataset)))
        for count, faults in faults_of(dataset, workers=workers):
            for fault in faults:
                bar.console.print(
                    f"{split}: {fault}", highlight=False, markup=False, soft_wrap=True
                )
                place = {"file": fault.file, "row": fault.row}
                found.append({"split": split, "sample": fault.index, **place, "reason": str(fault)})
            bar.update(task, advance=count)
    return found


def _summary(split: str, dataset: Dataset, faults: int) -> str:
    pictures = count_pictures(dataset)
    of = f" and {pictures:,} pictures" if pictures else ""
    result = f"{faults:,} cannot be read" if faults else "all can be read"
    return f"{split}: {len(cast(Sized, dataset)):,} samples{of}: {result}"
