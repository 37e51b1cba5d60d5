"""The performance models of GPUs: their pages and constants."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path

import pytest

from vlmo.kernels.moe_ffn.triton.tiles import OVERHEADS, TABLE

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RESULTS = BENCHMARKS / "results"


@pytest.mark.parametrize("name", ["volta", "volta_attention"])
def test_pages_of_the_model_are_those_of_its_figures(name):
    code = (
        f"import json, sys; sys.path.insert(0, {str(BENCHMARKS / 'modelled')!r}); import {name}; "
        f"print({name}.markdown(json.load(open({str(RESULTS / name)!r} + '.json'))), end='')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600
    )
    assert result.stdout == (RESULTS / f"{name}.md").read_text(encoding="utf-8"), result.stderr


def test_costs_of_tiles_are_those_that_were_counted():
    counted = json.loads((RESULTS / "sass_counts.json").read_text())
    for target, costs in counted["overheads"].items():
        assert tuple(costs) == OVERHEADS[target, "16-bit"], target
    for row in counted["moe_ffn"]:
        tiles = TABLE[row["target"].removesuffix(", descriptors"), "16-bit"]
        tile = {"fwd": tiles.forward, "bwd_rows": tiles.rows, "bwd_weights": tiles.weights}
        assert (*row["tile"], False) == astuple(tile[row["kernel"]]), row["target"]


def test_committed_models_list_the_constants_of_today():
    from sm70.timing import assumptions

    for name in ("volta", "volta_attention"):
        told = json.loads((RESULTS / f"{name}.json").read_text())["assumptions"]
        today = [list(row) for row in assumptions()]
        differ = [row[0] for row, other in zip(told, today, strict=True) if row != other]
        assert differ == ["dram_fraction"]
