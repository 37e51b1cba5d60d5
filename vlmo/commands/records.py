"""Reads the records of ``vlmo predict``, images with a text, in several formats."""

from __future__ import annotations

import csv
import io
import json
import os
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmo.commands.options import STANDARD
from vlmo.data.records import PICTURES, repeated_key
from vlmo.files import read_lines, read_text
from vlmo.inputs import check_text

TEXTS = ("text", "question", "statement", "caption")  # keys that a record's text may have
ADDED = ("prediction", "error")  # keys that the output adds to a record
# Keys that Hugging Face uses for pictures.
_FILES = {"image": "file_name", **{name: f"{name}_file_name" for name in PICTURES[1:]}}
_TABLES = (".parquet", ".arrow", ".npz", ".gz", ".zip")


@dataclass(frozen=True)
class Record:
    """Images and a text to predict.

    Attributes:
        given: the record as given, which is repeated in the output.
        place: file and line of the record, for errors.
        images: none, one, or the two of NLVR2.
        text: None if there is none.
    """

    given: dict[str, Any]
    place: str
    images: tuple[Path, ...]
    text: str | None

    @property
    def kind(self) -> tuple[int, bool]:
        """Number of images, and whether there is a text."""
        return len(self.images), self.text is not None


def to_json(value: Any) -> str:
    """Convert a value to JSON on one line that can be encoded in UTF-8.

    Raises:
        ValueError: a number is NaN or infinite, which JSON cannot represent.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can contain as an escape
        return json.dumps(value, allow_nan=False)
    return text


def given_records(images: tuple[Path, ...], texts: tuple[str, ...]) -> Iterator[Record]:
    """One record for each text, all with the same images."""
    names = ("image",) if len(images) == 1 else ("image_0", "image_1")
    shown = dict(zip(names, map(os.fspath, images), strict=False))
    for text in texts or (None,):
        said = {} if text is None else {"text": check_text("text", text)}
        yield Record(shown | said, "predict", images, text)


def reader(path: Path) -> Callable[[], Iterator[Record]]:
    """A function that reads the records of a file from its start; it can be called repeatedly.

    A ``.json`` file is an array of objects, or has a JSON object on every line; a ``.csv`` or
    ``.tsv`` file has a header; any other file has a JSON object on every line. ``-`` is standard
    input, which has lines of JSON and is read immediately. Paths of images are relative to the
    file's folder, those of standard input to the working directory.

    The function raises OSError if the file cannot be read, and ValueError with the place of the
    first invalid record.
    """
    if path == STANDARD:
        lines = [_standard_line(*line) for line in enumerate(sys.stdin.buffer, 1)]
        return lambda: _of_lines(lines, "standard input", Path())
    suffix = path.suffix.lower()
    if suffix in _TABLES:
        raise ValueError(f"input: {path}: {suffix} is not read here: write the records as .jsonl")
    if suffix in (".csv", ".tsv"):
        return lambda: _of_csv(path, "," if suffix == ".csv" else "\t")
    if suffix == ".json":
        return lambda: _of_array(path)
    return lambda: _of_lines(read_lines(path), os.fspath(path), path.parent)


def _standard_line(number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input, line {number}: is not UTF-8") from error


def _of_lines(lines: Iterable[str], name: str, folder: Path) -> Iterator[Record]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            place = f"{name}, line {number}"
            yield _record(_parsed(line, place), place, folder)


def _of_array(path: Path) -> Iterator[Record]:
    text = read_text(path)
    if not text.lstrip().startswith("["):
        yield from _of_lines(text.split("\n"), os.fspath(path), path.parent)
        return
    for number, value in enumerate(_parsed(text, os.fspath(path)), 1):
        yield _record(value, f"{path}, record {number}", path.parent)


def _of_csv(path: Path, separator: str) -> Iterator[Record]:
    content = io.StringIO(read_text(path), newline="")
    rows = csv.reader(content, delimiter=separator, strict=True)
    names: list[str] | None = None
    while True:
        place = f"{path}, line {rows.line_num + 1}"
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise ValueError(f"{place}: is not CSV: {error}") from error
        if row is None:
            return
        if names is None:
            names = [name.strip() for name in row]
            if len(set(names)) < len(names):
                raise ValueError(f"{place}: two columns have the same name")
        elif row:
            if len(row) != len(names):
                raise ValueError(f"{place}: has {len(row)} values for {len(names)} columns")
            values = dict(zip(names, row, strict=True))
            wanted = {n: v for n, v in values.items() if v or n not in (*TEXTS, *PICTURES)}
            yield _record(wanted, place, path.parent, values)


def _parsed(text: str, place: str) -> Any:
    """Parse JSON strictly: rejects NaN, infinity and repeated keys."""
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except RecursionError as error:
        raise ValueError(f"{place}: is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{place}: is not JSON: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    doubled = repeated_key(pairs)
    if doubled is not None:
        raise ValueError(f"the key {doubled!r} appears twice")
    return dict(pairs)


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")


def _record(values: Any, place: str, folder: Path, given: dict[str, Any] | None = None) -> Record:
    if not isinstance(values, dict):
        raise ValueError(f"{place}: {reprlib.repr(values)} is not a JSON object")
    places = {name: _FILES[name] if name not in values else name for name in PICTURES}
    names = [name for name in PICTURES if places[name] in values]
    if names not in ([], ["image"], ["image_0", "image_1"]):
        raise ValueError(
            f"{place}: has {' and '.join(names)} instead of image, or image_0 and image_1"
        )
    texts = [name for name in TEXTS if name in values]
    if len(texts) > 1:
        raise ValueError(f"{place}: has {' and '.join(texts)}; give only one of them")
    for name in (*(places[name] for name in names), *texts):
        if not isinstance(values[name], str):
            raise ValueError(f"{place}: {name}: {reprlib.repr(values[name])} is not a text")
        check_text(f"{place}: {name}", values[name])
    for name in ADDED:
        if name in values:
            raise ValueError(f"{place}: has the key {name!r}, which the output uses; rename it")
    given = values if given is None else given
    try:
        to_json(given)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: a number is too large for JSON") from error
    images = tuple(folder / values[places[name]] for name in names)
    return Record(given, place, images, values[texts[0]] if texts else None)
