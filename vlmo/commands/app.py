"""The command line: ``vlmo`` or ``python -m vlmo``."""

from __future__ import annotations

import io
import sys
from typing import Annotated, NoReturn

import typer

from vlmo import __version__
from vlmo.commands.check import check
from vlmo.commands.demo import demo
from vlmo.commands.evaluate import evaluate
from vlmo.commands.info import info, recipes
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
