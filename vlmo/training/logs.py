"""The logs of a training: log.csv, log.jsonl and TensorBoard's.

log.csv holds what the training computes and nothing that depends on the clock or the machine, so
that the same training writes the same file; log.jsonl holds both.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmo.files import replacing

TABLE, LINES, BOARD = "log.csv", "log.jsonl", "tensorboard"


class RunLog:
    """Appends one row a logged step to the logs in a folder.

    What the logs hold of steps after ``step`` is taken out first: a training that goes on from
    there writes it again.

    Args:
        folder: of the run; exists.
        step: steps done.
        board: write TensorBoard's log as well.

    Raises:
        ImportError: ``board`` without TensorBoard.
        OSError: a log cannot be written.
    """

    def __init__(self, folder: Path, step: int = 0, *, board: bool = True):
        self._table, self._lines = folder / TABLE, folder / LINES
        columns, rows = read_table(self._table)
        rows = [row for row in rows if int(row["step"]) <= step]
        self._columns = [name for name in columns if any(row[name] for row in rows)]
        self._replace(rows)
        kept = [line for line in _whole_lines(self._lines) if json.loads(line)["step"] <= step]
        with replacing(self._lines) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._board = None
        if board:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(folder / BOARD, purge_step=step + 1)

    def write(self, row: Mapping[str, Any], machine: Mapping[str, Any]) -> None:
        """Append a row.

        Args:
            row: ``step`` and what the training computes.
            machine: what this machine has to do with it: times, rates, memory.
        """
        new = [name for name in row if name not in self._columns]
        if new:
            rows = read_table(self._table)[1]
            self._columns = [*self._columns, *new]
            self._replace(rows)
        _append(self._table, _csv([[row.get(name, "") for name in self._columns]]))
        _append(self._lines, json.dumps({**row, **machine}) + "\n")
        if self._board is not None:
            for name, value in (*row.items(), *machine.items()):
                if name != "step":
                    self._board.add_scalar(_tag(name), value, row["step"])

    def sync(self) -> None:
        """Return when everything written is on disk."""
        for path in (self._table, self._lines):
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Close TensorBoard's log."""
        if self._board is not None:
            self._board.close()

    def _replace(self, rows: Sequence[Mapping[str, str]]) -> None:
        """Write the whole table anew."""
        lines = [self._columns] if self._columns else []
        lines += [[row.get(name, "") for name in self._columns] for row in rows]
        with replacing(self._table) as temporary:
            temporary.write_text(_csv(lines), encoding="utf-8")


def has_board() -> bool:
    """Whether TensorBoard is installed."""
    return importlib.util.find_spec("tensorboard") is not None


def read_table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows of a log.csv; none if it does not exist. A last half line is left out."""
    lines = [*csv.reader(_whole_lines(path))]
    columns = lines[0] if lines else []
    return columns, [dict(zip(columns, line, strict=True)) for line in lines[1:]]


def _whole_lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return text[: text.rfind("\n") + 1].splitlines()


def _csv(lines: Sequence[Sequence[Any]]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(lines)
    return stream.getvalue()


def _append(path: Path, text: str) -> None:
    """In one call of the system, so that a kill leaves all of it or nothing."""
    content = text.encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        while content:  # more than one call on a full disk only, whose error the next one raises
            content = content[os.write(descriptor, content) :]
    finally:
        os.close(descriptor)


def _tag(name: str) -> str:
    """TensorBoard's name of a value; those with the same beginning are shown together."""
    if name.startswith("val_"):
        return f"validation/{name.removeprefix('val_')}"
    return f"training/{name}" if name.endswith("loss") or name == "lr" else f"machine/{name}"
