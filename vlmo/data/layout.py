"""The files and folders of a user's own data that form a split, and errors if none do."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import warnings
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from vlmo.data.records import RAW_KINDS, RECORD_SUFFIXES, file_rows

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SPLIT_NAMES = {
    "train": ("train",),
    "val": ("val", "validation", "valid", "dev"),
    "test": ("test",),
}
# Fields that a record of each task needs; docs/data.md explains them.
_WANTED = {
    "textmlm": "'text'",
    "pretrain": "'image' and 'caption'",
    "retrieval": "'image' and 'caption'",
    "vqa": "'image', 'question' and 'answer'",
    "nlvr2": "'image_0', 'image_1', 'statement' and 'label'",
}
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})(-[0-9a-f]+)?")  # shards as Hugging Face names them
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_SHOWN = 10  # files listed in an error


class Layout(NamedTuple):
    """The files that form a split.

    Attributes:
        files: files of records or of texts, in order; empty for pictures with caption files.
        pictures: pictures that have a caption file beside them, in order.
        root: folder that errors and picture names refer to.
        mixed: the files hold records of other splits as well, if the records name their split.
        within: only records whose picture is in this folder count; None for all records.
    """

    files: Sequence[Path]
    pictures: Sequence[Path]
    root: Path
    mixed: bool = False
    within: Path | None = None


def split_of(name: str) -> str | None:
    """The split that a name stands for; None if it is not the name of a split."""
    name = name.strip().lower()
    return next((split for split, names in SPLIT_NAMES.items() if name in names), None)


def is_hidden(name: str) -> bool:
    """Whether a file or folder was created by a system or a program, not by the user."""
    return name.startswith(".") or name.lower() in ("__macosx", "@eadir", "thumbs.db")


def is_saved_by_hugging_face(folder: Path) -> bool:
    """Whether ``save_to_disk`` wrote a folder, for a data set or for a dictionary of data sets."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def holds_data(source: Path, file: Path) -> bool:
    """Whether a file in a folder of data, or below it, is or could be read as data of any kind."""
    suffix = file.suffix.lower()
    if suffix == ".arrow" or suffix in IMAGE_SUFFIXES or file.name in _METADATA:
        return True
    if suffix == ".txt" and any(file.with_suffix(kind).is_file() for kind in IMAGE_SUFFIXES):
        return True
    named = split_of(_SHARD.sub("", file.stem)) is not None
    return named and suffix in (*RECORD_SUFFIXES, ".txt") and file.parent == source


def find(source: Path, task: str, split: str) -> Layout:
    """Find the files that form a split of a source.

    Raises:
        FileNotFoundError: the source has no data for the split.
        ValueError: it has two candidates for the split, or the source is of another kind.
    """
    suffixes = (*RECORD_SUFFIXES, ".txt") if task == "textmlm" else RECORD_SUFFIXES
    if source.is_file():
        if source.suffix.lower() not in suffixes:
            hint = {
                ".txt": ": texts without pictures are for textmlm",
                ".arrow": ": give the folder of the Arrow files",
            }.get(source.suffix.lower(), "")
            raise ValueError(
                f"source: {source} is not a file of {', '.join(suffixes)} for {task}{hint}"
            )
        return Layout([source], (), source.parent, mixed=True)
    if is_saved_by_hugging_face(source):
        return _find_saved(source, split)
    named = _named_files(source, suffixes)
    found = {key: files for key, files in named.items() if key[0] in SPLIT_NAMES[split]}
    if len(found) > 1:
        raise _ambiguous(source, [files[0].name for files in found.values()])
    if found:
        (files,) = found.values()
        return Layout(_whole(files), (), source)
    if named:
        raise FileNotFoundError(f"{source}: has no {_any_of(split, suffixes)}")
    return _find_pictures(source, task, split, suffixes)


def tells_splits(source: Path) -> bool:
    """Whether a source distinguishes splits; otherwise all of it serves as any split.

    Raises:
        ValueError: its records cannot be read.
    """
    if source.is_file():
        return source.suffix.lower() in RECORD_SUFFIXES and _name_splits([source])
    if is_saved_by_hugging_face(source):
        return (source / "dataset_dict.json").is_file() or _name_splits(_saved_files(source))
    if _named_files(source, (*RECORD_SUFFIXES, ".txt")) or _split_folders(source):
        return True
    return _name_splits(_walk(source).metadata)


def listed(paths: Sequence[str], what: str) -> str:
    """The number of some paths and the names of the first ten."""
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return f"{len(paths)} {what}: {', '.join(paths[:_SHOWN])}{more}"


def _name_splits(files: Iterable[Path]) -> bool:
    return any("split" in row.values for file in files for row in file_rows(file, ("split",)))


def _named_files(folder: Path, suffixes: Sequence[str]) -> dict[tuple[str, str], list[Path]]:
    """Files named after a split, by that name and suffix; the parts of a split are grouped."""
    found: dict[tuple[str, str], list[Path]] = {}
    for path in sorted(folder.iterdir()):
        name = _SHARD.sub("", path.stem)
        if path.suffix.lower() in suffixes and split_of(name) is not None and path.is_file():
            found.setdefault((name.lower(), path.suffix.lower()), []).append(path)
    return found


def _whole(files: Sequence[Path]) -> Sequence[Path]:
    """The parts of a split; raises if parts are missing or the names are ambiguous."""
    shards = [_SHARD.search(path.stem) for path in files]
    if len(files) == 1 and shards[0] is None:
        return files
    totals = {shard[2] for shard in shards if shard is not None}
    numbers = [int(shard[1]) for shard in shards if shard is not None]
    if len(totals) > 1 or len(numbers) < len(files) or len(set(numbers)) < len(numbers):
        raise _ambiguous(files[0].parent, [path.name for path in files])
    lacking = sorted(set(range(int(totals.pop()))) - set(numbers))
    if lacking:
        names = [f"part {number:05}" for number in lacking]
        raise FileNotFoundError(f"{files[0].parent}: {listed(names, 'files like it are missing')}")
    return files


def _ambiguous(folder: Path, names: Sequence[str]) -> ValueError:
    return ValueError(f"source: {folder} has {' and '.join(names)} for one split, keep one")


def _any_of(split: str, suffixes: Sequence[str]) -> str:
    names = [f"{split}{suffix}" for suffix in suffixes]
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _split_folders(source: Path) -> dict[str, list[Path]]:
    """Folders named after a split, by split."""
    found: dict[str, list[Path]] = {}
    for path in sorted(source.iterdir()):
        split = split_of(path.name)
        if split is not None and path.is_dir():
            found.setdefault(split, []).append(path)
    return found


def _find_saved(source: Path, split: str) -> Layout:
    if not (source / "dataset_dict.json").is_file():
        return Layout(_saved_files(source), (), source, mixed=True)
    folders = _split_folders(source).get(split, [])
    if not folders:
        raise FileNotFoundError(f"{source}: has no folder {' or '.join(SPLIT_NAMES[split])}")
    if len(folders) > 1:
        raise _ambiguous(source, [folder.name for folder in folders])
    return Layout(_saved_files(folders[0]), (), source)


def _saved_files(folder: Path) -> list[Path]:
    """The Arrow files of a data set that Hugging Face's ``save_to_disk`` wrote."""
    path = folder / "state.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: does not exist, so no data set is saved in its folder")
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        files = [folder / file["filename"] for file in state["_data_files"]]
        chosen = state.get("_indices_files") or state.get("_indices_data_files")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: is not that of a data set saved by Hugging Face") from error
    if chosen:
        raise ValueError(f"{path}: only some rows were chosen: save it after flatten_indices()")
    if missing := [os.fspath(file) for file in files if not file.is_file()]:
        raise FileNotFoundError(f"{folder}: {listed(missing, 'files are missing')}")
    return files


class _Found(NamedTuple):
    """Pictures in a folder and below it, text files, and metadata files that describe pictures."""

    pictures: list[Path]
    texts: list[Path]
    metadata: list[Path]


def _walk(folder: Path) -> _Found:
    """Find the files in a folder and below it; links are followed, but each folder is read once."""
    found = _Found([], [], [])
    seen = {os.path.realpath(folder)}
    for place, folders, names in os.walk(folder, followlinks=True):
        path = Path(place)
        below = [name for name in sorted(folders) if not is_hidden(name)]
        # Visit a folder itself before links to it.
        below.sort(key=lambda name: (path / name).is_symlink())
        folders.clear()
        for name in below:
            real = os.path.realpath(path / name)
            if real not in seen:
                seen.add(real)
                folders.append(name)
        names = [name for name in names if not is_hidden(name)]
        found.pictures.extend(path / n for n in names if n.lower().endswith(IMAGE_SUFFIXES))
        found.texts.extend(path / name for name in names if name.endswith(".txt"))
        found.metadata.extend(_metadata(path, names))
    return _Found(*map(sorted, found))


def _metadata(folder: Path, names: Collection[str]) -> list[Path]:
    found = [name for name in _METADATA if name in names]
    if len(found) > 1:
        raise _ambiguous(folder, found)
    return [folder / name for name in found]


def _find_pictures(source: Path, task: str, split: str, suffixes: Sequence[str]) -> Layout:
    folder, folders = source, _split_folders(source)
    if folders:
        mine = folders.get(split, [])
        if len(mine) > 1:
            raise _ambiguous(source, [path.name for path in mine])
        folder = mine[0] if mine else source / split
        if not mine:
            raise FileNotFoundError(f"{folder}: does not exist")
    pictures, texts, metadata = _walk(folder)
    if metadata:
        return Layout(metadata, (), folder, mixed=not folders)
    if folders and (metadata := _metadata(source, os.listdir(source))):
        return Layout(metadata, (), folder, within=folder)
    bare = [os.fspath(path) for path in pictures if not path.with_suffix(".txt").is_file()]
    if not pictures or task in ("vqa", "nlvr2") or len(bare) == len(pictures):
        raise FileNotFoundError(_nothing(source, folder, task, split, bare, len(pictures)))
    if bare:
        raise FileNotFoundError(f"{folder}: {listed(bare, 'pictures have no .txt of captions')}")
    stems = {os.path.splitext(path)[0] for path in pictures}
    alone = [os.fspath(path) for path in texts if os.path.splitext(path)[0] not in stems]
    if alone:  # their pictures are missing or of an unsupported format
        kinds = ", ".join(IMAGE_SUFFIXES)
        what = listed(alone, f".txt lie beside no picture ({kinds}) and are left out")
        warnings.warn(f"{folder}: {what}", stacklevel=2)
    return Layout((), pictures, folder)


def _nothing(
    source: Path, folder: Path, task: str, split: str, bare: Sequence[str], pictures: int
) -> str:
    """Error text: what the folder of a split contains, and what the task needs."""
    visible = [path for path in sorted(folder.iterdir()) if not is_hidden(path.name)]
    for path in (*visible, *sorted(source.glob("*.json"))):
        for kind in RAW_KINDS:
            if fnmatch.fnmatch(path.name, kind.name):
                return f"{path}: {kind.advice}"
    others = ", ".join(RECORD_SUFFIXES[1:])
    needs = f"{task} needs {source / split}.jsonl (or {others}) with {_WANTED[task]} in each record"
    if task == "textmlm":
        needs += f", or {split}.txt"
    records = [path.name for path in visible if path.suffix.lower() in RECORD_SUFFIXES]
    if records:
        return (
            f"{folder}: holds {listed(records, 'files whose names say no split')}; {needs}: rename "
            "the file, or give it itself as the source"
        )
    if pictures and task in ("vqa", "nlvr2"):
        return f"{folder}: holds {pictures} pictures but no records; {needs}"
    if pictures:
        what = listed(bare, "pictures have no .txt of captions")
        return f"{folder}: {what}; {needs}, or such a .txt beside each picture"
    for below in visible:
        if below.is_dir() and (_named_files(below, RECORD_SUFFIXES) or any(below.glob("*.arrow"))):
            return f"{folder}: holds no data itself; its folder {below.name} does: give {below}"
    kinds = ", ".join(IMAGE_SUFFIXES)
    return f"{folder}: holds no pictures ({kinds}), no records and no Arrow files; {needs}"
