"""The samples of records as arrays: their columns, and the pictures that they show."""

from __future__ import annotations

import os
from array import array
from pathlib import Path
from typing import Any

import pyarrow as pa

from vlmo.data.records import IDENTITIES
from vlmo.data.rows import Stored

_CHUNK = 2**16  # rows of a column that are converted at a time


class Pictures:
    """Numbers the pictures: each picture gets one number, however its path is spelled.

    Args:
        root: folder; the names of pictures are their paths relative to it.

    Attributes:
        paths, names: of each picture, as first seen; for a picture stored in a table, the table's
            path.
        rows: the row of each picture in its table; -1 for a picture in a file of its own.
        missing: paths of files that do not exist.
    """

    def __init__(self, root: Path):
        self.paths: list[str] = []
        self.names: list[str] = []
        self.rows = array("q")
        self.missing: list[str] = []
        self._root = os.path.join(root, "")
        self._numbers: dict[str | Stored, int] = {}
        self._folders: dict[str, tuple[str, dict[str, bool]]] = {}

    def number(self, picture: str | Stored) -> int:
        """The number, from 0, of a path or of a picture in a table."""
        number = self._numbers.get(picture)
        if number is None:
            real = picture
            if isinstance(picture, Stored):
                path, row = picture.path, picture.row
            else:
                path, row, real = picture, -1, self._resolved(picture)
            number = self._numbers.setdefault(real, len(self.paths))
            self._numbers[picture] = number
            if number == len(self.paths):
                name = path.removeprefix(self._root)
                if os.path.isabs(name):
                    name = os.path.relpath(path, self._root)
                self.paths.append(path)
                self.rows.append(row)
                self.names.append(name if row < 0 else f"{name}, row {row + 1}")
        return number

    def _resolved(self, path: str) -> str:
        """The path with symbolic links resolved."""
        folder, name = os.path.split(path)
        # List each folder once instead of querying each file: there may be millions of files.
        if folder not in self._folders:
            self._folders[folder] = os.path.realpath(folder), _files(folder)
        real, names = self._folders[folder]
        if name not in names:
            self.missing.append(path)
            return path
        return os.path.realpath(path) if names[name] else os.path.join(real, name)


def _files(folder: str) -> dict[str, bool]:
    """Names of the files in a folder, each with whether it is a symbolic link."""
    if not os.path.isdir(folder):
        return {}
    with os.scandir(folder) as entries:
        return {entry.name: entry.is_symlink() for entry in entries if not entry.is_dir()}


class Columns:
    """Columns of samples, each collected in one Arrow array."""

    def __init__(self) -> None:
        self._items: list[dict[str, Any]] = []
        self._chunks: dict[str, list[pa.Array]] = {}

    def append(self, item: dict[str, Any]) -> None:
        """Add a sample; all samples must have the same keys."""
        self._items.append(item)
        if len(self._items) == _CHUNK:
            self._flush()

    def arrays(self) -> dict[str, pa.ChunkedArray | pa.Array]:
        """The columns by name; identities become texts unless all of them are 64-bit integers."""
        self._flush()
        columns = {}
        for name, chunks in self._chunks.items():
            if any(chunk.type == pa.large_string() for chunk in chunks):
                chunks = [chunk.cast(pa.large_string()) for chunk in chunks]
            columns[name] = pa.chunked_array(chunks).combine_chunks()
        return columns

    def _flush(self) -> None:
        for name in self._items[0] if self._items else ():
            values = [item[name] for item in self._items]
            self._chunks.setdefault(name, []).append(_array(name, values))
        self._items = []


_TYPES = {
    "text": pa.large_string(),
    "answers": pa.int64(),
    "answer_labels": pa.list_(pa.int64()),
    "answer_scores": pa.list_(pa.float64()),
}


def _array(name: str, values: list[Any]) -> pa.Array:
    if name not in IDENTITIES:
        return pa.array(values, _TYPES[name])
    if all(isinstance(value, int) and -(2**63) <= value < 2**63 for value in values):
        return pa.array(values, pa.int64())
    return pa.array(map(str, values), pa.large_string())
