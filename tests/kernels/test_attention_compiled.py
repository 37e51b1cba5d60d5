"""Every row of shared_attention's tile table, compiled for its GPU: tensor cores, no spills."""

import pytest

from attention_cases import CASES
from compiling import (
    FOR_TYPES,
    KINDS,
    RELEASES,
    WITH_INSTALLED,
    assert_no_spills,
    compiled,
)
from vlmo.kernels._backends.triton import OPERANDS
from vlmo.kernels.attention.triton.tiles import TABLE, WIDTHS
from vlmo.kernels.target import GENERATIONS

pytestmark = pytest.mark.heavy

SCRIPT = "compiled_attention.py"
PRODUCTS = {"expand": 0, "fwd": 2, "bwd_q": 3, "bwd_kv": 4, "bwd_table": 2}


def test_the_table_is_complete():
    assert set(TABLE) == {(n, kind, w) for n in GENERATIONS for kind in OPERANDS for w in WIDTHS}


@pytest.mark.parametrize("release", FOR_TYPES)
def test_every_option_has_types(release):
    """What the interpreter runs in the parity tests, with the types that a compiler asks for."""
    assert_all_there(compiled(SCRIPT, "types:sm_90", release=release))


@pytest.mark.parametrize("release", WITH_INSTALLED)
def test_vlmo_s_layer_compiles_for_every_kind_of_tensor_core(release):
    reports = compiled(SCRIPT, *(f"layer:{generation}" for generation in KINDS), release=release)
    assert len(reports) == 6 * len(KINDS)
    assert_good(reports)


@pytest.mark.parametrize("release", WITH_INSTALLED)
def test_lanes_that_hold_one_sum_agree(release):
    reports = compiled(SCRIPT, "lanes:sm_80", release=release)
    assert len(reports) == 4
    assert all(report["contracted"] == 0 for report in reports), reports


@pytest.mark.slow
@pytest.mark.parametrize("release", ["installed", *RELEASES])
def test_every_option_compiles(release):
    assert_all_there(compiled(SCRIPT, "options:sm_90", release=release))


def assert_all_there(reports: list[dict]) -> None:
    names = [report["kernel"] for report in reports]
    # In two dtypes and with places of 64 bits; one more in two dtypes.
    cases = [case for case in CASES if case.batch and case.length]
    calls = 3 * len(cases) + 2
    assert names.count("fwd") == names.count("bwd_q") == names.count("bwd_kv") == calls
    assert names.count("bwd_table") == 3 * sum(case.index is not None for case in cases) + 2


@pytest.mark.slow
@pytest.mark.parametrize("release", ["installed", *RELEASES])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_compiled(generation, release):
    reports = compiled(SCRIPT, f"table:{generation}", release=release)
    # Six launches of three layers, four of one, three of another; three head dims; bfloat16,
    # float32 and TF32.
    assert len(reports) == (3 * 6 + 4 + 3) * 3 * 3
    assert_good(reports)


def assert_good(reports: list[dict]) -> None:
    for report in reports:
        assert report["shared_bytes"] <= GENERATIONS[report["generation"]].shared_bytes, report
        assert report["contracted"] == 0, report
        found = report["mma.sync"] + report["wgmma.mma_async"] + report["tcgen05.mma"]
        if report["dtype"] == "torch.float32":  # exact products have no tensor cores
            assert found == 0, report
        else:
            assert found >= PRODUCTS[report["kernel"]], report
        if report["dtype"] == "torch.bfloat16":
            if report["case"] == "order":  # tiles are chosen for layers that expand the bias
                assert report["local_bytes"] <= 144, report
            else:
                assert_no_spills(report)
        # q, k, v and dout are copied ahead, rows of 34 numbers too; not those in a branch.
        in_branch = report["kernel"] == "bwd_table" and report["case"] == "order"
        has_products = report["kernel"] != "expand"
        assert (report["async_copies"] > 0) == (has_products and not in_branch), report
        # So is an expanded bias, 16 bytes at a time; the kernel of the table reads it once.
        in_loop = report["kernel"] in ("fwd", "bwd_q", "bwd_kv")
        in_loop &= report["case"] not in ("order", "decoder")
        if report["dtype"] == "torch.bfloat16":
            assert (report["bias_copies"] > 0) == in_loop, report
            assert report["narrow_bias_copies"] == 0, report
