"""Answers to visual questions: the vocabulary, and soft scores by the rule of VQA."""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

_SCORES = (0.0, 0.3, 0.6, 0.9, 1.0)  # indexed by the number of people who gave an answer


def normal_answer(answer: str) -> str:
    """Lower-case an answer and collapse its spaces: the form in which answers are compared."""
    return " ".join(answer.lower().split())


def soft_scores(given: str | Sequence[str] | Mapping[str, float]) -> dict[str, float]:
    """The right answers, in normal form, and their scores.

    Args:
        given: one right answer; or the answers of several people, which score 0.3, 0.6, 0.9 and 1
            if one, two, three and more people gave them, as in VQAv2; or scores between 0 and 1. A
            list with a single answer gives that answer the score 1.

    Raises:
        ValueError: a score is not between 0 and 1, two answers have the same normal form, or there
            is no answer.
    """
    if isinstance(given, str):
        return {normal_answer(given): 1.0}
    if not given:
        raise ValueError("is empty")
    if isinstance(given, Mapping):
        scores: dict[str, float] = {}
        for answer, score in given.items():
            if not isinstance(score, (int, float)) or not 0 <= score <= 1:
                shown = reprlib.repr(score)
                raise ValueError(f"gives {answer!r} the score {shown}, which is not within 0..1")
            if normal_answer(answer) in scores:
                raise ValueError(f"gives scores for {normal_answer(answer)!r} twice")
            scores[normal_answer(answer)] = float(score)
        return scores
    if len(given) == 1:
        return {normal_answer(given[0]): 1.0}
    counts = Counter(map(normal_answer, given))
    return {answer: _SCORES[min(count, 4)] for answer, count in counts.items()}


def vocabulary(scored: Iterable[Mapping[str, float]], minimum: int = 1) -> list[str]:
    """The answers that a model distinguishes, in the order in which they first occur.

    Args:
        scored: the scores of each question, see :func:`soft_scores`. Only the question's major
            answer counts: the first of those with the highest score.
        minimum: number of questions that an answer must be the major answer of; VQAv2 uses 9.

    Raises:
        ValueError: no answer is frequent enough.
    """
    counts = Counter(max(scores, key=scores.__getitem__) for scores in scored if scores)
    frequent = [answer for answer, count in counts.items() if count >= minimum]
    if not frequent:
        raise ValueError(f"answer_minimum: no answer is that of {minimum} questions")
    return frequent


def answer_ids(answers: Sequence[str]) -> dict[str, int]:
    """Map each answer in normal form to its id.

    Raises:
        ValueError: two answers have the same normal form.
    """
    ids: dict[str, int] = {}
    for number, answer in enumerate(answers):
        if ids.setdefault(normal_answer(answer), number) != number:
            raise ValueError(f"answers: {answer!r} is listed twice")
    return ids
