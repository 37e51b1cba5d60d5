"""What data sets of files have in common: samples of texts and decoded pictures."""

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
    """One sample that cannot be read: a damaged or missing picture, a text that is none.

    Args:
        message: names the file, and the row if it has rows.
        index: number of the sample in its data set.
        file: that holds what cannot be read; None if it is not known.
        row: in the file, as the message counts; None for a file without rows.

    Attributes:
        index, file, row: as given.
    """

    def __init__(self, message: str, index: int, file: str | None = None, row: int | None = None):
        super().__init__(message)
        self.index, self.file, self.row = index, file, row

    def __reduce__(self):
        return type(self), (str(self), self.index, self.file, self.row)


class Samples(Dataset, ABC):
    """Map-style data set; a sample is a dictionary as :mod:`vlmo.data.loading` lists its keys.

    Args:
        pictures: keys of the pictures: "image", or "image_0" and "image_1", or none.
        transform: from a decoded picture to its tensor.
        answers: of vqa, in the order of their ids.

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
        """A sample without its pictures."""

    @abstractmethod
    def picture(self, index: int, name: str) -> Image.Image:
        """A sample's picture, decoded to RGB."""

    @property
    @abstractmethod
    def image_ids(self) -> list[int] | list[str]:
        """The image_id of every sample of pretrain, retrieval or vqa; no picture is decoded."""

    @abstractmethod
    def place(self, index: int, name: str | None = None) -> tuple[str, int | None]:
        """File and row of a sample's picture, or of its text; None for a file without rows."""

    @property
    def keys(self) -> np.ndarray | None:
        """For :class:`~vlmo.data.GlobalBatches`: int64 [N], equal for captions of one picture.

        None where every sample has a picture of its own, and for tasks without captions.
        """
        return None

    @abstractmethod
    def fingerprint(self) -> str:
        """16 hex digits of the texts, labels, ids and names of pictures.

        Names are relative to the data, so that a copy elsewhere has the same digits. Pictures are
        not read.
        """

    @abstractmethod
    def picture_numbers(self, name: str) -> np.ndarray:
        """A number for each sample's picture, int64 [N], equal where it is the same one."""

    def text(self, index: int) -> str:
        """The caption, question, statement or text of a sample.

        Raises:
            BadSample: it cannot be read.
        """
        return self.read(index)["text"]

    def read(self, index: int, name: str | None = None) -> Any:
        """A sample without its pictures, or one of its pictures, decoded to RGB.

        Raises:
            BadSample: it cannot be read.
        """
        with self._reading(index, name):
            return self.fields(index) if name is None else self.picture(index, name)

    def __getitem__(self, item: Draw | int) -> dict[str, Any]:
        """A sample; its picture is transformed with the seed of the draw.

        Raises:
            BadSample: it cannot be read.
            IndexError: there is no such sample.
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
        """What goes wrong inside is the fault of this sample; its message names file and row."""
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
