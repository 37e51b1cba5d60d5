"""Progress display of a training: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Display:
    """Shows the rows of the logs; a context manager.

    Args:
        console: where to show them.
        step: number of steps done.
        total: number of steps of the whole training.
    """

    def __init__(self, console: Console, step: int, total: int):
        self._console, self._total = console, total
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("training", total=total, completed=step, facts="")

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, row: Mapping[str, Any], machine: Mapping[str, Any]) -> None:
        """Show a row and the measurements that depend on the machine, as in the logs."""
        step = row["step"]
        rate = machine["samples_per_second"]
        facts = [f"loss {row['loss']:.3f}", f"lr {row['lr']:.2g}", f"{rate:.0f} samples/s"]
        facts += [f"{machine['tflops']:.2f} TFLOP/s", f"{machine['memory_gib']:.1f} GiB"]
        self._bar.update(self._task, completed=step, facts="  ".join(facts))
        if not self._console.is_terminal:
            losses = [f"{n.removesuffix('_loss')} {v:.3f}" for n, v in row.items() if _part(n)]
            left = (self._total - step) * machine["seconds_per_step"]
            line = "  ".join([f"step {step}/{self._total}", *facts, *losses, f"{clock(left)} left"])
            self._console.print(line, highlight=False, soft_wrap=True)
        validation = {n: v for n, v in row.items() if n.startswith("val_")}
        if validation:
            shown = ", ".join(f"{n.removeprefix('val_')} {v:.4g}" for n, v in validation.items())
            self._console.print(f"step {step} validation: {shown}", highlight=False)


def clock(seconds: float) -> str:
    """Format a duration as ``1:02:03``."""
    minutes, second = divmod(math.ceil(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}"


def _part(name: str) -> bool:
    return name.endswith("_loss") and not name.startswith("val_")
