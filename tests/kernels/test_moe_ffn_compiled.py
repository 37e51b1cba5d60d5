"""Every row of the tile table, compiled for its GPU: tensor cores, no spills, shared memory."""

import pytest

from compiling import (
    FOR_TYPES,
    KINDS,
    RELEASES,
    WITH_INSTALLED,
    assert_no_spills,
    compiled,
)
from moe_ffn_cases import CASES
from vlmo.kernels._backends.triton import OPERANDS
from vlmo.kernels.moe_ffn.triton.tiles import TABLE
from vlmo.kernels.target import GENERATIONS

pytestmark = pytest.mark.heavy

SCRIPT = "compiled.py"
PRODUCTS = {  # the instruction of the main loops, by generation and dtype
    "sm_80": "mma.sync",
    "sm_86": "mma.sync",
    "sm_90": "wgmma.mma_async",
    "sm_100": "tcgen05.mma",
    "sm_120": "mma.sync",
}


def test_the_table_is_complete():
    assert set(TABLE) == {(name, kind) for name in GENERATIONS for kind in OPERANDS}


@pytest.mark.parametrize("release", FOR_TYPES)
def test_every_option_has_types(release):
    """What the interpreter runs in the parity tests, with the types that a compiler asks for."""
    assert_all_there(compiled(SCRIPT, "types:sm_90", release=release))


@pytest.mark.parametrize("release", FOR_TYPES)
def test_every_option_of_the_passes_has_types(release):
    reports = compiled(SCRIPT, "composed-types:sm_90", release=release)
    names = [report["kernel"] for report in reports]
    calls = sum(case.batch > 0 for case in CASES) + 13
    # Where not saved, h2 is computed again for the gradient of the layer scale, from act.
    assert names.count("branch") == names.count("bwd_branch") == calls
    assert names.count("bwd_sub_norm") == sum(case.sub_norm for case in CASES)
    assert set(names) == {"norm", "activation", "sub_norm", "branch", "sums"} | {
        f"bwd_{name}" for name in ("branch", "sub_norm", "activation", "norm")
    }


@pytest.mark.parametrize("release", WITH_INSTALLED)
@pytest.mark.parametrize(
    "generation",
    [pytest.param(g, marks=[] if g in KINDS else pytest.mark.slow) for g in GENERATIONS],
)
def test_the_passes_spill_nothing(generation, release):
    reports = compiled(SCRIPT, f"composed:{generation}", release=release)
    # Of two layers without and one with a sub-norm, each also without what the forward saves, and
    # of one with separate gates, in two dtypes.
    assert len(reports) == 2 * (2 * (7 + 9) + 7 + 10 + 12)
    for report in reports:
        assert_no_spills(report)
        assert report["contracted"] == 0, report


@pytest.mark.parametrize("release", WITH_INSTALLED)
def test_vlmo_s_layer_compiles_for_every_kind_of_tensor_core(release):
    reports = compiled(SCRIPT, *(f"layer:{generation}" for generation in KINDS), release=release)
    assert len(reports) == 3 * len(KINDS)
    assert_good(reports)


@pytest.mark.parametrize(
    ("generation", "release"),
    [
        ("sm_90", "installed"),
        *(
            pytest.param(generation, release, marks=pytest.mark.slow)
            for generation in ("sm_90", "sm_100", "sm_120")
            for release in ("installed", "newest")
            if (generation, release) != ("sm_90", "installed")
        ),
    ],
)
def test_descriptors_compile_to_tensor_copies(generation, release):
    reports = compiled(SCRIPT, f"descriptors:{generation}", release=release)
    # Three kernels of three layers, and three that recompute.
    assert len(reports) == 12
    assert_good(reports, copies="tensor_copies")


@pytest.mark.parametrize("release", WITH_INSTALLED)
def test_lanes_that_hold_one_sum_agree(release):
    reports = compiled(SCRIPT, "lanes:sm_80", release=release)
    assert len(reports) == 6
    assert all(report["contracted"] == 0 for report in reports), reports


@pytest.mark.slow
@pytest.mark.parametrize("release", ["installed", *RELEASES])
def test_every_option_compiles(release):
    assert_all_there(compiled(SCRIPT, "options:sm_90", release=release))


def assert_all_there(reports: list[dict]) -> None:
    names = [report["kernel"] for report in reports]
    calls = sum(case.batch > 0 for case in CASES) + 13
    assert names.count("fwd") == names.count("bwd_rows") == calls
    assert names.count("bwd_weights") == calls - 4  # where only dx, or nothing there, is wanted


@pytest.mark.slow
@pytest.mark.parametrize("release", ["installed", *RELEASES])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_compiled(generation, release):
    reports = compiled(SCRIPT, f"table:{generation}", release=release)
    # Three kernels of four layers and three kernels that recompute, in two dtypes; TF32 once.
    assert len(reports) == 33
    assert_good(reports)


def assert_good(reports: list[dict], copies: str = "async_copies") -> None:
    for report in reports:
        generation = report["generation"]
        assert_no_spills(report)
        assert report["shared_bytes"] <= GENERATIONS[generation].shared_bytes, report
        for kind in ("async_copies", "tensor_copies"):
            assert (report[kind] > 0) == (kind == copies), report
        assert report["contracted"] == 0, report
        found = report[PRODUCTS[generation]]
        if report["dtype"] == "torch.float32":  # exact products have no tensor cores
            assert found == 0, report
        else:
            # Each product has its own main loop: two forward, two or three by rows, one by weights.
            recomputes = report["case"].endswith("recomputed")
            loops = {"fwd": 2, "bwd_rows": 3 if recomputes else 2, "bwd_weights": 1}
            assert found >= loops[report["kernel"]], report
