"""Arrow and Parquet files: reads their rows without the pictures, and single pictures.

Arrow files are memory-mapped. A Parquet file is compressed, so reading a picture reads its whole
row group.
"""

from __future__ import annotations

import bisect
import contextlib
import json
import os
import warnings
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlmo.data.rows import Row, Stored

_GROUP_BYTES = 2**30  # largest size of the pictures of one row group
_CACHED_BYTES = 2**28  # row groups that a process caches
_BATCH = 2**14  # rows that are read at a time
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"


def open_arrow_file(path: str | os.PathLike[str]) -> pa.Table:
    """The table of an Arrow file, in the file or the stream format, memory-mapped.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged or not an Arrow file.
    """
    path = os.fspath(path)
    with open(path, "rb") as stream:
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(max(0, os.path.getsize(path) - len(_END_OF_STREAM)))
        ends = stream.read() == _END_OF_STREAM
    what = "is a damaged Arrow file" if is_file else "is not an Arrow file, or is damaged"
    with _errors(f"{path}: {what}"):
        source = pa.memory_map(path)
        reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
        table = reader.read_all()
        _ = table.column_names  # decodes the names
    if not is_file and not ends:
        warnings.warn(f"{path}: has no end mark, so it may be incomplete", stacklevel=2)
    return table


def check_offsets(column: pa.ChunkedArray, path: str | os.PathLike[str], name: str) -> None:
    """Raise ValueError if an Arrow column is damaged so that reading it might crash the process."""
    first = 0
    for chunk in column.chunks:
        try:
            chunk.validate()
            # Validate texts as bytes: their UTF-8 is checked when they are read.
            chunk.cast(_bytes_type(chunk.type)).validate(full=True)
        except pa.ArrowException as error:
            rows = f"rows {first} to {first + len(chunk) - 1}"
            raise ValueError(f"{os.fspath(path)}, {rows}: {name} is damaged: {error}") from error
        first += len(chunk)


def table_rows(path: Path, names: Collection[str], pictures: Collection[str] = ()) -> Iterator[Row]:
    """The rows of a Parquet or Arrow file; errors count them from 1.

    Args:
        path: .parquet or .arrow.
        names: columns to read, if the file has them.
        pictures: those of ``names`` that may hold pictures, which are returned as :class:`Stored`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, has another format, or holds values other than texts and numbers.
    """
    table = _Parquet(path) if _is_parquet(path) else _Arrow(path)
    schema = table.schema
    found = [name for name in schema.names if name in names]
    if doubled := [name for name in found if found.count(name) > 1]:
        raise ValueError(f"{path}: has two columns {doubled[0]!r}")
    stored: dict[str, np.ndarray] = {}
    plain, paths = [], []
    for name in found:
        kind = schema.field(name).type
        if name in pictures and _holds_bytes(kind):
            stored[name] = table.stored(name)
            if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
                paths.append(name)
        elif not _is_plain(kind):
            raise ValueError(f"{path}: column {name!r}: {kind} is neither text nor number")
        else:
            plain.append(name)
    classes = _class_names(schema)
    row = 0
    for size, arrays in table.batches(plain, paths):
        columns = {
            name: _values(array, f"{path}, row", row, name, classes.get(name))
            for name, array in arrays.items()
        }
        for number in range(size):
            values = {name: column[number] for name, column in columns.items()}
            for name, there in stored.items():
                if there[row]:
                    values[name] = Stored(os.fspath(path), row, name)
            row += 1
            yield Row(f"{path}, row {row}", values, schema.names)


class StoredPictures:
    """Reads the bytes of pictures; a process keeps the tables and row groups that it reads open."""

    def __init__(self) -> None:
        self._columns: dict[tuple[str, str], pa.ChunkedArray] = {}
        self._first_rows: dict[str, list[int]] = {}
        self._groups: OrderedDict[tuple[str, int, str], pa.ChunkedArray] = OrderedDict()

    def __reduce__(self) -> tuple[type[StoredPictures], tuple[()]]:
        return StoredPictures, ()

    def read(self, picture: Stored) -> bytes:
        """The content of a picture's file.

        Raises:
            OSError: the table cannot be read.
            ValueError: it is damaged; the message names file and row.
        """
        path, row, column = picture
        if _is_parquet(path):
            group, first = self._place(path, row)
            content = self._group(path, group, column)[row - first].as_py()
        else:
            if (path, column) not in self._columns:
                self._columns[path, column] = _contents(open_arrow_file(path)[column])
            content = self._columns[path, column][row].as_py()
        if content is None:
            raise ValueError(f"{path}, row {row + 1}: has no {column!r}")
        return content

    def _place(self, path: str, row: int) -> tuple[int, int]:
        """The row group of a row, and the first row of the group."""
        if path not in self._first_rows:
            meta = _parquet_file(path).metadata
            counts = [meta.row_group(group).num_rows for group in range(meta.num_row_groups)]
            self._first_rows[path] = np.cumsum([0, *counts]).tolist()
        starts = self._first_rows[path]
        group = bisect.bisect_right(starts, row) - 1
        return group, starts[group]

    def _group(self, path: str, group: int, column: str) -> pa.ChunkedArray:
        key = path, group, column
        if key not in self._groups:
            file = _parquet_file(path)
            leaf = _leaf(file.schema_arrow, column)
            with _group_errors(path, group):
                table = file.read_row_group(group, [leaf], use_threads=False)
            self._groups[key] = _contents(table[column])
            while len(self._groups) > 1 and self._cached() > _CACHED_BYTES:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]

    def _cached(self) -> int:
        return sum(column.nbytes for column in self._groups.values())


class _Arrow:
    """Rows of an Arrow file."""

    def __init__(self, path: Path):
        self._path, self._table = path, open_arrow_file(path)
        self.schema = self._table.schema

    def stored(self, name: str) -> np.ndarray:
        """Whether a row holds the bytes of a picture, bool [rows]."""
        check_offsets(self._table[name], self._path, name)
        return pc.is_valid(_contents(self._table[name])).to_numpy()

    def batches(
        self, plain: Sequence[str], paths: Sequence[str]
    ) -> Iterator[tuple[int, dict[str, pa.Array]]]:
        """Batches: number of rows, and columns; those in ``paths`` hold the paths of pictures."""
        for name in plain:
            check_offsets(self._table[name], self._path, name)
        for batch in self._table.to_batches(max_chunksize=_BATCH):
            columns = {name: batch[name] for name in plain}
            yield len(batch), columns | {n: pc.struct_field(batch[n], "path") for n in paths}


class _Parquet:
    """Rows of a Parquet file."""

    def __init__(self, path: Path):
        self._path = path
        with _errors(f"{path}: is not a Parquet file, or is damaged"):
            self._file = _parquet_file(os.fspath(path))
            self.schema = self._file.schema_arrow
            self._leaves = [column.path for column in self._file.schema]

    def stored(self, name: str) -> np.ndarray:
        """Whether a row holds the bytes of a picture, bool [rows]."""
        leaf, meta = _leaf(self.schema, name), self._file.metadata
        there = np.zeros(meta.num_rows, bool)
        row = 0
        for group in range(meta.num_row_groups):
            part = meta.row_group(group)
            chunk = part.column(self._leaves.index(leaf))
            if chunk.total_uncompressed_size > _GROUP_BYTES:
                raise ValueError(
                    f"{self._path}, row group {group}: holds {chunk.total_uncompressed_size:,} "
                    f"bytes of {name!r}, which are read as a whole for every picture; write the "
                    "file with smaller row groups (row_group_size=100)"
                )
            nulls = chunk.statistics.null_count if chunk.is_stats_set else None
            if nulls in (0, part.num_rows):
                there[row : row + part.num_rows] = nulls == 0
            else:
                self._look_into(group, leaf, name, there[row : row + part.num_rows])
            row += part.num_rows
        return there

    def _look_into(self, group: int, leaf: str, name: str, there: np.ndarray) -> None:
        row = 0
        with _group_errors(self._path, group):
            for batch in self._file.iter_batches(64, [group], [leaf], use_threads=False):
                valid = pc.is_valid(_contents(batch[name]))
                there[row : row + len(batch)] = valid.to_numpy(zero_copy_only=False)
                row += len(batch)

    def batches(
        self, plain: Sequence[str], paths: Sequence[str]
    ) -> Iterator[tuple[int, dict[str, pa.Array]]]:
        """Batches: number of rows, and columns; those in ``paths`` hold the paths of pictures."""
        leaves = [*plain, *(f"{name}.path" for name in paths)]
        for group in range(self._file.num_row_groups):
            with _group_errors(self._path, group):
                for batch in self._file.iter_batches(_BATCH, [group], leaves, use_threads=False):
                    columns = {name: batch[name] for name in plain}
                    for name in paths:
                        columns[name] = pc.struct_field(batch[name], "path")
                    yield len(batch), columns


@contextlib.contextmanager
def _errors(message: str) -> Iterator[None]:
    """Raise Arrow's errors about damaged files as ValueError; system errors pass unchanged."""
    try:
        yield
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{message}: {error}") from error


def _group_errors(path: str | os.PathLike[str], group: int) -> contextlib.AbstractContextManager:
    return _errors(f"{os.fspath(path)}, row group {group}: is damaged")


def _parquet_file(path: str) -> pq.ParquetFile:
    # Without threads: they would not exist in processes that are forked later.
    return pq.ParquetFile(path, pre_buffer=False, page_checksum_verification=True)


def _is_parquet(path: str | os.PathLike[str]) -> bool:
    return os.fspath(path).lower().endswith(".parquet")


def _leaf(schema: pa.Schema, name: str) -> str:
    """The Parquet path of the bytes in a column of pictures."""
    return f"{name}.bytes" if pa.types.is_struct(schema.field(name).type) else name


def _contents(column: Any) -> Any:
    """The bytes in a column of pictures."""
    return pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _holds_bytes(kind.field(place).type)
    return is_binary(kind)


def is_binary(kind: pa.DataType) -> bool:
    """Whether an Arrow column holds bytes."""
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def is_text(kind: pa.DataType) -> bool:
    """Whether an Arrow column holds texts."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def is_number(kind: pa.DataType) -> bool:
    """Whether an Arrow column holds integers, floats or booleans."""
    types = pa.types
    return types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)


def is_list(kind: pa.DataType) -> bool:
    """Whether an Arrow column holds lists."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _is_plain(kind: pa.DataType) -> bool:
    """Whether the values convert to texts, numbers, or lists and dictionaries of them."""
    if pa.types.is_dictionary(kind) or is_list(kind):
        return _is_plain(kind.value_type)
    if pa.types.is_map(kind):
        return _is_plain(kind.key_type) and _is_plain(kind.item_type)
    if pa.types.is_struct(kind):
        return all(_is_plain(kind.field(n).type) for n in range(kind.num_fields))
    return is_text(kind) or is_number(kind) or pa.types.is_null(kind)


def _values(
    column: pa.Array, place: str, first: int, name: str, classes: Sequence[str] | None
) -> list[Any]:
    """The Python values of a column; ``place`` and the ``first`` row's number are for errors."""
    try:
        values = column.to_pylist()
    except UnicodeDecodeError as error:
        row = first + next(n for n in range(len(column)) if not _decodes(column[n])) + 1
        raise ValueError(f"{place} {row}: {name}: is not UTF-8") from error
    if pa.types.is_map(column.type):
        for number, pairs in enumerate(values):
            if pairs is not None:
                values[number] = dict(pairs)
                if len(values[number]) < len(pairs):
                    raise ValueError(f"{place} {first + number + 1}: {name}: names a key twice")
    elif classes is not None:
        values = [
            classes[value] if isinstance(value, int) and 0 <= value < len(classes) else None
            for value in values
        ]
    return values


def _decodes(value: pa.Scalar) -> bool:
    try:
        value.as_py()
    except UnicodeDecodeError:
        return False
    return True


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """The class names of the columns that have Hugging Face's type ClassLabel."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            name: [str(label) for label in feature["names"]]
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _bytes_type(kind: pa.DataType) -> pa.DataType:
    if is_list(kind):
        make = pa.list_ if pa.types.is_list(kind) else pa.large_list
        return make(_bytes_type(kind.value_type))
    if is_text(kind):
        return pa.binary() if pa.types.is_string(kind) else pa.large_binary()
    return kind
