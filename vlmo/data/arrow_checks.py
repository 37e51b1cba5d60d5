"""Checks of unilm's Arrow files, so that no sample fails later or is read wrongly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vlmo.data.tables import check_offsets, is_binary, is_list, is_number, is_text
from vlmo.data.tokenizer import VISIBLE, is_blank


class _Kind(NamedTuple):
    """The kind of values in a column, which are nested in ``depth`` levels of lists."""

    depth: int
    fits: Callable[[pa.DataType], bool]
    name: str


def _is_identity(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or is_text(kind)


_PICTURE = _Kind(0, is_binary, "a picture in bytes")
_TEXTS = _Kind(1, is_text, "a list of texts")
_IDENTITY = _Kind(0, _is_identity, "an integer or a text")
_LABELS = _Kind(2, pa.types.is_integer, "a list of lists of integers")
_CAPTIONS = {"image": _PICTURE, "caption": _TEXTS, "image_id": _IDENTITY}
_COLUMNS = {
    "textmlm": {"caption": _TEXTS},
    "pretrain": _CAPTIONS,
    "retrieval": _CAPTIONS,
    "vqa": {
        "image": _PICTURE,
        "questions": _TEXTS,
        "image_id": _IDENTITY,
        "question_id": _Kind(1, _is_identity, "a list of integers or texts"),
        "answer_labels": _LABELS,
        "answer_scores": _Kind(2, is_number, "a list of lists of numbers"),
    },
    "nlvr2": {
        "image_0": _PICTURE,
        "image_1": _PICTURE,
        "questions": _TEXTS,
        "answers": _Kind(1, lambda kind: is_text(kind) or is_number(kind), "a list of texts"),
        "identifier": _IDENTITY,
    },
}
_NAMES_OF_ANSWERS = {
    "answers": _Kind(2, is_text, "a list of lists of texts"),
    "answer_labels": _LABELS,
}


def check_table(table: pa.Table, path: Path, task: str) -> None:
    """Raise ValueError unless a file has the columns and values that a task's samples need."""
    text = "questions" if task in ("vqa", "nlvr2") else "caption"
    _check_columns(table, path, _COLUMNS[task])
    # In pre-training, a picture without an id counts as a picture of its own.
    identity = {"retrieval": "image_id", "nlvr2": "identifier"}.get(task)
    if identity is not None:
        _refuse(path, pc.is_null(table[identity]).to_numpy(), f"has no {identity!r}")
    single = {"vqa": "question_id", "nlvr2": "answers"}.get(task)
    if single is not None:
        differ = _lengths(table[text]) != _lengths(table[single])
        _refuse(path, differ, f"{text} and {single} are of unequal length")
        missing = pc.is_null(flat(table[single])).to_numpy()
        _refuse(path, missing, f"{single}: one is missing", _parents(table[single]))
    if task == "vqa":
        for name in ("answer_labels", "answer_scores"):
            differ = _lengths(table[text]) != _lengths(table[name])
            filled = _parents(table[name])[_lengths(flat(table[name])) > 0]
            differ &= np.bincount(filled, minlength=len(table)) > 0  # but for unlabelled questions
            _refuse(path, differ, f"{text} and {name} are of unequal length")
        _check_pairs(table, path, "answer_labels", "answer_scores")
        scores = flat(flat(table["answer_scores"])).to_numpy()
        if not ((scores >= 0) & (scores <= 1)).all():
            raise ValueError(f"{path}: answer_scores: some are not within 0..1")
    if task == "nlvr2":
        for value in pc.unique(flat(table["answers"])).to_pylist():
            if str(value) not in ("True", "False"):
                raise ValueError(f"{path}: answers: {value!r} is neither 'True' nor 'False'")


def check_names_of_answers(table: pa.Table, path: Path) -> None:
    """Raise ValueError unless a file of questions names every answer."""
    _check_columns(table, path, _NAMES_OF_ANSWERS)
    _check_pairs(table, path, "answer_labels", "answers")


def _check_columns(table: pa.Table, path: Path, columns: Mapping[str, _Kind]) -> None:
    """Raise ValueError if a column is missing, has another type, or is damaged."""
    if lacking := [name for name in columns if name not in table.column_names]:
        raise ValueError(f"{path}: lacks the columns {', '.join(lacking)}")
    for name, kind in columns.items():
        if not _fits(table[name].type, kind):
            raise ValueError(f"{path}: {name}: {table[name].type} is not {kind.name}")
        check_offsets(table[name], path, name)


def _fits(found: pa.DataType, kind: _Kind) -> bool:
    for level in range(kind.depth):
        if not is_list(found):
            return level > 0 and pa.types.is_null(found)  # if every list is empty
        found = found.value_type
    return kind.fits(found) or (kind.depth > 0 and pa.types.is_null(found))


def _check_pairs(table: pa.Table, path: Path, *names: str) -> None:
    """Raise ValueError unless two columns of nested lists have the same shape and no nulls."""
    columns = [table[name] for name in names]
    message = f"{' and '.join(names)} are of unequal length"
    _refuse(path, np.not_equal(*map(_lengths, columns)), message)
    inner = [*map(flat, columns)]
    parents = _parents(columns[0])
    _refuse(path, np.not_equal(*map(_lengths, inner)), message, parents)
    for name, lists in zip(names, inner, strict=True):
        missing = pc.is_null(flat(lists)).to_numpy()
        _refuse(path, missing, f"{name}: one is missing", parents[_parents(lists)])


def _refuse(path: Path, wrong: np.ndarray, message: str, rows: np.ndarray | None = None) -> None:
    """Raise ValueError for the first entry that is ``wrong``; ``rows`` gives the entries' rows."""
    if wrong.any():
        first = int(wrong.argmax())
        raise ValueError(f"{path}, row {first if rows is None else rows[first]}: {message}")


def flat(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The members of all lists, concatenated."""
    return column if pa.types.is_null(column.type) else pc.list_flatten(column)


def _lengths(column: pa.ChunkedArray) -> np.ndarray:
    """Lengths of the lists, int64 [rows]; a missing list has length 0."""
    if pa.types.is_null(column.type):
        return np.zeros(len(column), np.int64)
    return pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)


def _parents(column: pa.ChunkedArray) -> np.ndarray:
    """The row of the list that each member belongs to, int64."""
    return np.repeat(np.arange(len(column)), _lengths(column))


def kept(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """A mask of the texts that are neither blank nor missing, and their number in each row."""
    texts = flat(column)
    if pa.types.is_null(texts.type):
        mask = np.zeros(len(texts), bool)
    else:
        texts = texts.cast(pa.binary() if pa.types.is_string(texts.type) else pa.large_binary())
        found = pc.match_substring_regex(texts, VISIBLE)
        mask = pc.fill_null(found, False).to_numpy().copy()
        for number in np.flatnonzero(~mask):  # few: texts without visible ASCII characters
            content = texts[int(number)].as_py()
            mask[number] = content is not None and not is_blank(content.decode(errors="replace"))
    ends = np.cumsum(_lengths(column))
    before = np.concatenate([[0], np.cumsum(mask)])
    return mask, np.diff(before[np.concatenate([[0], ends])])


def members(column: pa.ChunkedArray) -> np.ndarray:
    """The position of each text within its row, int32."""
    lengths = _lengths(column)
    first = np.cumsum(lengths) - lengths
    return (np.arange(lengths.sum()) - np.repeat(first, lengths)).astype(np.int32)
