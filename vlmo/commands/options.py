"""Options and exits that several commands share. Nothing here loads torch: --help stays fast."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["bfloat16", "float16", "float32"]
Split = Literal["train", "val", "test"]
Task = Literal["retrieval", "vqa", "nlvr2", "pretrain", "textmlm"]

STANDARD = Path("-")  # standard input or output

_DATA = "digits, a folder of Arrow files, or your own data (docs/data.md)."
DataArgument = Annotated[str, typer.Argument(help=_DATA)]
DataOption = Annotated[str, typer.Option(help=_DATA)]
DatasetsOption = Annotated[
    list[str] | None, typer.Option(help="Official data sets.", show_default="those of the task")
]
ModelArgument = Annotated[Path, typer.Argument(help="Checkpoint, or folder of a run.")]
VocabularyOption = Annotated[
    Path | None,
    typer.Option("--vocab", help="vocab.txt of the model.", show_default="that of the run folder"),
]
AnswersOption = Annotated[
    Path | None,
    typer.Option(help="JSON list of the VQA answers.", show_default="that of the run folder"),
]
DataAnswersOption = Annotated[
    Path | None,
    typer.Option(help="JSON list of the VQA answers.", show_default="those of the data"),
]
DeviceOption = Annotated[Device, typer.Option(help="Where to run.")]
DtypeOption = Annotated[
    Dtype | None,
    typer.Option(
        help="Dtype of the matrix products.", show_default="float32 on a CPU, 16 bits on a GPU"
    ),
]
BackendOption = Annotated[
    str | None,
    typer.Option(
        help="Kernels: cuda, triton, cpu or reference.", show_default="the first that can run"
    ),
]


def plain_console() -> Console:
    """A console that prints file names and error texts as they are, without markup."""
    return Console(markup=False, emoji=False)


def limit_spinning() -> None:
    """Keep idle OpenMP threads from spinning for long; call this before torch is imported.

    GNU OpenMP reads the variable when torch is loaded: how long its threads spin for work before
    they sleep. With the default, a step takes forty times as long when another program has one of
    two cores; put to sleep at once (OMP_WAIT_POLICY=passive), three times as long when none has.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")


@contextlib.contextmanager
def not_finite_exits() -> Iterator[None]:
    """Report numbers that are NaN or infinite in one line, and exit with status 1."""
    try:
        yield
    except FloatingPointError as error:
        print(f"vlmo: {error}", file=sys.stderr)
        raise typer.Exit(1) from error


@contextlib.contextmanager
def stopping_exits() -> Iterator[None]:
    """Report a training that ended early in one line, and exit.

    The status is 128 plus the number of the signal that stopped it, or 1 if a loss or a weight was
    not finite.
    """
    try:
        from vlmo.training import Interrupted

        try:
            with not_finite_exits():
                yield
        except Interrupted as stop:
            print(f"vlmo: {stop}", file=sys.stderr)
            raise typer.Exit(128 + stop.number) from stop
    except KeyboardInterrupt as stop:
        print("vlmo: stopped at once; what was saved before is as it was", file=sys.stderr)
        raise typer.Exit(130) from stop
