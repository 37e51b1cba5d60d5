"""Which files and folders of a user's own data serve a split, and what is said if none do."""

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
# Of each record; docs/data.md explains them.
_WANTED = {
    "textmlm": "'text'",
    "pretrain": "'image' and 'caption'",
    "retrieval": "'image' and 'caption'",
    "vqa": "'image', 'question' and 'answer'",
    "nlvr2": "'image_0', 'image_1', 'statement' and 'label'",
}
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})(-[0-9a-f]+)?")  # as Hugging Face names parts of a split
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_SHOWN = 10  # files in an error


class Layout(NamedTuple):
    """What serves a split.

    Attributes:
        files: of records or of texts, in order; none for pictures that lie beside their captions.
        pictures: these, in order.
        root: folder that errors and picture names refer to.
        mixed: the files hold other splits as well, if their records say so.
        within: of the records, only those whose picture lies in this folder; None for all.
    """

    files: Sequence[Path]
    pictures: Sequence[Path]
    root: Path
    mixed: bool = False
    within: Path | None = None


def split_of(name: str) -> str | None:
    """The split that a name means; None if it means none."""
    name = name.strip().lower()
    return next((split for split, names in SPLIT_NAMES.items() if name in names), None)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is none of a user's, but of a system or a program."""
    return name.startswith(".") or name.lower() in ("__macosx", "@eadir", "thumbs.db")


def is_saved_by_hugging_face(folder: Path) -> bool:
    """Whether a folder is one of ``save_to_disk``: of a data set or of a dictionary of them."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def holds_data(source: Path, file: Path) -> bool:
    """Whether a file in a folder of data, or below, is or would be read as data of some kind."""
    suffix = file.suffix.lower()
    if suffix == ".arrow" or suffix in IMAGE_SUFFIXES or file.name in _METADATA:
        return True
    if suffix == ".txt" and any(file.with_suffix(kind).is_file() for kind in IMAGE_SUFFIXES):
        return True
    named = split_of(_SHARD.sub("", file.stem)) is not None
    return named and suffix in (*RECORD_SUFFIXES, ".txt") and file.parent == source


def find(source: Path, task: str, split: str) -> Layout:
    """What serves a split of a source.

    Raises:
        FileNotFoundError: there is nothing for the split.
        ValueError: there are two things for it, or the source is of another kind.
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
    """Whether a source tells its splits apart; else all of it serves any split.

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
    """Number and names of some paths, of which the first ten are shown."""
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return f"{len(paths)} {what}: {', '.join(paths[:_SHOWN])}{more}"


def _name_splits(files: Iterable[Path]) -> bool:
    return any("split" in row.values for file in files for row in file_rows(file, ("split",)))


def _named_files(folder: Path, suffixes: Sequence[str]) -> dict[tuple[str, str], list[Path]]:
    """Files with the name of a split, by that name and suffix; parts of a split are together."""
    found: dict[tuple[str, str], list[Path]] = {}
    for path in sorted(folder.iterdir()):
        name = _SHARD.sub("", path.stem)
        if path.suffix.lower() in suffixes and split_of(name) is not None and path.is_file():
            found.setdefault((name.lower(), path.suffix.lower()), []).append(path)
    return found


def _whole(files: Sequence[Path]) -> Sequence[Path]:
    """The parts of a split, if none of them is missing."""
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
    """Folders with the name of a split, by split."""
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
    """The Arrow files of a data set that Hugging Face saved."""
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
    """Pictures in a folder and below, texts, and files that tell of the pictures beside them."""

    pictures: list[Path]
    texts: list[Path]
    metadata: list[Path]


def _walk(folder: Path) -> _Found:
    """What lies in a folder and below; links to folders are followed, each folder once."""
    found = _Found([], [], [])
    seen = {os.path.realpath(folder)}
    for place, folders, names in os.walk(folder, followlinks=True):
        path = Path(place)
        below = [name for name in sorted(folders) if not is_hidden(name)]
        # A folder itself comes before a link to it.
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
    if alone:  # of pictures that are gone, or of a format that is not looked for
        kinds = ", ".join(IMAGE_SUFFIXES)
        what = listed(alone, f".txt lie beside no picture ({kinds}) and are left out")
        warnings.warn(f"{folder}: {what}", stacklevel=2)
    return Layout((), pictures, folder)


def _nothing(
    source: Path, folder: Path, task: str, split: str, bare: Sequence[str], pictures: int
) -> str:
    """What was found in the folder of a split that does not serve a task, and what is wanted."""
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
