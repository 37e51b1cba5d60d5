"""Pictures of a report, each as PNG for light and for dark pages.

``roofline`` shows the rate of the fastest contenders of each case over its intensity, below the
measured roof. ``speed`` shows bars of speedups over unilm for the most important case of each suite
and phase. ``speed-SUITE`` shows lines if the suite's first number (tokens, length) has several
values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from harness.session import is_ours
from report import LABELS, Group, Record, Report, firsts, groups, is_dense, number, speedup
from vlmo.plotting import pyplot, save_figure

_WIDTH, _DPI = 8.0, 200  # inches; a README shows them at half the resolution
_PANELS = 4
_MARKERS = "osD^v"


class _Theme(NamedTuple):
    """Colours distinguishable by the colour-blind (Okabe and Ito), for a background."""

    name: str
    page: str
    text: str
    faint: str  # grid lines
    ours: str
    also_ours: str  # slower ones
    peer: str
    dense: str
    others: Sequence[str]  # lines of peers


_THEMES = (
    _Theme(
        *("light", "#ffffff", "#1f2328", "#d8dee4", "#0072b2", "#7fb8d8", "#8c959f", "#d0d7de"),
        others=("#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#57606a"),
    ),
    _Theme(
        *("dark", "#0d1117", "#e6edf3", "#30363d", "#56b4e9", "#2b5f80", "#8b949e", "#3d444d"),
        others=("#e69f00", "#2fbf94", "#e79fc8", "#f0e442", "#b1bac4"),
    ),
)


def draw(report: Report, stem: Path) -> list[Path]:
    """Write the pictures that the records suffice for, named ``{stem}-{picture}-{theme}.png``.

    Their metadata contains a digest of the report; see :func:`missing`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    written, figures = [], _figures(report)
    options = dict(
        dpi=_DPI, bbox_inches="tight", pad_inches=0.15, metadata={"Source": report.digest}
    )
    for theme in _THEMES:
        with pyplot().rc_context(_style(theme)):
            for name, drawn in figures.items():
                path = _path(stem, name, theme)
                save_figure(drawn(theme), path, **options)
                written.append(path)
    return written


def missing(report: Report, stem: Path) -> list[Path]:
    """The pictures of a report that do not exist, or were drawn from another report."""
    paths = [_path(stem, name, theme) for theme in _THEMES for name in _figures(report)]
    digest = report.digest.encode()
    return [path for path in paths if not path.is_file() or digest not in path.read_bytes()]


def _path(stem: Path, name: str, theme: _Theme) -> Path:
    return stem.with_name(f"{stem.name}-{name}-{theme.name}.png")


def _figures(report: Report) -> dict[str, Callable[[_Theme], Any]]:
    """Functions that draw the pictures for which there are records, by name."""
    found = groups(report.records)
    figures: dict[str, Callable[[_Theme], Any]] = {}
    if report.roof and found:
        figures["roofline"] = functools.partial(_roofline, report, found)
    for suite in dict.fromkeys(str(group.labels["suite"]) for group in found):
        panels = _panels([group for group in found if group.labels["suite"] == suite])
        if panels:
            figures[f"speed-{suite}"] = functools.partial(_lines, report, panels)
    compared = firsts([group for group in found if group.official is not None])
    if compared:
        figures["speed"] = functools.partial(_bars, report, compared)
    return figures


def _style(theme: _Theme) -> dict[str, Any]:
    return {
        "figure.facecolor": theme.page,
        "axes.facecolor": theme.page,
        "savefig.facecolor": theme.page,
        "text.color": theme.text,
        "axes.labelcolor": theme.text,
        "axes.edgecolor": theme.text,
        "xtick.color": theme.text,
        "ytick.color": theme.text,
        "grid.color": theme.faint,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "legend.frameon": False,
        "font.size": 11,
    }


def _roofline(report: Report, found: Sequence[Group], theme: _Theme) -> Any:
    """Points of our fastest contender and the fastest peer; lines of the roof for each dtype."""
    figure, axis = pyplot().subplots(figsize=(_WIDTH, 4.8))
    suites = list(dict.fromkeys(str(group.labels["suite"]) for group in found))
    points = [
        (_intensity(record), record["tflops"], suites.index(str(group.labels["suite"])), ours)
        for group in found
        for record, ours in ((group.best_peer, False), (group.best, True))
        if record is not None
    ]
    xs = np.array([x for x, *_ in points])
    copy, rates = report.roof["copy_gb_per_s"], report.roof["matrix_tflops"]
    used = {str(group.labels["dtype"]) for group in found}
    rates = {dtype: rate for dtype, rate in rates.items() if dtype in used}
    ridges = [1e3 * rate / copy for rate in rates.values()]
    low, high = min([*xs, *ridges]) / 3, max([*xs, *ridges]) * 3
    line = np.geomspace(low, high, 200)
    for (dtype, rate), dashes in zip(rates.items(), ("-", "--", ":", "-."), strict=False):
        axis.plot(line, np.minimum(rate, copy * line / 1e3), dashes, color=theme.text, lw=1.5)
        told = f"{dtype} products: {number(rate)} TFLOP/s"
        axis.annotate(told, (high, rate), (0, 4), textcoords="offset points", ha="right")
    for x, y, suite, ours in points:
        axis.plot(
            *(x, y, _MARKERS[suite % len(_MARKERS)]),
            # Peers are rings around the point, so that neither hides the other.
            color=theme.ours if ours else "none",
            mec=theme.page if ours else theme.others[0],
            mew=0.8 if ours else 1.8,
            ms=11 if ours else 8,
            zorder=2 if ours else 3,
        )
    bottom = min([y for _, y, *_ in points] + [copy * low / 1e3])
    top = max([y for _, y, *_ in points] + list(rates.values()))
    axis.set(xscale="log", yscale="log", xlim=(low, high), ylim=(bottom / 1.5, top * 2.5))
    axis.set(xlabel="FLOP / byte that must be moved", ylabel="TFLOP/s")
    axis.grid(which="major")
    _slanted(axis, f"copies: {number(copy)} GB/s", low, copy)
    handles = [
        axis.plot([], [], "o", color=theme.ours, mec=theme.page, ms=11, label="best of vlmo")[0],
        axis.plot([], [], "o", c="none", mec=theme.others[0], mew=1.8, ms=8, label="best peer")[0],
    ]
    if len(suites) > 1:
        handles += [
            axis.plot([], [], m, color="none", mec=theme.text, ms=8, label=suite)[0]
            for suite, m in zip(suites, _MARKERS, strict=False)
        ]
    axis.legend(handles=handles, loc="lower right", fontsize=10)
    axis.set_title(_machine(report), loc="left", fontsize=12)
    return figure


def _slanted(axis: Any, text: str, low: float, copy: float) -> None:
    """Write a label along the line of the copy rate, near its lower end."""
    axis.figure.canvas.draw()
    x = low * 1.3
    places = axis.transData.transform([(x, copy * x / 1e3), (2 * x, copy * 2 * x / 1e3)])
    (dx, dy) = places[1] - places[0]
    axis.annotate(
        text,
        (x, copy * x / 1e3),
        (-5, 5),
        textcoords="offset points",
        rotation=float(np.degrees(np.arctan2(dy, dx))),
        rotation_mode="anchor",
    )


def _intensity(record: Record) -> float:
    return 1e3 * record["tflops"] / record["gb_per_s"]


def _panels(of_suite: Sequence[Group]) -> list[list[Group]]:
    """Groups that differ only in numbers of the shape, if the first number has several values.

    The most important groups come first, so for every size and phase these have the first dtype and
    the first of the other labels.
    """
    key = next((name for name in of_suite[0].labels if name not in LABELS), None)
    if key is None or not all(isinstance(g.labels.get(key), int) for g in of_suite):
        return []
    panels: dict[tuple[Any, Any], dict[tuple[Any, ...], list[Group]]] = {}
    for group in of_suite:
        rest = tuple(_words(group))
        place = group.labels["size"], group.labels["phase"]
        panels.setdefault(place, {}).setdefault(rest, []).append(group)
    chosen = [next(iter(by_rest.values())) for by_rest in panels.values()]
    chosen = [sorted(panel, key=lambda group: group.labels[key]) for panel in chosen]
    return [panel for panel in chosen if len(panel) > 1][:_PANELS]


def _words(group: Group) -> list[str]:
    """The labels that are not numbers, except size and phase."""
    return [
        str(value) if name in LABELS else f"{name} {value}"
        for name, value in group.labels.items()
        if isinstance(value, str) and name not in ("size", "phase")
    ]


def _lines(report: Report, panels: Sequence[Sequence[Group]], theme: _Theme) -> Any:
    """TFLOP/s of each contender over tokens or length, one axis for each size and phase."""
    rows = -(-len(panels) // 2)
    columns = min(2, len(panels))
    figure, axes = pyplot().subplots(
        *(rows, columns), figsize=(_WIDTH, 3.1 * rows + 0.6), squeeze=False, sharex=True
    )
    names = list(
        dict.fromkeys(r["contender"] for panel in panels for g in panel for r in g.records)
    )
    names.sort(key=lambda name: (not is_ours(name), is_dense(name)))
    looks = _looks(names, theme)
    key = next(name for name in panels[0][0].labels if name not in LABELS)
    for panel, axis in zip(panels, axes.flat, strict=False):
        for name in reversed(names):  # ours drawn on top
            points = [
                (group.labels[key], record["tflops"])
                for group in panel
                for record in group.records
                if record["contender"] == name
            ]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, **looks[name])
        values = [group.labels[key] for group in panel]
        axis.set_xscale("log")
        axis.set_xticks(values, [f"{value:,}" for value in values])
        axis.set_xticks([], minor=True)
        axis.set_ylim(0, None)
        axis.grid(axis="y")
        labels = panel[0].labels
        axis.set_title(f"{labels['size']}, {labels['phase']}", loc="left", fontsize=11)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis in axes[:, 0]:
        axis.set_ylabel("TFLOP/s")
    for axis in axes[-1]:
        axis.set_xlabel(key)
    shown = {line.get_label(): line for axis in axes.flat for line in axis.get_lines()}
    handles = [shown[name] for name in names]
    figure.tight_layout()
    figure.legend(
        handles=handles, loc="upper center", ncol=4, bbox_to_anchor=(0.5, 0.0), fontsize=10
    )
    title = f"{_machine(report)}\n{', '.join(_words(panels[0][0]))}"
    figure.suptitle(title, x=0.01, y=1.0, va="bottom", ha="left", fontsize=12)
    return figure


def _looks(names: Sequence[str], theme: _Theme) -> dict[str, dict[str, Any]]:
    """Colours and dashes: ours strong, peers thin, dense layers dotted."""
    looks: dict[str, dict[str, Any]] = {}
    ours = [name for name in names if is_ours(name)]
    peers = [name for name in names if not is_ours(name) and not is_dense(name)]
    for place, name in enumerate(ours):
        dashes = ("-", "--", "-.", ":")[place % 4]
        looks[name] = dict(color=theme.ours, ls=dashes, lw=2.8, marker="o", ms=6)
    for place, name in enumerate(peers):
        colour = theme.others[place % len(theme.others)]
        marker = "sD^vPX*"[place % 7]
        looks[name] = dict(color=colour, lw=1.4, marker=marker, ms=5)
    for place, name in enumerate(n for n in names if is_dense(n)):
        looks[name] = dict(color=theme.peer, ls=(":", "-.")[place % 2], lw=1.4)
    return looks


def _bars(report: Report, found: Sequence[Group], theme: _Theme) -> Any:
    """Speedup of each contender over unilm, case by case."""
    count = sum(len(group.records) + 1.6 for group in found)
    figure, axis = pyplot().subplots(figsize=(_WIDTH, 0.29 * count + 0.9))
    place, ticks = 0.0, {}
    longest = max(speedup(r, g.official) or 0 for g in found for r in g.records)
    for group in found:
        _headline(axis, place, group)
        first = place = place + 1
        for record in sorted(group.records, key=lambda record: record["device_ms"]):
            times = speedup(record, group.official) or 0
            axis.barh(place, times, 0.8, color=_colour(group, record, theme))
            axis.text(
                *(times + 0.012 * longest, place),
                f"{times:.2f} x   {number(record['device_ms'])} ms",
                va="center",
                fontsize=10,
                weight="bold" if record is group.best else "normal",
                bbox=dict(facecolor=theme.page, edgecolor="none", pad=3),
            )
            ticks[place] = record["contender"]
            place += 1
        axis.vlines(1, first - 0.5, place - 0.5, color=theme.text, lw=1.2, ls="--")
        place += 0.6
    axis.set_yticks(list(ticks), list(ticks.values()))
    for label in axis.get_yticklabels():
        label.set_weight("bold" if is_ours(label.get_text()) else "normal")
    axis.set(xlim=(0, 1.3 * longest), ylim=(place - 0.6, -0.8))
    axis.set_xlabel("speedup over unilm, the reference implementation (dashed); longer is better")
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.set_title(_machine(report), loc="left", fontsize=12, pad=12)
    return figure


def _headline(axis: Any, place: float, group: Group) -> None:
    """Write suite and phase, and the other labels of the case in a small font."""
    labels = group.labels
    told = f"{labels['suite']}, {labels['phase']}"
    head = axis.text(0, place, told, weight="bold", va="center", fontsize=11)
    shape = [f"{k} {v}" for k, v in labels.items() if k not in LABELS]
    rest = ", ".join([str(labels["size"]), str(labels["dtype"]), *shape])
    beside = dict(xycoords=head, textcoords="offset points", va="center")
    axis.annotate(rest, (1, 0.5), (8, 0), fontsize=9, **beside)


def _machine(report: Report) -> str:
    """Machine and commit of the report, for a title."""
    facts = report.machine
    name = facts.get("cpu", "cpu") if facts["name"] == "cpu" else facts["name"]
    cores = f", {facts['cores']} cores" if facts["name"] == "cpu" and "cores" in facts else ""
    return f"Measured: {name}{cores}, commit {report.commit}"


def _colour(group: Group, record: Record, theme: _Theme) -> str:
    if is_ours(record["contender"]):
        return theme.ours if record is group.best else theme.also_ours
    return theme.dense if is_dense(record["contender"]) else theme.peer
