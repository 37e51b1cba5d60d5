"""Samples that cannot be read: how many of them a training tolerates, and their list."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vlmo.files import append, replacing
from vlmo.training.parallel import objects_of_ranks

FILE = "bad_samples.jsonl"
SPARES = 8  # replacement samples for each row of a batch
_SHARE, _FEWEST = 0.01, 10  # the limit of "skip" without a number


def bearable(policy: str, samples: int) -> int | None:
    """Number of bad samples that a training may leave out; None if the first one ends it.

    Args:
        policy: "error"; "skip" for 1 % of the samples, but at least 10; "skip:N" for N.
        samples: number of samples in the data.

    Raises:
        ValueError: ``policy`` has another form.
    """
    if policy == "error":
        return None
    if policy == "skip":
        return max(_FEWEST, math.ceil(_SHARE * samples))
    number = re.fullmatch(r"skip:([1-9][0-9]{0,17})", policy)
    if number is None:
        raise ValueError(f"on_bad_sample: {policy!r} is not error, skip or skip:N with N above 0")
    return int(number[1])


class BadSamples:
    """The samples that could not be read so far, each listed once; equal on all ranks.

    Args:
        known: the bad samples of the steps done, by number of the sample.
        limit: largest number that may be left out; None if the first one ends the training.
    """

    def __init__(self, known: dict[int, dict[str, Any]], limit: int | None):
        self._known, self._limit = known, limit
        self._seen: list[tuple[int, int, str]] = []

    def __len__(self) -> int:
        return len(self._known)

    def note(self, step: int, found: Iterable[tuple[int, str]]) -> None:
        """Record the numbers and reasons of samples that this rank could not read for a step."""
        self._seen += [(step, number, reason) for number, reason in found]

    def gather(self) -> list[dict[str, Any]]:
        """New entries of all ranks since the last call, as in the file; a collective call."""
        everyone, self._seen = objects_of_ranks(self._seen), []
        new = []
        for step, number, reason in sorted(entry for seen in everyone for entry in seen):
            if number not in self._known:
                self._known[number] = {"sample": number, "step": step, "reason": reason}
                new.append(self._known[number])
        return new

    def until(self, step: int) -> int:
        """Number of bad samples found in steps up to and including ``step``."""
        return sum(entry["step"] <= step for entry in self._known.values())

    def check(self) -> None:
        """Raise ValueError if there are more than may be left out."""
        if self._limit is not None and len(self) > self._limit:
            raise ValueError(
                f"on_bad_sample: {len(self)} samples cannot be read, more than the {self._limit} "
                f"that may be skipped; {FILE} in the run's folder lists them, and vlmo check finds "
                "all there are"
            )


def write_list(folder: Path, known: Mapping[int, Mapping[str, Any]]) -> None:
    """Rewrite the file of bad samples, or delete it if there are none."""
    path = folder / FILE
    if not known:
        path.unlink(missing_ok=True)
        return
    with replacing(path) as temporary:
        temporary.write_text("".join(map(_line, known.values())), encoding="utf-8")


def add_to_list(folder: Path, new: Iterable[Mapping[str, Any]]) -> None:
    """Append to the file of bad samples."""
    path = folder / FILE
    if not path.exists():
        write_list(folder, dict(enumerate(new)))
    else:
        append(path, "".join(map(_line, new)))


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry) + "\n"
