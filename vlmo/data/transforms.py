"""Pictures: decoding, unilm's augmentation for training, and its resize for evaluation.

Everything uses Pillow, without torchvision or OpenCV. All randomness comes from a seed, so a sample
is the same in whichever process it is prepared.
"""

from __future__ import annotations

import io
import math
import os
import random
import stat
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageEnhance, ImageFile, ImageOps, UnidentifiedImageError
from PIL.Image import Resampling, Transpose
from torch import Tensor

AREA = 0.5, 1.0  # area of a random crop, as a share of the picture's area
ASPECT = 3 / 4, 4 / 3  # width to height of a random crop
OPERATIONS = 2  # drawn for each picture
OPERATION_CHANCE = 0.5  # probability that a drawn operation is applied
MAGNITUDE = 0.7  # relative to the strongest operations: level 7 of 10
FILL = (128, 128, 128)  # for pixels that an operation takes from outside the picture
_TRIES = 10  # attempts to find a crop that fits
_PNG = b"\x89PNG\r\n\x1a\n"
# The transposition that undoes each EXIF orientation.
_TURNS: dict[int | None, Transpose] = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


def read_image(source: str | os.PathLike[str] | bytes, name: str) -> Image.Image:
    """Decode a picture to RGB as a viewer would show it, see :func:`as_rgb`.

    Metadata other than the orientation may be damaged. Of several frames or pages the first is
    read. Pillow's warnings are suppressed, and a truncated picture is an error even if
    ``PIL.ImageFile.LOAD_TRUNCATED_IMAGES`` is set.

    Args:
        source: a path, or the content of a file.
        name: name of the picture in error messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the picture is damaged, has a format that Pillow cannot read, is larger than
            Pillow's limit (``PIL.Image.MAX_IMAGE_PIXELS``), or is rejected by :func:`as_rgb`.
    """
    try:
        if not isinstance(source, bytes) and not stat.S_ISREG(os.stat(source).st_mode):
            kind = "a folder" if os.path.isdir(source) else "no regular file"
            raise ValueError(f"it is {kind}")  # opening a named pipe would block
        with _strictly():
            return _decoded(source)
    except FileNotFoundError:
        raise
    except UnidentifiedImageError as error:
        raise ValueError(f"{name}: is not an image of a known format") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: the image has too many pixels: {error}") from error
    except Exception as error:  # Pillow raises exceptions of many types for damaged files
        reason = str(error) or type(error).__name__
        raise ValueError(f"{name}: the image cannot be read: {reason}") from error


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture to RGB, as a copy; a picture that is not loaded yet is read.

    The orientation given in EXIF or XMP is applied; an invalid one is ignored. Transparent pixels
    are composited over white. Grey levels of more than 8 bits are mapped to 0 .. 255 according to
    their type and range: 16-bit levels lose their lower byte, and so do wider integers if one of
    them exceeds 255; floats are multiplied by 255 if none exceeds 1, and rounded.

    Raises:
        ValueError: there are no pixels, a float is not finite, integers are outside 0 .. 65535,
            floats are outside 0 .. 255, or the largest float is between 1 and 2, where the range is
            ambiguous: too large for 0 .. 1, and almost black in 0 .. 255.
    """
    if 0 in image.size:
        raise ValueError(f"{image.width} x {image.height} pixels are no image")
    image.load()  # also applies the orientation of TIFF files
    turn = _TURNS.get(_orientation(image))
    if image.mode.startswith(("I", "F")):
        rgb = Image.fromarray(_grey(np.asarray(image))).convert("RGB")
    elif image.has_transparency_data:
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        rgb = Image.alpha_composite(white, image).convert("RGB")
    else:
        rgb = image.convert("RGB")
    return rgb if turn is None else rgb.transpose(turn)


def _grey(levels: np.ndarray) -> np.ndarray:
    """Convert integers or floats to grey levels uint8, see :func:`as_rgb`."""
    if levels.dtype.itemsize == 2:
        return (levels >> 8).astype(np.uint8)
    if not np.isfinite(levels).all():
        raise ValueError("a grey level is not finite")
    low, high, is_float = levels.min(), levels.max(), levels.dtype.kind == "f"
    if low < 0 or high > (255 if is_float else 65535) or (is_float and 1 < high < 2):
        wanted = "0..1 or 0..255" if is_float else "0..255 or 0..65535"
        raise ValueError(f"grey levels from {low:g} to {high:g} are not those of {wanted}")
    if is_float:
        return np.rint(levels * (255 if high <= 1 else 1)).astype(np.uint8)
    return (levels >> 8 if high > 255 else levels).astype(np.uint8)


def _orientation(image: Image.Image) -> int | None:
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF data raise exceptions of many types
        return None
    return value if isinstance(value, int) else None


def _decoded(source: str | os.PathLike[str] | bytes) -> Image.Image:
    def opened(source: Any) -> Image.Image:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return as_rgb(image)

    try:
        return opened(source)
    except Exception:
        pixels = _png_pixels(source)
        if pixels is None:
            raise
        return opened(pixels)


def _png_pixels(source: str | os.PathLike[str] | bytes) -> bytes | None:
    """A PNG without texts and profiles, which Pillow rejects if large; None if it is no PNG.

    Other faults of the file are kept.
    """
    with io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as stream:
        if stream.read(len(_PNG)) != _PNG:
            return None
        content = _PNG + stream.read()
    kept, place = [_PNG], len(_PNG)
    while place < len(content):
        (length,) = struct.unpack(">I", content[place : place + 4].rjust(4, b"\0"))
        kind, end = content[place + 4 : place + 8], place + length + 12
        if not kind[:1].islower() or kind in (b"tRNS", b"eXIf"):
            kept.append(content[place:end])
        place = end
    return b"".join(kept)


@contextmanager
def _strictly() -> Iterator[None]:
    lenient = ImageFile.LOAD_TRUNCATED_IMAGES
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        try:
            if lenient:
                ImageFile.LOAD_TRUNCATED_IMAGES = False
            yield
        finally:
            if lenient:
                ImageFile.LOAD_TRUNCATED_IMAGES = True


@dataclass(frozen=True)
class SquareTransform:
    """Converts a picture to the uint8 tensor [3, S, S] that the model reads.

    For training, as unilm's ``square_transform_randaug``: a random crop resized to the square, a
    horizontal flip with probability one half, and two random operations (:func:`random_augment`),
    each applied with probability one half. For evaluation the whole picture is resized to the
    square. Both use bicubic interpolation.

    Args:
        size: S, in pixels.
        train: augment.
        flip: mirror half of the pictures in training, as unilm does even where a text mentions left
            and right.

    Raises:
        ValueError: ``size`` is not positive.
        ValueError: ``size`` is not positive.
    """

    size: int
    train: bool = False
    flip: bool = True

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"image_size: {self.size} is not positive")

    def __call__(self, image: Image.Image, seed: int = 0) -> Tensor:
        """Transform an RGB picture; without ``train`` the seed has no effect."""
        square = (self.size, self.size)
        if not self.train:
            return _tensor(image.resize(square, Resampling.BICUBIC))
        draws = random.Random(seed)
        box = random_crop(*image.size, draws)
        image = image.crop(box).resize(square, Resampling.BICUBIC)
        if self.flip and draws.random() < 0.5:
            image = ImageOps.mirror(image)
        return _tensor(random_augment(image, draws))


def random_crop(width: int, height: int, draws: random.Random) -> tuple[int, int, int, int]:
    """Box (left, top, right, bottom) of a random part of a picture.

    Its share of the area is uniform in ``AREA`` and the logarithm of its aspect ratio is uniform in
    ``ASPECT``. If none of ten draws fits, the result is the largest central box whose aspect ratio
    is in ``ASPECT``.
    """
    for _ in range(_TRIES):
        area = width * height * draws.uniform(*AREA)
        aspect = math.exp(draws.uniform(*map(math.log, ASPECT)))
        crop = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop[0] <= width and 0 < crop[1] <= height:
            left, top = draws.randint(0, width - crop[0]), draws.randint(0, height - crop[1])
            return left, top, left + crop[0], top + crop[1]
    crop = (
        min(width, max(1, round(height * ASPECT[1]))),
        min(height, max(1, round(width / ASPECT[0]))),
    )
    left, top = (width - crop[0]) // 2, (height - crop[1]) // 2
    return left, top, left + crop[0], top + crop[1]


def random_augment(image: Image.Image, draws: random.Random) -> Image.Image:
    """The RandomAugment of ALBEF (Li et al. 2021) with the settings of VLMo: N = 2, M = 7 of 10.

    Two operations are drawn from identity, autocontrast, equalize, brightness, sharpness, shear and
    translation along each axis, and rotation. Brightness and sharpness are multiplied by 1.36;
    shears are 0.21, translations 7 pixels and rotations 21 degrees, in either direction.
    """
    for name in draws.choices(list(_OPERATIONS), k=OPERATIONS):
        if draws.random() < OPERATION_CHANCE:
            sign = draws.choice((-1, 1))
            image = _OPERATIONS[name](image, sign * MAGNITUDE)
    return image


def _enhance(kind: Callable, image: Image.Image, magnitude: float) -> Image.Image:
    return kind(image).enhance(1.8 * abs(magnitude) + 0.1)


def _affine(image: Image.Image, *rows: float) -> Image.Image:
    """Sample the picture at (a x + b y + c, d x + e y + f), in pixels of the original."""
    return image.transform(
        image.size, Image.Transform.AFFINE, rows, Resampling.BILINEAR, fillcolor=FILL
    )


# Functions of a picture and a magnitude between -1 and 1; some use only its absolute value.
_OPERATIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "identity": lambda image, m: image,
    "autocontrast": lambda image, m: ImageOps.autocontrast(image),
    "equalize": lambda image, m: ImageOps.equalize(image),
    "brightness": lambda image, m: _enhance(ImageEnhance.Brightness, image, m),
    "sharpness": lambda image, m: _enhance(ImageEnhance.Sharpness, image, m),
    "shear_x": lambda image, m: _affine(image, 1, 0.3 * m, 0, 0, 1, 0),
    "shear_y": lambda image, m: _affine(image, 1, 0, 0, 0.3 * m, 1, 0),
    "translate_x": lambda image, m: _affine(image, 1, 0, 10 * m, 0, 1, 0),
    "translate_y": lambda image, m: _affine(image, 1, 0, 0, 0, 1, 10 * m),
    "rotate": lambda image, m: image.rotate(30 * m, Resampling.BILINEAR, fillcolor=FILL),
}


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
