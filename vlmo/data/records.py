"""Readers of records: JSON Lines, JSON, CSV, TSV, Parquet, and Hugging Face's Arrow files."""

from __future__ import annotations

import csv
import json
import os
import re
import reprlib
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlmo.data.rows import Row, Stored
from vlmo.data.tokenizer import is_blank
from vlmo.files import read_lines, read_text

RECORD_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
PICTURES = ("image", "image_0", "image_1")
IDENTITIES = ("image_id", "question_id", "identifier")
_LONGEST_PATH = 4095  # the limit of Linux
_INTEGER = re.compile(r"0|-?[1-9]\d{0,17}")
_URL = re.compile(r"[a-z][a-z0-9+]+://", re.IGNORECASE)
_JSON_SPACE = re.compile(r"[ \t\n\r]*")


class RawKind(NamedTuple):
    """Annotation files in the form in which they are published, which must be converted to records.

    Attributes:
        lists: keys of the lists in the JSON object of such a file.
        name: pattern of such a file's name.
        advice: what the file is and how to convert it.
    """

    lists: tuple[str, ...]
    name: str
    advice: str


_WRITE = "write a record for each with"
RAW_KINDS = (
    RawKind(
        ("questions",),
        "*_questions.json",
        "holds VQAv2's questions as they are published, without their answers and pictures: "
        f"{_WRITE} 'image' (a path), 'question' and 'answer' (the list of all ten)",
    ),
    RawKind(
        ("images", "annotations"),
        "captions_*.json",
        "holds COCO's annotations as they are published, pictures and captions apart: "
        "write a record for each picture with 'image' (a path) and 'caption' (a list)",
    ),
    RawKind(
        ("annotations",),
        "*_annotations.json",
        "holds VQAv2's annotations as they are published, without questions and pictures: "
        f"{_WRITE} 'image' (a path), 'question' and 'answer' (the list of all ten)",
    ),
    RawKind(
        ("images",),
        "dataset_*.json",
        "holds Karpathy's splits as they are published: write a record for each picture with "
        "'image' (a path), 'caption' (a list) and 'split' (restval belongs to train)",
    ),
)
_RAW_NAMES = {name for kind in RAW_KINDS for name in kind.lists}


class Record(NamedTuple):
    """One record, with what error messages need.

    Attributes:
        place: file and line or row, for error messages.
        values: values by name, none of them None.
        names: names of all fields in the file, including those that were not read.
        number: number of the record within its split, from 0.
        folder: folder that paths are relative to.
    """

    place: str
    values: Mapping[str, Any]
    names: Collection[str]
    number: int
    folder: str

    def text(self, name: str) -> str:
        """A text that is not blank."""
        return self._checked(name, self._get(name, str, "a text"))

    def texts(self, name: str) -> list[str]:
        """A text or a list of texts, none of them blank."""
        value = self._get(name, (str, list), "a text or a list of texts")
        texts = [value] if isinstance(value, str) else value
        if not texts or not all(isinstance(text, str) for text in texts):
            raise self.error(name, f"{reprlib.repr(value)} is not a text or a list of texts")
        return [self._checked(name, text) for text in texts]

    def picture(self, name: str) -> str | Stored:
        """A path, or a picture in the table; Hugging Face's ``file_name`` is accepted as a path."""
        other = "file_name" if name == "image" else f"{name}_file_name"
        if name not in self.values and other in self.values:
            name = other
        value = self._get(name, (str, Stored), "a path")
        if isinstance(value, Stored):
            return value
        if "\0" in self._checked(name, value) or len(value) > _LONGEST_PATH:
            raise self.error(name, f"{reprlib.repr(value)} is not a path")
        if _URL.match(value):
            raise self.error(name, f"{value!r} is not on this machine: download it first")
        return os.path.normpath(os.path.join(self.folder, value))

    def identity(self, name: str) -> int | str | None:
        """An integer or a text; None if the record has none."""
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise self.error(name, f"{reprlib.repr(value)} is not an integer or a text")
        return self._checked(name, value) if isinstance(value, str) else value

    def answers(self) -> str | list[str] | dict[str, Any] | None:
        """Field ``answers`` or ``answer``: a text, texts, or scores by text; None if missing."""
        name = "answers" if "answers" in self.values else "answer"
        given = self.values.get(name)
        if isinstance(given, dict):  # a Parquet struct has all its field names in every row
            given = {text: score for text, score in given.items() if score is not None}
        if given is not None:
            texts = given if isinstance(given, (list, dict)) else [given]
            if not all(isinstance(text, str) for text in texts):
                raise self.error(name, f"{reprlib.repr(given)} is not made of texts")
            for text in texts:
                self._checked(name, text)
        return given

    def error(self, name: str, message: str) -> ValueError:
        """The error to raise for a value."""
        return ValueError(f"{self.place}: {name}: {message}")

    def value(self, name: str) -> Any:
        """A value that is not None."""
        value = self.values.get(name)
        if value is None:
            if name in self.names:
                raise ValueError(f"{self.place}: has no {name!r}: it is empty or null")
            others = textwrap.shorten(", ".join(map(repr, self.names)), 200)
            raise ValueError(f"{self.place}: has no {name!r}{f', only {others}' if others else ''}")
        return value

    def _get(self, name: str, kind: type | tuple[type, ...], wanted: str) -> Any:
        value = self.value(name)
        if not isinstance(value, kind):
            raise self.error(name, f"{reprlib.repr(value)} is not {wanted}")
        return value

    def _checked(self, name: str, text: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            shown = reprlib.repr(text)
            raise self.error(name, f"{shown} holds half of a surrogate pair") from error
        if is_blank(text):
            raise self.error(name, f"{reprlib.repr(text)} is blank")
        return text


def file_rows(path: Path, names: Collection[str]) -> Iterator[Row]:
    """Read the records of a file in the format that its suffix indicates.

    Args:
        path: with a suffix of ``RECORD_SUFFIXES``, or .arrow.
        names: fields that are needed; only these columns of a table are read.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged or has another form; the message names file and line or row.
    """
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        rows = _json_lines(path)
    elif suffix == ".json":
        rows = _json_values(path)
    elif suffix in (".csv", ".tsv"):
        rows = _separated(path, "," if suffix == ".csv" else "\t")
    else:
        from vlmo.data.tables import table_rows  # imported here because it needs pyarrow

        rows = table_rows(path, names, PICTURES)
    for row in rows:
        given = {name: value for name, value in row.values.items() if value is not None}
        yield row._replace(values=given)


def _json_lines(path: Path) -> Iterator[Row]:
    for number, line in enumerate(read_lines(path), 1):
        if line and not line.isspace():
            yield _json_row(path, number, _parsed(path, number, _DECODER.decode, line))


def _json_values(path: Path) -> Iterator[Row]:
    """Records of a JSON list, or of JSON objects in sequence."""
    text = read_text(path)
    place, line, counted = _after_space(text, 0), 1, 0
    in_list = text.startswith("[", place)
    if in_list:
        place = _after_space(text, place + 1)
    while place < len(text) and not (in_list and text[place] == "]"):
        line, counted = line + text.count("\n", counted, place), place
        value, place = _parsed(path, line, _DECODER.raw_decode, text, place)
        yield _json_row(path, line, value)
        place = _after_space(text, place)
        if in_list and text.startswith(",", place):
            place = _after_space(text, place + 1)
        elif in_list:
            break
    if in_list and text[place:].strip() != "]":
        line = text.count("\n", 0, place) + 1
        raise ValueError(
            f"{path}, line {line}: is not JSON: here a list of records must end or go on"
        )


def _after_space(text: str, place: int) -> int:
    match = _JSON_SPACE.match(text, place)
    assert match is not None
    return match.end()


def repeated_key(pairs: Sequence[tuple[str, Any]]) -> str | None:
    """The first key that occurs twice among the pairs of a JSON object; None if there is none."""
    if len(dict(pairs)) == len(pairs):
        return None
    names = [name for name, _ in pairs]
    return next(name for name in names if names.count(name) > 1)


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    twice = repeated_key(pairs)
    if twice is not None:
        raise ValueError(f"{reprlib.repr(twice)} appears twice in one object")
    return dict(pairs)


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _parsed(path: Path, line: int, parse: Callable[..., Any], *text: Any) -> Any:
    try:
        return parse(*text)
    except json.JSONDecodeError as error:
        place = (
            f"{path}, line {line + error.lineno - 1 if parse == _DECODER.decode else error.lineno}"
        )
        raise ValueError(f"{place}: is not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ValueError(f"{path}, line {line}: is not JSON: it is nested too deeply") from error
    except ValueError as error:  # from _object, or for an integer with thousands of digits
        raise ValueError(f"{path}, line {line}: {error}") from error


def _json_row(path: Path, line: int, values: Any) -> Row:
    place = f"{path}, line {line}"
    if not isinstance(values, dict):
        hint = "; a list of records belongs into a .json file" if isinstance(values, list) else ""
        raise ValueError(f"{place}: {reprlib.repr(values)} is not a JSON object{hint}")
    for kind in () if _RAW_NAMES.isdisjoint(values) else RAW_KINDS:
        if all(_is_table(values.get(name)) for name in kind.lists):
            raise ValueError(f"{place}: {kind.advice}")
    return Row(place, values, values.keys())


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _separated(path: Path, separator: str) -> Iterator[Row]:
    """Rows of CSV or TSV below a header line; empty cells are missing values."""
    lines = (line + "\n" for line in read_lines(path))
    reader = csv.reader(lines, delimiter=separator, strict=True)
    names: list[str] | None = None
    while True:
        place = f"{path}, line {reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{place}: is not {path.suffix[1:].upper()}: {error}") from error
        if cells is None:
            return
        if not cells:
            continue
        if names is None:
            names = [name.strip() for name in cells]
            if twice := [name for name in names if name and names.count(name) > 1]:
                raise ValueError(f"{place}: names the column {twice[0]!r} twice")
            continue
        if len(cells) != len(names):
            raise ValueError(f"{place}: has {len(cells)} cells for {len(names)} columns")
        values: dict[str, Any] = {n: cell for n, cell in zip(names, cells, strict=True) if cell}
        for name in IDENTITIES:
            if _INTEGER.fullmatch(values.get(name, "")):
                values[name] = int(values[name])
        yield Row(place, values, [name for name in names if name])
