"""The Arrow files of unilm (the reference implementation): a row per image, its texts in a list.

The files are memory-mapped and never read as a whole. ``DATASETS`` names the files of each data
set; docs/data.md lists the columns.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from vlmo.data import identity
from vlmo.data.arrow_checks import check_names_of_answers, check_table, flat, kept, members
from vlmo.data.layout import is_hidden, listed
from vlmo.data.samples import Samples, picture_names
from vlmo.data.tables import open_arrow_file
from vlmo.data.transforms import SquareTransform, read_image

_COCO, _F30K = "coco_caption_karpathy", "f30k_caption_karpathy"

_MOST_ANSWERS = 2**20  # far more than any answer vocabulary has
# Files of each split of each data set, without the suffix ".arrow".
DATASETS: dict[str, dict[str, tuple[str, ...]]] = {
    "coco": {
        "train": (f"{_COCO}_train", f"{_COCO}_restval"),
        "val": (f"{_COCO}_val",),
        "test": (f"{_COCO}_test",),
    },
    "f30k": {split: (f"{_F30K}_{split}",) for split in ("train", "val", "test")},
    "vg": {"train": ("vg",)},
    "sbu": {"train": tuple(f"sbu_{n}" for n in range(9))},
    "gcc": {
        "train": tuple(f"conceptual_caption_train_{n}" for n in range(30)),
        "val": ("conceptual_caption_val_0",),
    },
    "wikibk": {"train": tuple(f"wikibk_train_{n}" for n in range(50)), "val": ("wikibk_val_0",)},
    "vqa": {
        "train": ("vqav2_train", "vqav2_trainable_val"),
        "val": ("vqav2_rest_val",),
        "test": ("vqav2_test",),
    },
    "vqa-test-dev": {"test": ("vqav2_test-dev",)},
    "nlvr2": {
        "train": ("nlvr2_train",),
        "val": ("nlvr2_dev", "nlvr2_test1"),
        "test": ("nlvr2_test1",),
    },
}
_DATASET_OF = {
    name: dataset
    for dataset, splits in DATASETS.items()
    for names in splits.values()
    for name in names
}
_CAPTIONED = ("coco", "f30k", "vg", "sbu", "gcc")
_ALLOWED = {
    "textmlm": ("wikibk", *_CAPTIONED),
    "pretrain": _CAPTIONED,
    "retrieval": ("coco", "f30k"),
    "vqa": ("vqa", "vqa-test-dev"),
    "nlvr2": ("nlvr2",),
}
_DEFAULT = {
    "textmlm": ("wikibk",),
    "pretrain": ("coco", "vg", "sbu", "gcc"),
    "vqa": ("vqa",),
    "nlvr2": ("nlvr2",),
}


def open_arrow(
    folder: Path,
    task: str,
    split: str,
    transform: SquareTransform,
    *,
    answers: Sequence[str] | None = None,
    datasets: Sequence[str] | None = None,
) -> ArrowSamples:
    """Open a data set in the Arrow files of unilm.

    Args:
        folder: the folder that holds the files.
        task: see :func:`~vlmo.data.open_data`.
        split: see :func:`~vlmo.data.open_data`.
        transform: applied to the pictures.
        answers: the answers of vqa; None for those that the files name.
        datasets: names of ``DATASETS``; None for those that unilm uses for the task (for retrieval,
            whichever of coco and f30k is there). Data sets without files of the split are skipped.

    Raises:
        FileNotFoundError: files are missing; all of them are named.
        ValueError: an argument is invalid, or files are damaged or have other columns.
    """
    _require_official(folder)
    chosen = chosen_datasets(folder, task, datasets)
    names = [name for dataset in chosen for name in DATASETS[dataset].get(split, ())]
    if not names:
        raise ValueError(f"datasets: {', '.join(chosen)} have no split {split!r}")
    _require_files(folder, split, chosen)
    if task == "vqa":
        answers = _vqa_answers(folder, answers)
    return ArrowSamples([folder / f"{name}.arrow" for name in names], task, transform, answers)


class ArrowSamples(Samples):
    """One sample per image and text of some Arrow files; blank and missing texts are left out.

    Every process opens the files itself, so that forked and spawned workers behave alike.

    Args:
        paths: files of the same task, in order.
        task: see :func:`~vlmo.data.open_data`.
        transform: applied to the pictures.
        answers: the answers of vqa.

    Warns:
        UserWarning: texts are left out.

    Raises:
        ValueError: a file is not an Arrow file, is damaged, or lacks a column or values; or no text
            remains.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        task: str,
        transform: SquareTransform,
        answers: Sequence[str] | None = None,
    ):
        super().__init__(picture_names(task), transform, answers)
        self._paths, self._task = list(paths), task
        self._text = "questions" if task in ("vqa", "nlvr2") else "caption"
        self._tables: tuple[int, list[pa.Table]] | None = None
        for table, path in zip(self._open(), paths, strict=True):
            check_table(table, path, task)
        found = [kept(table[self._text]) for table in self._open()]
        self._warn_of([mask.size - int(mask.sum()) for mask, _ in found])
        # The number of the first row of each file and of the first sample of each row; the last
        # entry is the total.
        self._first_row = np.cumsum([0, *(len(counts) for _, counts in found)])
        self._first_sample = np.cumsum(np.concatenate([[0], *(counts for _, counts in found)]))
        # The number of each sample's text within its row; None if no text is left out.
        self._numbers = None
        if not all(mask.all() for mask, _ in found):
            numbers = [members(table[self._text]) for table in self._open()]
            pairs = zip(numbers, found, strict=True)
            self._numbers = np.concatenate([n[mask] for n, (mask, _) in pairs])
        if not len(self):
            raise ValueError(
                f"{paths[0]}: holds no text" + " and the others neither" * (len(paths) > 1)
            )

    def __len__(self) -> int:
        return int(self._first_sample[-1])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tables": None}

    def fields(self, index: int) -> dict[str, Any]:
        file, row, number = self._locate(index)
        table = self._open()[file]
        sample = {"text": _member(table, self._text, row, number)}
        if self._task in ("pretrain", "retrieval"):
            sample["image_id"] = table["image_id"][row].as_py()
        elif self._task == "vqa":
            sample["image_id"] = table["image_id"][row].as_py()
            sample["question_id"] = _member(table, "question_id", row, number)
            # The answer lists of test questions are empty, or the column is one empty list per row.
            for name in ("answer_labels", "answer_scores"):
                given = table[name][row].as_py() or []
                sample[name] = (given[number] or []) if number < len(given) else []
        elif self._task == "nlvr2":
            sample["answers"] = int(str(_member(table, "answers", row, number)) == "True")
            sample["identifier"] = table["identifier"][row].as_py()
            sample["table_name"] = self._paths[file].stem
        return sample

    def picture(self, index: int, name: str) -> Image.Image:
        file, row, _ = self._locate(index)
        content = self._open()[file][name][row].as_py()
        if content is None:
            raise ValueError(f"{self._paths[file]}, row {row}: has no {name!r}")
        return read_image(content, f"{self._paths[file]}, row {row}, {name}")

    def place(self, index: int, name: str | None = None) -> tuple[str, int | None]:
        file, row, _ = self._locate(index)
        return os.fspath(self._paths[file]), row

    def picture_numbers(self, name: str) -> np.ndarray:
        rows = np.repeat(np.arange(len(self._first_sample) - 1), np.diff(self._first_sample))
        return rows * len(self.picture_names) + self.picture_names.index(name)

    @property
    def image_ids(self) -> list[int] | list[str]:
        datasets = [_DATASET_OF.get(path.stem, path.stem) for path in self._paths]
        by_row: list[Any] = []
        for dataset, table in zip(datasets, self._open(), strict=True):
            identities = table["image_id"].to_pylist()
            if len(set(datasets)) > 1:  # which may use the same id for different pictures
                identities = [f"{dataset}/{identity}" for identity in identities]
            by_row += identities
        return [by_row[row] for row in np.repeat(range(len(by_row)), np.diff(self._first_sample))]

    @property
    def keys(self) -> np.ndarray | None:
        if self._task not in ("pretrain", "retrieval"):
            return None
        text = pa.large_string()
        slash = pa.scalar("/", text)
        ids = []
        for table, path in zip(self._open(), self._paths, strict=True):
            name = pa.scalar(_DATASET_OF.get(path.stem, path.stem), text)
            numbers = table["image_id"].cast(text).chunks
            ids += [pc.binary_join_element_wise(name, chunk, slash) for chunk in numbers]
        rows = identity.numbered(pa.chunked_array(ids, text))
        return identity.none_if_different(np.repeat(rows, np.diff(self._first_sample)))

    def fingerprint(self) -> str:
        return identity.fingerprint(table[name] for table in self._open() for name in self._told())

    def _locate(self, index: int) -> tuple[int, int, int]:
        """The file, the row in the file, and the text in the row that make up a sample."""
        row = int(np.searchsorted(self._first_sample, index, side="right")) - 1
        file = int(np.searchsorted(self._first_row, row, side="right")) - 1
        number = index - int(self._first_sample[row])
        if self._numbers is not None:
            number = int(self._numbers[index])
        return file, row - int(self._first_row[file]), number

    def _open(self) -> list[pa.Table]:
        """The tables of the files, memory-mapped by the calling process."""
        if self._tables is None or self._tables[0] != os.getpid():
            self._tables = os.getpid(), [open_arrow_file(path) for path in self._paths]
        return self._tables[1]

    def _told(self) -> tuple[str, ...]:
        """Columns to read, without the pictures."""
        extra = {
            "pretrain": ("image_id",),
            "retrieval": ("image_id",),
            "vqa": ("image_id", "question_id", "answer_labels", "answer_scores"),
            "nlvr2": ("answers", "identifier"),
        }
        return (self._text, *extra.get(self._task, ()))

    def _warn_of(self, left_out: Sequence[int]) -> None:
        if any(left_out):
            named = [f"{p.name} ({n})" for p, n in zip(self._paths, left_out, strict=True) if n]
            warnings.warn(
                f"{self._paths[0].parent}: {sum(left_out)} blank or missing texts are left out, in "
                f"{listed(named, 'files')}",
                stacklevel=4,
            )


def chosen_datasets(folder: Path, task: str, datasets: Sequence[str] | None) -> Sequence[str]:
    """Names of the data sets that :func:`open_arrow` opens."""
    allowed = _ALLOWED[task]
    if datasets is not None:
        if isinstance(datasets, str) or not datasets:
            raise ValueError(f"datasets: {datasets!r} is not a list of {', '.join(allowed)}")
        for name in datasets:
            if name not in allowed:
                raise ValueError(f"datasets: {name!r} is not one of {', '.join(allowed)}")
        return datasets
    if task in _DEFAULT:
        return _DEFAULT[task]
    present = [name for name in allowed if any(_present(folder, name))]
    if len(present) > 1:
        raise ValueError(f"datasets: {folder} holds {' and '.join(present)}, choose one")
    return present or allowed


def datasets_there(folder: Path, split: str | None = None) -> dict[str, tuple[str, ...]]:
    """Data sets that have files (of a split) in a folder, by a task that can open them."""
    found = {
        task: tuple(name for name in _ALLOWED[task] if _present(folder, name, split))
        for task in ("pretrain", "vqa", "nlvr2")
    }
    texts = ("wikibk",) if _present(folder, "wikibk", split) else ()
    return {task: names for task, names in (found | {"textmlm": texts}).items() if names}


def _present(folder: Path, dataset: str, split: str | None = None) -> list[str]:
    of_splits = DATASETS[dataset]
    chosen = of_splits.values() if split is None else [of_splits.get(split, ())]
    names = {name for files in chosen for name in files}
    return [name for name in names if (folder / f"{name}.arrow").is_file()]


def _require_official(folder: Path) -> None:
    if not any(_present(folder, name) for name in DATASETS):
        found = sorted(path.name for path in folder.glob("*.arrow"))
        names = [name for name in found if not is_hidden(name)]
        raise ValueError(
            f"{folder}: {listed(names, 'Arrow files')}, none of them named as one of the official "
            "code, such as vg.arrow; other data are read from records (JSON Lines, Parquet, ...) "
            "or from a folder of Hugging Face's save_to_disk"
        )


def _require_files(folder: Path, split: str, datasets: Sequence[str]) -> None:
    missing = [
        f"{name}.arrow for {dataset}"
        for dataset in datasets
        for name in DATASETS[dataset].get(split, ())
        if not (folder / f"{name}.arrow").is_file()
    ]
    if missing:
        there = [name for name in DATASETS if _present(folder, name)]
        raise FileNotFoundError(
            f"{folder}: {len(missing)} files of the {split} split are missing: {', '.join(missing)}"
            f"; datasets (--datasets) chooses others, here are files of {', '.join(there)}"
        )


def _member(table: pa.Table, column: str, row: int, number: int) -> Any:
    return table[column][row][number].as_py()


def _vqa_answers(folder: Path, given: Sequence[str] | None) -> list[str]:
    """The answers in the order of their ids, as the labelled files name them.

    Raises:
        ValueError: an id has no name, or the names differ from the given ones.
    """
    names: dict[int, str] = {}
    for stem in sorted({*_present(folder, "vqa")} - {"vqav2_test"}):
        path = folder / f"{stem}.arrow"
        table = open_arrow_file(path)
        check_names_of_answers(table, path)
        labels, texts = (flat(flat(table[name])) for name in ("answer_labels", "answers"))
        pairs = pa.table({"label": labels, "text": texts}).group_by(["label", "text"]).aggregate([])
        for pair in pairs.to_pylist():
            label, text = pair["label"], pair["text"]
            if not 0 <= label < _MOST_ANSWERS:
                most = _MOST_ANSWERS - 1
                raise ValueError(
                    f"{path}: answer_labels: {label} of {text!r} is not within 0..{most}"
                )
            if names.setdefault(label, text) != text:
                raise ValueError(f"{folder}: answer {label} is {names[label]!r} and {text!r}")
    if given is not None:
        for label, text in names.items():
            if label >= len(given) or given[label] != text:
                found = repr(given[label]) if label < len(given) else "missing"
                raise ValueError(f"answers: answer {label} is {found}, but {text!r} in {folder}")
        return list(given)
    if not names:
        raise ValueError(f"answers: {folder} has no labelled questions to take them from")
    unnamed = sorted(set(range(max(names, default=0) + 1)) - set(names))
    if unnamed:
        raise ValueError(
            f"{folder}: {len(unnamed)} answers have no name in its files, the first is answer "
            f"{unnamed[0]}: give the answers"
        )
    return [names[label] for label in range(len(names))]
