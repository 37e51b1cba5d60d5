"""Every row of the tile table, compiled for its GPU: tensor cores, no spills, shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from moe_ffn_cases import CASES
from vlmo.kernels.moe_ffn.tiles import GENERATIONS, OPERANDS, TABLE

PRODUCTS = {  # the instruction of the main loops, by generation and dtype
    "sm_80": "mma.sync",
    "sm_86": "mma.sync",
    "sm_90": "wgmma.mma_async",
    "sm_100": "tcgen05.mma",
    "sm_120": "mma.sync",
}

KINDS = ("sm_80", "sm_90", "sm_100")  # a GPU of each kind of tensor-core instruction


def test_the_table_is_complete():
    assert set(TABLE) == {(name, kind) for name in GENERATIONS for kind in OPERANDS}


def compiled(*arguments) -> list[dict]:
    """What tests/compiled.py says, in a process in which Triton compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("compiled.py")), *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.fixture(scope="module")
def quick() -> list[dict]:
    """What takes seconds, in one process."""
    return compiled("types:sm_90", *(f"layer:{generation}" for generation in KINDS))


@pytest.mark.parametrize("what", ["types", pytest.param("options", marks=pytest.mark.slow)])
def test_every_option_compiles(what, quick):
    """What the interpreter runs in the parity tests, with the types that a compiler asks for."""
    found = compiled("options:sm_90") if what == "options" else quick
    reports = [report for report in found if report["what"] == what]
    names = [report["kernel"] for report in reports]
    calls = sum(case.batch > 0 for case in CASES) + 13
    assert names.count("fwd") == names.count("bwd_rows") == calls
    assert names.count("bwd_weights") == calls - 4  # where only dx, or nothing there, is wanted


def test_vlmo_s_layer_compiles_for_every_kind_of_tensor_core(quick):
    reports = [report for report in quick if report["what"] == "layer"]
    assert len(reports) == 3 * len(KINDS)
    assert_good(reports)


@pytest.mark.slow
@pytest.mark.parametrize("generation", GENERATIONS)
def test_compiled(generation):
    reports = compiled(f"table:{generation}")
    # Three kernels of two layers and two kernels that recompute, in two dtypes; TF32 once.
    assert len(reports) == 19
    assert_good(reports)


def assert_good(reports: list[dict]) -> None:
    # The table is chosen for the Triton that is tested; another's ptxas may spill a little.
    limit = 0 if triton.__version__ == "3.7.1" else 64
    spilt = [report for report in reports if report["local_bytes"] > limit]
    assert not spilt
    for report in reports:
        generation = report["generation"]
        assert report["shared_bytes"] <= GENERATIONS[generation].shared_bytes, report
        assert report["async_copies"] > 0, report
        found = report[PRODUCTS[generation]]
        if report["dtype"] == "torch.float32":  # exact products have no tensor cores
            assert found == 0, report
        else:
            # Each product has its own main loop: two forward, two or three by rows, one by weights.
            recomputes = report["case"].endswith("recomputed")
            loops = {"fwd": 2, "bwd_rows": 3 if recomputes else 2, "bwd_weights": 1}
            assert found >= loops[report["kernel"]], report
