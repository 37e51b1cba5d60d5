"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its name when the block ends without an error.

    It is on disk before it takes the name. The suffix is kept, for writers that choose a format by
    it. After an error an older file of that name is as it was, and the temporary one is gone; after
    a kill, a hidden file may be left.

    Raises:
        OSError: the folder does not exist, the disk is full, ``path`` is a directory.
    """
    # A link is followed, or os.replace would put a file in its place.
    final = Path(os.path.realpath(path))
    if final.is_dir():
        raise IsADirectoryError(f"{final}: is a directory")
    if not final.parent.is_dir():
        raise FileNotFoundError(f"{final}: its folder does not exist")
    temporary = final.with_name(f".{final.stem}.{os.getpid()}-{secrets.token_hex(4)}{final.suffix}")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(final.parent)  # the new name as well


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write a JSON file through :func:`replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
