"""Writes the numbers of README.md and docs/*.md from the committed results.

    python benchmarks/tables.py [--check]

A block between ``<!-- table: NAME -->`` and ``<!-- end -->`` is a table, one between
``<!-- number: NAME -->`` and ``<!-- end -->`` a number within a sentence; both are made from
``results/*.json`` alone. Reports of ``vlmo bench`` there get their Markdown page and pictures, if
these are missing or old. With ``--check`` nothing is written, and the exit code is 1 if something
would be.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vlmo.bench.pictures import draw, missing
from vlmo.bench.report import Group, Record, Report, groups, markdown_table, number, times_as_fast
from vlmo.files import replacing

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- (table|number): (.*?) -->)(.*?)(<!-- end -->)", re.DOTALL)
REPORTS = "benchmarks/results"


def files() -> list[Path]:
    """Where blocks may stand."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def render(path: Path, text: str) -> str:
    """The text of a file with all of its blocks made anew.

    Raises:
        ValueError: a block has a name that nothing has, or no end.
    """
    up = "" if path.parent == ROOT else "../"

    def replaced(match: re.Match[str]) -> str:
        begin, kind, name, _, end = match.groups()
        if name not in KINDS[kind]:
            raise ValueError(f"{path.name}: no {kind} is called {name!r}")
        made = KINDS[kind][name](up)
        return f"{begin}\n{made}\n{end}" if kind == "table" else f"{begin}{made}{end}"

    if len(re.findall(r"<!-- (?:table|number):", text)) != len(BLOCK.findall(text)):
        raise ValueError(f"{path.name}: a block has no end")
    return BLOCK.sub(replaced, text)


def cpu_report() -> Report | None:
    """The committed report of a CPU.

    Raises:
        ValueError: there are several.
    """
    found = sorted(RESULTS.glob("cpu-*.json"))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ValueError(f"{names}: keep one report of a CPU")
    return Report.load(found[0]) if found else None


def gpu_reports() -> list[Report]:
    """The committed reports of GPUs."""
    found = []
    for path in sorted(RESULTS.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        # Other results, modelled ones among them, have no format.
        if "format" in content and content["machine"]["name"] != "cpu":
            found.append(Report.load(path))
    return found


def cpu_summary(up: str) -> str:
    """Picture and table of the most telling case of each suite and phase."""
    report = cpu_report()
    if report is None:
        return "No result of a CPU is committed yet."
    base = f"{up}{REPORTS}/{report.stem}"
    firsts: dict[tuple[Any, Any], Group] = {}
    for group in groups(report.records):
        firsts.setdefault((group.labels["suite"], group.labels["phase"]), group)
    picture = [
        "<picture>",
        f'  <source media="(prefers-color-scheme: dark)" srcset="{base}-speed-dark.png">',
        f'  <img alt="Speed beside the official way" src="{base}-speed-light.png" width="800">',
        "</picture>",
        "",
    ]
    told = f"{_origin(report)}; all of it: [{report.stem}.md]({base}.md)."
    return "\n".join([*picture, *_compact(list(firsts.values())), "", told])


def cpu_cases(up: str) -> str:
    """Every case on the CPU."""
    report = cpu_report()
    if report is None:
        return "No result of a CPU is committed yet."
    return "\n".join([*_compact(groups(report.records)), "", f"{_origin(report)}."])


def gpu_summary(up: str) -> str:
    """Every case on every GPU."""
    lines: list[str] = []
    for report in gpu_reports():
        page = f"[{report.stem}.md]({up}{REPORTS}/{report.stem}.md)"
        lines += [*_compact(groups(report.records)), "", f"{_origin(report)}: {page}.", ""]
    return "\n".join(lines).rstrip() or "No result of a GPU is committed yet."


def _compact(found: list[Group]) -> list[str]:
    """A line for each case: the best of ours, the best peer and the official way."""
    rows = []
    for group in found:
        best, peer, official = group.best, group.best_peer, group.official
        times = [
            "-" if best is None or (x := times_as_fast(best, other)) is None else f"{x:.2f} x"
            for other in (peer, official)
        ]
        rows.append([group.title, _time(best), _time(peer), _time(official), *times])
    header = ["case", "vlmo, ms", "best peer, ms", "official way, ms", "x best peer", "x official"]
    return markdown_table(header, rows)


def _time(record: Record | None) -> str:
    return "-" if record is None else f"{number(record['device_ms'])} ({record['contender']})"


def _origin(report: Report) -> str:
    machine = report.machine
    name = machine["name"]
    if name == "cpu":
        name = f"{machine.get('cpu', 'a CPU')}, {machine.get('cores', '?')} cores"
    return f"Measured on {name}, commit {report.commit}, by `{report.command}`"


def _modelled(stem: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{stem}.json").read_text(encoding="utf-8"))


def volta_forward(up: str) -> str:
    """moe_ffn's forward on a V100, modelled."""
    rows = [
        [launch["size"], launch["tokens"], f"{launch['fill']:.2f}", f"{launch['speedup']:.2f} x"]
        for launch in _modelled("volta")["launches"]
    ]
    header = ["MODELLED: size", "tokens", "multiprocessors' time in tasks", "x CUTLASS"]
    return "\n".join(markdown_table(header, rows))


def volta_attention(up: str) -> str:
    """shared_attention on a V100, modelled."""
    rows = []
    for figure in _modelled("volta_attention")["figures"]:
        faster = " to ".join(f"{x:.2f}" for x in dict.fromkeys(figure["faster"]))
        bias = "looked up" if figure["bias"] else "none"
        rows.append([figure["phase"], str(figure["length"]), bias, f"{faster} x"])
    return "\n".join(markdown_table(["MODELLED: phase", "N", "bias", "x PyTorch"], rows))


def ptx_kernels(up: str) -> str:
    """The parity cases of the Triton kernels as PTX."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in _modelled("ptx")["rows"]:
        for kernel in row["kernels"]:
            groups.setdefault((kernel, row["target"]), []).append(row)
    rows = []
    for (kernel, target), group in sorted(groups.items()):
        worst = max(group, key=lambda row: row["error"] / max(row["eager"], 1e-7))
        errors = f"{worst['error']:.1e} beside {worst['eager']:.1e}"
        good = sum(not row["failed"] for row in group)
        reports = sum(len(row["reports"]) for row in group)
        errors += f" ({worst['worst']}, {worst['dtype']})"
        rows.append([kernel, target, f"{good} of {len(group)}", str(reports), errors])
    header = ["kernel", "target", "cases that hold", "reports", "worst error beside eager's"]
    return "\n".join(markdown_table(header, rows))


TABLES: dict[str, Callable[[str], str]] = {
    "cpu.summary": cpu_summary,
    "cpu.cases": cpu_cases,
    "gpu.summary": gpu_summary,
    "volta.forward": volta_forward,
    "volta.attention": volta_attention,
    "ptx.kernels": ptx_kernels,
}


def _numbers() -> Iterator[tuple[str, Callable[[str], str]]]:
    for size, products in _modelled("volta")["products"].items():
        fc1, _, fc2, *_ = products
        for name, product in (("fc1", fc1), ("fc2", fc2)):
            text = f"{product['busy']:.2f}"
            yield f"volta.busy.{size}.{name}", lambda up, text=text: text


NUMBERS = dict(_numbers())
KINDS = {"table": TABLES, "number": NUMBERS}


def stale(*, write: bool) -> list[str]:
    """What is not up to date, by name; written if ``write``."""
    found = []
    for path in files():
        text = path.read_text(encoding="utf-8")
        made = render(path, text)
        if made != text:
            found.append(str(path.relative_to(ROOT)))
            if write:
                _write(path, made)
    cpu = cpu_report()
    for report in [*([cpu] if cpu else []), *gpu_reports()]:
        page, made = RESULTS / f"{report.stem}.md", report.markdown()
        if not page.is_file() or page.read_text(encoding="utf-8") != made:
            found.append(f"{REPORTS}/{page.name}")
            if write:
                _write(page, made)
        old = missing(report, RESULTS)
        found += [f"{REPORTS}/{picture.name}" for picture in old]
        if old and write:
            draw(report, RESULTS)
    return found


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if old")
    check = parser.parse_args().check
    found = stale(write=not check)
    for name in found:
        print(f"{name}: {'is not up to date' if check else 'written'}")
    return 1 if check and found else 0


if __name__ == "__main__":
    sys.exit(main())
