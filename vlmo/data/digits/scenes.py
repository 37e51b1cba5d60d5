"""Digit scenes: image-text data with real pixels that needs no download.

A scene shows one to three handwritten digits from scikit-learn's scans ("a three above a seven",
"two fives left of a one"). Each digit is placed in one of the picture's four quadrants, so digits
never overlap. The constructor draws all scenes of a data set as arrays; pictures are rendered on
access.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vlmo.data.digits import language
from vlmo.data.digits.language import ANSWERS, Meaning, Question
from vlmo.data.digits.scans import enlarged_scans, load_scans, split_scans
from vlmo.data.draws import Draw
from vlmo.data.samples import SPLITS, picture_names

TASKS = ("pretrain", "retrieval", "vqa", "nlvr2", "textmlm")
AXES = ("single", "horizontal", "vertical")
MAX_DIGITS = 3
SINGLE_SHARE, PAIR_SHARE = 0.1, 0.4  # of the scenes; the rest hold two equal digits and a third
BRIGHTEST_BACKGROUND = 48  # grey level, at most 255

_SCENE_DRAWS = 17  # uniform random numbers that determine one scene
_TEXT_DRAWS = 3  # and those that determine its text


@dataclass(frozen=True)
class Scene:
    """One picture: its content and the position of every digit.

    Attributes:
        key: the meaning; scenes with equal keys have the same true captions.
        digits: class of each digit; those of the left or upper group come first.
        scans: number of each digit's scan.
        positions: (top, left) of each digit, in pixels.
        digit_size: side of a digit, in pixels.
        image_size: side of the picture, in pixels.
        background: grey level 0..255 behind the digits.
    """

    key: Meaning
    digits: tuple[int, ...]
    scans: tuple[int, ...]
    positions: tuple[tuple[int, int], ...]
    digit_size: int
    image_size: int
    background: int

    def captions(self) -> tuple[str, ...]:
        """All true captions, the canonical one first."""
        return language.captions(self.key)

    def questions(self) -> list[Question]:
        """Every question about the scene with its answer."""
        return language.questions(self.key)


class _Meanings(NamedTuple):
    """N meanings as arrays."""

    axis: np.ndarray  # [N] index into AXES
    counts: np.ndarray  # [N, 2] digits in each group; the second is 0 for a single digit
    digits: np.ndarray  # [N, 2] class of each group


class _Layout(NamedTuple):
    """Sizes in pixels, see :class:`DigitScenes`."""

    image_size: int
    digit_size: int
    jitter: int


@dataclass(frozen=True)
class _SceneTable:
    """N scenes of up to 3 digits as arrays; an absent digit has scan -1."""

    meanings: _Meanings
    scans: np.ndarray  # [N, 3]
    tops: np.ndarray  # [N, 3]
    lefts: np.ndarray  # [N, 3]
    background: np.ndarray  # [N] uint8
    digit_size: int
    image_size: int

    def meaning(self, row: int) -> Meaning:
        axis, counts, digits = (array[row].tolist() for array in self.meanings)
        groups = zip(counts, digits, strict=True)
        return Meaning(AXES[axis], tuple(group for group in groups if group[0]))

    def scene(self, row: int) -> Scene:
        present = np.flatnonzero(self.scans[row] >= 0)
        scans = self.scans[row, present]
        corners = np.stack([self.tops[row, present], self.lefts[row, present]], axis=1)
        return Scene(
            key=self.meaning(row),
            digits=tuple(load_scans()[1][scans].tolist()),
            scans=tuple(scans.tolist()),
            positions=tuple((top, left) for top, left in corners.tolist()),
            digit_size=self.digit_size,
            image_size=self.image_size,
            background=int(self.background[row]),
        )

    def render(self, rows: np.ndarray) -> np.ndarray:
        """Render the pictures of the given rows [n]: uint8 [n, S, S]."""
        shape = (len(rows), self.image_size, self.image_size)
        pictures = np.empty(shape, dtype=np.uint8)
        pictures[:] = self.background[rows, None, None]
        glyphs = enlarged_scans(self.digit_size)
        offset = np.arange(self.digit_size)
        for slot in range(MAX_DIGITS):
            picture = np.flatnonzero(self.scans[rows, slot] >= 0)
            row = rows[picture]
            y = self.tops[row, slot, None, None] + offset[:, None]  # [n, d, 1]
            x = self.lefts[row, slot, None, None] + offset  # [n, 1, d]
            # Take the maximum: otherwise the black frame of a scan would cut a box out of the
            # background.
            ink = np.maximum(glyphs[self.scans[row, slot]], self.background[row, None, None])
            pictures[picture[:, None, None], y, x] = ink
        return pictures


class DigitScenes(Dataset):
    """Map-style data set of digit scenes.

    Sample ``i`` depends only on ``split``, ``seed``, ``task`` and the sizes of picture and digits,
    not on ``size`` or on the seed of a :class:`~vlmo.data.Draw`. Samples are dictionaries:

    - pretrain, retrieval: image uint8 [3, S, S], text (a caption), image_id (the index)
    - vqa: image, text (a question), answer_labels (one index into ``ANSWERS``), answer_scores
      (1.0), question_id (the index)
    - nlvr2: image_0, image_1, text (a statement), answers (1 true, 0 false; even ones are true),
      identifier ("train-0")
    - textmlm: text (a caption)

    The train split uses all true captions of a scene (see ``paraphrase``), the other splits only
    the canonical one.

    Args:
        split: "train", "val" or "test"; no scan of a digit occurs in two of them.
        size: number of samples.
        image_size: S, a multiple of 8, at least 32.
        task: one of ``TASKS``.
        seed: selects other scenes of the same distribution, 0 .. 2**32 - 1.
        digit_size: side of a digit in pixels: more than S / 4, so that two digits side by side are
            not also one above the other, and at most S / 2; default 7 S / 16.
        jitter: largest offset of a digit from the centre of its quadrant in each direction, in
            pixels; at most half of the space that the digit leaves free. An offset of one pixel
            makes scenes harder for a small model, so the default is 0.
        distinct: give every sample a different meaning; not for nlvr2.
        paraphrase: draw among all true phrasings in the train split. Without it every split uses
            only the canonical phrasing ("a one below a two" is always "a two above a one"), which
            is easier: with paraphrases the demo's model does not learn the arrangement within its
            number of steps.

    Attributes:
        answers: all answers in the order of their ids, for vqa; None for other tasks.
        keys, groups: for :class:`~vlmo.data.GlobalBatches`; samples with equal keys have the same
            meaning, samples of one group show the same digits. None if no two samples can
            contradict each other.

    Raises:
        ValueError: an argument is outside the ranges above, or there are fewer meanings than
            distinct samples.
    """

    def __init__(
        self,
        split: str = "train",
        size: int = 16384,
        *,
        image_size: int = 32,
        task: str = "pretrain",
        seed: int = 0,
        digit_size: int | None = None,
        jitter: int = 0,
        distinct: bool = False,
        paraphrase: bool = True,
    ):
        digit_size = 7 * image_size // 16 if digit_size is None else digit_size
        _check_arguments(split, size, image_size, task)
        _check_layout(image_size, digit_size, jitter)
        layout = _Layout(image_size, digit_size, jitter)
        self.split, self.task, self.seed = split, task, seed
        self.image_size, self.digit_size = image_size, digit_size
        self.answers = list(ANSWERS) if task == "vqa" else None
        self._paraphrase = paraphrase and split == "train"
        pair = task == "nlvr2"
        random = np.random.RandomState([seed, SPLITS.index(split), int(pair)])
        # One row of random numbers per sample, so that a larger data set starts with the samples of
        # a smaller one.
        draws = random.random_sample((size, (2 if pair else 1) * _SCENE_DRAWS + _TEXT_DRAWS))
        self._text_draws = draws[:, -_TEXT_DRAWS:]
        first = draws[:, :_SCENE_DRAWS]
        if pair:
            if distinct:
                raise ValueError("distinct: pictures of nlvr2 come in pairs, use another task")
            meanings = _draw_meanings(first, singles=False)
            second = draws[:, _SCENE_DRAWS : 2 * _SCENE_DRAWS]
            partners = _share_a_digit(_draw_meanings(second, singles=False), meanings, second)
            self._tables = tuple(
                _place(drawn, shown, split, layout)
                for drawn, shown in ((first, meanings), (second, partners))
            )
        else:
            meanings = _distinct_meanings(random, size) if distinct else _draw_meanings(first)
            self._tables = (_place(first, meanings, split, layout),)
        self.keys = self.groups = None
        if task in ("pretrain", "retrieval"):
            self.keys, self.groups = self.meaning_ids().tolist(), self._digit_sets().tolist()

    def __len__(self) -> int:
        return len(self._tables[0].scans)

    @property
    def image_ids(self) -> list[int]:
        """The image_id of every sample: each sample has a picture of its own."""
        return list(range(len(self)))

    def fingerprint(self) -> str:
        """16 hex digits that identify all scenes and texts."""
        words = (self.task, self.split, self.image_size, self.digit_size, self._paraphrase)
        digest = hashlib.blake2b(repr(words).encode(), digest_size=8)
        for table in self._tables:
            for array in (*table.meanings, table.scans, table.tops, table.lefts, table.background):
                digest.update(array.astype("<i8").tobytes())
        digest.update(self._text_draws.astype("<f8").tobytes())
        return digest.hexdigest()

    def scene(self, index: int, image: int = 0) -> Scene:
        """Description of a picture; ``image`` 1 selects the second picture of nlvr2."""
        return self._tables[image].scene(index)

    def text(self, index: int) -> str:
        """The caption, question or statement of a sample."""
        return self._text_and_target(index)[0]

    def target(self, index: int) -> int:
        """The answer id of vqa or the label of nlvr2.

        Raises:
            ValueError: the task has neither.
        """
        target = self._text_and_target(index)[1]
        if target is None:
            raise ValueError(f"task {self.task!r} has no targets")
        return target

    def meaning_ids(self) -> np.ndarray:
        """One number per sample, int64 [N], equal if their first pictures have the same meaning."""
        axis, counts, digits = self._tables[0].meanings
        # The absent second group of a single digit has an arbitrary class, which must not count.
        fields = np.column_stack([axis, counts, digits[:, 0], digits[:, 1] * (counts[:, 1] > 0)])
        return fields @ np.array([900, 300, 100, 10, 1])

    def _digit_sets(self) -> np.ndarray:
        """One number per sample, int64 [N], equal if their pictures show the same classes."""
        _, counts, digits = self._tables[0].meanings
        second = np.where(counts[:, 1] > 0, digits[:, 1], digits[:, 0])
        return 10 * np.minimum(digits[:, 0], second) + np.maximum(digits[:, 0], second)

    def images(self, indices: Sequence[int] | np.ndarray, image: int = 0) -> Tensor:
        """Pictures uint8 [n, 3, S, S]; ``image`` 1 selects the second picture of nlvr2."""
        grey = self._tables[image].render(np.asarray(indices, dtype=np.int64))
        return torch.from_numpy(grey).unsqueeze(1).expand(-1, 3, -1, -1).contiguous()

    def __getitem__(self, item: Draw | int) -> dict:
        return self.__getitems__([item])[0]

    def __getitems__(self, items: Sequence[Draw | int]) -> list[dict]:
        indices = [Draw.of(item).index for item in items]
        for index in indices:
            if not 0 <= index < len(self):
                raise IndexError(f"sample {index} of {len(self)}")
        pictures = {
            name: self.images(indices, image) for image, name in enumerate(picture_names(self.task))
        }
        samples = []
        for n, index in enumerate(indices):
            sample: dict[str, Any] = {name: images[n] for name, images in pictures.items()}
            sample["text"], target = self._text_and_target(index)
            if self.task in ("pretrain", "retrieval"):
                sample["image_id"] = index
            elif self.task == "vqa":
                sample |= {"answer_labels": [target], "answer_scores": [1.0], "question_id": index}
            elif self.task == "nlvr2":
                sample |= {"answers": target, "identifier": f"{self.split}-{index}"}
            samples.append(sample)
        return samples

    def _text_and_target(self, index: int) -> tuple[str, int | None]:
        draws = self._text_draws[index].tolist()
        meaning = self._tables[0].meaning(index)
        if self.task == "vqa":
            question = language.draw_question(meaning, draws)
            return question.text, ANSWERS.index(question.answer)
        if self.task == "nlvr2":
            label = index % 2 == 0
            shown = meaning, self._tables[1].meaning(index)
            text = language.draw_statement(shown, label, draws, paraphrase=self._paraphrase)
            return text, int(label)
        texts = language.captions(meaning)
        return texts[int(draws[0] * len(texts)) if self._paraphrase else 0], None


def retrieval_gallery(split: str = "test", size: int = 256, **options: Any) -> DigitScenes:
    """Pairs for retrieval: each picture has exactly one true caption and each caption one picture.

    Args:
        split: see :class:`DigitScenes`.
        size: number of pairs, at most the 550 meanings; recall at chance level is 1 / size.
        options: ``image_size``, ``seed``, ``digit_size``, ``jitter`` of :class:`DigitScenes`.
    """
    return DigitScenes(split, size, task="retrieval", distinct=True, **options)


def _check_arguments(split: str, size: int, image_size: int, task: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split: {split!r} is not one of {SPLITS}")
    if task not in TASKS:
        raise ValueError(f"task: {task!r} is not one of {TASKS}")
    if size < 1:
        raise ValueError(f"size: {size} is not positive")
    if image_size < 32 or image_size % 8:
        raise ValueError(f"image_size: {image_size} is not a multiple of 8 from 32 up")


def _check_layout(image_size: int, digit_size: int, jitter: int) -> None:
    smallest, largest = image_size // 4 + 1, image_size // 2
    if not smallest <= digit_size <= largest:
        raise ValueError(f"digit_size: {digit_size} is not within {smallest}..{largest}")
    free = (image_size // 2 - digit_size) // 2
    if not 0 <= jitter <= free:
        raise ValueError(f"jitter: {jitter} is not within 0..{free}")


def _whole(draws: np.ndarray, count) -> np.ndarray:
    """Uniform integers 0 .. count - 1 from uniform real numbers in [0, 1)."""
    return (draws * count).astype(np.int64)


def _draw_meanings(
    draws: np.ndarray,  # [N, 17]
    singles: bool = True,
) -> _Meanings:
    """Meanings of N scenes; without ``singles`` all scenes have two groups."""
    kind = draws[:, 0] if singles else SINGLE_SHARE + draws[:, 0] * (1 - SINGLE_SHARE)
    single, double = kind < SINGLE_SHARE, kind >= SINGLE_SHARE + PAIR_SHARE
    axis = np.where(single, 0, 1 + _whole(draws[:, 1], 2))
    counts = np.ones((len(draws), 2), dtype=np.int64)
    counts[np.flatnonzero(double), _whole(draws[double, 2], 2)] = 2
    counts[single, 1] = 0
    first = _whole(draws[:, 3], 10)
    second = (first + 1 + _whole(draws[:, 4], 9)) % 10
    return _Meanings(axis, counts, np.stack([first, second], axis=1))


def _share_a_digit(
    meanings: _Meanings,
    partners: _Meanings,
    draws: np.ndarray,  # [N, 17]
) -> _Meanings:
    """Make ``meanings`` share exactly one digit with ``partners``, as statements require."""
    rows, theirs = np.arange(len(draws)), np.sort(partners.digits, axis=1)
    place = _whole(draws[:, 3], 2)
    digits = meanings.digits.copy()
    digits[rows, place] = partners.digits[rows, _whole(draws[:, 4], 2)]
    other = _whole(draws[:, 16], 8)  # among the digits that the partners do not show
    other += other >= theirs[:, 0]
    other += other >= theirs[:, 1]
    digits[rows, 1 - place] = other
    return meanings._replace(digits=digits)


def _distinct_meanings(random: np.random.RandomState, size: int) -> _Meanings:
    """Different meanings, with each kind about as frequent as in a data set."""
    every = language.all_meanings()
    if size > len(every):
        raise ValueError(f"size: {size} exceeds the {len(every)} different meanings")
    axis = np.array([AXES.index(meaning.axis) for meaning in every])
    groups = np.array([(*meaning.groups, (0, 0))[:2] for meaning in every])  # [550, 2, 2]
    kind = groups[:, :, 0].sum(axis=1) - 1  # 0 single, 1 pair, 2 with a double digit
    shares = np.array([SINGLE_SHARE, PAIR_SHARE, 1 - SINGLE_SHARE - PAIR_SHARE])
    weight = (shares / np.bincount(kind))[kind]
    # Weighted sampling without replacement: take the smallest of exponential variables.
    chosen = np.argsort(-np.log1p(-random.random_sample(len(every))) / weight)[:size]
    return _Meanings(axis[chosen], groups[chosen, :, 0], groups[chosen, :, 1])


def _place(
    draws: np.ndarray,  # [N, 17]
    meanings: _Meanings,
    split: str,
    layout: _Layout,
) -> _SceneTable:
    """Choose the scans and positions of the digits."""
    axis, counts, digits = meanings
    slot = np.arange(MAX_DIGITS)
    group = (slot >= counts[:, :1]).astype(np.int64)  # [N, 3]
    present = slot < counts.sum(axis=1, keepdims=True)
    in_double = np.take_along_axis(counts, group, axis=1) == 2
    scans = _choose_scans(np.take_along_axis(digits, group, axis=1), split, draws[:, 6:9])

    # Each group occupies one side of the axis. Two equal digits fill both halves of their side; a
    # lone digit takes one half, the same half for both digits of a pair, which are thus aligned.
    half = _whole(draws[:, 5:6], 2)
    second_of_double = slot - group * counts[:, :1]
    across = np.where(in_double, second_of_double, half)
    side = np.where(axis[:, None] == 0, _whole(draws[:, 1:2], 2), group)
    vertical = axis[:, None] == 2
    cell = layout.image_size // 2
    margin = (cell - layout.digit_size) // 2 - layout.jitter
    places = 2 * layout.jitter + 1
    return _SceneTable(
        meanings=meanings,
        scans=np.where(present, scans, -1),
        tops=np.where(vertical, side, across) * cell + margin + _whole(draws[:, 9:12], places),
        lefts=np.where(vertical, across, side) * cell + margin + _whole(draws[:, 12:15], places),
        background=_whole(draws[:, 15], BRIGHTEST_BACKGROUND + 1).astype(np.uint8),
        digit_size=layout.digit_size,
        image_size=layout.image_size,
    )


def _choose_scans(
    classes: np.ndarray,  # [N, 3]
    split: str,
    draws: np.ndarray,  # [N, 3]
) -> np.ndarray:
    """Scan numbers [N, 3]; equal digits in neighbouring slots get different scans."""
    by_class = split_scans(split)
    sizes = np.array([len(members) for members in by_class])
    starts = np.cumsum(sizes) - sizes
    size = sizes[classes]
    chosen = _whole(draws, size)
    for slot in (1, 2):
        repeats = classes[:, slot] == classes[:, slot - 1]
        step = 1 + _whole(draws[:, slot], size[:, slot] - 1)
        chosen[:, slot] = np.where(
            repeats, (chosen[:, slot - 1] + step) % size[:, slot], chosen[:, slot]
        )
    return np.concatenate(by_class)[starts[classes] + chosen]
