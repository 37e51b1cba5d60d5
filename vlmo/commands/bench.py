"""``vlmo bench``: measure suites here, and show, write and draw what was found."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from vlmo.bench import pictures, runner
from vlmo.bench.compare import compare
from vlmo.bench.report import (
    Report,
    groups,
    is_defect,
    is_left_out,
    labels_of,
    show_group,
    title_of,
)
from vlmo.bench.suite import Scale, Suite
from vlmo.device import chosen_device
from vlmo.files import replacing

_MINUTES = {"cpu": 4.5, "cuda": 20.0}


@dataclass(frozen=True)
class Settings:
    """What the command line decides.

    Attributes:
        output: folder for the JSON file, the Markdown page and the pictures.
        suites: names of ``runner.SUITES``; none for all.
        dtypes: only cases in these; none for all.
        sizes: only cases of these; none for all.
        contenders: only these, or all that begin with one and a colon; none for all.
        device: name for :func:`vlmo.device.chosen_device`.
        minutes: within which everything ends; None for 4.5 on a CPU and 20 on a GPU.
        smoke: tiny sizes and three calls of each, to see that everything runs; written to a folder
            ``smoke`` in ``output``, in the place of the last such run.
        draws: whether pictures are wanted.
        commit: of what is measured; None to ask git.
        command: that the user gave.
    """

    output: Path = Path("vlmo-bench")
    suites: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    contenders: tuple[str, ...] = ()
    device: str = "auto"
    minutes: float | None = None
    smoke: bool = False
    draws: bool = True
    commit: str | None = None
    command: str = "vlmo bench"


def run(settings: Settings, console: Console) -> Report:
    """Measure, print each case as it is finished and what could not run, and write everything.

    The JSON file and the page are there after the first case, for a run that may be killed. An
    earlier run of the same commit keeps its files: this one gets a number.

    Raises:
        ValueError: a name that nothing has, or no time.
        ImportError: matplotlib is missing; nothing has been measured.
        OSError: the folder cannot be written to.
    """
    suites = _suites(settings.suites)
    device = chosen_device(settings.device)
    minutes = _MINUTES[device.type] if settings.minutes is None else settings.minutes
    if not minutes > 0:
        raise ValueError(f"minutes: {minutes} is not more than 0")
    if settings.draws:
        _require_matplotlib()
    if settings.smoke:
        settings = dataclasses.replace(settings, output=settings.output / "smoke")
    settings.output.mkdir(parents=True, exist_ok=True)
    names = ", ".join(suite.name for suite in suites)
    console.print(f"Measuring {names} on {device}, {minutes:g} minutes.", highlight=False)
    progress = _Progress(settings, console)
    report = runner.run(
        suites,
        device,
        scale=_scale(settings, device.type),
        seconds=60 * minutes,
        dtypes=settings.dtypes or None,
        sizes=settings.sizes or None,
        contenders=settings.contenders or None,
        commit=settings.commit,
        command=settings.command,
        on_case=progress,
    )
    report = progress.completed(report)
    report.summary(console)
    written = _write(report, settings)
    if settings.draws:
        written += pictures.draw(report, settings.output)
    console.print(f"\nWritten: {', '.join(map(str, written))}", highlight=False, soft_wrap=True)
    if report.defects:
        told = f"{len(report.defects)} of {len(report.records)} records: ours, not exact or failed"
        console.print(f"[red]{told}; see above.[/]", highlight=False)
    return report


def run_compare(before: Path, after: Path, console: Console) -> None:
    """Print what has become faster or slower from one JSON file to another.

    Raises:
        ValueError, OSError: as :meth:`Report.load`.
    """
    compare(Report.load(before), Report.load(after)).table(console)


class _Progress:
    """Prints and saves the report so far: each case's table, and each reason once."""

    def __init__(self, settings: Settings, console: Console) -> None:
        self._settings = settings
        self._console = console
        self._cases: set[str] = set()
        self._reasons: set[tuple[str, str]] = set()
        self._run: int | None = None

    def __call__(self, report: Report) -> None:
        for group in groups(report.records):
            if group.title not in self._cases:
                self._cases.add(group.title)
                self._console.print()
                show_group(group, self._console)
        for record in report.records:
            if "reason" not in record:
                continue
            who, reason = record["contender"], record["reason"]
            if is_left_out(record):
                who = f"{title_of(labels_of(record))}: {who}"
            if (who, reason) not in self._reasons:
                self._reasons.add((who, reason))
                style = "red" if is_defect(reason) else "dim"
                told = escape(f"  {who}: {reason}")
                self._console.print(told, style=style, highlight=False, soft_wrap=True)
        _write(self.completed(report), self._settings)

    def completed(self, report: Report) -> Report:
        """With what only the command knows."""
        if self._settings.smoke:
            note = "Speed: a smoke run of tiny sizes and few calls, whose times mean nothing."
            return dataclasses.replace(report, unmeasured=[note, *report.unmeasured])
        if self._run is None:
            self._run = report.numbered(self._settings.output).run
        return dataclasses.replace(report, run=self._run)


def _suites(names: Sequence[str]) -> list[Suite]:
    known = runner.SUITES
    for name in names:
        if name not in known:
            raise ValueError(f"suite: {name!r} is not one of {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names or known)]


def _require_matplotlib() -> None:
    try:
        pictures.require_matplotlib()
    except ImportError as error:
        raise ImportError(f"{error}; or take --no-pictures") from error


def _scale(settings: Settings, device: str) -> Scale:
    if settings.smoke:
        return Scale.smoke
    return Scale.full if device == "cuda" else Scale.cpu


def _write(report: Report, settings: Settings) -> list[Path]:
    data = report.save(settings.output)
    page = settings.output / f"{report.stem}.md"
    with replacing(page) as temporary:
        temporary.write_text(report.markdown(), encoding="utf-8")
    return [data, page]
