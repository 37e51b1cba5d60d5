"""The command line: ``vlmo`` or ``python -m vlmo``."""

from __future__ import annotations

import enum
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

# The commands import what they need, so that --help does not wait for torch.

app = typer.Typer(
    help="Fused kernels for multiway transformers, and the VLMo model on top of them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# What a user can cause and mend; anything else is a defect and keeps its traceback.
_USER_ERRORS = (ValueError, NotImplementedError, OSError, ImportError)


class Device(str, enum.Enum):
    """Where to run; auto is the GPU if there is one."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Dtype(str, enum.Enum):
    """Of the operands of the products."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


@app.command()
def info() -> None:
    """Show versions, devices, built kernels, and what can run here."""
    from vlmo.machine import show_machine

    show_machine(Console())


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("vlmo-demo"),
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Train so many steps only; the results are then not judged."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of data, weights and training.")] = 0,
    device: Annotated[Device, typer.Option(help="Where to run.")] = Device.auto,
    backend: Annotated[
        str | None, typer.Option(help="cuda, triton or reference; default: the first that can.")
    ] = None,
) -> None:
    """Check the kernels, train a small VLMo, and search pictures with it.

    Exits with 1 if a kernel is less exact than it must be, if retrieval is not far above chance, or
    if re-ranking makes it worse.
    """
    # GNU OpenMP reads this when torch is loaded: how long its threads spin for work before they
    # sleep. Left to spin, a step takes forty times as long when another program has one of two
    # cores; put to sleep at once (OMP_WAIT_POLICY=passive), three times as long when none has.
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")
    from vlmo.demo import Settings, run

    settings = Settings(output, seed=seed, device=device.value, backend=backend, steps=steps)
    failures = run(settings, Console())
    if failures:
        raise typer.Exit(1)


@app.command()
def tune(
    dim: Annotated[int | None, typer.Option(min=1, help="Model dimension.  [default: 768]")] = None,
    hidden: Annotated[
        int | None, typer.Option(min=1, help="Hidden width of an expert.  [default: 3072]")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the batch.  [default: 32768]")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="Tokens of each expert in one sequence.  [default: 40:197]"),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of weights and activations.  [default: bfloat16]")
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Table to write; rows of other GPUs in it are kept.")
    ] = Path("vlmo-tiles.json"),
    quick: Annotated[bool, typer.Option("--quick", help="Try the likeliest tiles only.")] = False,
) -> None:
    """Search the tile shapes of moe_ffn's Triton kernels on this GPU and write them to a file.

    The variable VLMO_TILES makes the library use the file. Without a GPU, TRITON_INTERPRET=1 runs
    the search at a tiny size, as a check of itself: its times mean nothing.
    """
    from vlmo.tune import parse_problem, tune

    given = dict(dim=dim, hidden=hidden, tokens=tokens, split=split, dtype=dtype and dtype.value)
    problem = parse_problem({name: value for name, value in given.items() if value is not None})
    tune(problem, output, Console(), quick=quick)


def main() -> None:
    """Console entry point: errors a user can mend are one line and exit code 2."""
    try:
        app()
    except _USER_ERRORS as error:
        print(f"vlmo: {error}", file=sys.stderr)
        sys.exit(2)
