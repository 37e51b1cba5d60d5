"""Every row of shared_attention's tile table, compiled for its GPU: tensor cores, no spills."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from attention_cases import CASES
from vlmo.kernels.attention.tiles import TABLE, WIDTHS
from vlmo.kernels.moe_ffn.tiles import GENERATIONS, OPERANDS

PRODUCTS = {"fwd": 2, "bwd_q": 3, "bwd_kv": 4, "bwd_table": 2}

KINDS = ("sm_80", "sm_90", "sm_100")  # a GPU of each kind of tensor-core instruction


def test_the_table_is_complete():
    assert set(TABLE) == {(n, kind, w) for n in GENERATIONS for kind in OPERANDS for w in WIDTHS}


def compiled(*arguments) -> list[dict]:
    """What tests/compiled_attention.py says, in a process in which Triton compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compiled_attention.py")
    run = subprocess.run(
        [sys.executable, str(script), *arguments], env=environment, capture_output=True, text=True
    )
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
    names = [report["kernel"] for report in found if report["what"] == what]
    # In two dtypes and with places of 64 bits; one more in two dtypes.
    cases = [case for case in CASES if case.batch and case.length]
    calls = 3 * len(cases) + 2
    assert names.count("fwd") == names.count("bwd_q") == names.count("bwd_kv") == calls
    assert names.count("bwd_table") == 3 * sum(case.index is not None for case in cases) + 2


def test_vlmo_s_layer_compiles_for_every_kind_of_tensor_core(quick):
    reports = [report for report in quick if report["what"] == "layer"]
    assert len(reports) == 4 * len(KINDS)
    assert_good(reports)


@pytest.mark.slow
@pytest.mark.parametrize("generation", GENERATIONS)
def test_compiled(generation):
    reports = compiled(f"table:{generation}")
    # Four kernels of two layers, three of one; three head dims; bfloat16, float32 and TF32.
    assert len(reports) == (4 + 4 + 3) * 3 * 3
    assert_good(reports)


def assert_good(reports: list[dict]) -> None:
    # The table is chosen for the Triton that is tested; another's ptxas may spill a little.
    limit = 0 if triton.__version__ == "3.7.1" else 64
    for report in reports:
        assert report["shared_bytes"] <= GENERATIONS[report["generation"]].shared_bytes, report
        found = report["mma.sync"] + report["wgmma.mma_async"] + report["tcgen05.mma"]
        if report["dtype"] == "torch.float32":  # exact products have no tensor cores
            assert found == 0, report
        else:
            assert found >= PRODUCTS[report["kernel"]], report
        if report["dtype"] == "torch.bfloat16":
            assert report["local_bytes"] <= limit, report
        # q, k, v and dout are copied ahead, rows of 34 numbers too; not those in a branch.
        in_branch = report["kernel"] == "bwd_table" and report["case"] == "ragged"
        assert (report["async_copies"] > 0) != in_branch, report
