"""Modelled figures: what an emulator and a timing model say of a GPU that is not there.

They are kept apart from what is measured: they come from scripts of the source tree, as pages and
JSON of their own in ``benchmarks/results``, and :class:`vlmo.bench.report.Report` refuses them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.markdown import Markdown
from rich.panel import Panel
from rich.table import Table

import vlmo

_ASSUMPTIONS = "\n## Assumptions\n"


class Model(NamedTuple):
    """One operation on one GPU.

    Attributes:
        operation: that is modelled.
        script: of ``benchmarks/`` that computes the figures.
        results: of ``benchmarks/results/``, without a suffix, that it writes.
    """

    operation: str
    script: str
    results: str


MODELS = {
    "v100": (
        Model("moe_ffn", "model_volta.py", "volta"),
        Model("shared_attention", "model_volta_attention.py", "volta_attention"),
    ),
}


def show(gpu: str, console: Console, *, again: bool = False) -> None:
    """Print the modelled figures of a GPU, and the uncalibrated constants that they rest on.

    Args:
        gpu: of ``MODELS``.
        console: to print on.
        again: run the emulator, which takes minutes and overwrites the committed results; else
            those are printed.

    Raises:
        ValueError: there is no model of ``gpu``.
        NotImplementedError: this installation has no source tree.
    """
    if gpu not in MODELS:
        raise ValueError(f"modelled: {gpu!r} is not one of {', '.join(MODELS)}")
    benchmarks = _benchmarks()
    models = MODELS[gpu]
    if again:
        for model in models:
            console.print(f"Modelling {model.operation} (minutes) ...")
            _run(benchmarks / model.script)
    origin = "Computed now" if again else "As committed (--again computes them, in minutes)"
    told = f"No {gpu.upper()} was involved. {origin}; in {benchmarks / 'results'}."
    console.print(Panel(told, title="MODELLED, not measured", style="yellow"))
    results = [benchmarks / "results" / model.results for model in models]
    for path in results:
        page = path.with_suffix(".md").read_text(encoding="utf-8")
        console.print(Markdown(page.partition(_ASSUMPTIONS)[0]))
    console.print(_assumptions(models, results))


def _benchmarks() -> Path:
    """The folder of the scripts."""
    folder = Path(vlmo.__file__).parent.parent / "benchmarks"
    if not (folder / "model_volta.py").is_file():
        raise NotImplementedError(
            "modelled: the emulator is not part of an installed wheel; clone the repository, "
            "run `pip install -c constraints.txt -e '.[test]'` in it, and then this command."
        )
    return folder


def _run(script: Path) -> None:
    result = subprocess.run([sys.executable, str(script)], stdout=subprocess.DEVNULL, check=False)
    if result.returncode:
        raise RuntimeError(f"{script.name} failed with exit code {result.returncode}; see above")


def _assumptions(models: Sequence[Model], results: Sequence[Path]) -> Table:
    """All constants, each once, with the operation where its value is not the same for all."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for model, path in zip(models, results, strict=True):
        content = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        for name, value, meaning in content["assumptions"]:
            values = found.setdefault((name, meaning), {})
            values.setdefault(value, []).append(model.operation)
    table = Table(
        title="MODELLED by these constants, none of which has been calibrated",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for column in ("constant", "value", "meaning"):
        table.add_column(column)
    for (name, meaning), values in found.items():
        told = [
            value if len(values) == 1 else f"{', '.join(operations)}: {value}"
            for value, operations in values.items()
        ]
        table.add_row(name, "\n".join(told), meaning)
    return table
