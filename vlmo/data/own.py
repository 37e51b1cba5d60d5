"""A user's own data: records in JSON Lines or Parquet, folders of pictures with captions, texts."""

from __future__ import annotations

import copy
import json
import mmap
import os
import reprlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vlmo.data import identity
from vlmo.data.answers import answer_ids, soft_scores, vocabulary
from vlmo.data.digit_scans import SPLITS
from vlmo.data.samples import Samples, picture_names
from vlmo.data.transforms import SquareTransform, read_image

RECORD_SUFFIXES = (".jsonl", ".parquet")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_SHOWN = 10  # missing files in an error

Item = dict[str, Any]


def open_own(
    source: Path,
    task: str,
    split: str,
    transform: SquareTransform,
    *,
    answers: Sequence[str] | None = None,
    answer_minimum: int = 1,
) -> Samples:
    """Data set of a file or folder, see docs/data.md.

    Args:
        source: a .jsonl, .parquet or .txt file, or a folder with one for each split or with
            pictures.
        task: as of :func:`~vlmo.data.open_data`.
        split: as of :func:`~vlmo.data.open_data`.
        transform: of the pictures.
        answers: of vqa; None for the answers of the train split.
        answer_minimum: see :func:`~vlmo.data.answers.vocabulary`.

    Raises:
        FileNotFoundError: the split, or pictures that it names, are missing.
        ValueError: a record lacks what the task needs, or is of another form.
    """
    path = _split_file(source, task, split)
    if path is not None and path.suffix == ".txt":
        return TextLines(path, transform)
    items = list(_split_items(source, path, task, split))
    if not items:
        raise ValueError(f"{path or source}: holds nothing of split {split!r}")
    if task == "vqa":
        if answers is None:
            scored = (item["scores"] for item in _train_items(source, split, items))
            answers = vocabulary(scored, answer_minimum)
        items = _label_answers(items, answers, path or source, split)
    return RecordSamples(path or source, items, picture_names(task), transform, answers)


def has_splits(source: Path) -> bool:
    """Whether a file or folder tells its splits apart; else all of it serves any split."""
    if source.is_dir():
        names = [name for split in SPLITS for name in (split, f"{split}.txt")]
        names += [f"{split}{suffix}" for split in SPLITS for suffix in RECORD_SUFFIXES]
        return any((source / name).exists() for name in names)
    if source.suffix not in RECORD_SUFFIXES:
        return False
    return any("split" in record.values for record in _file_records(source, None))


class RecordSamples(Samples):
    """Samples of records, their pictures in files of their own.

    Args:
        source: what errors call the data.
        items: samples, with paths in place of pictures.
        pictures: keys of the pictures.
        transform: of the pictures.
        answers: of vqa.

    Raises:
        FileNotFoundError: pictures are missing; the first ten are named.
    """

    def __init__(
        self,
        source: Path,
        items: Sequence[Item],
        pictures: Sequence[str],
        transform: SquareTransform,
        answers: Sequence[str] | None,
    ):
        super().__init__(pictures, transform, answers)
        self._source = os.fspath(source)
        numbers: dict[str, int] = {}
        # Arrow's and NumPy's arrays, and no lists of objects, which every worker would copy.
        self._places = {
            name: np.array([numbers.setdefault(item[name], len(numbers)) for item in items])
            for name in pictures
        }
        _require_files(source, list(numbers))
        self._paths = pa.array(list(numbers), pa.large_string())
        self._columns = {
            name: pa.array(_alike([item[name] for item in items]))
            for name in items[0]
            if name not in pictures
        }

    def __len__(self) -> int:
        return len(self._columns["text"])

    def fields(self, index: int) -> Item:
        return {name: column[index].as_py() for name, column in self._columns.items()}

    def picture(self, index: int, name: str) -> Image.Image:
        path, _ = self.place(index, name)
        return read_image(path, path)

    def place(self, index: int, name: str | None = None) -> tuple[str, int | None]:
        if name is None:
            return self._source, None
        return self._paths[int(self._places[name][index])].as_py(), None

    @property
    def image_ids(self) -> list[int] | list[str]:
        return self._columns["image_id"].to_pylist()

    @property
    def keys(self) -> np.ndarray | None:
        if self._pictures != ("image",) or self.answers is not None:
            return None
        paths = identity.numbered(pa.array(identity.resolved(self._paths.to_pylist())))
        ids = identity.numbered(self._columns["image_id"])
        files = paths[self._places["image"]]
        return identity.none_if_different(identity.same_pictures(files, ids))

    def without(self, rows: Sequence[int]) -> RecordSamples:
        """A copy as if the records of some samples had not been there."""
        found = copy.copy(self)
        kept = np.delete(np.arange(len(self)), rows)
        used = np.concatenate([places[kept] for places in self._places.values()] or [kept[:0]])
        old, first = np.unique(used, return_index=True)
        order = old[np.argsort(first)]  # pictures are numbered as they come
        number = np.empty(len(self._paths), dtype=np.int64)
        number[order] = np.arange(len(order))
        found._places = {name: number[places[kept]] for name, places in self._places.items()}
        found._paths = self._paths.take(pa.array(order))
        found._columns = {name: column.take(kept) for name, column in self._columns.items()}
        return found

    def fingerprint(self) -> str:
        folder = self._source if os.path.isdir(self._source) else os.path.dirname(self._source)
        names = identity.relative(self._paths.to_pylist(), folder)
        return identity.fingerprint(
            [pa.array(names, pa.large_string()), *self._places.values(), *self._columns.values()]
        )


class TextLines(Samples):
    """Each line of a text file that is not blank, read when it is asked for.

    Args:
        path: UTF-8.
        transform: of pictures, which there are none of.

    Raises:
        ValueError: no line holds any text.
    """

    def __init__(self, path: Path, transform: SquareTransform):
        super().__init__((), transform)
        self.path = path
        starts, lengths = array("q"), array("q")
        place = 0
        with path.open("rb") as stream:
            for line in stream:
                if line.strip():
                    starts.append(place)
                    lengths.append(len(line))
                place += len(line)
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
        try:
            return {"text": line.decode("utf-8").strip()}
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: text {index + 1} is not UTF-8: {error}") from error

    def _mapped(self) -> mmap.mmap:
        if self._content is None:
            with self.path.open("rb") as stream:
                self._content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        return self._content

    def picture(self, index: int, name: str) -> Image.Image:
        raise KeyError(name)

    def place(self, index: int, name: str | None = None) -> tuple[str, int | None]:
        return os.fspath(self.path), index + 1

    def without(self, rows: Sequence[int]) -> TextLines:
        """A copy as if the lines of some texts had not been there."""
        found = copy.copy(self)
        found._starts, found._lengths = (np.delete(a, rows) for a in (self._starts, self._lengths))
        return found

    def fingerprint(self) -> str:
        content = self._mapped()
        spans = zip(self._starts.tolist(), self._lengths.tolist(), strict=True)
        lines = (content[start : start + length].strip() + b"\n" for start, length in spans)
        return identity.fingerprint(lines)

    @property
    def image_ids(self) -> list[int] | list[str]:
        raise ValueError(f"{self.path}: texts have no image_id")


def _split_file(source: Path, task: str, split: str) -> Path | None:
    """The file of a split; None for a folder of pictures."""
    suffixes = (*RECORD_SUFFIXES, ".txt") if task == "textmlm" else RECORD_SUFFIXES
    if source.is_file():
        if source.suffix not in suffixes:
            raise ValueError(f"source: {source} is not a file of {', '.join(suffixes)} for {task}")
        return source
    found = {
        name: [path for s in suffixes if (path := source / f"{name}{s}").is_file()]
        for name in SPLITS
    }
    if len(found[split]) > 1:
        raise ValueError(f"source: {source} has {' and '.join(p.name for p in found[split])}")
    if not found[split] and any(found.values()):
        wanted = " or ".join(f"{split}{suffix}" for suffix in suffixes)
        raise FileNotFoundError(f"{source}: has no {wanted}")
    return found[split][0] if found[split] else None


def _split_items(source: Path, path: Path | None, task: str, split: str) -> Iterator[Item]:
    if path is None:
        records = _folder_records(source, split)
    else:
        # A file for every split may say which its records belong to.
        records = _file_records(path, split if path == source else None)
    for record in records:
        yield from _READERS[task](record)


def _train_items(source: Path, split: str, items: list[Item]) -> Iterable[Item]:
    """Questions of the train split, which are the ``items`` already if ``split`` is that one."""
    if split == "train":
        return items
    return _split_items(source, _split_file(source, "vqa", "train"), "vqa", "train")


class _Record(NamedTuple):
    """One record of a file, and its place for errors."""

    values: Mapping[str, Any]
    place: str
    number: int  # from 0
    folder: Path  # that paths are relative to

    def get(self, name: str, kind: type | tuple[type, ...], wanted: str) -> Any:
        value = self.values.get(name)
        if value is None:
            raise ValueError(f"{self.place}: has no {name!r}")
        if not isinstance(value, kind):
            raise ValueError(f"{self.place}: {name}: {reprlib.repr(value)} is not {wanted}")
        return value

    def text(self, name: str) -> str:
        return self.get(name, str, "a text")

    def texts(self, name: str) -> list[str]:
        value = self.get(name, (str, list), "a text or a list of texts")
        texts = [value] if isinstance(value, str) else value
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"{self.place}: {name}: {reprlib.repr(value)} is not a text or a list of texts"
            )
        return texts

    def path(self, name: str) -> str:
        value = self.get(name, str, "a path")
        return os.path.normpath(self.folder / value)

    def identity(self, name: str, default: int | str) -> int | str:
        value = self.values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise ValueError(f"{self.place}: {name}: {value!r} is not a number or a text")
        return value


def _file_records(path: Path, split: str | None) -> Iterator[_Record]:
    rows = _json_lines(path) if path.suffix == ".jsonl" else _parquet_rows(path)
    for number, (place, values) in enumerate(rows):
        values = {name: value for name, value in values.items() if value is not None}
        if split is None or values.get("split", split) == split:
            yield _Record(values, place, number, path.parent)


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                values = json.loads(line)
            except ValueError as error:  # of the syntax or of the encoding
                raise ValueError(f"{place}: is not JSON: {error}") from error
            if not isinstance(values, dict):
                raise ValueError(f"{place}: {reprlib.repr(values)} is not a JSON object")
            yield place, values


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches():
            for values in batch.to_pylist(maps_as_pydicts="strict"):
                number += 1
                yield f"{path}, row {number}", values
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: is not a Parquet file: {error}") from error


def _folder_records(source: Path, split: str) -> Iterator[_Record]:
    """Pictures in the folder of the split, or in ``source`` if no split has one."""
    folder = source
    if any((source / name).is_dir() for name in SPLITS):
        folder = source / split
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: does not exist")
    images = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise FileNotFoundError(
            f"{folder}: holds no pictures ({', '.join(IMAGE_SUFFIXES)}), no "
            f"{split}{f' or {split}'.join(RECORD_SUFFIXES)}, and no Arrow files"
        )
    bare = [os.fspath(path) for path in images if not path.with_suffix(".txt").is_file()]
    if bare:
        raise FileNotFoundError(f"{folder}: {_listed(bare, 'pictures have no .txt of captions')}")
    for number, path in enumerate(images):
        name = path.relative_to(folder).as_posix()
        values = {"image": name, "caption": _caption_lines(path.with_suffix(".txt"))}
        yield _Record(values, os.fspath(path), number, folder)


def _caption_lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8: {error}") from error
    captions = [line.strip() for line in lines if line.strip()]
    if not captions:
        raise ValueError(f"{path}: holds no caption")
    return captions


def _captions(record: _Record) -> Iterator[Item]:
    image = record.path("image")
    identity = record.identity("image_id", record.values["image"])
    for text in record.texts("caption"):
        yield {"text": text, "image": image, "image_id": identity}


def _question(record: _Record) -> Iterator[Item]:
    name = "answers" if "answers" in record.values else "answer"
    given = record.values.get(name)
    scores: dict[str, float] = {}
    if isinstance(given, dict):  # a struct of Parquet has all names in every row
        given = {text: score for text, score in given.items() if score is not None}
    if given is not None:
        texts = given if isinstance(given, (list, dict)) else [given]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{record.place}: {name}: {reprlib.repr(given)} is not made of texts")
        try:
            scores = soft_scores(given)
        except ValueError as error:
            raise ValueError(f"{record.place}: {name} {error}") from error
    yield {
        "text": record.text("question"),
        "image": record.path("image"),
        "image_id": record.identity("image_id", record.values["image"]),
        "question_id": record.identity("question_id", record.number),
        "scores": scores,
        "labelled": given is not None,
        "place": record.place,
    }


def _statement(record: _Record) -> Iterator[Item]:
    label = record.values.get("label")
    known = {"true": 1, "false": 0, "1": 1, "0": 0}
    if str(label).lower() not in known:
        raise ValueError(f"{record.place}: label: {label!r} is neither true nor false")
    yield {
        "text": record.text("statement"),
        "image_0": record.path("image_0"),
        "image_1": record.path("image_1"),
        "answers": known[str(label).lower()],
        "identifier": record.identity("identifier", record.number),
    }


def _texts(record: _Record) -> Iterator[Item]:
    for text in record.texts("text" if "text" in record.values else "caption"):
        yield {"text": text}


_READERS = {
    "pretrain": _captions,
    "retrieval": _captions,
    "vqa": _question,
    "nlvr2": _statement,
    "textmlm": _texts,
}


def _label_answers(
    items: Sequence[Item], answers: Sequence[str], source: Path, split: str
) -> list[Item]:
    """Scores by id; for training without the questions that have no answer among ``answers``."""
    ids = answer_ids(answers)
    labelled = []
    for item in items:
        item = dict(item)
        place, has_answer = item.pop("place"), item.pop("labelled")
        if split != "test" and not has_answer:
            raise ValueError(f"{place}: has no 'answer'")
        right = {ids[text]: score for text, score in item.pop("scores").items() if text in ids}
        if split == "train" and not right:
            continue
        item["answer_labels"], item["answer_scores"] = list(right), list(right.values())
        labelled.append(item)
    if not labelled:
        raise ValueError(f"{source}: no question has an answer among the {len(answers)} answers")
    return labelled


def _alike(values: list[Any]) -> list[Any]:
    """Identities as texts if not all of them are numbers."""
    if any(isinstance(value, str) for value in values):
        return [str(value) for value in values]
    return values


def _require_files(source: Path, paths: Sequence[str]) -> None:
    # One look into each folder, not one at each file: there may be millions.
    listed: dict[str, set[str]] = {}
    missing = []
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in listed:
            listed[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name not in listed[folder]:
            missing.append(path)
    if missing:
        raise FileNotFoundError(f"{source}: {_listed(missing, 'image files are missing')}")


def _listed(paths: Sequence[str], what: str) -> str:
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return f"{len(paths)} {what}: {', '.join(paths[:_SHOWN])}{more}"
