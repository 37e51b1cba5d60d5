"""Pictures: decoding, the official augmentation for training, the official resize for evaluation.

Everything works on Pillow images, without torchvision or OpenCV. What is random comes from a seed
alone, so that a sample is the same in whatever process it is made.
"""

from __future__ import annotations

import io
import math
import os
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps, UnidentifiedImageError
from PIL.Image import Resampling
from torch import Tensor

AREA = 0.5, 1.0  # of a random crop, as a share of the picture's
ASPECT = 3 / 4, 4 / 3  # of a random crop, width to height
OPERATIONS = 2  # drawn for each picture
OPERATION_CHANCE = 0.5  # to be applied, for each drawn operation
MAGNITUDE = 0.7  # of the strongest operations: level 7 of 10
FILL = (128, 128, 128)  # where an operation uncovers what is beside the picture
_TRIES = 10  # to find a crop that fits


def read_image(source: str | os.PathLike[str] | bytes, name: str) -> Image.Image:
    """Decode a picture to RGB as a viewer would show it.

    The EXIF orientation is applied, transparent pixels are laid over white, and 16-bit grey levels
    are scaled to 8 bits.

    Args:
        source: a path, or a file's content.
        name: what an error calls the picture.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the picture is damaged, or of a format that Pillow cannot read.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return as_rgb(image)
    except FileNotFoundError:
        raise
    except UnidentifiedImageError as error:
        raise ValueError(f"{name}: is no image of a known format") from error
    except Exception as error:  # Pillow's readers raise many kinds for damaged files
        raise ValueError(f"{name}: the image cannot be read: {error}") from error


def as_rgb(image: Image.Image) -> Image.Image:
    """The picture in RGB, see :func:`read_image`; a picture that is still in its file is read."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        levels = np.asarray(image)
        wide = image.mode.startswith("I;16") or levels.max(initial=0) > 255
        grey = (levels >> 8 if wide else levels).clip(0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


@dataclass(frozen=True)
class SquareTransform:
    """From a picture to the uint8 tensor [3, S, S] that the model reads.

    For training, as the official ``square_transform_randaug``: a random crop resized to the square,
    a flip in half of the cases, and two random operations (:func:`random_augment`), each applied in
    half of the cases. For evaluation the whole picture is resized to the square. Both are bicubic.

    Args:
        size: S, in pixels.
        train: augment.
        flip: mirror half of the pictures in training, as the official code does, even where a text
            speaks of left and right.

    Raises:
        ValueError: ``size`` is not positive.
    """

    size: int
    train: bool = False
    flip: bool = True

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"image_size: {self.size} is not positive")

    def __call__(self, image: Image.Image, seed: int = 0) -> Tensor:
        """Transform an RGB picture; without ``train`` the seed means nothing."""
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

    Its share of the area is uniform in ``AREA`` and the logarithm of its aspect in ``ASPECT``. If
    ten draws do not fit, it is the largest middle part whose aspect lies in ``ASPECT``.
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

    Two operations are drawn of identity, autocontrast, equalize, brightness, sharpness, shear and
    translation along each axis, and rotation. Brightness and sharpness are multiplied by 1.36;
    shears are 0.21, translations 7 pixels and rotations 21 degrees, either way.
    """
    for name in draws.choices(list(_OPERATIONS), k=OPERATIONS):
        if draws.random() < OPERATION_CHANCE:
            sign = draws.choice((-1, 1))
            image = _OPERATIONS[name](image, sign * MAGNITUDE)
    return image


def _enhance(kind: Callable, image: Image.Image, magnitude: float) -> Image.Image:
    return kind(image).enhance(1.8 * abs(magnitude) + 0.1)


def _affine(image: Image.Image, *rows: float) -> Image.Image:
    """The picture at a x + b y + c, d x + e y + f, in pixels of the original."""
    return image.transform(
        image.size, Image.Transform.AFFINE, rows, Resampling.BILINEAR, fillcolor=FILL
    )


# From a picture and a magnitude within -1 and 1, of which some take the size alone.
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
