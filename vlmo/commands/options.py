"""Options and exit codes that several commands share; imports no torch, so --help stays fast."""

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

_DATA = "Data source: digits, a folder of Arrow files, or your own data (docs/data.md)."
DataArgument = Annotated[str, typer.Argument(help=_DATA)]
DataOption = Annotated[str, typer.Option(help=_DATA)]
DatasetsOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Official data set to read; may be repeated.", show_default="those of the task"
    ),
]
ModelArgument = Annotated[Path, typer.Argument(help="Checkpoint file or run folder.")]
VocabularyOption = Annotated[
    Path | None,
    typer.Option(
        "--vocab",
        help="Vocabulary of the model: vocab.txt, or a SentencePiece model (.spm).",
        show_default="that of the run folder",
    ),
]
AnswersOption = Annotated[
    Path | None,
    typer.Option(help="JSON list of the VQA answers.", show_default="that of the run folder"),
]
DataAnswersOption = Annotated[
    Path | None,
    typer.Option(help="JSON list of the VQA answers.", show_default="those of the data"),
]
DeviceOption = Annotated[Device, typer.Option(help="Device to run on.")]
DtypeOption = Annotated[
    Dtype | None,
    typer.Option(
        help="Dtype of matrix products.", show_default="float32 on a CPU, 16 bits on a GPU"
    ),
]
BackendOption = Annotated[
    str | None,
    typer.Option(
        help="Kernel backend: cuda, triton, cpu or reference; moe_ffn=composed is for the experts.",
        show_default="the first that can run",
    ),
]


def plain_console() -> Console:
    """A console that prints file names and error messages verbatim, without markup."""
    return Console(markup=False, emoji=False)


def limit_spinning() -> None:
    """Limit how long idle OpenMP threads spin; call this before torch is imported.

    GNU OpenMP reads GOMP_SPINCOUNT, the number of spins before a thread sleeps, when torch is
    loaded. With the default, a step takes forty times as long when another program occupies one of
    two cores. Threads that sleep at once (OMP_WAIT_POLICY=passive) make a step take three times as
    long on an idle machine.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")


@contextlib.contextmanager
def not_finite_exits() -> Iterator[None]:
    """Report NaN or infinite outputs in one line and exit with status 1."""
    try:
        yield
    except FloatingPointError as error:
        print(f"vlmo: {error}", file=sys.stderr)
        raise typer.Exit(1) from error


@contextlib.contextmanager
def stopping_exits() -> Iterator[None]:
    """Report in one line why a training ended early, and exit.

    The exit status is 128 plus the number of the signal, or 1 if a loss or a weight was not finite.
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
