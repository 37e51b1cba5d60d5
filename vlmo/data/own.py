"""A user's own data: files of records, folders of pictures with captions, text files."""

from __future__ import annotations

import copy
import mmap
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from vlmo.data import identity
from vlmo.data.answers import answer_ids, soft_scores, vocabulary
from vlmo.data.columns import Columns, Pictures
from vlmo.data.layout import SPLIT_NAMES, Layout, find, listed, split_of
from vlmo.data.layout import tells_splits as has_splits
from vlmo.data.records import Record, file_rows
from vlmo.data.rows import Stored
from vlmo.data.samples import Samples, picture_names
from vlmo.data.tables import StoredPictures
from vlmo.data.tokenizer import is_blank
from vlmo.data.transforms import SquareTransform, read_image
from vlmo.files import read_lines, read_text, text_encoding

__all__ = ["RecordSamples", "TextLines", "has_splits", "open_own"]

Item = dict[str, Any]


def open_own(
    source: Path,
    task: str,
    split: str,
    transform: SquareTransform,
    *,
    answers: Sequence[str] | None = None,
    answer_minimum: int = 1,
    allow_missing: bool = False,
) -> Samples:
    """Open a data set from a file or folder; docs/data.md describes the formats.

    Args:
        source: a file of records or texts, or a folder with such a file for each split or with
            pictures.
        task: see :func:`~vlmo.data.open_data`.
        split: see :func:`~vlmo.data.open_data`.
        transform: applied to the pictures.
        answers: the answers of vqa; None for the answers of the train split.
        answer_minimum: see :func:`~vlmo.data.answers.vocabulary`.
        allow_missing: see :func:`~vlmo.data.open_data`.

    Raises:
        FileNotFoundError: the split is missing, or pictures that its records name are.
        ValueError: a record lacks a field that the task needs, or has another form.
    """
    layout = find(source, task, split)
    place = layout.files[0] if len(layout.files) == 1 else layout.root
    if place.suffix.lower() == ".txt":
        return TextLines(place, transform)
    items = _items(layout, task, split)
    if task == "vqa":
        if answers is None:
            training = find(source, task, "train")
            questions = _some(
                _items(training, task, "train"),
                f"{place}: holds nothing of split 'train' to take answers from",
            )
            scores = (_labelled(question)["scores"] for question in questions)
            answers = vocabulary(scores, answer_minimum)
        items = _label_answers(items, answers, place, split)
    items = _some(items, f"{place}: holds nothing of split {split!r}")
    return RecordSamples(
        place,
        items,
        picture_names(task),
        transform,
        answers,
        root=layout.root,
        allow_missing=allow_missing,
    )


class RecordSamples(Samples):
    """Samples from records; their pictures are in files of their own or in tables.

    Args:
        source: name of the data in errors.
        items: samples, with paths or :class:`~vlmo.data.tables.Stored` instead of pictures; an
            ``image_id`` of None is replaced by the picture's path relative to ``root``.
        pictures: keys of the pictures.
        transform: applied to the pictures.
        answers: the answers of vqa.
        root: folder that picture names are relative to.
        allow_missing: a missing picture makes a bad sample when it is read, instead of an error in
            the constructor.

    Raises:
        FileNotFoundError: pictures are missing; the first ten are named.
    """

    def __init__(
        self,
        source: Path,
        items: Iterable[Item],
        pictures: Sequence[str],
        transform: SquareTransform,
        answers: Sequence[str] | None,
        *,
        root: Path,
        allow_missing: bool = False,
    ):
        super().__init__(pictures, transform, answers)
        self._source = os.fspath(source)
        # Use Arrow and NumPy arrays: every worker would copy lists of objects.
        known, columns = Pictures(root), Columns()
        places = {name: array("q") for name in pictures}
        for item in items:
            for name in pictures:
                places[name].append(known.number(item.pop(name)))
            if item.get("image_id", "") is None:
                item["image_id"] = known.names[places["image"][-1]]
            columns.append(item)
        if known.missing and not allow_missing:
            raise FileNotFoundError(f"{source}: {listed(known.missing, 'image files are missing')}")
        self._places = {name: np.array(numbers, np.int64) for name, numbers in places.items()}
        # The file or table that holds each picture, and its row in the table, or -1.
        self._paths, self._rows = pa.array(known.paths, pa.large_string()), np.array(known.rows)
        self._columns = columns.arrays()
        self._stored = StoredPictures()

    def __len__(self) -> int:
        return len(self._columns["text"])

    def fields(self, index: int) -> Item:
        return {name: column[index].as_py() for name, column in self._columns.items()}

    def picture(self, index: int, name: str) -> Image.Image:
        number = int(self._places[name][index])
        path, row = self._paths[number].as_py(), int(self._rows[number])
        if row < 0:
            return read_image(path, path)
        content = self._stored.read(Stored(path, row, name))
        return read_image(content, f"{path}, row {row + 1}, {name}")

    def place(self, index: int, name: str | None = None) -> tuple[str, int | None]:
        if name is None:
            return self._source, None
        number = int(self._places[name][index])
        row = int(self._rows[number])
        return self._paths[number].as_py(), None if row < 0 else row + 1

    def picture_numbers(self, name: str) -> np.ndarray:
        return self._places[name]

    @property
    def image_ids(self) -> list[int] | list[str]:
        return self._columns["image_id"].to_pylist()

    @property
    def keys(self) -> np.ndarray | None:
        if self.picture_names != ("image",) or self.answers is not None:
            return None
        ids = identity.numbered(self._columns["image_id"])
        return identity.none_if_different(identity.same_pictures(self._places["image"], ids))

    def without(self, rows: Sequence[int]) -> RecordSamples:
        """A copy that omits the records of some samples."""
        found = copy.copy(self)
        kept = np.delete(np.arange(len(self)), rows)
        used = np.concatenate([places[kept] for places in self._places.values()] or [kept[:0]])
        old, first = np.unique(used, return_index=True)
        order = old[np.argsort(first)]  # pictures are numbered in the order of their first use
        number = np.empty(len(self._paths), dtype=np.int64)
        number[order] = np.arange(len(order))
        found._places = {name: number[places[kept]] for name, places in self._places.items()}
        found._paths, found._rows = self._paths.take(pa.array(order)), self._rows[order]
        found._columns = {name: column.take(kept) for name, column in self._columns.items()}
        return found

    def fingerprint(self) -> str:
        folder = self._source if os.path.isdir(self._source) else os.path.dirname(self._source)
        names = identity.relative(self._paths.to_pylist(), folder)
        pictures = [pa.array(names, pa.large_string()), self._rows, *self._places.values()]
        return identity.fingerprint([*pictures, *self._columns.values()])


class TextLines(Samples):
    """The lines of a text file that are not blank, each read on access.

    Args:
        path: encoded in UTF-8, or with a byte order mark.
        transform: unused, as there are no pictures.

    Raises:
        ValueError: no line holds any text, or a line has another encoding.
    """

    def __init__(self, path: Path, transform: SquareTransform):
        super().__init__((), transform)
        self.path = path
        with path.open("rb") as stream:
            self._encoding, place = text_encoding(stream.read(4))
        starts, lengths = array("q"), array("q")
        for number, line in enumerate(read_lines(path, ends=True), 1):
            if "\r" in line.rstrip("\r\n"):
                raise ValueError(
                    f"{path}, line {number}: holds carriage returns within the line; end "
                    "lines with LF or CR LF"
                )
            length = len(line.encode(self._encoding))
            if not is_blank(line):
                starts.append(place)
                lengths.append(length)
            place += length
        if not starts:
            raise ValueError(f"{path}: holds no text")
        self._starts, self._lengths = np.array(starts), np.array(lengths)
        self._content: mmap.mmap | None = None

    def __len__(self) -> int:
        return len(self._starts)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_content": None}

    def fields(self, index: int) -> Item:
        start = int(self._starts[index])
        line = self._mapped()[start : start + int(self._lengths[index])]
        return {"text": line.decode(self._encoding).strip()}

    def _mapped(self) -> mmap.mmap:
        if self._content is None:
            with self.path.open("rb") as stream:
                self._content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        return self._content

    def picture(self, index: int, name: str) -> Image.Image:
        raise KeyError(name)

    def picture_numbers(self, name: str) -> np.ndarray:
        raise KeyError(name)

    def place(self, index: int, name: str | None = None) -> tuple[str, int | None]:
        return os.fspath(self.path), index + 1

    def without(self, rows: Sequence[int]) -> TextLines:
        """A copy that omits the lines of some texts."""
        found = copy.copy(self)
        found._starts, found._lengths = (np.delete(a, rows) for a in (self._starts, self._lengths))
        return found

    def fingerprint(self) -> str:
        content = self._mapped()
        spans = zip(self._starts.tolist(), self._lengths.tolist(), strict=True)
        lines = (content[start : start + length] for start, length in spans)
        if self._encoding != "utf-8":
            lines = (line.decode(self._encoding, "replace").encode() for line in lines)
        return identity.fingerprint(line.strip() + b"\n" for line in lines)

    @property
    def image_ids(self) -> list[int] | list[str]:
        raise ValueError(f"{self.path}: texts have no image_id")


def _items(layout: Layout, task: str, split: str) -> Iterator[Item]:
    reader, names = _READERS[task]
    for record in _records(layout, names, split):
        yield from reader(record)


def _records(layout: Layout, names: Sequence[str], split: str) -> Iterator[Record]:
    number = 0
    for path in layout.files:
        folder = os.fspath(path.parent)
        for row in file_rows(path, (*names, "split")):
            record = Record(row.place, row.values, row.names, number, folder)
            number += 1
            if layout.mixed and not _belongs(record, split):
                continue
            if layout.within is not None and not _lies_in(record, layout.within):
                continue
            if not layout.mixed:
                _check_split(record, split)
            yield record
    folder = os.fspath(layout.root)
    for number, path in enumerate(layout.pictures):
        name = path.relative_to(layout.root).as_posix()
        if not _is_utf8(name):
            raise ValueError(f"{path}: the name of the file is not UTF-8: rename it")
        values = {"image": name, "caption": _caption_lines(path.with_suffix(".txt"))}
        yield Record(os.fspath(path), values, (), number, folder)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # raised for bytes that Python decoded to lone surrogates
        return False
    return True


def _belongs(record: Record, split: str) -> bool:
    """Whether a record belongs to a split; a record that names no split belongs to every split."""
    given = record.values.get("split")
    if given is None:
        return True
    known = split_of(given) if isinstance(given, str) else None
    if known is None:
        names = ", ".join(name for names in SPLIT_NAMES.values() for name in names)
        raise record.error("split", f"{given!r} is not one of {names}")
    return known == split


def _check_split(record: Record, split: str) -> None:
    """Raise if a record names another split than that of its file or folder."""
    given = record.values.get("split")
    if isinstance(given, str) and split_of(given) not in (split, None):
        raise record.error("split", f"{given!r}, but the record is where those of {split!r} are")


def _lies_in(record: Record, folder: Path) -> bool:
    picture = record.picture("image_0" if "image_0_file_name" in record.values else "image")
    return isinstance(picture, str) and picture.startswith(os.path.join(folder, ""))


def _caption_lines(path: Path) -> list[str]:
    lines = read_text(path).replace("\r", "\n").split("\n")
    captions = [line.strip() for line in lines if not is_blank(line)]
    if not captions:
        raise ValueError(f"{path}: holds no caption")
    return captions


def _captions(record: Record) -> Iterator[Item]:
    image, identity = record.picture("image"), record.identity("image_id")
    names = [name for name in ("caption", "text") if name in record.values]
    for text in record.texts(names[0] if names else "caption"):
        yield {"text": text, "image": image, "image_id": identity}


def _question(record: Record) -> Iterator[Item]:
    given = record.answers()
    scores: dict[str, float] = {}
    if given is not None:
        try:
            scores = soft_scores(given)
        except ValueError as error:
            name = "answers" if "answers" in record.values else "answer"
            raise ValueError(f"{record.place}: {name} {error}") from error
    question_id = record.identity("question_id")
    yield {
        "text": record.text("question"),
        "image": record.picture("image"),
        "image_id": record.identity("image_id"),
        "question_id": record.number if question_id is None else question_id,
        "scores": scores,
        "labelled": given is not None,
        "place": record.place,
    }


def _statement(record: Record) -> Iterator[Item]:
    label = record.value("label")
    known = {"true": 1, "false": 0, "1": 1, "0": 0}
    if str(label).lower() not in known:
        raise record.error("label", f"{label!r} is neither true nor false")
    identifier = record.identity("identifier")
    yield {
        "text": record.text("statement"),
        "image_0": record.picture("image_0"),
        "image_1": record.picture("image_1"),
        "answers": known[str(label).lower()],
        "identifier": record.number if identifier is None else identifier,
    }


def _texts(record: Record) -> Iterator[Item]:
    names = [name for name in ("text", "caption") if name in record.values]
    for text in record.texts(names[0] if names else "text"):
        yield {"text": text}


_IMAGE = ("image", "file_name")
_CAPTIONS = _captions, (*_IMAGE, "image_id", "caption", "text")
# The function with which a task reads a record, and the fields that it needs.
_READERS = {
    "pretrain": _CAPTIONS,
    "retrieval": _CAPTIONS,
    "vqa": (_question, (*_IMAGE, "image_id", "question", "question_id", "answer", "answers")),
    "nlvr2": (
        _statement,
        (
            *("image_0", "image_0_file_name", "image_1", "image_1_file_name"),
            *("statement", "label", "identifier"),
        ),
    ),
    "textmlm": (_texts, ("text", "caption")),
}


def _label_answers(
    items: Iterable[Item], answers: Sequence[str], source: Path, split: str
) -> Iterator[Item]:
    """Convert answers to ids and scores; training omits questions with no answer in ``answers``."""
    ids = answer_ids(answers)
    seen = kept = 0
    for item in items:
        if split != "test":
            _labelled(item)
        del item["place"], item["labelled"]
        right = {ids[text]: score for text, score in item.pop("scores").items() if text in ids}
        seen += 1
        if split == "train" and not right:
            continue
        kept += 1
        yield item | {"answer_labels": list(right), "answer_scores": list(right.values())}
    if seen and not kept:
        raise ValueError(f"{source}: no question has an answer among the {len(answers)} answers")


def _labelled(item: Item) -> Item:
    """The item; raises ValueError if its question has no answer."""
    if not item["labelled"]:
        raise ValueError(f"{item['place']}: has no 'answer'")
    return item


def _some(items: Iterable[Item], message: str) -> Iterator[Item]:
    """The items; raises ValueError with ``message`` if there are none."""
    empty = True
    for item in items:
        empty = False
        yield item
    if empty:
        raise ValueError(message)
