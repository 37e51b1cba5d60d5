"""Numbers in README.md and docs/ come from committed results only."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

import tables
from bench_cases import measured, not_run, report
from report import Report

# What a measured or modelled figure looks like. "128 x 128" is a size.
FIGURES = re.compile(
    r"""
      \d[\d.,]*\s?[x\u00d7](?![\s\[]*[\dA-Z]|\w)             # 1.8 x
    | \d[\d.,]*\s?(?:ms|µs|us|ns|s)\b                   # 3.4 ms
    | \d[\d.,]*\s?[KMGTP]?(?:FLOP/s|FLOPS|B/s|iB/s)     # 12 TFLOP/s
    | \d[\d.,]*\s?(?:tokens|samples|images|pairs|steps)\s?(?:/|per|a)\s?s(?:ec|\b)
    | \d[\d.,]*\s?%                                     # 12 % faster
    | \d[\d.,]*\s(?:cycles|seconds|minutes|hours)\b
    | \b(?:twice|half|(?:\w+\s)?times)\sas\s(?:fast|slow)\b
    | \b\w+\stimes\s(?:faster|slower)\b
    """,
    re.VERBOSE,
)
# Of the figures that may stand in a text: file, words around the figure, reason.
ALLOWED = (
    ("README.md", "within 25 minutes", "a limit that benchmarks/gpu.sh keeps"),
    ("docs/training.md", "8 % more work", "operations, counted"),
    ("docs/training.md", "everything, the classifier 20 times as fast", "a learning rate"),
    ("docs/training.md", "15 % of the text's own tokens", "a share of masked tokens"),
    ("docs/training.md", "at most 1 % of the samples", "the limit of --on-bad-sample skip"),
    ("docs/training.md", "gives its processes 30 seconds", "a time limit of torchrun"),
    ("docs/training_step.md", "20 % fewer token-layers", "counted by tests/training/test_step.py"),
    ("docs/training_step.md", "8 % more work", "operations, counted"),
)


def prose(text: str) -> str:
    """The text without generated blocks and code, and with single spaces."""
    text = tables.BLOCK.sub(" ", text)
    text = re.sub(r"```.*?```|^ {4}.*?$", " ", text, flags=re.DOTALL | re.MULTILINE)
    return " ".join(re.sub(r"`[^`]*`", "`code`", text).split())


def test_blocks_are_what_the_results_say():
    assert tables.stale(write=False) == [], "run python benchmarks/tables.py"


@pytest.mark.parametrize("path", tables.files(), ids=lambda path: path.name)
def test_no_figure_stands_outside_a_block(path):
    text = prose(path.read_text(encoding="utf-8"))
    for file, words, _ in ALLOWED:
        if path == tables.ROOT / file:
            text = text.replace(words, "")
    found = [text[max(0, m.start() - 50) : m.end() + 20] for m in FIGURES.finditer(text)]
    assert not found, "use a block of benchmarks/tables.py"


@pytest.mark.parametrize(("file", "words", "reason"), ALLOWED)
def test_what_is_allowed_is_still_there(file, words, reason):
    assert words in prose((tables.ROOT / file).read_text(encoding="utf-8")), reason
    assert FIGURES.search(words)


@pytest.mark.parametrize(
    "text",
    [
        *("is 1.8 x faster", "1.8x.", "2 \u00d7 as", "12 TFLOP/s", "700 GB/s", "3.4 ms"),
        *("12 % faster", "12% of", "70 cycles", "3 minutes", "twice as fast", "ten times slower"),
        *("30 us, or", "64 samples/s", "takes 4 s.", "three times as fast", "1,234.5 ms"),
    ],
)
def test_figures_are_recognised(text):
    assert FIGURES.search(text)


@pytest.mark.parametrize(
    "text",
    ["128 x 128", "2 x 2,", "E x [D, F]", "sm_80", "32 texts", "[3, S, S]", "24 KB", "4 x S"],
)
def test_sizes_are_no_figures(text):
    assert not FIGURES.search(text)


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A repository with a README, a page and no results of the benchmarks."""
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    for name in ("volta", "volta_attention"):
        (results / f"{name}.json").write_bytes((tables.RESULTS / f"{name}.json").read_bytes())
    for path in ("README.md", "docs/page.md"):
        (tmp_path / path).write_text("A\n<!-- table: cpu.summary -->\nold\n<!-- end -->\nZ\n")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", results)
    return tmp_path


def of_a_cpu() -> Report:
    records = [
        *(measured("slices", ms, tokens=n) for n, ms in ((8192, 4.0), (100, 5.0))),
        *(measured("vlmo:cpu", ms, tokens=n) for n, ms in ((8192, 2.0), (100, 2.5))),
        measured("masks", 3.0),
        not_run("quack", "is not installed"),
    ]
    return report(*records, machine={"name": "cpu", "cpu": "Some Chip", "cores": 2})


def save(it: Report, name: str = "cpu-abc1234") -> Path:
    """Among the results, in format 1."""
    path = tables.RESULTS / f"{name}.json"
    path.write_text(json.dumps({"format": 1} | asdict(it)))
    return path


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["tables.py", *arguments])
    return tables.main()


def test_without_a_result_the_block_says_so(tree, monkeypatch, capsys):
    assert run(monkeypatch, "--check") == 1
    assert "README.md: is not up to date" in capsys.readouterr().out
    assert "old" in (tree / "README.md").read_text()
    assert run(monkeypatch) == 0
    text = (tree / "README.md").read_text()
    assert text == (
        "A\n<!-- table: cpu.summary -->\nNo result of a CPU is committed yet.\n<!-- end -->\nZ\n"
    )
    assert run(monkeypatch, "--check") == 0


@pytest.mark.heavy
def test_a_result_fills_its_blocks_page_and_pictures(tree, monkeypatch):
    it = of_a_cpu()
    save(it)
    assert run(monkeypatch) == 0
    assert run(monkeypatch, "--check") == 0
    assert (tables.RESULTS / "cpu-abc1234.md").read_text() == it.markdown()
    for path, up in ((tree / "README.md", ""), (tree / "docs" / "page.md", "../")):
        text = path.read_text()
        for link in re.findall(r'(?:src|srcset)="(.*?)"|\]\((.*?)\)', text):
            target = next(filter(None, link))
            assert target.startswith(f"{up}benchmarks/results/")
            assert (path.parent / target).is_file(), target
        [row] = [line for line in text.splitlines() if line.startswith("| moe_ffn")]
        assert "2.00 (vlmo:cpu) | 3.00 (masks) | 4.00 (slices) | 1.50 x | 2.00 x" in row
        assert (
            "Some Chip, 2 cores, commit abc1234, by `pytest benchmarks --benchmark-enable`" in text
        )
    assert tables.cpu_cases("").count("| moe_ffn") == 2


@pytest.mark.heavy
def test_a_changed_page_or_picture_is_not_up_to_date(tree, monkeypatch):
    it = of_a_cpu()
    save(it)
    run(monkeypatch)
    (tables.RESULTS / "cpu-abc1234.md").write_text("changed")
    assert tables.stale(write=False) == ["benchmarks/results/cpu-abc1234.md"]
    run(monkeypatch)
    assert tables.stale(write=False) == []
    (tables.RESULTS / "cpu-abc1234-speed-dark.png").unlink()
    assert tables.stale(write=False) == ["benchmarks/results/cpu-abc1234-speed-dark.png"]
    run(monkeypatch)
    before = {path.name for path in tables.RESULTS.glob("*.png")}
    it.records[0]["calls"] += 1  # in no picture and on no page, but they are of another report
    save(it)
    assert set(tables.stale(write=False)) == {f"benchmarks/results/{name}" for name in before}


def test_every_cpu_has_its_table(tree):
    for commit, chip in (("a", "Some Chip"), ("b", "Another")):
        records = [measured("vlmo:cpu", 1.0), measured("slices", 2.0)]
        save(report(*records, machine={"name": "cpu", "cpu": chip}), f"cpu-{commit}")
    for text in (tables.cpu_summary(""), tables.cpu_cases("")):
        assert text.count("| moe_ffn") == 2
        assert text.index("Measured on Some Chip") < text.index("Measured on Another")


@pytest.mark.heavy
def test_results_of_gpus_are_listed_and_others_left_alone(tree):
    assert tables.gpu_summary("") == "No result of a GPU is committed yet."
    save(of_a_cpu())
    save(report(measured("vlmo:triton", 1.0), measured("slices", 2.0)), "testing-unit-9")
    text = tables.gpu_summary("../")
    assert "Testing Unit 9" in text and "Some Chip" not in text
    assert "1.00 (vlmo:triton) | 2.00 (slices) | 2.00 (slices) | 2.00 x | 2.00 x" in text


def test_two_results_of_one_cpu_are_one_too_many(tree):
    for commit in ("a", "b"):
        save(report(machine={"name": "cpu"}), f"cpu-{commit}")
    with pytest.raises(ValueError, match=r"cpu-a\.json, cpu-b\.json: keep one"):
        tables.cpu_reports()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: nothing -->\n<!-- end -->", "no table is called 'nothing'"),
        ("<!-- number: cpu.summary -->1<!-- end -->", "no number is called 'cpu.summary'"),
        ("<!-- table: cpu.summary -->\nnumbers", "a block has no end"),
        (
            "<!-- table: cpu.summary -->\n<!-- number: volta.busy.base.fc1 -->1<!-- end -->",
            "a block has no end",
        ),
    ],
)
def test_a_block_that_cannot_be_made_is_an_error(tree, text, message):
    with pytest.raises(ValueError, match=message):
        tables.render(tree / "README.md", text)


def test_numbers_are_those_of_the_results():
    busy = json.loads((tables.RESULTS / "volta.json").read_text())["products"]["base"][0]["busy"]
    made = tables.render(
        tables.ROOT / "README.md", "is <!-- number: volta.busy.base.fc1 -->9<!-- end --> of it"
    )
    assert made == f"is <!-- number: volta.busy.base.fc1 -->{busy:.2f}<!-- end --> of it"
