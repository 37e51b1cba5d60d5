"""Writes the numbers of README.md and docs/ from the committed results.

    python benchmarks/tables.py [--check]

A block between ``<!-- table: NAME -->`` and ``<!-- end -->`` is a table, one between
``<!-- number: NAME -->`` and ``<!-- end -->`` a number within a sentence; both are generated only
from ``results/*.json``. The Markdown pages and pictures of benchmark results are written if they
are missing or outdated. With ``--check`` nothing is written, and the exit status is 1 if anything
is outdated.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pictures import missing
from report import (
    Group,
    Record,
    Report,
    firsts,
    groups,
    markdown_table,
    number,
    speedup,
    times,
)
from report import write as write_page
from vlmo.files import replacing

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- (table|number): (.*?) -->)(.*?)(<!-- end -->)", re.DOTALL)
REPORTS = "benchmarks/results"


def files() -> list[Path]:
    """The files that may contain blocks."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def render(path: Path, text: str) -> str:
    """The text of a file with all of its blocks regenerated.

    Raises:
        ValueError: a block has an unknown name or no end.
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


def reports(*, gpu: bool) -> dict[Path, Report]:
    """The committed results of GPUs, or of CPUs."""
    found = {}
    for path in sorted(RESULTS.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        # Other results, such as modelled ones, come from other scripts.
        if "format" in content or "vlmo" in content:
            report = Report.load(path)
            if (report.machine["name"] != "cpu") == gpu:
                found[path] = report
    return found


def cpu_reports() -> dict[Path, Report]:
    """The committed results of CPUs.

    Raises:
        ValueError: there are several results of one CPU.
    """
    found = reports(gpu=False)
    by_cpu: dict[str, Path] = {}
    for path, report in found.items():
        other = by_cpu.setdefault(report.machine.get("cpu", "a CPU"), path)
        if other != path:
            raise ValueError(f"{other.name}, {path.name}: keep one result of a CPU")
    return found


def cpu_summary(up: str) -> str:
    """Picture and table of the most important case of each suite and phase, for each CPU."""
    parts = []
    for path, report in cpu_reports().items():
        base = f"{up}{REPORTS}/{path.stem}"
        picture = [
            "<picture>",
            f'  <source media="(prefers-color-scheme: dark)" srcset="{base}-speed-dark.png">',
            f'  <img alt="Speedup over unilm" src="{base}-speed-light.png" width="800">',
            "</picture>",
            "",
        ]
        told = f"{_origin(report)}; all of it: [{path.stem}.md]({base}.md)."
        parts += [*picture, *_compact(firsts(groups(report.records))), "", told, ""]
    return "\n".join(parts).rstrip() or "No result of a CPU is committed yet."


def cpu_cases(up: str) -> str:
    """Every case on every CPU."""
    parts = []
    for report in cpu_reports().values():
        parts += [*_compact(groups(report.records)), "", f"{_origin(report)}.", ""]
    return "\n".join(parts).rstrip() or "No result of a CPU is committed yet."


def gpu_summary(up: str) -> str:
    """Every case on every GPU."""
    lines: list[str] = []
    for path, report in reports(gpu=True).items():
        page = f"[{path.stem}.md]({up}{REPORTS}/{path.stem}.md)"
        lines += [*_compact(groups(report.records)), "", f"{_origin(report)}: {page}.", ""]
    return "\n".join(lines).rstrip() or "No result of a GPU is committed yet."


def _compact(found: list[Group]) -> list[str]:
    """A line for each case: our best contender, the best peer and unilm."""
    rows = []
    for group in found:
        best, peer, official = group.best, group.best_peer, group.official
        told = [_time(best), _time(peer), _time(official)]
        rows.append([group.title, *told, *(times(speedup(best, o)) for o in (peer, official))])
    header = ["case", "vlmo, ms", "best peer, ms", "unilm, ms"]
    return markdown_table([*header, "speedup over best peer", "speedup over unilm"], rows)


def _time(record: Record | None) -> str:
    return "-" if record is None else f"{number(record['device_ms'])} ({record['contender']})"


def _origin(report: Report) -> str:
    machine = report.machine
    name = machine["name"]
    if name == "cpu":
        name = f"{machine.get('cpu', 'a CPU')}, {machine.get('cores', '?')} cores"
    of_old = report.command.startswith("vlmo bench")  # a command that existed at that commit
    told = f"that commit's {report.command}" if of_old else f"`{report.command}`"
    return f"Measured on {name}, commit {report.commit}, by {told}"


def _modelled(stem: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{stem}.json").read_text(encoding="utf-8"))


def volta_forward(up: str) -> str:
    """Modelled forward of moe_ffn on a V100."""
    rows = [
        [launch["size"], launch["tokens"], f"{launch['fill']:.2f}", f"{launch['speedup']:.2f} x"]
        for launch in _modelled("volta")["launches"]
    ]
    header = ["MODELLED: size", "tokens", "multiprocessors' time in tasks", "x CUTLASS"]
    return "\n".join(markdown_table(header, rows))


def volta_attention(up: str) -> str:
    """Modelled shared_attention on a V100."""
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
    def always(text: str) -> Callable[[str], str]:
        return lambda up: text

    for size, products in _modelled("volta")["products"].items():
        fc1, _, fc2, *_ = products
        for name, product in (("fc1", fc1), ("fc2", fc2)):
            yield f"volta.busy.{size}.{name}", always(f"{product['busy']:.2f}")


NUMBERS = dict(_numbers())
KINDS = {"table": TABLES, "number": NUMBERS}


def stale(*, write: bool) -> list[str]:
    """Names of the outdated files, which are rewritten if ``write``."""
    found = []
    for path in files():
        text = path.read_text(encoding="utf-8")
        made = render(path, text)
        if made != text:
            found.append(str(path.relative_to(ROOT)))
            if write:
                _write(path, made)
    for result, report in (reports(gpu=False) | reports(gpu=True)).items():
        page = result.with_suffix(".md")
        fresh = page.is_file() and page.read_text(encoding="utf-8") == report.markdown()
        old = [*([] if fresh else [page]), *missing(report, result.with_suffix(""))]
        found += [f"{REPORTS}/{path.name}" for path in old]
        if old and write:
            list(write_page(result, report))
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
