"""vlmo bench from the command line, with a suite that pretends."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bench_cases import measured, report
from vlmo.bench import modelled, runner
from vlmo.bench.cost import Cost
from vlmo.bench.report import Report
from vlmo.bench.roofline import Roof
from vlmo.bench.suite import Case, Scale, Suite
from vlmo.commands.app import app, main
from vlmo.testing import Deviation

scales: list[Scale] = []


@dataclass
class Pretence:
    """Sleeps; one contender may be wrong."""

    wrong: str | None
    contenders = ("vlmo:cpu", "slices", "masks", "quack")
    cost = check_cost = Cost(flops=10**9, bytes=10**7)
    samples = 2

    def expect(self, contender):
        pass

    def why_not(self, contender):
        return "quack is not installed" if contender == "quack" else None

    def check(self, contender):
        off = 3.0 if contender == self.wrong else 1.0
        return [Deviation("y", off, 1.0, 2.0)]

    def work(self, contender):
        return lambda: time.sleep(0.001 if contender == "vlmo:cpu" else 0.002)


def pretending(name: str, *, wrong: str | None = None) -> Suite:
    def cases(device, scale):
        scales.append(scale)
        both = (torch.float32, torch.bfloat16)
        return [Case(name, "tiny", dtype, "forward", {"tokens": 8}) for dtype in both]

    return Suite(name, cases, lambda case, device: Pretence(wrong))


@pytest.fixture(autouse=True)
def suites(monkeypatch):
    def roof(device, dtypes):
        return Roof(10.0, {str(dtype).removeprefix("torch."): 2.0 for dtype in dtypes})

    scales.clear()
    known = {"one": pretending("one"), "two": pretending("two")}
    known["bad"] = pretending("bad", wrong="vlmo:cpu")
    known["rounded"] = pretending("rounded", wrong="masks")
    monkeypatch.setattr(runner, "SUITES", known, raising=False)
    monkeypatch.setattr(runner, "measure_roof", roof)
    monkeypatch.setattr(runner.gc, "collect", lambda: 0)  # as in test_bench_runner.py


def vlmo(monkeypatch, *arguments: str):
    monkeypatch.setattr(sys, "argv", ["vlmo", *arguments])
    return CliRunner().invoke(app, list(arguments))


def bench(monkeypatch, folder: Path, *arguments: str):
    common = ["bench", "--output", str(folder), "--device", "cpu", "--commit", "abc", "--smoke"]
    return vlmo(monkeypatch, *common, *arguments)


def test_a_run_prints_each_case_and_writes_everything(tmp_path, monkeypatch):
    result = bench(monkeypatch, tmp_path / "new", "--suite", "one", "--suite", "two")
    assert result.exit_code == 0, result.output
    folder = tmp_path / "new" / "smoke"
    pictures = [f"cpu-abc-{n}-{t}.png" for n in ("roofline", "speed") for t in ("dark", "light")]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["cpu-abc.json", "cpu-abc.md", *pictures]
    )
    found = Report.load(folder / "cpu-abc.json")
    assert {record["suite"] for record in found.records} == {"one", "two"}
    assert {record["dtype"] for record in found.records} == {"float32", "bfloat16"}
    assert found.command.startswith("vlmo bench --output")
    assert "times mean nothing" in found.unmeasured[0]
    assert (folder / "cpu-abc.md").read_text() == found.markdown()
    assert result.output.count("one, tiny, float32, forward, tokens 8") == 1
    # Once when it came up, once in the summary.
    assert result.output.count("quack is not installed") == 2
    assert "quack is not installed: quack (4 cases)" in result.output
    assert all(name in result.output for name in ("cpu-abc.json", *pictures))


def test_filters_and_scale_are_those_of_the_command_line(tmp_path, monkeypatch):
    wanted = ["--dtype", "float32", "--contender", "vlmo", "--contender", "quack", "--suite", "two"]
    assert bench(monkeypatch, tmp_path, *wanted, "--no-pictures").exit_code == 0
    found = Report.load(tmp_path / "smoke" / "cpu-abc.json").records
    assert {(r["suite"], r["dtype"]) for r in found} == {("two", "float32")}
    assert [r["contender"] for r in found] == ["vlmo:cpu", "quack"]
    assert scales == [Scale.smoke]
    assert not list(tmp_path.glob("**/*.png"))
    seen = {}

    def run(suites, device, **options):
        seen.update(options)
        return report(measured("slices", 1.0))

    monkeypatch.setattr(runner, "run", run)
    arguments = ["bench", "--output", str(tmp_path), "--device", "cpu", "--no-pictures"]
    assert vlmo(monkeypatch, *arguments).exit_code == 0
    assert (tmp_path / "testing-unit-9-abc1234.json").is_file()
    assert (seen["scale"], seen["seconds"], seen["dtypes"]) == (Scale.cpu, 270, None)
    assert vlmo(monkeypatch, *arguments, "--minutes", "0.5").exit_code == 0
    assert seen["seconds"] == 30


def test_one_that_is_not_exact_is_told_and_exits_with_1(tmp_path, monkeypatch):
    result = bench(monkeypatch, tmp_path, "--suite", "bad", "--no-pictures")
    assert result.exit_code == 1
    assert "not exact: y is off by 3.00e+00" in result.output
    assert "2 of 8 records: ours, not exact or failed" in result.output
    assert len(Report.load(tmp_path / "smoke" / "cpu-abc.json").defects) == 2


def test_a_peer_that_is_not_exact_is_told_and_exits_with_0(tmp_path, monkeypatch):
    """Others round as they like on another CPU; they only get no time."""
    result = bench(monkeypatch, tmp_path, "--suite", "rounded", "--no-pictures")
    assert result.exit_code == 0, result.output
    told = "masks: not timed: out of its error bound: y is off by 3.00e+00, allowed are 2.00e+00."
    assert " ".join(result.output.split()).count(told) == 2  # below the table of each case
    found = Report.load(tmp_path / "smoke" / "cpu-abc.json")
    assert not found.defects and told in found.markdown()
    assert "| masks | - |" in found.markdown()
    assert {r["contender"] for r in found.records if "device_ms" in r} == {"vlmo:cpu", "slices"}


def test_what_is_measured_is_saved_before_the_run_ends(tmp_path, monkeypatch):
    real, calls = runner.measure, []

    def killed(works, *rest):
        calls.append(works)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(works, *rest)

    monkeypatch.setattr(runner, "measure", killed)
    bench(monkeypatch, tmp_path, "--suite", "one")
    found = Report.load(tmp_path / "smoke" / "cpu-abc.json")
    assert len(found.records) == 4
    assert (tmp_path / "smoke" / "cpu-abc.md").read_text() == found.markdown()


def test_an_earlier_run_keeps_its_files(tmp_path, monkeypatch):
    common = ["bench", "--output", str(tmp_path), "--device", "cpu", "--suite", "one"]
    for _ in range(2):
        assert vlmo(monkeypatch, *common, "--commit", "abc", "--no-pictures").exit_code == 0
    stems = ["cpu-abc", "cpu-abc-2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{stem}.{suffix}" for stem in stems for suffix in ("json", "md")
    )
    assert [Report.load(tmp_path / f"{stem}.json").run for stem in stems] == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "three"], "suite: 'three' is not one of one, two, bad, rounded"),
        (["--size", "huge"], "huge"),
        (["--contender", "nobody"], "nobody"),
        (["--minutes", "0"], "minutes: 0.0 is not more than 0"),
        (["--again"], "again: only goes with --modelled"),
        (["--modelled", "a100"], "'a100' is not one of v100"),
        (["compare", "no.json", "no.json"], "no.json"),
        (["compare", __file__, __file__], "is not JSON"),
    ],
)
def test_user_errors_are_one_line_and_exit_code_2(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["vlmo", "bench", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_without_matplotlib_nothing_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(sys, "argv", ["vlmo", "bench", "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == 2
    assert "pip install matplotlib; or take --no-pictures" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not scales


def test_compare_shows_two_files(tmp_path, monkeypatch):
    paths = [report(measured("slices", ms), commit=str(ms)).save(tmp_path) for ms in (2.0, 1.0)]
    result = vlmo(monkeypatch, "bench", "compare", *map(str, paths))
    assert result.exit_code == 0, result.output
    assert "1 faster, 0 slower, 0 same." in result.output


def test_modelled_figures_are_labelled_and_tell_their_constants(monkeypatch):
    result = vlmo(monkeypatch, "bench", "--modelled", "v100")
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert "MODELLED, not measured" in text
    for title in ("moe_ffn on a V100: MODELLED", "shared_attention on a V100: MODELLED"):
        assert title in text
    assert text.count("what DRAM delivers to one SM") == 1
    assert "none of which has been calibrated" in text


def test_modelled_figures_are_computed_again_by_their_scripts(tmp_path, monkeypatch):
    benchmarks = Path(modelled._benchmarks())
    ran = []
    monkeypatch.setattr(modelled, "_run", ran.append)
    assert vlmo(monkeypatch, "bench", "--modelled", "v100", "--again").exit_code == 0
    assert ran == [benchmarks / "model_volta.py", benchmarks / "model_volta_attention.py"]
    script = tmp_path / "fails.py"
    script.write_text("raise SystemExit(3)")
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match=r"fails\.py failed with exit code 3"):
        modelled._run(script)


def test_a_wheel_says_what_modelled_figures_need(tmp_path, monkeypatch):
    monkeypatch.setattr(modelled.vlmo, "__file__", str(tmp_path / "vlmo" / "__init__.py"))
    with pytest.raises(NotImplementedError, match="not part of an installed wheel; clone"):
        modelled.show("v100", None)


@pytest.mark.parametrize("name", ["volta", "volta_attention"])
def test_pages_of_the_model_are_those_of_its_figures(name):
    results = Path(__file__).parent.parent / "benchmarks" / "results"
    script = results.parent / f"model_{name}.py"
    code = (
        f"import json, sys; sys.path.insert(0, {str(script.parent)!r}); import {script.stem} as m; "
        f"print(m.markdown(json.load(open({str(results / name)!r} + '.json'))), end='')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600
    )
    assert result.stdout == (results / f"{name}.md").read_text(encoding="utf-8"), result.stderr


def test_committed_models_list_the_constants_of_today():
    from sm70.timing import assumptions

    results = Path(__file__).parent.parent / "benchmarks" / "results"
    for name in ("volta", "volta_attention"):
        told = json.loads((results / f"{name}.json").read_text())["assumptions"]
        today = [list(row) for row in assumptions()]
        differ = [row[0] for row, other in zip(told, today, strict=True) if row != other]
        assert differ == ["dram_fraction"]
