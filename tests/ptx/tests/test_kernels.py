"""The parity cases as PTX of three GPU generations: accurate, in any program order, without races.

Each launch runs in several interleavings of few CTAs, which must leave bitwise identical memory.
"""

import itertools
from dataclasses import replace
from unittest import mock

import pytest
import torch

import attention_cases
import moe_ffn_cases
from ptx.driver import TARGETS, Emulated, emulated
from ptx.machine import Interleaving
from vlmo.kernels.attention.triton import tiles as attention_tiles
from vlmo.kernels.moe_ffn.triton import tiles as moe_ffn_tiles

PLACE = torch.device("cpu"), "triton"
COMPOSED = torch.device("cpu"), "composed"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOE_FFN = [case for case in moe_ffn_cases.CASES if case.batch]
ATTENTION = [
    *(case for case in attention_cases.CASES if case.batch and (case.length or case.lengths)),
    attention_cases.ONES,
]


def each(cases) -> list:
    """Every case on every target in every dtype; make test runs one target and dtype of each."""
    combinations = [*itertools.product(TARGETS, DTYPES)]
    return [
        pytest.param(
            *(case, dtype, target),
            marks=[pytest.mark.slow] if k != number % len(combinations) else [],
            id=f"{target}-{dtype}-{case}",
        )
        for number, case in enumerate(cases)
        for k, (target, dtype) in enumerate(combinations)
    ]


@pytest.mark.parametrize(("case", "dtype", "target"), each(MOE_FFN))
def test_moe_ffn(case, dtype, target):
    with emulated(target) as gpu:
        moe_ffn_cases.assert_parity(case, dtype, PLACE)
    assert len(gpu.launches) == 3
    assert not gpu.reports, gpu.reports


@pytest.mark.parametrize(("case", "dtype", "target"), each(MOE_FFN))
def test_moe_ffn_composed(case, dtype, target):
    """The passes; PyTorch multiplies. x is read in place if it has no norm, but streams."""
    with emulated(target) as gpu:
        moe_ffn_cases.assert_parity(case, dtype, COMPOSED)
    # With biases or norm parameters the sums; without a norm, x is copied in the backward, too.
    parameters = case.bias or case.layer_scale or case.norm != "none" or case.sub_norm
    # A sub-norm has two passes, and the backward needs the activations before it.
    others = 5 if case.linear else 6 + (case.norm == "none") + 3 * case.sub_norm
    in_place = 3 * (case.norm == "none" and case.streams)
    assert len(gpu.launches) == others + parameters - in_place
    assert not gpu.reports, gpu.reports


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_moe_ffn_composed_of_many_tiles(activation, target):
    """Several row tiles, steps, blocks of columns and lines of sums, on one multiprocessor."""
    case = moe_ffn_cases.Case(
        *(((0, 3), (1, 8)), "packed", 32, 136, (264, 280), activation), token_scale=False
    )
    with emulated(target, multiprocessors=1) as gpu:
        moe_ffn_cases.assert_parity(case, torch.float16, COMPOSED)
    assert min(launch.grid for launch in gpu.launches) >= 8
    assert not gpu.reports, gpu.reports


@pytest.mark.parametrize(("case", "dtype", "target"), each(ATTENTION))
def test_attention(case, dtype, target):
    with emulated(target) as gpu:
        attention_cases.assert_parity(case, dtype, PLACE)
    kernels = [launch.kernel for launch in gpu.launches]
    expanded = kernels.count("attention_expand_kernel")
    assert expanded in ((0,) if case.index is None or case.positions is True else (0, 2))
    assert len(kernels) - expanded == (3 if case.index is None else 4)
    assert not gpu.reports, gpu.reports


# Many small tiles: several bands, and weight tiles that are split over several programs.
SMALL = {
    "sm_80": moe_ffn_tiles.Tile(16, 32, 16, 4, 2),
    "sm_90": moe_ffn_tiles.Tile(64, 32, 16, 4, 3),  # wgmma requires 64 rows
    "sm_120": moe_ffn_tiles.Tile(16, 32, 16, 4, 3),
}
MANY_TILES = [
    moe_ffn_cases.Case(batch=8),
    moe_ffn_cases.Case(batch=8, form="ids", hidden=(48, 48)),
    moe_ffn_cases.Case(
        *(((0, 7), (1, 13)), "ids", 8, 24, (48, 33), "swiglu", "rms"), norm_bias=False
    ),
    moe_ffn_cases.Case(batch=8, linear=56),
]


def acquires(gpu: Emulated, kernel: str) -> int:
    """How often programs of a kernel have read a counter with acquire order."""
    launches = [launch for launch in gpu.launches if launch.kernel == kernel]
    return sum(
        launch.machine.executed(result)["ld.acquire"]
        for launch in launches
        for result in launch.results
    )


@pytest.mark.parametrize("case", MANY_TILES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_moe_ffn_of_many_tiles(target, case):
    tile = SMALL[target]
    row = moe_ffn_tiles.Tiles(tile, tile, tile, tile)
    # No number of tiles here is a multiple of five programs.
    with emulated(target, multiprocessors=5) as gpu, moe_ffn_tiles.use_tiles(row):
        moe_ffn_cases.assert_parity(case, torch.float16, PLACE)
    assert not gpu.reports, gpu.reports
    for launch in gpu.launches:
        assert acquires(gpu, launch.kernel) > 0, launch.kernel


# Widths that a descriptor can have; experts without rows, and of unequal widths.
WITH_DESCRIPTORS = [
    moe_ffn_cases.Case(batch=8),
    moe_ffn_cases.Case(
        *(((0, 3), (3, 5), (1, 4)), "ids", 8, 24, (16, 64, 8, 40), "geglu"), layer_scale=False
    ),
    moe_ffn_cases.Case(
        *(((1, 9),), "packed", 8, 24, (48, 40), "gelu", "none"), token_scale=False, residual=False
    ),
    moe_ffn_cases.Case(form="ids", batch=8, linear=72),
]


@pytest.mark.parametrize("options", [{}, {"recompute": True}], ids=["saved", "recomputed"])
@pytest.mark.parametrize("case", WITH_DESCRIPTORS, ids=str)
def test_moe_ffn_through_descriptors(case, options):
    if case.linear and options:
        pytest.skip("moe_linear has nothing to save")
    tile = moe_ffn_tiles.Tile(64, 64, 32, 4, 3, descriptors=True)
    row = moe_ffn_tiles.Tiles(tile, tile, tile, tile)
    with emulated("sm_90", multiprocessors=5) as gpu, moe_ffn_tiles.use_tiles(row):
        moe_ffn_cases.assert_parity(case, torch.float16, PLACE, **options)
    assert not gpu.reports, gpu.reports
    assert len(gpu.launches) == 3
    for launch in gpu.launches:
        executed = [launch.machine.executed(result) for result in launch.results]
        copies = [sum(n for name, n in e.items() if "bulk.tensor" in name) for e in executed]
        # Without a norm and scales, the weights are multiplied with x and dy by token.
        by_token = case.norm == "none" and not case.token_scale and "weights" in launch.kernel
        assert all(copies) if not by_token else not any(copies), launch.kernel


def test_a_missing_proxy_fence_is_reported():
    tile = moe_ffn_tiles.Tile(64, 64, 32, 4, 3, descriptors=True)
    row = moe_ffn_tiles.Tiles(tile, tile, tile, tile)
    with emulated("sm_90", multiprocessors=5) as gpu, moe_ffn_tiles.use_tiles(row):
        gpu.change = lambda ptx: ptx.replace("fence.proxy.async.global;", "")
        moe_ffn_cases.assert_parity(WITH_DESCRIPTORS[0], torch.float16, PLACE)
    found = {report.finding for report in gpu.reports}
    assert found == {"copy of a tile reads global memory without a proxy fence behind the write"}


@pytest.mark.parametrize("target", TARGETS)
def test_moe_ffn_in_separate_launches(target):
    """Nothing waits for another program, except for shares of the same tile of the weights."""
    tile = SMALL[target]
    row = moe_ffn_tiles.Tiles(tile, tile, tile, tile)
    with emulated(target, multiprocessors=5) as gpu, moe_ffn_tiles.use_tiles(row, separate=0):
        moe_ffn_cases.assert_parity(MANY_TILES[0], torch.float16, PLACE)
    assert not gpu.reports, gpu.reports
    assert len(gpu.launches) == 8
    assert acquires(gpu, "moe_ffn_fwd_kernel") == acquires(gpu, "moe_ffn_bwd_rows_kernel") == 0


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("backend", ["triton", "composed"])
def test_moe_ffn_that_recomputes(backend, target, activation):
    """The backward recomputes the pre-activation, which is not saved."""
    case = moe_ffn_cases.Case(activation=activation)
    routing = moe_ffn_cases.make_routing(case, "cpu")

    def run(backend: str, **options) -> dict[str, torch.Tensor]:
        return moe_ffn_cases.outputs_and_gradients(
            lambda t: moe_ffn_cases.call(case, routing, t, backend=backend, **options),
            moe_ffn_cases.make_tensors(case, "cpu", torch.float32),
        )

    with emulated(target) as gpu:
        actual = run(backend, recompute=True)
    assert not gpu.reports, gpu.reports
    for name, value in run("reference").items():
        torch.testing.assert_close(actual[name], value, rtol=2e-5, atol=2e-5)


LARGE_INDEX = attention_cases.Case(length=40, heads=1, head_dim=34, grid=(6, 6), text=13)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "case",
    [
        attention_cases.Case(batch=3, heads=2, index="random", length=37, mask="padding"),
        attention_cases.Case(heads=1, index="random", length=61, mask=None, causal=True),
        attention_cases.Case(
            heads=1, index="joint", lengths=(33, 5, 50), mask=None, positions=True
        ),
        replace(LARGE_INDEX, lengths=(33, 0, 50, 45, 40), mask=None, positions="gaps"),
        replace(LARGE_INDEX, batch=3, causal=True, positions="distinct"),
    ],
    ids=str,
)
def test_attention_of_many_tiles(case, target):
    tile = attention_tiles.Tile(16, 16, 4, 2)
    row = attention_tiles.Tiles(tile, tile, tile, tile)
    with emulated(target) as gpu, mock.patch.object(attention_tiles, "choose", return_value=row):
        attention_cases.assert_parity(case, torch.float16, PLACE)
    assert not gpu.reports, gpu.reports


def scattered(target: str, case: attention_cases.Case) -> int:
    """Numbers that the kernel of the table's gradient adds atomically."""
    tensors = attention_cases.make_tensors(case, "cpu", torch.bfloat16)
    options = attention_cases.make_options(case, "cpu")
    with emulated(target, [Interleaving(resident=4, races=False)], multiprocessors=1) as gpu:
        attention_cases.outputs_and_gradients(
            lambda t: attention_cases.call(case, t, options, backend="triton"), tensors
        )
    (launch,) = [launch for launch in gpu.launches if launch.kernel == "attention_bwd_table_kernel"]
    statements, (result,) = launch.machine.kernel.statements, launch.results
    adds = [
        n for n, s in enumerate(statements) if s.parts[0] in ("atom", "red") and "add" in s.parts
    ]
    return int(result.lane_count[adds].sum())


@pytest.mark.parametrize("target", TARGETS)
def test_more_packed_sequences_are_not_more_scatters(target):
    """Unless their positions may repeat."""
    few, many = (replace(LARGE_INDEX, lengths=(50,) * batch, mask=None) for batch in (8, 24))
    distinct, any_order = (
        [scattered(target, replace(case, positions=positions)) for case in (few, many)]
        for positions in ("distinct", "order")
    )
    assert 0 < distinct[0] == distinct[1]
    assert any_order[1] > 2 * any_order[0] >= 2 * distinct[0]
