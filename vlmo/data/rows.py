"""One row of a file of records, independent of the file's format."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple


class Stored(NamedTuple):
    """A picture whose bytes are stored in a table.

    Attributes:
        path: path of the table.
        row: row of the picture, from 0.
        column: a binary column, or a struct column with a field ``bytes`` as Hugging Face writes
            it.
    """

    path: str
    row: int
    column: str


class Row(NamedTuple):
    """One row of a file of records.

    Attributes:
        place: file and row, for error messages.
        values: values by name.
        names: names of all fields in the file, including those that were not read.
    """

    place: str
    values: dict[str, Any]
    names: Collection[str]
