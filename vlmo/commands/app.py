"""The command line: ``vlmo`` or ``python -m vlmo``."""

from __future__ import annotations

import enum
import io
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from vlmo import __version__
from vlmo.commands.check import check
from vlmo.commands.demo import demo
from vlmo.commands.evaluate import evaluate
from vlmo.commands.info import info, recipes
from vlmo.commands.options import DeviceOption, Dtype, plain_console
from vlmo.commands.predict import predict
from vlmo.commands.train import train
from vlmo.commands.vocab import vocab

# The commands import what they need when they run, so that --help does not wait for torch.

app = typer.Typer(
    help="Fused kernels for multiway transformers, and the VLMo model on top of them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

# Errors that a user can cause and correct; any other is a defect and keeps its traceback.
_USER_ERRORS = (ValueError, NotImplementedError, OSError, ImportError)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"vlmo {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Fused kernels for multiway transformers, and the VLMo model on top of them."""


for _command in (info, demo, recipes, train, vocab, check, evaluate, predict):
    app.command()(_command)


@app.command()
def tune(
    dim: Annotated[
        int | None, typer.Option(min=1, help="Model dimension.", show_default="768")
    ] = None,
    hidden: Annotated[
        int | None, typer.Option(min=1, help="Hidden width of an expert.", show_default="3072")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the batch.", show_default="32768")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="Tokens of each expert in one sequence.", show_default="40:197"),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of weights and activations.", show_default="bfloat16")
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

    given = dict(dim=dim, hidden=hidden, tokens=tokens, split=split, dtype=dtype)
    problem = parse_problem({name: value for name, value in given.items() if value is not None})
    tune(problem, output, plain_console(), quick=quick)


class _Dtype(str, enum.Enum):
    """Typer takes no list of literals."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


bench_app = typer.Typer(pretty_exceptions_enable=False)
app.add_typer(bench_app, name="bench")


@bench_app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    suite: Annotated[
        list[str] | None, typer.Option(help="moe_ffn, attention or model.", show_default="all")
    ] = None,
    dtype: Annotated[
        list[_Dtype] | None, typer.Option(help="Only cases in it.", show_default="all")
    ] = None,
    size: Annotated[
        list[str] | None, typer.Option(help="base or large.", show_default="all")
    ] = None,
    contender: Annotated[
        list[str] | None,
        typer.Option(help="Only this one; vlmo for all of ours.", show_default="all"),
    ] = None,
    device: DeviceOption = "auto",
    minutes: Annotated[
        float | None,
        typer.Option(
            help="What would end later is left out.", show_default="4.5 on a CPU, 20 on a GPU"
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("vlmo-bench"),
    commit: Annotated[
        str | None, typer.Option(help="Of what is measured.", show_default="ask git")
    ] = None,
    pictures: Annotated[bool, typer.Option(help="Draw the results (needs matplotlib).")] = True,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Tiny sizes: see that everything runs.")
    ] = False,
    modelled: Annotated[
        str | None, typer.Option(help="Show the modelled figures of v100 instead.")
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Compute the modelled figures anew, in minutes.")
    ] = False,
) -> None:
    """Measure the operations and the model here, beside peers and the roof (docs/performance.md).

    Nothing is timed that has not been held against float64: exits with 1 if one of this library's
    own contenders was not exact or failed. Each of --suite, --dtype, --size and --contender may be
    repeated.
    """
    if context.invoked_subcommand is not None:
        return
    if again and modelled is None:
        raise ValueError("again: only goes with --modelled")
    if modelled is not None:
        from vlmo.bench.modelled import show

        show(modelled, Console(), again=again)
        return
    if smoke:
        os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # as in demo
    from vlmo.commands.bench import Settings, run

    settings = Settings(
        output,
        suites=tuple(suite or ()),
        dtypes=tuple(name.value for name in dtype or ()),
        sizes=tuple(size or ()),
        contenders=tuple(contender or ()),
        device=device,
        minutes=minutes,
        smoke=smoke,
        draws=pictures,
        commit=commit,
        command=shlex.join(["vlmo", *sys.argv[1:]]),
    )
    if run(settings, Console()).defects:
        raise typer.Exit(1)


@bench_app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="JSON file of vlmo bench.")],
    after: Annotated[Path, typer.Argument(help="Another one.")],
) -> None:
    """Show what is faster, slower or the same in the second of two reports."""
    from vlmo.commands.bench import run_compare

    run_compare(before, after, Console())


def _lack_of_memory(error: BaseException) -> str | None:
    """The message for an out-of-memory error; None for any other error."""
    reason = next(iter(str(error).splitlines()), "")
    # NumPy and Python, torch on the CPU, torch on a GPU.
    torch_s = "can't allocate memory" in reason or type(error).__name__ == "OutOfMemoryError"
    if not isinstance(error, MemoryError) and not torch_s:
        return None
    return f"there is not enough memory: {reason or 'no more can be had'}"


def main() -> None:
    """Console entry point: errors that a user can correct are one line and exit code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files need not be in its encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except _USER_ERRORS as error:
        _fail(error)
    except (RuntimeError, MemoryError) as error:
        # torch raises it wherever the main process is when a worker dies.
        from vlmo.data import worker_failure

        worker = worker_failure(error) if isinstance(error, RuntimeError) else None
        failure = worker or _lack_of_memory(error)
        if failure is None:
            raise
        _fail(failure)


def _fail(message: object) -> NoReturn:
    print(f"vlmo: {message}", file=sys.stderr)
    sys.exit(2)
