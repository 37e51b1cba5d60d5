"""Checks and converts a caller's images and texts, in all supported forms."""

from __future__ import annotations

import os
import reprlib
import threading
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from PIL import Image
from torch import Tensor

from vlmo.data.transforms import as_rgb, read_image

Picture: TypeAlias = str | os.PathLike[str] | bytes | BinaryIO | Image.Image | np.ndarray
Pictures: TypeAlias = Picture | Iterable[Picture]
Texts: TypeAlias = str | Iterable[str]

_TEXT_KINDS = "UO"  # NumPy dtype kinds: text, object
# Pillow reads an image's file when its pixels are first accessed; two threads must not read the
# same image at once.
_pillow = threading.Lock()


def pictures(name: str, given: Any) -> list[Picture]:
    """Convert one image or several to a list; reads open files, but no paths.

    Args:
        name: name of the argument, for errors.
        given: a path, the bytes of an image file, a file opened for reading bytes, a Pillow image,
            or a uint8 array ``[H, W]``, ``[H, W, 1]`` or ``[H, W, 3]``; or any iterable of these,
            or an array ``[n, H, W, 1 or 3]``.

    Raises:
        ValueError: it is something else, or an image has no pixels; the message names the argument,
            and the index of the image if there are several.
    """
    if isinstance(given, np.ndarray):
        if given.ndim == 4:
            given = list(given)
        elif given.dtype.kind in _TEXT_KINDS and given.ndim < 2:  # an array of paths or images
            given = given.tolist()
    if _is_picture(given):
        return [_picture(name, given)]
    return [_picture(f"{name}[{n}]", one) for n, one in enumerate(_several(name, given))]


def texts(name: str, given: Any) -> list[str]:
    """Convert one text or several to a list; warns about blank texts.

    Args:
        name: name of the argument, for errors.
        given: a text, or any iterable or one-dimensional array of texts.

    Raises:
        ValueError: it is something else, or a text is not valid Unicode; the message names the
            argument, and the index of the text if there are several.
    """
    if isinstance(given, np.ndarray) and given.dtype.kind in _TEXT_KINDS and given.ndim < 2:
        given = given.tolist()
    if isinstance(given, str):
        return [_text(name, given)]
    return [_text(f"{name}[{n}]", one) for n, one in enumerate(_several(name, given))]


def decoded(picture: Picture, name: str) -> Image.Image:
    """Decode a picture from :func:`pictures` to RGB.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the image cannot be read; the message names its path, or else ``name``.
    """
    if isinstance(picture, (str, os.PathLike)):
        return read_image(picture, os.fspath(picture))
    if isinstance(picture, bytes):
        return read_image(picture, name)
    if isinstance(picture, np.ndarray):
        grey = picture.ndim == 3 and picture.shape[2] == 1
        return as_rgb(Image.fromarray(picture[..., 0] if grey else picture))
    assert isinstance(picture, Image.Image)
    try:
        with _pillow:
            picture.load()
        return as_rgb(picture)
    except Exception as error:  # Pillow raises exceptions of many types for damaged files
        raise ValueError(f"{name}: the image cannot be read: {error}") from error


def _is_picture(given: Any) -> bool:
    kinds = (str, os.PathLike, bytes, Image.Image, np.ndarray)
    return isinstance(given, kinds) or hasattr(given, "read")


def _several(name: str, given: Any) -> Iterable[Any]:
    if isinstance(given, (Mapping, set, frozenset)):
        raise ValueError(f"{name}: a {type(given).__name__} has no fixed order; give a list")
    if isinstance(given, Tensor):
        raise ValueError(
            f"{name}: tensors are not taken; convert an image by .permute(1, 2, 0).numpy(), uint8"
        )
    if isinstance(given, np.ndarray) or not isinstance(given, Iterable):
        raise ValueError(f"{name}: {_described(given)} is neither one nor a list of them")
    if isinstance(given, (bytes, bytearray, memoryview)):
        raise ValueError(f"{name}: {_described(given)} is not a text; decode it first")
    return given


def _picture(name: str, given: Any) -> Picture:
    if hasattr(given, "read") and not isinstance(given, (os.PathLike, Image.Image)):
        given = given.read()
        if not isinstance(given, bytes):
            raise ValueError(f"{name}: the file is opened for text, not for bytes")
    if not _is_picture(given):
        raise ValueError(
            f"{name}: {_described(given)} is neither a path, a Pillow image nor an array"
        )
    if isinstance(given, np.ndarray):
        if given.dtype != np.uint8 or given.shape[2:] not in ((), (1,), (3,)) or given.ndim < 2:
            raise ValueError(
                f"{name}: {given.dtype} {given.shape} is not uint8 [H, W], [H, W, 1] or [H, W, 3]"
            )
        if not given.size:
            raise ValueError(f"{name}: {given.shape} is an empty image")
    if isinstance(given, Image.Image) and not all(given.size):
        raise ValueError(f"{name}: {given.size} is an empty image")
    return given


def _text(name: str, given: Any) -> str:
    if isinstance(given, (bytes, bytearray)):
        raise ValueError(f"{name}: {_described(given)} is not a text; decode it first")
    if not isinstance(given, str):
        raise ValueError(f"{name}: {_described(given)} is not a text")
    if not check_text(name, given).strip():
        warnings.warn(f"{name}: the text is blank", stacklevel=4)
    return given


def check_text(name: str, text: str) -> str:
    """The text; raises ValueError, with ``name`` first, if it is not valid Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: {text!r} is not valid Unicode: {error.reason}") from error
    return text


def _described(given: Any) -> str:
    """A short description of a value, for errors."""
    if given is None or isinstance(given, (bool, int, float, bytes, bytearray)):
        return reprlib.repr(given)
    if isinstance(given, np.ndarray):
        return f"an array of {given.dtype} {given.shape}"
    return type(given).__name__
