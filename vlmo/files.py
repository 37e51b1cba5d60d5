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
        OSError: the folder does not exist, the disk is full, ``path`` is a directory; its text
            names the file.
    """
    # A link is followed, or os.replace would put a file in its place.
    final = Path(os.path.realpath(path))
    if final.is_dir():
        raise IsADirectoryError(f"{final}: is a directory")
    if not final.parent.is_dir():
        raise FileNotFoundError(f"{final}: its folder does not exist")
    temporary = final.with_name(f".{final.stem}.{os.getpid()}-{secrets.token_hex(4)}{final.suffix}")
    try:
        with _named_in_errors(final):
            yield temporary
            _sync(temporary)
            os.replace(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(final.parent)  # the new name as well


def append(path: str | os.PathLike[str], text: str) -> None:
    """Append to a file in one call of the system, so that a kill leaves all of it or nothing.

    Raises:
        OSError: the file does not exist, the disk is full; its text names the file.
    """
    content = text.encode()
    with _named_in_errors(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        try:
            while content:  # more than one call on a full disk only, whose error the next raises
                content = content[os.write(descriptor, content) :]
        finally:
            os.close(descriptor)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write a JSON file through :func:`replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _named_in_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Name the file in an error that does not, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
