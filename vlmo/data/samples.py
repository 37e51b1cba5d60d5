"""What data sets of files have in common: samples of texts and decoded pictures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from vlmo.data.draws import Draw, hashed
from vlmo.data.transforms import SquareTransform


class Samples(Dataset, ABC):
    """Map-style data set; a sample is a dictionary as :mod:`vlmo.data.loading` lists its keys.

    Args:
        pictures: keys of the pictures: "image", or "image_0" and "image_1", or none.
        transform: from a decoded picture to its tensor.
        answers: of vqa, in the order of their ids.

    Attributes:
        answers: as given; None for tasks other than vqa.
        keys, groups: None; see :class:`~vlmo.data.GlobalBatches`.
    """

    keys = groups = None

    def __init__(
        self,
        pictures: Sequence[str],
        transform: SquareTransform,
        answers: Sequence[str] | None = None,
    ):
        self._pictures, self._transform = tuple(pictures), transform
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

    def text(self, index: int) -> str:
        """The caption, question, statement or text of a sample."""
        return self.fields(index)["text"]

    def __getitem__(self, item: Draw | int) -> dict[str, Any]:
        index, seed = Draw.of(item)
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        sample = self.fields(index)
        for number, name in enumerate(self._pictures):
            picture = self.picture(index, name)
            sample[name] = self._transform(picture, int(hashed(seed, number)))
        return sample


def picture_names(task: str) -> tuple[str, ...]:
    """Keys of the pictures in a task's samples."""
    names: dict[str, tuple[str, ...]] = {"nlvr2": ("image_0", "image_1"), "textmlm": ()}
    return names.get(task, ("image",))
