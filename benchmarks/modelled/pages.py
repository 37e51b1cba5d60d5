"""Output of the models of the V100: figures, and the constants that they depend on."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vlmo.files import replacing, write_json

RESULTS = Path(__file__).parent.parent / "results"
Table = dict[str, Any]


def main(
    stem: str, description: str, compute: Callable[[], Table], page: Callable[[Table], str]
) -> None:
    """The command line of a model: compute, and write ``results/STEM.json`` and ``.md``.

    Args:
        stem: file name of both files, without suffix.
        description: description for ``--help``.
        compute: computes the figures that are written; takes minutes.
        page: renders the figures as Markdown.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--page", action="store_true", help=f"only make {stem}.md anew, from {stem}.json"
    )
    if parser.parse_args().page:
        table = json.loads((RESULTS / f"{stem}.json").read_text(encoding="utf-8"))
    else:
        table = compute()
        write_json(RESULTS / f"{stem}.json", table)
    with replacing(RESULTS / f"{stem}.md") as temporary:
        temporary.write_text(page(table), encoding="utf-8")
    print(page(table))


def assumed(**parameters: float) -> list[list[str]]:
    """Name, value and meaning of the timing model's constants; ``parameters`` replace values."""
    from sm70.timing import assumptions

    return [list(row) for row in assumptions(**parameters)]


def assumptions_section(table: Mapping[str, Any]) -> list[str]:
    """The section about the constants, as lines of Markdown."""
    return [
        "\n## Assumptions\n",
        "Constants of the timing model (`tests/sm70/timing.py`). None has been calibrated against "
        "a V100.\n",
        "| constant | value | meaning |",
        "|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in table["assumptions"]),
    ]
