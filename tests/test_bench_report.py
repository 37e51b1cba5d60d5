"""Reports of vlmo bench: files, tables, Markdown."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from bench_cases import measured, not_run, report
from vlmo.bench.report import Report, groups, number


def printed(it: Report) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        it.table(console)
    return capture.get()


def row(text: str, contender: str) -> list[str]:
    """Cells of a contender's row of Markdown."""
    [line] = [x for x in text.splitlines() if x.startswith(f"| {contender} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_report_comes_back_from_its_file(tmp_path):
    saved = report(measured("vlmo:triton", 2.0), not_run("quack", "is not installed"))
    path = saved.save(tmp_path / "new" / "folder")
    assert path.name == "testing-unit-9-abc1234.json"
    assert json.loads(path.read_text())["format"] == 1
    assert Report.load(path) == saved


def test_a_commit_from_the_command_line_cannot_leave_the_folder(tmp_path):
    path = report(commit="../../tag 1.0").save(tmp_path)
    assert path.parent == tmp_path
    assert path.name == "testing-unit-9-..-..-tag-1.0.json"


CONTENT = {"format": 1} | vars(report(measured("slices", 1.0)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ([], "not a JSON object"),
        (CONTENT | {"format": 2}, "format 2 is not 1"),
        ({k: v for k, v in CONTENT.items() if k != "roof"}, "has no 'roof'"),
        (CONTENT | {"records": {}}, "'records' is of type dict"),
        (CONTENT | {"machine": {}}, "'machine' has no 'name'"),
        (CONTENT | {"roof": {"copy_gb_per_s": 1.0}}, "'roof' is {'copy_gb_per_s': 1.0}"),
        (CONTENT | {"roof": {"copy_gb_per_s": 1.0, "matrix_tflops": {"float32": 0}}}, "'roof' is"),
        (CONTENT | {"records": [measured("slices", -1.0)]}, "record 0: 'device_ms' is -1.0"),
        (CONTENT | {"records": [measured("a", 1.0, size=3)]}, "record 0: 'size' is 3"),
        (CONTENT | {"records": [measured("a", 1.0, speed=3.5)]}, "record 0: 'speed' is 3.5"),
        (CONTENT | {"records": [measured("a", 1.0, reason="no")]}, "either a 'reason' or"),
        (CONTENT | {"records": [measured("a", 1.0, tflops=None)]}, "'tflops' is None"),
        (CONTENT | {"records": [measured("a", float("nan"))]}, "'device_ms' is nan"),
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
    from pathlib import Path

    results = Path(__file__).parent.parent / "benchmarks" / "results"
    for name in ("volta", "volta_attention", "moe_ffn_schedule"):
        with pytest.raises(ValueError, match="modelled"):
            Report.load(results / f"{name}.json")


def test_ratios_are_beside_the_best_peer_the_official_way_and_dense_layers():
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
    assert found["x best peer"] == "1.50 x"
    assert found["x official"] == "2.00 x"
    assert found["x dense"] == "0.50 x"
    assert found["ms (quartiles)"] == "2.00 (1.98 to 2.02)"
    assert found["of roof"] == "50%"
    assert "dense: all tokens through one expert." in text
    names = [line.split("|")[1].strip() for line in text.splitlines() if " x |" in line]
    assert names == ["vlmo:triton", "vlmo:reference", "grouped_mm", "slices", "dense"]


def test_columns_without_a_value_are_left_out():
    bare, full = measured("slices", 1.0), measured("slices", 1.0, peak_mib=12.0, millijoules=3.0)
    assert not {"peak MiB", "launches", "mJ"} & set(row(report(bare).markdown(), "contender"))
    header = row(report(full, measured("masks", 1.0)).markdown(), "contender")
    assert {"peak MiB", "mJ"} <= set(header) and "launches" not in header


def test_each_case_has_its_own_table():
    records = [measured("slices", 1.0, tokens=n) for n in (8192, 32768)]
    assert [g.labels["tokens"] for g in groups([*records, measured("masks", 2.0)])] == [8192, 32768]


@pytest.mark.parametrize("show", [printed, Report.markdown])
def test_a_reason_is_told_once_and_failures_first(show):
    text = show(
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
    for text in (it.markdown(), printed(it)):
        assert f"slices: not timed: {told}." in text
    assert not it.defects
    [group] = groups(it.records)
    assert group.best_peer["contender"] == "masks" and group.official is None


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


def test_defects_are_found():
    bad = [not_run("vlmo:cuda", "not exact: dx"), not_run("vlmo:triton", "failed: KeyError: 1")]
    assert report(measured("a", 1.0), not_run("b", "is not installed"), *bad).defects == bad


def test_a_later_run_of_the_same_commit_has_files_of_its_own(tmp_path):
    first, it = report(measured("a", 1.0)), report(measured("a", 2.0))
    paths = [first.save(tmp_path)]
    for _ in range(2):
        paths += [it.numbered(tmp_path).save(tmp_path)]
    stems = ["testing-unit-9-abc1234" + end for end in ("", "-2", "-3")]
    assert [path.stem for path in paths] == stems
    assert Report.load(paths[0]) == first
    assert [Report.load(path).stem for path in paths] == stems
    assert it.run == 1


def test_markdown_is_headed_by_what_the_numbers_depend_on():
    text = report(measured("slices", 1.0)).markdown()
    head = text[: text.index("\n## ")]
    for fact in ("Testing Unit 9", "cores 2", "abc1234", "`vlmo bench --suite moe_ffn`", "2.13.0"):
        assert fact in head
    assert "copies 10.0 GB/s, bfloat16 products 2.00 TFLOP/s" in head


def test_the_console_tells_what_markdown_tells():
    it = report(measured("vlmo:triton", 2.0, throttled=["power cap"]), measured("slices", 3.0))
    text = printed(it)
    assert "moe_ffn, base, bfloat16, forward, tokens 8192, split 40:197" in text
    assert "2.00 (1.98 to 2.02)" in text and "1.50 x" in text
    assert "vlmo:triton: the GPU was throttled (power cap)." in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.001234, "0.00123"), (1.5, "1.50"), (12.34, "12.3"), (1234.5, "1,234"), (0, "0")],
)
def test_numbers_have_three_digits(value, text):
    assert number(value) == text
