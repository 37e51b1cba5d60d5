"""``vlmo check``: read every sample of a data source once and list the unreadable ones."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.progress import Progress

from vlmo.commands.options import (
    DataAnswersOption,
    DataArgument,
    DatasetsOption,
    Split,
    Task,
    plain_console,
)

if TYPE_CHECKING:
    from torch.utils.data import Dataset

_IMAGE_SIZE = 32  # which nothing is resized to


def check(
    data: DataArgument,
    task: Annotated[
        Task | None,
        typer.Option(
            help="Task to open the data for.", show_default="every task that the data support"
        ),
    ] = None,
    split: Annotated[Split | None, typer.Option(help="Split to check.", show_default="all")] = None,
    datasets: DatasetsOption = None,
    answers: DataAnswersOption = None,
    workers: Annotated[int, typer.Option(min=0, help="Data loader processes.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option(
            help=".jsonl file that receives file, row and reason of each unreadable sample."
        ),
    ] = None,
) -> None:
    """Read every text and image of a data source once and list the unreadable ones.

    Exits with status 1 if there are any.
    """
    from vlmo.commands.outputs import check_outputs, path_of_data
    from vlmo.commands.records import to_json
    from vlmo.data import open_data
    from vlmo.files import replacing
    from vlmo.loading import read_answers

    check_outputs({"output": output}, given={"data": path_of_data(data), "answers": answers})
    if answers is not None and task not in (None, "vqa"):
        raise ValueError(f"answers: {answers} does not suit {task}, only vqa")
    known = None if answers is None else read_answers(answers)
    opened = [
        (
            *(of_task, of_split),
            open_data(
                *(data, of_task, of_split),
                image_size=_IMAGE_SIZE,
                answers=known if of_task == "vqa" else None,
                datasets=names,
                allow_missing=True,
            ),
        )
        for of_task, of_split, names in _parts(data, task, split, tuple(datasets or ()) or None)
    ]
    console = plain_console()
    found: list[dict[str, Any]] = []
    for of_task, of_split, dataset in opened:
        faults = _check(of_split, dataset, workers, console)
        found += [{"task": of_task, **fault} for fault in faults]
        summary = _summary(of_split, dataset, len(faults))
        if task is None:  # say which were found
            summary = f"{of_task}, {summary}"
        console.print(summary, highlight=False, soft_wrap=True)
    if output is not None:
        with replacing(output) as temporary:
            temporary.write_text("".join(to_json(fault) + "\n" for fault in found), "utf-8")
        console.print(f"Written: {output}", highlight=False, soft_wrap=True)
    if found:
        raise typer.Exit(1)


def _parts(
    data: str, task: str | None, split: str | None, datasets: tuple[str, ...] | None
) -> Iterator[tuple[str, str, tuple[str, ...] | None]]:
    """Task, split and official data sets of each data set to open."""
    from vlmo.data.check import official_datasets, splits_there, tasks_of
    from vlmo.data.digit_scans import SPLITS

    for of_task in [task] if task else tasks_of(data):
        there: dict[str, tuple[str, ...] | None] = {}
        if task is None and datasets is None:
            found = {name: official_datasets(data, of_task, name) for name in SPLITS}
            there = {name: names for name, names in found.items() if names}
        splits = [split] if split else list(there) or splits_there(data, of_task, datasets)
        for name in splits:
            yield of_task, name, there.get(name, datasets)


def _check(split: str, dataset: Dataset, workers: int, console: Console) -> list[dict[str, Any]]:
    from vlmo.data.check import faults_of

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
    from vlmo.data.check import count_pictures

    pictures = count_pictures(dataset)
    of = f" and {pictures:,} pictures" if pictures else ""
    result = f"{faults:,} cannot be read" if faults else "all can be read"
    return f"{split}: {len(cast(Sized, dataset)):,} samples{of}: {result}"
