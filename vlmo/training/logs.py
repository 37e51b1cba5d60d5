"""The logs of a training: log.csv, log.jsonl and those of TensorBoard.

log.csv holds results of the training but nothing that depends on the clock or the machine, so a
repeated training writes the same file; log.jsonl holds both.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmo.files import append, named_in_errors, replacing

TABLE, LINES, BOARD = "log.csv", "log.jsonl", "tensorboard"


class RunLog:
    """Appends one row per logged step to the logs in a folder.

    Rows of steps after ``step`` are removed first: a training that resumes there writes them again.

    Args:
        folder: folder of the run, which exists.
        step: number of steps done.
        board: also write TensorBoard's log.

    Raises:
        ImportError: ``board`` without TensorBoard.
        OSError: a log cannot be written.
        ValueError: a log has invalid content; no log has been changed.
    """

    def __init__(self, folder: Path, step: int = 0, *, board: bool = True):
        self._folder, self._table, self._lines = folder, folder / TABLE, folder / LINES
        columns, rows = read_table(self._table)
        rows = [row for row in rows if int(row["step"]) <= step]
        kept = [line for line, of_step in _read_lines(self._lines) if of_step <= step]
        self._columns = [name for name in columns if any(row[name] for row in rows)]
        self._replace(rows)
        with replacing(self._lines) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._board = None
        if board:
            from torch.utils.tensorboard import SummaryWriter

            threading.excepthook = _told_of_thread
            with named_in_errors(folder / BOARD):
                self._board = SummaryWriter(folder / BOARD, purge_step=step + 1)

    def write(self, row: Mapping[str, Any], machine: Mapping[str, Any]) -> None:
        """Append a row.

        Args:
            row: ``step`` and the results of the training.
            machine: measurements that depend on the machine: times, rates, memory.
        """
        new = [name for name in row if name not in self._columns]
        if new:
            rows = read_table(self._table)[1]
            self._columns = [*self._columns, *new]
            self._replace(rows)
        append(self._table, _csv([[row.get(name, "") for name in self._columns]]))
        append(self._lines, json.dumps({**row, **machine}) + "\n")
        if self._board is not None:
            with named_in_errors(self._folder / BOARD):
                for name, value in (*row.items(), *machine.items()):
                    if name != "step":
                        self._board.add_scalar(_tag(name), value, row["step"])

    def sync(self) -> None:
        """Flush everything written to disk."""
        for path in (self._table, self._lines):
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        if self._board is not None:
            with named_in_errors(self._folder / BOARD):
                self._board.flush()

    def close(self) -> None:
        """Close TensorBoard's log."""
        if self._board is not None:
            with contextlib.suppress(OSError):  # a full disk, which the other logs have reported
                self._board.close()
            threading.excepthook = threading.__excepthook__

    def _replace(self, rows: Sequence[Mapping[str, str]]) -> None:
        """Rewrite the whole table."""
        lines = [self._columns] if self._columns else []
        lines += [[row.get(name, "") for name in self._columns] for row in rows]
        with replacing(self._table) as temporary:
            temporary.write_text(_csv(lines), encoding="utf-8")


def _told_of_thread(told: threading.ExceptHookArgs) -> None:
    """Ignore a full disk in TensorBoard's thread: its next call raises the same error."""
    if type(told.thread).__name__ != "_AsyncWriterThread" or told.exc_type is not OSError:
        threading.__excepthook__(told)


def why_no_board() -> str | None:
    """The reason why TensorBoard's log cannot be written; None if it can."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: F401
    except Exception as error:  # an incompatible dependency of it may raise anything
        return " ".join(str(error).split()) or type(error).__name__
    return None


def read_table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows of a log.csv, without an incomplete last line; empty if it does not exist.

    Raises:
        ValueError: it is damaged or not such a log; the message names the line.
    """
    lines = _whole_lines(path)
    try:
        found = [*csv.reader(lines)]
    except csv.Error as error:
        raise _damaged(path, str(error)) from error
    columns = found[0] if found else []
    if found and ("step" not in columns or len(set(columns)) < len(columns)):
        raise _damaged(path, "line 1 does not name the columns, step among them")
    rows = []
    for number, line in enumerate(found[1:], 2):
        if len(line) != len(columns):
            raise _damaged(path, f"line {number} has {len(line)} values in {len(columns)} columns")
        row = dict(zip(columns, line, strict=True))
        if not row["step"].isdecimal():
            raise _damaged(path, f"line {number}: step: {row['step'][:40]!r} is not a number")
        rows.append(row)
    return columns, rows


def _read_lines(path: Path) -> Iterator[tuple[str, int]]:
    """The complete lines of a log.jsonl and their steps."""
    for number, line in enumerate(_whole_lines(path), 1):
        try:
            step = json.loads(line)["step"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise _damaged(path, f"line {number} is not a JSON object with a step") from error
        if not isinstance(step, int):
            raise _damaged(path, f"line {number}: step: {step!r} is not a number")
        yield line, step


def _whole_lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    content = path.read_bytes()
    try:
        text = content[: content.rfind(b"\n") + 1].decode()
    except UnicodeDecodeError as error:
        raise _damaged(path, f"it is not UTF-8: {error}") from error
    return text.split("\n")[:-1]


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(
        f"{path}: is not the log of a training: {what}; repair it, or move it away to begin a new "
        "one"
    )


def _csv(lines: Sequence[Sequence[Any]]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(lines)
    return stream.getvalue()


def _tag(name: str) -> str:
    """TensorBoard's tag of a value; values with the same prefix are shown together."""
    if name.startswith("val_"):
        return f"validation/{name.removeprefix('val_')}"
    computed = name.endswith(("loss", "scale")) or name in ("lr", "bad_samples")
    return f"training/{name}" if computed else f"machine/{name}"
