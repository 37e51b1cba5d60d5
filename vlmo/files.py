"""Atomic replacement of files, and reading of texts in any Unicode encoding."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

# By byte order mark; that of UTF-32 starts with that of UTF-16.
_ENCODINGS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that replaces it when the block ends without an error.

    The temporary file is flushed to disk before it is renamed. It has the same suffix, for writers
    that choose a format by suffix. After an error an existing file is unchanged and the temporary
    one is deleted; after a kill, a hidden file may remain.

    Raises:
        OSError: the folder does not exist, the disk is full, or ``path`` is a directory; the
            message names the file.
    """
    # Follow a link: os.replace would replace the link itself.
    final = Path(os.path.realpath(path))
    if final.is_dir():
        raise IsADirectoryError(f"{final}: is a directory")
    if not final.parent.is_dir():
        raise FileNotFoundError(f"{final}: its folder does not exist")
    temporary = final.with_name(f".{final.stem}.{os.getpid()}-{secrets.token_hex(4)}{final.suffix}")
    try:
        with named_in_errors(final):
            yield temporary
            _sync(temporary)
            os.replace(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(final.parent)  # for the new name


def append(path: str | os.PathLike[str], text: str) -> None:
    """Append to a file with a single system call, so that a kill leaves all of the text or nothing.

    Raises:
        OSError: the file does not exist, or the disk is full; the message names the file.
    """
    content = text.encode()
    with named_in_errors(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        try:
            while content:  # a second call occurs only on a full disk, and raises
                content = content[os.write(descriptor, content) :]
        finally:
            os.close(descriptor)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write a JSON file through :func:`replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def named_in_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Add the file's name to errors that lack it, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a file in UTF-8 or in the encoding of its byte order mark, without the mark.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has another encoding; the message names file and line.
    """
    content = Path(path).read_bytes()
    encoding, start = text_encoding(content[:4])
    try:
        text = content[start:].decode(encoding)
    except UnicodeDecodeError as error:
        before = content[start : start + error.start].decode(encoding)
        raise ValueError(_not_text(path, before.count("\n") + 1, encoding)) from error
    if "\0" in text:
        raise ValueError(_has_nul(path, text[: text.index("\0")].count("\n") + 1))
    return text


def read_lines(path: str | os.PathLike[str], *, ends: bool = False) -> Iterator[str]:
    """The lines of a text file as in :func:`read_text`, optionally with line ends (LF or CR LF).

    A file in UTF-8 is read line by line.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has another encoding; the message names file and line.
    """
    with open(path, "rb") as stream:
        encoding, start = text_encoding(stream.read(4))
        if encoding == "utf-8":
            stream.seek(start)
            contents = enumerate(stream, 1)
            lines: Iterable[str] = (_line(path, number, line) for number, line in contents)
        else:
            lines = io.StringIO(read_text(path), newline="\n")
        for line in lines:
            yield line if ends else line.removesuffix("\n").removesuffix("\r")


def text_encoding(start: bytes) -> tuple[str, int]:
    """Encoding of a text file from its first four bytes, and the length of its byte order mark."""
    for mark, encoding in _ENCODINGS.items():
        if start.startswith(mark):
            return encoding, len(mark)
    return "utf-8", 0


def _line(path: str | os.PathLike[str], number: int, content: bytes) -> str:
    try:
        line = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(_not_text(path, number, "utf-8")) from error
    if "\0" in line:
        raise ValueError(_has_nul(path, number))
    return line


def _not_text(path: str | os.PathLike[str], line: int, encoding: str) -> str:
    return f"{os.fspath(path)}, line {line}: is not {encoding.upper()}; save the file as UTF-8"


def _has_nul(path: str | os.PathLike[str], line: int) -> str:
    return (
        f"{os.fspath(path)}, line {line}: holds the character NUL, as a file in UTF-16 without a "
        "byte order mark does; save the file as UTF-8"
    )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
