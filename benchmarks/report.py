"""Reads what a run of the benchmarks has measured, and writes it as a page with pictures.

    python benchmarks/report.py [PATH]

PATH is a JSON file of pytest-benchmark, or a folder from which the newest one is read (default
``.benchmarks/``). The Markdown page is written beside it, and so are the pictures if matplotlib is
installed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from harness.session import LEFT_OUT, PEER_NOT_EXACT, is_defect, is_ours
from vlmo.files import replacing

STORAGE = Path(__file__).parent.parent / ".benchmarks"
# A case and contender as a flat dict: Case.labels, "contender", and "reason" or MEASURED values.
Record = dict[str, Any]
LABELS = ("suite", "size", "dtype", "phase")  # of every case; the shape adds more
MEASURED = (
    *("device_ms", "device_ms_low", "device_ms_high", "wall_ms", "calls", "tflops", "gb_per_s"),
    *("share_of_roof", "samples_per_s", "peak_mib", "launches", "millijoules", "clock_mhz"),
    *("temperature_c", "throttled", "error"),
)
# The contenders that compute as unilm, the reference implementation; its BEiT-3 is torchscale.
OFFICIAL = ("slices", "eager", "official", "torchscale")
MODELS = ("model", "beit3")  # suites of whole models
# Notes about contenders that affect the interpretation of their numbers.
NOTES = {
    "dense": "all tokens through one expert",
    "dense-compiled": "all tokens through one expert",
    "liger": "another function of as many operations: SwiGLU without biases",
    "quack": "GELU by its tanh approximation",
    "eager": "the product of queries and keys has a result in the dtype of the operands, as under "
    "autocast in unilm; the allowed error is that of one in float32",
    "sdpa": "any of PyTorch's kernels that has the gradient of a bias, which cuDNN's has not",
}


@dataclass
class Report:
    """The records of a run, and its environment.

    Attributes:
        machine: ``name`` ("cpu", or the GPU's name), ``cpu`` (a name), on a CPU ``instructions``
            and, if variables restrict them, ``environment``, and further descriptions.
        commit: commit that was measured.
        command: command that was run.
        versions: versions of the software that times can depend on.
        roof: ``copy_gb_per_s``, and ``matrix_tflops`` by dtype.
        unmeasured: sentences about what could not be measured on this machine, and why.
        records: one for each case and contender.
    """

    machine: dict[str, Any]
    commit: str
    command: str
    versions: dict[str, str]
    roof: dict[str, Any]
    unmeasured: list[str]
    records: list[Record]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Report:
        """Read a JSON file of pytest-benchmark, or one of format 1 (until 2026).

        Raises:
            ValueError: it has another format; the message names the file and the fault.
            OSError: it cannot be read.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:  # invalid JSON or encoding
            raise ValueError(f"{path}: is not JSON: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path}: is not a JSON object")
        if content.get("modelled") or content.get("kind") == "modelled":
            raise ValueError(f"{path}: has modelled figures, which are no measurements")
        if content.get("format") == 1:
            return cls(**{known.name: content[known.name] for known in fields(cls)})
        if "vlmo" not in content:
            raise ValueError(f"{path}: is no result of these benchmarks")
        return cls._of_pytest_benchmark(content)

    @classmethod
    def _of_pytest_benchmark(cls, content: dict[str, Any]) -> Report:
        ours, machine, commit = (content[key] for key in ("vlmo", "machine_info", "commit_info"))
        records = []
        for benchmark in content["benchmarks"]:
            stats = benchmark["stats"]
            times = dict(device_ms="median", device_ms_low="q1", device_ms_high="q3")
            told = {name: 1e3 * stats[key] for name, key in times.items()}
            records.append(benchmark["extra_info"] | told | {"calls": stats["rounds"]})
        records += ours["not_run"]
        suites = list(dict.fromkeys(record["suite"] for record in records))
        brand = {"cpu": machine["cpu"].get("brand_raw", machine["machine"])}
        return cls(
            machine=machine["device"] | (brand if "cpu" not in machine["device"] else {}),
            commit=commit["id"][:7] + ("-dirty" if commit["dirty"] else ""),
            versions=machine["versions"],
            records=sorted(records, key=lambda record: suites.index(record["suite"])),
            **{name: ours[name] for name in ("command", "roof", "unmeasured")},
        )

    @property
    def digest(self) -> str:
        """Digest of the whole report."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def markdown(self) -> str:
        """The report as a page that starts with machine, commit, command and versions."""
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
            columns = [column for column in _COLUMNS if column.shown(group)]
            rows = [[c.cell(group, record) for c in columns] for record in group.records]
            rows += [[r["contender"], *["-"] * (len(columns) - 1)] for r in group.inexact]
            lines += [f"## {group.title}", ""]
            lines += markdown_table([c.title for c in columns], rows)
            lines += ["", *(f"{note}\n" for note in group.notes)]
        for title, below in (
            ("Not run", self.not_run()),
            ("Left out for lack of time", self.left_out()),
            ("Not measured here", self.unmeasured),
        ):
            if below:
                lines += [f"## {title}", "", *(f"* {line}" for line in below), ""]
        return "\n".join(lines)

    def not_run(self) -> list[str]:
        """Each reason once, with its contenders and their numbers of cases; defects first."""
        found: dict[str, dict[str, int]] = {}
        defects = set()
        for record in self.records:
            if "reason" in record and not _is_left_out(record):
                who, reason = record["contender"], record["reason"]
                counts = found.setdefault(reason, {})
                counts[who] = counts.get(who, 0) + 1
                if is_defect(who, reason):
                    defects.add(reason)
        told = []
        for reason in sorted(found, key=lambda reason: reason not in defects):
            whose = [f"{w} ({n} case{'s' * (n != 1)})" for w, n in found[reason].items()]
            told.append(f"{reason.rstrip('.')}: {', '.join(whose)}")
        return told

    def left_out(self) -> list[str]:
        """The cases and contenders that were left out because of the time limit."""
        return [
            f"{title_of(labels_of(record))}: {record['contender']}: {record['reason']}"
            for record in self.records
            if _is_left_out(record)
        ]

    def _roof(self) -> str:
        if not self.roof:
            return "not measured"
        rates = self.roof["matrix_tflops"].items()
        parts = [f"copies {number(self.roof['copy_gb_per_s'])} GB/s"]
        return ", ".join(parts + [f"{dtype} products {number(r)} TFLOP/s" for dtype, r in rates])


@dataclass(frozen=True)
class Group:
    """The results of a case: ours first, then peers, then dense layers, each by speed.

    Attributes:
        labels: labels of the case.
        records: records with numbers.
        inexact: records of peers that exceed the error bound and have no numbers.
    """

    labels: dict[str, int | str]
    records: list[Record]
    inexact: list[Record]

    @property
    def title(self) -> str:
        """Description of the case."""
        return title_of(self.labels)

    @property
    def best(self) -> Record | None:
        """Our fastest contender."""
        return self._fastest(is_ours)

    @property
    def best_peer(self) -> Record | None:
        """The fastest peer, compiled or not; notes describe those of another function."""
        return self._fastest(lambda name: not is_ours(name) and not is_dense(name))

    @property
    def official(self) -> Record | None:
        """The contender that computes as unilm does."""
        return self._fastest(lambda name: name in OFFICIAL)

    @property
    def dense(self) -> Record | None:
        """The fastest layer without experts, which computes another function."""
        return self._fastest(is_dense)

    @property
    def notes(self) -> list[str]:
        """Notes below the table."""
        names = [record["contender"] for record in self.records]
        found = [f"{name}: {NOTES[name]}." for name in names if name in NOTES]
        for record in self.records:
            if record.get("throttled"):
                reasons = ", ".join(record["throttled"])
                found.append(f"{record['contender']}: the GPU was throttled ({reasons}).")
        return found + [f"{r['contender']}: not timed: {r['reason']}." for r in self.inexact]

    def _fastest(self, wanted: Callable[[str], bool]) -> Record | None:
        chosen = [record for record in self.records if wanted(record["contender"])]
        return min(chosen, key=lambda record: record["device_ms"], default=None)


def groups(records: Sequence[Record]) -> list[Group]:
    """The cases with results, in order."""
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


def firsts(found: Sequence[Group]) -> list[Group]:
    """The most important case of each suite and phase."""
    chosen: dict[tuple[Any, Any], Group] = {}
    for group in found:
        chosen.setdefault((group.labels["suite"], group.labels["phase"]), group)
    return list(chosen.values())


def title_of(labels: Mapping[str, int | str]) -> str:
    """Description of a case."""
    shape = [f"{k} {v}" for k, v in labels.items() if k not in LABELS]
    return ", ".join([*(str(labels[name]) for name in LABELS), *shape])


def labels_of(record: Record) -> dict[str, int | str]:
    """The labels of a record that identify its case."""
    others = ("contender", "reason", *MEASURED)
    return {name: value for name, value in record.items() if name not in others}


def is_dense(contender: str) -> bool:
    """Whether a contender is a layer without experts."""
    return contender.startswith("dense")


def speedup(record: Record | None, other: Record | None) -> float | None:
    """Time of ``other`` divided by that of ``record``; None if either is missing."""
    if record is None or other is None:
        return None
    return other["device_ms"] / record["device_ms"]


def number(value: float) -> str:
    """Format with three significant digits and without an exponent."""
    if value == 0 or not math.isfinite(value):
        return str(value)
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def times(value: float | None) -> str:
    """Format a speedup."""
    return "-" if value is None else f"{value:.2f} x"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; the first column is left-aligned, the others right-aligned."""
    ruler = ["---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (header, ruler, *rows)]


class _Column(NamedTuple):
    """A column of a case's table."""

    title: str
    cell: Callable[[Group, Record], str]
    shown: Callable[[Group], bool] = lambda group: True


def _measured(title: str, name: str, shown: Callable[[float], str] = number) -> _Column:
    """A column that appears if any record has a value."""
    return _Column(
        title,
        lambda group, record: "-" if record.get(name) is None else shown(record[name]),
        lambda group: any(record.get(name) is not None for record in group.records),
    )


def _speedup(over: str, other: Callable[[Group], Record | None]) -> _Column:
    return _Column(
        f"speedup over {over}",
        lambda group, record: times(speedup(record, other(group))),
        lambda group: other(group) is not None,
    )


def _milliseconds(group: Group, record: Record) -> str:
    low, high = number(record["device_ms_low"]), number(record["device_ms_high"])
    return f"{number(record['device_ms'])} ({low} to {high})"


_COLUMNS = (
    _Column("contender", lambda group, record: record["contender"]),
    _Column("ms (quartiles)", _milliseconds),
    _measured("TFLOP/s", "tflops"),
    _measured("GB/s", "gb_per_s"),
    _measured("of roof", "share_of_roof", "{:.0%}".format),
    _measured("samples/s", "samples_per_s")._replace(shown=lambda g: g.labels["suite"] in MODELS),
    _speedup("best peer", lambda group: group.best_peer),
    _speedup("unilm", lambda group: group.official),
    _speedup("dense", lambda group: group.dense),
    _measured("peak MiB", "peak_mib"),
    _measured("launches", "launches", str),
    _measured("mJ", "millijoules"),
)


def _rank(contender: str) -> int:
    return 0 if is_ours(contender) else 2 if is_dense(contender) else 1


def _is_left_out(record: Record) -> bool:
    return record.get("reason", "").startswith(LEFT_OUT)


def write(path: Path, report: Report) -> Iterator[Path]:
    """Write the page beside the JSON file ``path``, and the pictures if matplotlib is installed."""
    from pictures import draw

    page = path.with_suffix(".md")
    with replacing(page) as temporary:
        temporary.write_text(report.markdown(), encoding="utf-8")
    yield page
    try:
        yield from draw(report, path.with_suffix(""))
    except ImportError as error:
        print(f"No pictures: {error}", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, nargs="?", default=STORAGE, help="JSON file, or folder")
    path = parser.parse_args().path
    if path.is_dir():
        found = sorted(path.rglob("*.json"), key=lambda path: path.stat().st_mtime)
        if not found:
            parser.error(f"{path} holds no result")
        path = found[-1]
    report = Report.load(path)
    print(report.markdown())
    print(f"Written: {', '.join(map(str, write(path, report)))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
