"""``vlmo demo``: verify the kernels and run a small training and retrieval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vlmo.commands.options import BackendOption, DeviceOption, limit_spinning, stopping_exits


def demo(
    output: Annotated[Path, typer.Option(help="Output folder.")] = Path("vlmo-demo"),
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of training steps; if given, the recall is reported but not checked.",
            show_default="those of the recipe digits_demo",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Random seed of data, weights and training.")
    ] = 0,
    device: DeviceOption = "auto",
    backend: BackendOption = None,
) -> None:
    """Verify the kernels, train a small VLMo, and retrieve images with it.

    Exits with status 1 if a kernel exceeds its error bound, if retrieval is not far above chance,
    or if re-ranking lowers the recall. After Ctrl-C the training is saved, the status is 130, and
    the same command continues it.
    """
    limit_spinning()
    from vlmo.demo import Settings, run

    settings = Settings(output, seed=seed, device=device, backend=backend, steps=steps)
    with stopping_exits():
        failures = run(settings, Console())
    if failures:
        raise typer.Exit(1)
