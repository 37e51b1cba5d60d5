"""What a run of suites found: on disk, as tables on the console, and as Markdown."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from vlmo.bench import attention, moe_ffn
from vlmo.files import write_json

FORMAT = 1
# One case and contender, flat: Case.labels, "contender", and "reason" or MEASURED.
Record = dict[str, Any]
LABELS = ("suite", "size", "dtype", "phase")  # of every case; its shape adds more
MEASURED = (
    "device_ms",
    "device_ms_low",
    "device_ms_high",
    "wall_ms",
    "calls",
    "tflops",
    "gb_per_s",
    "share_of_roof",
    "samples_per_s",
    "peak_mib",
    "launches",
    "millijoules",
    "clock_mhz",
    "temperature_c",
    "throttled",
    "error",
)
_ALWAYS_MEASURED = ("device_ms", "device_ms_low", "device_ms_high", "tflops", "gb_per_s")
# How each suite's computation is written by those who publish it.
OFFICIAL = ("slices", "eager", "official")
# What reasons begin with that are defects of this library's own contenders.
NOT_EXACT, FAILED = "not exact", "failed"
# Of peers, who may round otherwise on another CPU; and of what there was no time for.
PEER_NOT_EXACT, LEFT_OUT = "out of its error bound", "left out"
_NOTES = {moe_ffn.NAME: moe_ffn.NOTES, attention.NAME: attention.NOTES}


@dataclass
class Report:
    """The records of a run, and what they depend on.

    Attributes:
        machine: ``name``, short, which names the file ("cpu", or the GPU's name), and more for
            people.
        commit: of what was measured.
        command: that was run.
        versions: of what a time can depend on.
        roof: ``copy_gb_per_s``, and ``matrix_tflops`` by dtype; as of ``roofline.Roof``.
        unmeasured: sentences: what could not be measured on this machine, and why.
        records: one for each case and contender.
        run: its number among those of this machine and commit in one folder.
    """

    machine: dict[str, Any]
    commit: str
    command: str
    versions: dict[str, str]
    roof: dict[str, Any]
    unmeasured: list[str] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    run: int = 1

    @property
    def stem(self) -> str:
        """Name of its files without a suffix: machine, commit, and from the second on the run."""
        name = f"{_slug(self.machine['name'])}-{_slug(self.commit)}"
        return name if self.run == 1 else f"{name}-{self.run}"

    @property
    def digest(self) -> str:
        """Of everything in it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def numbered(self, folder: str | os.PathLike[str]) -> Report:
        """The same with the first number of which the folder has no file."""
        report = dataclasses.replace(self, run=1)
        while (Path(folder) / f"{report.stem}.json").exists():
            report.run += 1
        return report

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the JSON file into a folder, which is made; its path is returned."""
        path = Path(folder) / f"{self.stem}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"format": FORMAT} | asdict(self))
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Report:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: it is something else; the message names the file and what is wrong.
            OSError: it cannot be read.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:  # of JSON, or of the encoding
            raise ValueError(f"{path}: is not JSON: {error}") from error
        wrong = _why_no_report(content)
        if wrong is not None:
            raise ValueError(f"{path}: {wrong}")
        return cls(**{known.name: content[known.name] for known in fields(cls)})

    def table(self, console: Console) -> None:
        """Print everything: a table for each case, what was not run, what was not measured."""
        for group in groups(self.records):
            show_group(group, console)
        self.summary(console)

    def summary(self, console: Console) -> None:
        """Print what was not run and what was not measured, and why."""
        for title, lines in self._below():
            console.print(f"\n[bold]{title}[/]")
            for line in lines:
                style = "red" if is_defect(line) else None
                console.print(f"  {escape(line)}", style=style, highlight=False)

    def markdown(self) -> str:
        """Everything as a page, headed by machine, commit, command and versions."""
        machine = "; ".join(f"{key} {value}" for key, value in self.machine.items())
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines = [
            f"# Measured on {self.machine['name']}",
            "",
            f"* machine: {machine}",
            f"* commit: {self.commit}",
            f"* command: `{self.command}`",
            f"* versions: {versions}",
            f"* roof: {self._roof()}",
            "",
            "docs/performance.md says what the columns mean.",
            "",
        ]
        for group in groups(self.records):
            columns = _columns(group)
            lines += [f"## {group.title}", ""]
            lines += markdown_table([c.title for c in columns], group.rows(columns))
            lines += ["", *(f"{note}\n" for note in group.notes)]
        for title, below in self._below():
            lines += [f"## {title}", "", *(f"* {line}" for line in below), ""]
        return "\n".join(lines)

    @property
    def defects(self) -> list[Record]:
        """Records of our own contenders that are not exact or failed."""
        return [record for record in self.records if is_defect(record.get("reason", ""))]

    def not_run(self) -> list[str]:
        """Each reason once, with its contenders and how many cases of each it kept out."""
        found: dict[str, dict[str, int]] = {}
        for record in self.records:
            if "reason" in record and not is_left_out(record):
                counts = found.setdefault(record["reason"], {})
                counts[record["contender"]] = counts.get(record["contender"], 0) + 1
        told = []
        # What is wrong comes before what is only missing.
        for reason in sorted(found, key=lambda reason: not is_defect(reason)):
            whose = [f"{who} ({_cases(count)})" for who, count in found[reason].items()]
            told.append(f"{reason.rstrip('.')}: {', '.join(whose)}")
        return told

    def left_out(self) -> list[str]:
        """The cases and contenders for which there was no time."""
        return [
            f"{title_of(labels_of(record))}: {record['contender']}: {record['reason']}"
            for record in self.records
            if is_left_out(record)
        ]

    def _below(self) -> Iterator[tuple[str, list[str]]]:
        for title, lines in (
            ("Not run", self.not_run()),
            ("Left out for lack of time", self.left_out()),
            ("Not measured here", self.unmeasured),
        ):
            if lines:
                yield title, lines

    def _roof(self) -> str:
        rates = self.roof.get("matrix_tflops", {}).items()
        parts = [f"copies {number(self.roof['copy_gb_per_s'])} GB/s"] if self.roof else []
        parts += [f"{dtype} products {number(rate)} TFLOP/s" for dtype, rate in rates]
        return ", ".join(parts) or "not measured"


@dataclass(frozen=True)
class Group:
    """What was measured of one case: ours first, then peers, then dense layers; fast ones first.

    Attributes:
        labels: of the case.
        records: those with numbers.
        inexact: of peers that are out of their error bound, and have no numbers.
    """

    labels: dict[str, int | str]
    records: list[Record]
    inexact: list[Record]

    @property
    def title(self) -> str:
        """The case in words."""
        return title_of(self.labels)

    def rows(self, columns: Sequence[_Column]) -> list[list[str]]:
        """Cells of the table, the inexact last."""
        measured = [[c.cell(self, record) for c in columns] for record in self.records]
        nothing = ["-"] * (len(columns) - 1)
        return measured + [[record["contender"], *nothing] for record in self.inexact]

    @property
    def best(self) -> Record | None:
        """The fastest of ours."""
        return self._fastest(lambda name: is_ours(name))

    @property
    def best_peer(self) -> Record | None:
        """The fastest of the others; of those that compute something else, notes tell."""
        return self._fastest(lambda name: not is_ours(name) and not is_dense(name))

    @property
    def official(self) -> Record | None:
        """The published way of writing it."""
        return self._fastest(lambda name: name in OFFICIAL)

    @property
    def dense(self) -> Record | None:
        """The fastest layer without experts, which computes something else."""
        return self._fastest(is_dense)

    @property
    def notes(self) -> list[str]:
        """What has to be said below the table."""
        names = [record["contender"] for record in self.records]
        notes = _NOTES.get(str(self.labels["suite"]), {})
        found = [f"{name}: {notes[name]}." for name in names if name in notes]
        for record in self.records:
            if record.get("throttled"):
                reasons = ", ".join(record["throttled"])
                found.append(f"{record['contender']}: the GPU was throttled ({reasons}).")
        return found + [f"{r['contender']}: not timed: {r['reason']}." for r in self.inexact]

    def _fastest(self, wanted: Callable[[str], bool]) -> Record | None:
        chosen = [record for record in self.records if wanted(record["contender"])]
        return min(chosen, key=lambda record: record["device_ms"], default=None)


def groups(records: Sequence[Record]) -> list[Group]:
    """The cases of which something was measured, in their order."""
    found: dict[str, Group] = {}
    for record in records:
        labels = labels_of(record)
        group = found.setdefault(json.dumps(labels), Group(labels, [], []))
        if "device_ms" in record:
            group.records.append(record)
        elif record["reason"].startswith(PEER_NOT_EXACT):
            group.inexact.append(record)
    for group in found.values():
        group.records.sort(key=lambda record: (_rank(record["contender"]), record["device_ms"]))
    return [group for group in found.values() if group.records]


def title_of(labels: Mapping[str, int | str]) -> str:
    """A case in words."""
    shape = [f"{k} {v}" for k, v in labels.items() if k not in LABELS]
    return ", ".join([*(str(labels[name]) for name in LABELS), *shape])


def labels_of(record: Record) -> dict[str, int | str]:
    """What tells the case of a record from other cases."""
    others = ("contender", "reason", *MEASURED)
    return {name: value for name, value in record.items() if name not in others}


def is_defect(reason: str) -> bool:
    """Whether a record has no numbers because something is wrong, rather than missing."""
    return reason.startswith((NOT_EXACT, FAILED))


def is_left_out(record: Record) -> bool:
    """Whether there was no time for it."""
    return record.get("reason", "").startswith(LEFT_OUT)


def is_ours(contender: str) -> bool:
    """Whether it is of this library."""
    return contender.startswith("vlmo")


def is_dense(contender: str) -> bool:
    """Whether it is a layer without experts."""
    return contender.startswith("dense")


def times_as_fast(record: Record, other: Record | None) -> float | None:
    """The other's time over this one's; None if there is no other."""
    return None if other is None else other["device_ms"] / record["device_ms"]


def show_group(group: Group, console: Console) -> None:
    """Print the table of one case."""
    columns = _columns(group)
    table = Table(title=escape(group.title), title_justify="left", box=box.SIMPLE_HEAD)
    for column in columns:
        left = column is columns[0]
        table.add_column(column.title, justify="left" if left else "right", no_wrap=True)
    for row in group.rows(columns):
        table.add_row(*map(escape, row), style="bold" if is_ours(row[0]) else None)
    print_whole(console, table)
    for note in group.notes:
        console.print(f"  {escape(note)}", highlight=False)


def print_whole(console: Console, table: Table) -> None:
    """Print a table wider than the console rather than without some of its digits."""
    wide = console.options.update(width=1000)
    table.width = Measurement.get(console, wide, table).maximum
    console.print(table, crop=False, no_wrap=True, overflow="ignore")


def number(value: float) -> str:
    """Three significant digits, never an exponent."""
    if value == 0 or not math.isfinite(value):
        return str(value)
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, the first column left, the others right."""
    ruler = ["---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (header, ruler, *rows)]


class _Column(NamedTuple):
    """One column of a case's table."""

    title: str
    cell: Callable[[Group, Record], str]
    shown: Callable[[Group], bool]


def _measured(title: str, name: str, shown: Callable[[float], str] = number) -> _Column:
    """A column that is there if a record has a value."""

    def has(record: Record) -> bool:
        return record.get(name) is not None

    return _Column(
        title,
        lambda group, record: shown(record[name]) if has(record) else "-",
        lambda group: any(map(has, group.records)),
    )


def _ratio(title: str, other: Callable[[Group], Record | None]) -> _Column:
    def cell(group: Group, record: Record) -> str:
        times = times_as_fast(record, other(group))
        return "-" if times is None else f"{times:.2f} x"

    return _Column(title, cell, lambda group: other(group) is not None)


def _milliseconds(group: Group, record: Record) -> str:
    low, high = number(record["device_ms_low"]), number(record["device_ms_high"])
    return f"{number(record['device_ms'])} ({low} to {high})"


_COLUMNS = (
    _Column("contender", lambda group, record: record["contender"], lambda group: True),
    _Column("ms (quartiles)", _milliseconds, lambda group: True),
    _measured("TFLOP/s", "tflops"),
    _measured("GB/s", "gb_per_s"),
    _measured("of roof", "share_of_roof", "{:.0%}".format),
    _measured("samples/s", "samples_per_s")._replace(shown=lambda g: g.labels["suite"] == "model"),
    _ratio("x best peer", lambda group: group.best_peer),
    _ratio("x official", lambda group: group.official),
    _ratio("x dense", lambda group: group.dense),
    _measured("peak MiB", "peak_mib"),
    _measured("launches", "launches", str),
    _measured("mJ", "millijoules"),
)


def _columns(group: Group) -> list[_Column]:
    return [column for column in _COLUMNS if column.shown(group)]


def _rank(contender: str) -> int:
    return 0 if is_ours(contender) else 2 if is_dense(contender) else 1


def _cases(count: int) -> str:
    return f"{count} case" if count == 1 else f"{count} cases"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", str(name).lower()).strip("-")


def _why_no_report(content: Any) -> str | None:
    """What is wrong with the content of a file."""
    if not isinstance(content, dict):
        return "is no report of vlmo bench: not a JSON object"
    if content.get("modelled") or content.get("kind") == "modelled":
        return "has modelled figures, which are never put beside measured ones"
    if content.get("format") != FORMAT:
        return f"format {content.get('format')!r} is not {FORMAT}: no report of this vlmo bench"
    kinds = dict(machine=dict, commit=str, command=str, versions=dict, roof=dict)
    for key, kind in (kinds | dict(unmeasured=list, records=list, run=int)).items():
        if key not in content:
            return f"has no {key!r}"
        if not isinstance(content[key], kind):
            return f"{key!r} is of type {type(content[key]).__name__}, not {kind.__name__}"
    if not isinstance(content["machine"].get("name"), str):
        return "'machine' has no 'name'"
    rates = [content["roof"].get("copy_gb_per_s"), *_values(content["roof"], "matrix_tflops")]
    if content["roof"] and not all(isinstance(rate, int | float) and rate > 0 for rate in rates):
        return f"'roof' is {content['roof']!r}"
    for number_, record in enumerate(content["records"]):
        wrong = _why_no_record(record)
        if wrong is not None:
            return f"record {number_}: {wrong}"
    return None


def _values(content: dict[str, Any], key: str) -> list[Any]:
    values = content.get(key)
    return list(values.values()) if isinstance(values, dict) else [None]


def _why_no_record(record: Any) -> str | None:
    if not isinstance(record, dict):
        return "is not a JSON object"
    for key in (*LABELS, "contender"):
        if not isinstance(record.get(key), str):
            return f"{key!r} is {record.get(key)!r}, not a text"
    for key, value in labels_of(record).items():
        if not isinstance(value, int | str):
            return f"{key!r} is {value!r}: neither a label nor something that is measured"
    if ("reason" in record) == ("device_ms" in record):
        return "needs either a 'reason' or a 'device_ms'"
    if "reason" in record:
        return None if isinstance(record["reason"], str) else "'reason' is not a text"
    for key in MEASURED:
        measured = record.get(key)
        if measured is None and key not in _ALWAYS_MEASURED:
            continue
        if key == "throttled":
            right = isinstance(measured, list)
        else:
            right = isinstance(measured, int | float) and 0 <= measured < math.inf
        if not right or (key == "device_ms" and measured == 0):
            return f"{key!r} is {measured!r}"
    return None
