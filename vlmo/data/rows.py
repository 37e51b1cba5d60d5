"""One row of a file of records, whatever the file."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple


class Stored(NamedTuple):
    """A picture whose bytes lie in a table.

    Attributes:
        path: of the table.
        row: from 0.
        column: binary, or a struct with a field ``bytes`` as Hugging Face writes it.
    """

    path: str
    row: int
    column: str


class Row(NamedTuple):
    """One row of a file of records.

    Attributes:
        place: of the row, for errors.
        values: by name.
        names: of all that the file has, also of what was not read.
    """

    place: str
    values: dict[str, Any]
    names: Collection[str]
