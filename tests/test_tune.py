"""Tile tables: the search, the file, and which row a call gets."""

import contextlib
import io
import json
import os
from dataclasses import asdict, replace

import pytest
import torch
from rich.console import Console

from processes import command
from vlmo.kernels import target
from vlmo.kernels.moe_ffn.triton import tiles
from vlmo.kernels.moe_ffn.triton.tiles import INTERPRETED, INTERPRETER, TABLE, Tile
from vlmo.kernels.target import GENERATIONS
from vlmo.tune import candidates, parse_problem, search, tune

CPU = torch.device("cpu")
OTHER = replace(INTERPRETED, forward=Tile(16, 32, 16, 4, 1))


def row(generation=INTERPRETER, operands="32-bit", shapes=OTHER) -> dict:
    return dict(generation=generation, operands=operands, tiles=asdict(shapes), measured={})


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a table and lets VLMO_TILES name it."""

    def write(*rows, **changes):
        path = tmp_path / "tiles.json"
        path.write_text(json.dumps({"version": 1, "rows": rows} | changes))
        monkeypatch.setenv("VLMO_TILES", str(path))
        return path

    monkeypatch.delenv("VLMO_TILES", raising=False)
    return write


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter runs without a GPU")
def test_search_in_the_interpreter_writes_a_table_that_is_used(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("VLMO_TILES", raising=False)
    path = tmp_path / "tiles.json"
    kept = row("sm_90", "16-bit", TABLE["sm_90", "16-bit"])
    path.write_text(json.dumps({"version": 1, "rows": [kept, row()]}))
    assert command(monkeypatch, "tune", "--output", str(path)) == 0
    assert "times mean nothing" in capsys.readouterr().out

    first, found = json.loads(path.read_text())["rows"]
    assert first == kept
    assert (found["generation"], found["operands"]) == (INTERPRETER, "32-bit")
    measured = found["measured"]
    assert measured["times_mean_something"] is False
    assert measured["command"].startswith("vlmo tune --dim")
    for kernel, times in measured["kernels"].items():
        assert len(times["candidates"]) == 2 and not times["dropped"]
        assert times["winner_ms"] <= times["built_in_ms"]
        assert times["candidates"][0] == found["tiles"][kernel] | {"ms": times["winner_ms"]}

    monkeypatch.setenv("VLMO_TILES", str(path))
    assert asdict(tiles.choose(CPU, torch.float32)) == found["tiles"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter runs without a GPU")
def test_interrupted_search_leaves_what_it_has_found(tmp_path, monkeypatch):
    """The kernel that was found is in the file, and the built-in tiles of the others."""
    searched = []

    def search_one(trial, kernel, *arguments):
        if searched:
            raise KeyboardInterrupt
        searched.append(kernel)
        return search(trial, kernel, *arguments)

    monkeypatch.setattr("vlmo.tune.search", search_one)
    monkeypatch.setattr("vlmo.tune.Trial", FakeTrial)
    monkeypatch.delenv("VLMO_TILES", raising=False)
    path, problem = tmp_path / "tiles.json", parse_problem({})
    path.write_text(json.dumps({"version": 1, "rows": [row("sm_90", "16-bit")]}))
    with pytest.raises(KeyboardInterrupt):
        tune(problem, path, Console(file=io.StringIO()))
    kept, found = json.loads(path.read_text())["rows"]
    assert kept == row("sm_90", "16-bit")
    assert searched == ["forward"] == list(found["measured"]["kernels"])
    assert found["tiles"] | {"forward": None} == asdict(INTERPRETED) | {"forward": None}
    assert found["measured"]["kernels"]["forward"]["candidates"]
    assert tiles.load(path)[INTERPRETER, "32-bit"].rows == INTERPRETED.rows


def test_without_a_gpu_it_refuses_in_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command(monkeypatch, "tune", "--output", str(tmp_path / "out.json")) == 2
    told = "vlmo: tune: needs an NVIDIA GPU, and torch finds none here.\n"
    assert capsys.readouterr().err == told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "40:x"], "split: '40:x' is not like 40:197"),
        (["--split", "0:0"], "split: (0, 0) holds no tokens"),
        (["--output", "missing/tiles.json"], "its folder does not exist"),
        (["--output", __file__], "not JSON"),
    ],
)
def test_bad_options_are_refused_before_the_search(arguments, message, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert command(monkeypatch, "tune", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


class FakeTrial:
    """Candidates of which one is wrong and one does not compile."""

    device = CPU

    def __init__(self, *problem):
        self.runs = []
        self.compiled = []

    def run(self, kernel, shapes):
        self.compiled.append(shapes.rows)
        raise RuntimeError("what does not compile is reported when it is run")

    def why_wrong(self, kernel, shapes):
        if shapes.rows.num_stages == 4:
            raise RuntimeError("out of resource: shared memory\nand more")
        return "gradient 1 is off." if shapes.rows.num_stages == 3 else None

    def work(self, kernel, shapes):
        return lambda: self.runs.append(shapes.rows)


def test_search_drops_and_reports_what_is_wrong_or_fails():
    trial, console = FakeTrial(), Console(record=True, width=200, file=io.StringIO())
    shapes = [Tile(32, 32, 32, 4, stages) for stages in (2, 3, 4)]
    found = search(trial, "rows", INTERPRETED, shapes, console)
    assert trial.compiled == [INTERPRETED.rows, *shapes]  # all of them before any is run
    assert set(found.seconds) == {INTERPRETED.rows, shapes[0]} == set(trial.runs)
    assert found.dropped[shapes[1]] == "gradient 1 is off."
    assert found.dropped[shapes[2]] == "RuntimeError: out of resource: shared memory"
    printed = console.export_text()
    assert "out of resource" in printed and "gradient 1 is off." in printed
    reasons = [entry["reason"] for entry in found.record(INTERPRETED.rows)["dropped"]]
    assert reasons == list(found.dropped.values())

    with pytest.raises(RuntimeError, match="none of 1 candidates"):
        search(trial, "rows", replace(INTERPRETED, rows=shapes[1]), [], console)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_candidates_fit_the_multiprocessor(generation, itemsize):
    shared = GENERATIONS[generation].shared_bytes
    found = candidates(shared, itemsize)
    assert set(candidates(shared, itemsize, quick=True)) < set(found)
    for tile in found:
        stage = (tile.block_t + tile.block_n) * tile.block_k * itemsize
        assert stage * tile.num_stages * tile.programs <= shared


def test_precedence(write):
    assert tiles.choose(CPU, torch.float32) == INTERPRETED
    write(row())
    assert tiles.choose(CPU, torch.float32) == OTHER
    assert tiles.choose(CPU, torch.bfloat16) == INTERPRETED  # no row for 16-bit operands
    forced = replace(INTERPRETED, weights=Tile(64, 64, 64, 8, 2))
    with contextlib.suppress(KeyError), tiles.use_tiles(forced):
        assert tiles.choose(CPU, torch.float32) == forced
        raise KeyError
    assert tiles.choose(CPU, torch.float32) == OTHER
    assert tiles.built_in(CPU, torch.float32) == INTERPRETED


def test_row_of_another_generation_is_ignored(write, monkeypatch):
    monkeypatch.setattr(target, "compute_capability", lambda device: (9, 0))
    gpu, built_in = torch.device("cuda"), TABLE["sm_90", "16-bit"]
    write(row("sm_80", "16-bit"), row(operands="16-bit"))
    assert tiles.choose(gpu, torch.bfloat16) == built_in
    write(row("sm_80", "16-bit"), row("sm_90", "16-bit"), row("sm_90", "32-bit"))
    os.utime(os.environ["VLMO_TILES"], ns=(1, 1))
    assert tiles.choose(gpu, torch.bfloat16) == OTHER


def test_file_is_read_once_and_again_when_it_changes(write, monkeypatch):
    loads = []
    load = tiles.load
    monkeypatch.setattr(tiles, "load", lambda path: loads.append(path) or load(path))
    path = write(row())
    for _ in range(3):
        assert tiles.choose(CPU, torch.float32) == OTHER
    assert loads == [str(path)]
    write(row(shapes=INTERPRETED))
    os.utime(path, ns=(2, 2))
    assert tiles.choose(CPU, torch.float32) == INTERPRETED
    assert len(loads) == 2


def changed(**fields) -> dict:
    shapes = asdict(OTHER)
    shapes["rows"] |= fields
    return row() | {"tiles": shapes}


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([], {"version": 2}, "version: 2, expected 1"),
        ([], {"gpu": "H100"}, "gpu: unknown field"),
        ([], {"rows": {}}, "rows: expected a list"),
        ([row("sm_42")], {}, r"rows\[0\]\.generation: 'sm_42' is not one of"),
        ([row(), row(operands="8-bit")], {}, r"rows\[1\]\.operands: '8-bit'"),
        ([row(), row()], {}, r"rows\[1\]\.generation: a second row"),
        ([row() | {"note": ""}], {}, r"rows\[0\]\.note: unknown field"),
        ([{"generation": "sm_90"}], {}, r"rows\[0\]\.operands: missing"),
        (["sm_90"], {}, r"rows\[0\]: expected an object"),
        ([row() | {"tiles": {}}], {}, r"rows\[0\]\.tiles\.forward: missing"),
        ([changed(block_m=64)], {}, r"tiles\.rows\.block_m: unknown field"),
        ([changed(block_t=96)], {}, r"tiles\.rows\.block_t: 96 is not a power of two"),
        ([changed(block_k=8)], {}, r"tiles\.rows\.block_k: 8 is not a power of two from 16"),
        ([changed(num_warps=3)], {}, r"tiles\.rows\.num_warps: 3 is not a power of two"),
        ([changed(num_stages=0)], {}, r"tiles\.rows\.num_stages: 0 is not a positive integer"),
        ([changed(programs="1")], {}, r"tiles\.rows\.programs: '1' is not a positive integer"),
    ],
)
def test_bad_file_is_named_with_its_field(write, rows, changes, message):
    path = write(*rows, **changes)
    with pytest.raises(ValueError, match=message) as error:
        tiles.choose(CPU, torch.float32)
    assert str(path) in str(error.value)


def test_file_that_is_missing_or_not_json(write):
    path = write()
    path.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        tiles.choose(CPU, torch.float32)
    path.unlink()
    with pytest.raises(ValueError, match=r"VLMO_TILES: .*No such file"):
        tiles.choose(CPU, torch.float32)
