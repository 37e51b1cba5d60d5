"""Base of the data sets that read files: samples with texts and decoded pictures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from vlmo.data.draws import Draw, hashed
from vlmo.data.transforms import SquareTransform

SPLITS = ("train", "val", "test")


class BadSample(ValueError):
    """A sample that cannot be read: a picture is damaged or missing, or a text is invalid.

    Args:
        message: names the file, and the row if the file has rows.
        index: number of the sample in its data set.
        file: the file that cannot be read; None if unknown.
        row: row in the file, counted as in the message; None for a file without rows.

    Attributes:
        index, file, row: as given.
    """

    def __init__(self, message: str, index: int, file: str | None = None, row: int | None = None):
        super().__init__(message)
        self.index, self.file, self.row = index, file, row

    def __reduce__(self):
        return type(self), (str(self), self.index, self.file, self.row)


class Samples(Dataset, ABC):
    """Map-style data set; :mod:`vlmo.data.loading` lists the keys of its samples.

    Args:
        pictures: keys of the pictures: "image", or "image_0" and "image_1", or none.
        transform: converts a decoded picture to a tensor.
        answers: the answers of vqa, in the order of their ids.

    Attributes:
        answers: as given; None for tasks other than vqa.
        picture_names: keys of the pictures, as given.
        groups: None; see :class:`~vlmo.data.GlobalBatches`.
    """

    groups = None

    def __init__(
        self,
        pictures: Sequence[str],
        transform: SquareTransform,
        answers: Sequence[str] | None = None,
    ):
        self.picture_names, self._transform = tuple(pictures), transform
        self.answers = None if answers is None else list(answers)

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def fields(self, index: int) -> dict[str, Any]:
        """The fields of a sample without its pictures."""

    @abstractmethod
    def picture(self, index: int, name: str) -> Image.Image:
        """A sample's picture, decoded to RGB."""

    @property
    @abstractmethod
    def image_ids(self) -> list[int] | list[str]:
        """The image_id of every sample of pretrain, retrieval or vqa, without decoding pictures."""

    @abstractmethod
    def place(self, index: int, name: str | None = None) -> tuple[str, int | None]:
        """File and row of a sample's picture or text; the row is None for a file without rows."""

    @property
    def keys(self) -> np.ndarray | None:
        """Keys for :class:`~vlmo.data.GlobalBatches`, int64 [N], equal for captions of one picture.

        None if every sample has a picture of its own, and for tasks without captions.
        """
        return None

    @abstractmethod
    def fingerprint(self) -> str:
        """16 hex digits that identify the texts, labels, ids and picture names.

        Names are relative to the data, so a copy in another place has the same fingerprint.
        Pictures are not read.
        """

    @abstractmethod
    def picture_numbers(self, name: str) -> np.ndarray:
        """The number of each sample's picture, int64 [N], equal for the same picture."""

    def text(self, index: int) -> str:
        """The caption, question, statement or text of a sample.

        Raises:
            BadSample: the text cannot be read.
        """
        return self.read(index)["text"]

    def read(self, index: int, name: str | None = None) -> Any:
        """A sample without its pictures, or one of its pictures, decoded to RGB.

        Raises:
            BadSample: the sample or picture cannot be read.
        """
        with self._reading(index, name):
            return self.fields(index) if name is None else self.picture(index, name)

    def __getitem__(self, item: Draw | int) -> dict[str, Any]:
        """A sample; the draw's seed determines how its pictures are transformed.

        Raises:
            BadSample: the sample cannot be read.
            IndexError: ``index`` is out of range.
        """
        index, seed, _ = Draw.of(item)
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        sample = self.read(index)
        for number, name in enumerate(self.picture_names):
            picture = self.read(index, name)
            sample[name] = self._transform(picture, int(hashed(seed, number)))
        return sample

    @contextmanager
    def _reading(self, index: int, name: str | None = None) -> Iterator[None]:
        """Raise errors inside as BadSample of this sample; the message names file and row."""
        try:
            yield
        except BadSample:
            raise
        except (OSError, ValueError) as error:
            file, row = self.place(index, name)
            message = str(error)
            if isinstance(error, OSError) and error.strerror:
                message = f"{file}: {error.strerror}"
            elif file not in message:
                message = f"{file}{'' if row is None else f', row {row}'}: {message}"
            raise BadSample(message, index, file, row) from error


def picture_names(task: str) -> tuple[str, ...]:
    """Keys of the pictures in a task's samples."""
    names: dict[str, tuple[str, ...]] = {"nlvr2": ("image_0", "image_1"), "textmlm": ()}
    return names.get(task, ("image",))
