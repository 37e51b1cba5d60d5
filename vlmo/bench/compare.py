"""What has become faster or slower from one report to another."""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vlmo.bench.report import (
    Record,
    Report,
    is_ours,
    labels_of,
    number,
    print_whole,
    title_of,
)

THRESHOLD = 0.02
RULE = (
    "faster or slower: the medians differ by more than "
    f"{THRESHOLD:.0%} and the ranges between the quartiles do not overlap; else the same"
)
_STYLES = {"faster": "green", "slower": "red", "same": "dim"}


class Change(NamedTuple):
    """One contender of one case, in both reports.

    Attributes:
        before: record of the first report.
        after: record of the second.
        verdict: "faster", "slower" or "same", of the second.
    """

    before: Record
    after: Record
    verdict: str

    @property
    def times(self) -> float:
        """How many times as fast the second is."""
        return self.before["device_ms"] / self.after["device_ms"]


@dataclass(frozen=True)
class Comparison:
    """Two reports side by side.

    Attributes:
        changes: of what both have measured, in the order of the second.
        only_before: measured in the first only, in words.
        only_after: measured in the second only, in words.
        warnings: what else differs, so that times need not be those of the same thing. If the
            contenders of others, whose code did not change, are faster or slower by more than
            2 % (median), the machine was in another state.
    """

    changes: Sequence[Change]
    only_before: Sequence[str]
    only_after: Sequence[str]
    warnings: Sequence[str]

    def table(self, console: Console) -> None:
        """Print everything, and the rule."""
        for warning in self.warnings:
            console.print(f"[yellow]Warning: {escape(warning)}[/]", highlight=False)
        console.print(f"Verdict: {RULE}.", highlight=False)
        table = Table(box=box.SIMPLE_HEAD)
        table.add_column("case", no_wrap=True)
        table.add_column("contender", no_wrap=True)
        for column in ("ms before", "ms after", "times as fast", "verdict"):
            table.add_column(column, justify="right", no_wrap=True)
        told = None
        for change in self.changes:
            case = title_of(labels_of(change.after))
            times = [number(record["device_ms"]) for record in (change.before, change.after)]
            table.add_row(
                *(escape(case) if case != told else "", escape(change.after["contender"])),
                *times,
                f"{change.times:.2f} x",
                f"[{_STYLES[change.verdict]}]{change.verdict}[/]",
            )
            told = case
        print_whole(console, table)
        counts = Counter(change.verdict for change in self.changes)
        console.print(", ".join(f"{counts[verdict]} {verdict}" for verdict in _STYLES) + ".")
        for title, names in (
            ("Measured before only", self.only_before),
            ("Measured after only", self.only_after),
        ):
            if names:
                console.print(f"\n[bold]{title}[/]")
                for name in names:
                    console.print(f"  {escape(name)}", highlight=False)


def compare(before: Report, after: Report) -> Comparison:
    """Match what was measured by case and contender.

    One is faster or slower than the other if the medians differ by more than 2 % and the ranges
    between the quartiles do not overlap; else they are the same.
    """
    old, new = _measured(before), _measured(after)
    both = [(old[key], new[key]) for key in new if key in old]
    changes = [Change(*records, _verdict(*records)) for records in both]
    return Comparison(
        changes,
        [_name(record) for key, record in old.items() if key not in new],
        [_name(record) for key, record in new.items() if key not in old],
        [*_warnings(before, after), *_drift(changes)],
    )


def _measured(report: Report) -> dict[str, Record]:
    """Records with numbers by what identifies them, whatever the order of their labels."""
    return {
        json.dumps([labels_of(record), record["contender"]], sort_keys=True): record
        for record in report.records
        if "device_ms" in record
    }


def _verdict(before: Record, after: Record) -> str:
    apart = (
        after["device_ms_high"] < before["device_ms_low"]
        or before["device_ms_high"] < after["device_ms_low"]
    )
    change = after["device_ms"] / before["device_ms"] - 1
    if not apart or abs(change) <= THRESHOLD:
        return "same"
    return "faster" if change < 0 else "slower"


def _name(record: Record) -> str:
    return f"{title_of(labels_of(record))}: {record['contender']}"


def _warnings(before: Report, after: Report) -> list[str]:
    found = [
        f"the {name} differs: {old!r} before, {new!r} after"
        for name, old, new in (
            ("machine's name", before.machine["name"], after.machine["name"]),
            ("command", _what_runs(before.command), _what_runs(after.command)),
        )
        if old != new
    ]
    for what, old, new in (
        ("machine", before.machine, after.machine),
        ("version of", before.versions, after.versions),
    ):
        found += [
            f"{what} {key} differs: {old.get(key)!r} before, {new.get(key)!r} after"
            for key in dict.fromkeys([*old, *new])
            if key != "name" and old.get(key) != new.get(key)
        ]
    return found


def _what_runs(command: str) -> str:
    """The command without what only says how and where its results are written."""
    return re.sub(r"\s--(?:(?:output|commit)[ =]\S+|(?:no-)?pictures)", "", command)


def _drift(changes: Sequence[Change]) -> list[str]:
    """A warning if code that is not this library's has become faster or slower."""
    others = [change.times for change in changes if not is_ours(change.after["contender"])]
    drift = statistics.median(others) if others else 1.0
    if abs(drift - 1) <= THRESHOLD:
        return []
    return [
        f"contenders of others are {drift:.2f} x as fast as before (median of {len(others)}): "
        "the machine was in another state; divide by that, or measure both again in turn"
    ]
