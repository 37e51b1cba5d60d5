"""Where a command is to write, looked at before it begins."""

from __future__ import annotations

import os
from pathlib import Path


def check_outputs(**paths: Path | None) -> None:
    """Raise for files that could not be written at the end, so that nothing is done in vain.

    Args:
        paths: by the names of their options; None for what is not written.

    Raises:
        OSError: a folder does not exist or is not to be written to, or a path is a folder.
        ValueError: two options name the same file.
    """
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
        if final in seen:
            raise ValueError(f"{name}: {path} is the file of {seen[final]} as well")
        seen[final] = name
