"""Checks the output paths of a command before it starts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from vlmo.data.layout import IMAGE_SUFFIXES, holds_data
from vlmo.run_folder import RECIPE
from vlmo.training.setup import RUN_FILES
from vlmo.training.state import STATE


def check_outputs(paths: Mapping[str, Path | None], *, given: Mapping[str, Path | None]) -> None:
    """Raise for files that could not be written at the end, or that would overwrite others.

    Args:
        paths: output paths by the names of their options; None for options that are not given.
        given: input files and folders by the names of their options.

    Raises:
        OSError: a folder does not exist or is not writable, or a path is a folder.
        ValueError: two options name the same file, or one names data, a picture, or a file of a
            training.
    """
    read = {Path(os.path.realpath(path)): name for name, path in given.items() if path is not None}
    seen: dict[Path, str] = {}
    for name, path in paths.items():
        if path is None:
            continue
        final = Path(os.path.realpath(path))
        if final.is_dir():
            raise IsADirectoryError(f"{name}: {path} is a directory")
        if not final.parent.is_dir():
            raise FileNotFoundError(f"{name}: the folder of {path} does not exist")
        if not os.access(final.parent, os.W_OK):
            raise PermissionError(f"{name}: the folder of {path} cannot be written to")
        for known in (seen, read):
            if final in known:
                raise ValueError(f"{name}: {path} is the file of {known[final]} as well")
        if final.suffix.lower() in IMAGE_SUFFIXES:
            raise ValueError(f"{name}: {path} has the name of a picture")
        if final.name in RUN_FILES and final.exists() and _is_of_training(final.parent):
            raise ValueError(f"{name}: {path} is a file of the training in its folder")
        for source in read:
            if source in final.parents and holds_data(source, final):
                raise ValueError(f"{name}: {path} would be taken for data of {source}")
        seen[final] = name


def path_of_data(source: str) -> Path | None:
    """The file or folder of a source of data; None for digit scenes."""
    return None if source == "digits" else Path(source)


def _is_of_training(folder: Path) -> bool:
    return any((folder / name).exists() for name in (RECIPE, STATE))
