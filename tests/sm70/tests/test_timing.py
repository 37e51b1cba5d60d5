"""Sanity checks of the timing and static models; their absolute numbers are not calibrated."""

import pathlib

import numpy as np
import pytest

from sm70 import Kernel, analyse_loops, compare, compile_cuda, estimate
from sm70.timing import DEFAULTS, UNITS, assumptions, occupancy

GEMM = pathlib.Path(__file__).with_name("gemm.cu")

M, N, K = 64, 64, 512


@pytest.fixture(scope="module")
def estimates():
    """The GEMM without and with swizzled shared memory."""
    out = {}
    for name, defines in (("plain", []), ("swizzled", ["SWIZZLE"])):
        kernel = Kernel(compile_cuda(GEMM, defines=defines), "gemm", strict=True)
        c = np.zeros((M, N), np.float16)
        args = [np.ones((M, K), np.float16), np.ones((N, K), np.float16), c, M, N, K]
        out[name] = estimate(kernel, (1, 1), 128, args)
        assert (c == K).all()
    return out


def test_utilisation(estimates):
    for r in estimates.values():
        ideal = M * N * K / 512  # 512 products per SM and cycle
        assert r["cycles"] > ideal
        assert r["tensor_utilisation"] == pytest.approx(ideal / r["cycles"])
        assert 0 < r["issue_utilisation"] < 1 and 0 < r["lsu_utilisation"] <= 1
        assert r["hot_spots"] and sum(r["stalls"].values()) > 0


def test_bank_conflicts(estimates):
    assert estimates["swizzled"]["bank_conflict_factor"] == 1.0
    assert estimates["plain"]["bank_conflict_factor"] > 1.5
    assert estimates["swizzled"]["shared_wavefronts"] < estimates["plain"]["shared_wavefronts"]
    assert estimates["swizzled"]["cycles"] < estimates["plain"]["cycles"]


def test_compare(estimates):
    table = compare(estimates["plain"], estimates["swizzled"], ("plain", "swizzled"))
    assert "bank_conflict_factor" in table and "swizzled" in table.splitlines()[0]


def test_occupancy():
    assert occupancy(32, 1024, 0) == 2
    assert occupancy(128, 256, 0) == 2
    assert occupancy(32, 128, 48 * 1024) == 2
    assert occupancy(255, 256, 0) == 1


def test_static_model():
    loops = analyse_loops(compile_cuda(GEMM, defines=["SWIZZLE"]), threads=128)
    loop = max(loops, key=lambda x: x.mix.get("TENSOR", 0))
    # 32x32x32 products of a warp per K step: 32 mma.m8n8k4 of 4 HMMA, two cycles each.
    assert loop.mix["TENSOR"] % 128 == 0
    assert loop.bounds["tensor pipe"] == 2 * loop.mix["TENSOR"] * loop.warps_per_scheduler
    assert 0.2 < loop.tensor_bound <= 1 and loop.stall_sum >= loop.instructions


def test_assumptions_are_listed_with_their_meaning():
    rows = {(name, meaning): value for name, value, meaning in assumptions(dram_fraction=0.5)}
    assert {name for name, _ in rows} >= set(DEFAULTS)
    assert all(meaning for _, meaning in rows)
    assert rows["dram_fraction", "part of the L2 traffic that goes on to DRAM"] == "0.5"
    assert rows["TENSOR pipe", "HMMA that adds up in F32"] == "busy 2, latency 10 cycles"
    named = " ".join(meaning for _, meaning in rows).replace(",", "").split()
    assert set(UNITS) <= set(named)


def test_parameters_reach_the_model():
    kernel = Kernel(compile_cuda(GEMM), "gemm", strict=True)
    args = [np.ones((64, 64), np.float16)] * 2 + [np.zeros((64, 64), np.float16), 64, 64, 64]
    cycles = [
        estimate(kernel, (1, 1), 128, args, **changes)["cycles"]
        for changes in ({}, {"operands_of_memory": 200}, {"shared_latency": 190})
    ]
    assert cycles[1] > cycles[0] and cycles[2] > cycles[0]
