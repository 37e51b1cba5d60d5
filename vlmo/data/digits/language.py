"""Texts about digit scenes: captions, questions with answers, statements about two scenes.

A :class:`Meaning` is the content of a scene without its pixels. Captions are exhaustive: they list
every digit of the picture, so "a five left of a one" is false for a picture of two fives and a one.
"Contains a five" and "is there a five?" only ask for at least one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ANSWERS = (*DIGITS, "yes", "no")

RELATIONS = ("left of", "right of", "above", "below")
_BY_AXIS = {"horizontal": ("left of", "right of"), "vertical": ("above", "below")}
_OTHER_AXIS = {"horizontal": "vertical", "vertical": "horizontal"}


class Meaning(NamedTuple):
    """The content of a scene; equal meanings have equal captions.

    Attributes:
        axis: "horizontal", "vertical", or "single" for one digit alone.
        groups: (count, digit) of the left or upper group, then of the right or lower group; a
            single digit is one group.
    """

    axis: str
    groups: tuple[tuple[int, int], ...]

    @property
    def digits(self) -> tuple[int, ...]:
        """The different classes in the scene."""
        return tuple(digit for _, digit in self.groups)

    def count(self, digit: int) -> int:
        """The number of digits of one class."""
        return sum(count for count, member in self.groups if member == digit)


class Question(NamedTuple):
    """A question, its answer (one of ``ANSWERS``), and its kind."""

    text: str
    answer: str
    kind: str


def all_meanings() -> list[Meaning]:
    """All meanings in a fixed order: 10 single digits, 180 pairs, 360 with a double digit."""
    meanings = [Meaning("single", ((1, digit),)) for digit in range(10)]
    for counts in ((1, 1), (2, 1), (1, 2)):
        for axis in _BY_AXIS:
            for first in range(10):
                for second in range(10):
                    if first != second:
                        groups = ((counts[0], first), (counts[1], second))
                        meanings.append(Meaning(axis, groups))
    return meanings


def captions(meaning: Meaning) -> tuple[str, ...]:
    """All captions that are true for a scene, the canonical one first."""
    if meaning.axis == "single":
        phrase = _indefinite(meaning.groups[0])
        return f"only {phrase}", f"{phrase} and nothing else"
    first, second = (_indefinite(group) for group in meaning.groups)
    forward, backward = _BY_AXIS[meaning.axis]
    return f"{first} {forward} {second}", f"{second} {backward} {first}"


def questions(meaning: Meaning) -> list[Question]:
    """Every question that can be asked about a scene; far more answers are "no" than "yes"."""
    if meaning.axis == "single":
        asked = [_which(meaning)]
    else:
        asked = [_what(meaning, subject) for subject in (0, 1)]
        asked += [
            _verify(meaning, subject, relation) for subject in (0, 1) for relation in RELATIONS
        ]
    asked += [_how_many(meaning, digit) for digit in range(10)]
    asked += [_is_there(meaning, digit) for digit in range(10)]
    return asked


def draw_question(meaning: Meaning, draws: Sequence[float]) -> Question:
    """Draw a question whose wording alone does not make any answer likely.

    "yes" and "no" are equally likely, and so are "zero", "one" and "two" as answers to "how many"
    as long as half of the scenes hold two equal digits.

    Args:
        meaning: content of the scene.
        draws: three numbers in [0, 1): for the kind, the answer, and the digits named.
    """
    kind, side, choice = draws
    absent = [digit for digit in range(10) if digit not in meaning.digits]
    if kind < 0.35:
        if meaning.axis == "single":
            return _which(meaning)
        return _what(meaning, int(2 * choice))
    if kind < 0.6:
        return _how_many(meaning, _digit_to_count(meaning, side, choice, absent))
    if kind < 0.8 or meaning.axis == "single":
        pool = meaning.digits if side < 0.5 else absent
        return _is_there(meaning, _pick(pool, choice))
    subject, choice = divmod(2 * choice, 1)
    right = _BY_AXIS[meaning.axis][int(subject)]
    wrong = [relation for relation in RELATIONS if relation != right]
    return _verify(meaning, int(subject), right if side < 0.5 else _pick(wrong, choice))


def draw_statement(
    images: tuple[Meaning, Meaning], label: bool, draws: Sequence[float], *, paraphrase: bool
) -> str:
    """Draw a statement about two scenes that is true or false as requested.

    Args:
        images: content of the left and the right image. Each shows two classes, and exactly one
            class is shared: then every kind of statement can be true as well as false.
        label: whether the statement shall be true.
        draws: three numbers in [0, 1): for the kind, the content, and the paraphrase.
        paraphrase: choose among all true captions instead of the canonical one.
    """
    kind, choice, wording = draws
    left, right = images
    shared = [digit for digit in left.digits if digit in right.digits]
    lone = [digit for digit in (*left.digits, *right.digits) if digit not in shared]
    absent = [digit for digit in range(10) if digit not in (*left.digits, *right.digits)]
    if kind < 0.4:
        side = int(kind < 0.2)
        shown, other = images[side], images[1 - side]
        said = shown if label else _pick(_confusions(shown, other), choice)
        texts = captions(said)
        text = _pick(texts, wording) if paraphrase else texts[0]
        return f"the {('left', 'right')[side]} image shows {text}"
    rest, choice = divmod(2 * choice, 1)
    if kind < 0.6:
        digit = _pick(shared if label else (lone, absent)[int(rest)], choice)
        return f"both images contain {_indefinite((1, digit))}"
    if kind < 0.8:
        digit = _pick(lone if label else (shared, absent)[int(rest)], choice)
        return f"exactly one image contains {_indefinite((1, digit))}"
    digit = _pick(absent if label else (shared, lone)[int(rest)], choice)
    return f"neither image contains {_indefinite((1, digit))}"


def all_texts() -> Iterator[str]:
    """Every caption and question, and each kind of statement with every digit, in a fixed order."""
    for meaning in all_meanings():
        yield from captions(meaning)
        yield from (question.text for question in questions(meaning))
        for side in ("left", "right"):
            yield from (f"the {side} image shows {text}" for text in captions(meaning))
    for digit in range(10):
        phrase = _indefinite((1, digit))
        yield f"both images contain {phrase}"
        yield f"exactly one image contains {phrase}"
        yield f"neither image contains {phrase}"


def _plural(digit: int) -> str:
    return DIGITS[digit] + ("es" if DIGITS[digit].endswith("x") else "s")


def _indefinite(group: tuple[int, int]) -> str:
    count, digit = group
    if count == 1:
        return f"{'an' if DIGITS[digit] == 'eight' else 'a'} {DIGITS[digit]}"
    return f"{DIGITS[count]} {_plural(digit)}"


def _definite(group: tuple[int, int]) -> str:
    count, digit = group
    return f"the {DIGITS[digit] if count == 1 else _plural(digit)}"


def _pick(options: Sequence, draw: float):
    return options[int(draw * len(options))]


def _which(meaning: Meaning) -> Question:
    return Question("which digit is shown?", DIGITS[meaning.digits[0]], "which")


def _what(meaning: Meaning, subject: int) -> Question:
    """Ask for the group ``subject`` by its relation to the other group."""
    relation = _BY_AXIS[meaning.axis][subject]
    other = _definite(meaning.groups[1 - subject])
    return Question(f"what is {relation} {other}?", DIGITS[meaning.digits[subject]], "what")


def _how_many(meaning: Meaning, digit: int) -> Question:
    answer = DIGITS[meaning.count(digit)]
    return Question(f"how many {_plural(digit)} are there?", answer, "how many")


def _is_there(meaning: Meaning, digit: int) -> Question:
    answer = "yes" if meaning.count(digit) else "no"
    return Question(f"is there {_indefinite((1, digit))}?", answer, "is there")


def _verify(meaning: Meaning, subject: int, relation: str) -> Question:
    group, other = meaning.groups[subject], meaning.groups[1 - subject]
    verb = "is" if group[0] == 1 else "are"
    answer = "yes" if relation == _BY_AXIS[meaning.axis][subject] else "no"
    return Question(f"{verb} {_definite(group)} {relation} {_definite(other)}?", answer, "verify")


def _digit_to_count(meaning: Meaning, side: float, choice: float, absent: Sequence[int]) -> int:
    """Choose the digit of a "how many" question.

    A scene without two equal digits cannot give the answer "two". A scene with two equal digits
    gives it in 2 of 3 cases: half of all scenes times 2/3 makes a third of the answers.
    """
    doubles = [digit for count, digit in meaning.groups if count == 2]
    singles = [digit for count, digit in meaning.groups if count == 1]
    if not doubles:
        return _pick(singles if side < 0.5 else absent, choice)
    if side < 2 / 3:
        return doubles[0]
    return _pick(singles if side < 5 / 6 else absent, choice)


def _confusions(shown: Meaning, other: Meaning) -> list[Meaning]:
    """Meanings close to that of an image: mirrored, turned, or with one digit changed."""
    first, second = shown.groups
    stranger = next(digit for digit in other.digits if digit not in shown.digits)
    nearby = [
        Meaning(shown.axis, (second, first)),
        Meaning(_OTHER_AXIS[shown.axis], shown.groups),
        Meaning(shown.axis, ((first[0], stranger), second)),
        Meaning(shown.axis, (first, (second[0], stranger))),
    ]
    return [*nearby, other]
