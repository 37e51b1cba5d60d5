"""The search of tile shapes."""

import contextlib
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tune
from tune import candidates, row_of, search
from vlmo.kernels.moe_ffn.triton import tiles
from vlmo.kernels.moe_ffn.triton.tiles import INTERPRETED, TABLE, Tile
from vlmo.kernels.target import GENERATIONS

SCRIPT = Path(tune.__file__)
CPU = torch.device("cpu")


def run(interpret: str, *arguments: str):
    command = [sys.executable, str(SCRIPT), *arguments]
    environment = os.environ | {"TRITON_INTERPRET": interpret}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter runs without a GPU")
def test_a_trial_runs_every_kernel_with_the_tiles_in_force(monkeypatch):
    case = tune.Case("moe_ffn", "tiny", torch.float32, "forward+backward", FEW)
    trial = tune.Trial(case, CPU)
    asked = []
    real = tiles.choose

    def noted(*key):
        asked.append(real(*key))
        return asked[-1]

    monkeypatch.setattr(tiles, "choose", noted)
    other = Tile(16, 32, 16, 4, 1)
    for kernel in tune.KERNELS:
        work, row = trial.work(kernel), replace(INTERPRETED, **{kernel: other})
        asked.clear()
        for _ in range(2):  # the graph of the backward is kept
            tune._with(row, work)
        assert asked == [row, row]
        assert tune._why_dropped(trial, kernel, row) is None


FEW: dict[str, int | str] = dict(tokens=7, split="3:4")


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter runs without a GPU")
def test_the_end_compares_one_launch_separate_launches_and_the_composition(launches, capsys):
    trial = tune.Trial(tune.Case("moe_ffn", "tiny", torch.float32, "forward+backward", FEW), CPU)
    launches.clear()
    tune.compare(trial, INTERPRETED)
    printed = capsys.readouterr().out
    pattern = " ms, ".join(rf"{re.escape(label)} ([\d.]+)" for label in tune.FORMS)
    found = re.fullmatch(rf"forward and backward: {pattern} ms; the fastest is (.*)\n", printed)
    assert found is not None, printed
    *times, fastest = found.groups()
    assert fastest == min(zip(map(float, times), tune.FORMS, strict=True))[1]
    tasks = {
        sum(n > 0 for n in args[-1].tasks)
        for name, args in launches
        if name == "moe_ffn_fwd_kernel"
    }
    assert tasks == {1, 3}, "a launch has one phase, or all"


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU")
def test_without_a_gpu_it_refuses_in_one_sentence():
    result = run("0")
    assert result.returncode == 2
    assert "needs an NVIDIA GPU, and torch finds none here" in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter runs without a GPU")
def test_what_is_found_before_an_interruption_is_printed(monkeypatch, capsys):
    found = Tile(16, 32, 16, 4, 1)

    def search_one(trial, kernel, base, shapes):
        if kernel != "forward":
            raise KeyboardInterrupt
        return tune.Search({found: 1.0})

    monkeypatch.setattr(tune, "search", search_one)
    monkeypatch.setattr(sys, "argv", ["tune.py"])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(KeyboardInterrupt):
        tune.main()
    out = capsys.readouterr().out
    assert "times mean nothing" in out
    assert row_of(("interpreter", "32-bit"), replace(INTERPRETED, forward=found)) in out


@pytest.mark.parametrize("key", [("sm_90", "16-bit"), ("sm_120", "32-bit")])
def test_a_row_is_what_stands_in_the_table(key):
    text = row_of(key, TABLE[key])
    names = dict(Tile=Tile, Tiles=tiles.Tiles)
    assert eval(f"{{{text}}}", names) == {key: TABLE[key]}
    if key == ("sm_90", "16-bit"):
        assert text in Path(tiles.__file__).read_text()


class FakeTrial:
    """Candidates of which one is wrong and one does not compile."""

    device = CPU

    def __init__(self):
        self.runs = []

    def why_wrong(self, kernel):
        stages = getattr(tiles.choose(CPU, torch.float32), kernel).num_stages
        if stages == 4:
            raise RuntimeError("out of resource: shared memory\nand more")
        return "gradient 1 is off." if stages == 3 else None

    def work(self, kernel):
        return lambda: self.runs.append(getattr(tiles.choose(CPU, torch.float32), kernel))


def test_search_drops_and_reports_what_is_wrong_or_fails(capsys):
    trial: Any = FakeTrial()
    shapes = [Tile(32, 32, 32, 4, stages) for stages in (2, 3, 4)]
    found = search(trial, "rows", INTERPRETED, shapes)
    assert trial.runs[:4] == [INTERPRETED.rows, *shapes]  # all are compiled before one is checked
    assert set(found.seconds) == {INTERPRETED.rows, shapes[0]} == set(trial.runs[4:])
    assert found.dropped[shapes[1]] == "gradient 1 is off."
    assert found.dropped[shapes[2]] == "RuntimeError: out of resource: shared memory"
    out = capsys.readouterr().out
    assert "out of resource" in out and "gradient 1 is off." in out

    with pytest.raises(RuntimeError, match="none of 1 candidates"):
        search(trial, "rows", replace(INTERPRETED, rows=shapes[1]), [])


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_candidates_fit_the_multiprocessor(generation, itemsize):
    shared = GENERATIONS[generation].shared_bytes
    found = candidates(shared, itemsize)
    assert set(candidates(shared, itemsize, quick=True)) < set(found)
    for tile in found:
        stage = (tile.block_t + tile.block_n) * tile.block_k * itemsize
        assert stage * tile.num_stages * tile.programs <= shared


def test_tiles_in_force_come_before_the_table():
    forced = replace(INTERPRETED, weights=Tile(64, 64, 64, 8, 2))
    with contextlib.suppress(KeyError), tiles.use_tiles(forced):
        assert tiles.choose(CPU, torch.float32) == forced
        raise KeyError
    assert tiles.choose(CPU, torch.float32) == INTERPRETED
