"""Reports: files, tables, Markdown."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from bench_cases import measured, not_run, report
from report import Report, groups, number

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def row(text: str, contender: str) -> list[str]:
    """Cells of a contender's row of Markdown."""
    [line] = [x for x in text.splitlines() if x.startswith(f"| {contender} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("cpu-*.json")), ids=lambda path: path.stem)
def test_committed_results_are_read(path):
    it = Report.load(path)
    assert (it.machine["name"], it.commit) == ("cpu", path.stem.removeprefix("cpu-"))
    measured = json.loads(path.read_text())["benchmarks"]
    assert len([record for record in it.records if "device_ms" in record]) == len(measured) > 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ([], "not a JSON object"),
        ({"format": 2}, "no result of these benchmarks"),
        ({"benchmarks": []}, "no result of these benchmarks"),
        ({"modelled": True, "figures": []}, "modelled figures"),
        ({"kind": "modelled", "rows": []}, "modelled figures"),
    ],
)
def test_what_is_no_report_is_refused_with_the_file_and_the_reason(tmp_path, content, message):
    path = tmp_path / "some.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=r"some\.json: ") as error:
        Report.load(path)
    assert message in str(error.value)


def test_committed_models_are_no_reports():
    for name in ("volta", "volta_attention", "moe_ffn_schedule"):
        with pytest.raises(ValueError, match="modelled"):
            Report.load(RESULTS / f"{name}.json")


def test_the_newest_file_of_a_folder_gets_its_page(tmp_path):
    (tmp_path / "machine").mkdir()
    path = tmp_path / "machine" / "0001.json"
    it = report(not_run("quack", "is not installed"))
    path.write_text(json.dumps({"format": 1} | asdict(it)))
    command = [sys.executable, str(RESULTS.parent / "report.py"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert path.with_suffix(".md").read_text() == it.markdown()
    assert it.markdown() in result.stdout


def test_speedups_are_over_the_best_peer_unilm_and_dense_layers():
    text = report(
        measured("slices", 4.0),
        measured("vlmo:triton", 2.0),
        measured("grouped_mm", 3.0),
        measured("dense", 1.0),
        measured("vlmo:reference", 8.0),
    ).markdown()
    header = row(text, "contender")
    rows = {name: dict(zip(header, row(text, name), strict=True)) for name in ("vlmo:triton",)}
    found = rows["vlmo:triton"]
    assert found["speedup over best peer"] == "1.50 x"
    assert found["speedup over unilm"] == "2.00 x"
    assert found["speedup over dense"] == "0.50 x"
    assert found["ms (quartiles)"] == "2.00 (1.98 to 2.02)"
    assert found["of roof"] == "50%"
    assert "dense: all tokens through one expert." in text
    names = [line.split("|")[1].strip() for line in text.splitlines() if " x |" in line]
    assert names == ["vlmo:triton", "vlmo:reference", "grouped_mm", "slices", "dense"]


def test_compiled_peers_are_peers_and_our_compiled_model_is_ours():
    """The best peer is the better of unilm's model as it is and compiled; unilm is as it is."""
    for compiled, times in ((6.0, "2.00 x"), (12.0, "3.00 x")):
        records = [
            *(measured("vlmo:cpu", 4.0), measured("vlmo:cpu-compiled", 3.0)),
            *(measured("official", 9.0), measured("official-compiled", compiled)),
        ]
        it = report(*(record | {"suite": "model"} for record in records))
        [group] = groups(it.records)
        assert [r["contender"] for r in (group.best, group.official) if r is not None] == [
            *("vlmo:cpu-compiled", "official")
        ]
        text = it.markdown()
        header, ours = row(text, "contender"), row(text, "vlmo:cpu-compiled")
        found = dict(zip(header, ours, strict=True))
        assert found["speedup over best peer"] == times and found["speedup over unilm"] == "3.00 x"


def test_torchscale_is_what_beit3_is_compared_with():
    records = [measured("vlmo:cpu", 4.0), measured("torchscale", 8.0)]
    it = report(*(record | {"suite": "beit3"} for record in records))
    found = dict(zip(row(it.markdown(), "contender"), row(it.markdown(), "vlmo:cpu"), strict=True))
    assert found["speedup over unilm"] == "2.00 x" and "samples/s" in found


def test_columns_without_a_value_are_left_out():
    bare, full = measured("slices", 1.0), measured("slices", 1.0, peak_mib=12.0, millijoules=3.0)
    assert not {"peak MiB", "launches", "mJ"} & set(row(report(bare).markdown(), "contender"))
    header = row(report(full, measured("masks", 1.0)).markdown(), "contender")
    assert {"peak MiB", "mJ"} <= set(header) and "launches" not in header


def test_each_case_has_its_own_table():
    records = [measured("slices", 1.0, tokens=n) for n in (8192, 32768)]
    assert [g.labels["tokens"] for g in groups([*records, measured("masks", 2.0)])] == [8192, 32768]


def test_a_reason_is_told_once_and_failures_first():
    text = Report.markdown(
        report(
            measured("slices", 1.0),
            *(not_run("quack", "is not installed", tokens=n) for n in (1, 2, 3)),
            not_run("scattermoe", "is not installed"),
            not_run("vlmo:cuda", "not exact: y is off by [0.5]"),
            unmeasured=["energy: there is no GPU"],
        )
    )
    assert text.count("is not installed") == 1
    assert "is not installed: quack (3 cases), scattermoe (1 case)" in text
    assert text.index("y is off by [0.5]") < text.index("is not installed")
    assert "energy: there is no GPU" in text


def test_a_peer_out_of_its_bound_is_in_the_table_without_a_time():
    told = "out of its error bound: dtable[0] is off by 8.45e-06, allowed are 7.41e-06"
    it = report(measured("vlmo:cpu", 2.0), not_run("slices", told), measured("masks", 4.0))
    assert set(row(it.markdown(), "slices")[1:]) == {"-"}
    assert row(it.markdown(), "vlmo:cpu")[1] == "2.00 (1.98 to 2.02)"
    assert f"slices: not timed: {told}." in it.markdown()
    [group] = groups(it.records)
    assert group.best_peer is not None and group.best_peer["contender"] == "masks"
    assert group.official is None


def test_what_there_was_no_time_for_is_listed_case_by_case():
    reason = "left out: it would take about 80 s; 30 s of the time limit of 270 s are left"
    it = report(
        measured("vlmo:cpu", 2.0),
        not_run("masks", reason),
        not_run("all", reason, dtype="float16"),
        not_run("quack", "is not installed"),
    )
    lines = [
        f"moe_ffn, base, {dtype}, forward, tokens 8192, split 40:197: {who}: {reason}"
        for dtype, who in (("bfloat16", "masks"), ("float16", "all"))
    ]
    assert it.left_out() == lines
    assert it.not_run() == ["is not installed: quack (1 case)"]
    assert all(line in it.markdown() for line in lines)


def test_markdown_is_headed_by_what_the_numbers_depend_on():
    text = report(measured("slices", 1.0)).markdown()
    head = text[: text.index("\n## ")]
    for fact in (
        "Testing Unit 9",
        "cores 2",
        "abc1234",
        "`pytest benchmarks --benchmark-enable`",
        "2.13.0",
    ):
        assert fact in head
    assert "copies 10.0 GB/s, bfloat16 products 2.00 TFLOP/s" in head


def test_a_throttled_gpu_is_told():
    it = report(measured("vlmo:triton", 2.0, throttled=["power cap"]), measured("slices", 3.0))
    assert "vlmo:triton: the GPU was throttled (power cap)." in it.markdown()


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.001234, "0.00123"), (1.5, "1.50"), (12.34, "12.3"), (1234.5, "1,234"), (0, "0")],
)
def test_numbers_have_three_digits(value, text):
    assert number(value) == text
