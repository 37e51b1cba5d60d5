"""Kernels whose CTAs wait for each other, under fixed and random interleavings."""

import numpy as np
import pytest

from sm70 import KernelFault, fuzz_interleavings

X = np.arange(8 * 64, dtype=np.float32)
EXPECTED = (2 * X).reshape(2, 4, 64).sum(1).ravel()


def two_phase_args():
    return [
        X,
        np.zeros(8 * 64, np.float32),
        np.zeros(2 * 64, np.float32),
        np.zeros(2, np.int32),
        8,
        4,
    ]


def correct(args):
    return np.array_equal(args[2], EXPECTED)


def test_spin_wait(build):
    args = two_phase_args()
    build("kernels.cu", "two_phase").launch(10, 64, args, resident=10)
    assert correct(args)


def test_too_few_resident_ctas_hang(build):
    with pytest.raises(KernelFault, match="no progress") as caught:
        build("kernels.cu", "two_phase").launch(
            10, 64, two_phase_args(), resident=2, hang_instructions=200_000
        )
    assert {p.cta for p in caught.value.result.problems} == {0, 1}


def test_random_interleavings(build):
    fuzz_interleavings(build("kernels.cu", "two_phase"), 10, 64, two_phase_args, correct, seeds=20)


def test_missing_fence_is_exposed(build):
    with pytest.raises(AssertionError, match="seed"):
        fuzz_interleavings(
            build("kernels.cu", "two_phase_no_fence"), 10, 64, two_phase_args, correct, seeds=20
        )


def test_acquire_release_chain(build):
    n = 12
    expected = np.cumsum(np.arange(1, n + 1))
    fuzz_interleavings(
        build("kernels.cu", "chain"),
        n,
        32,
        lambda: [np.zeros(n, np.int32), np.zeros(n, np.int32)],
        lambda args: np.array_equal(args[1], expected),
        seeds=10,
    )


def test_seed_is_reproducible(build):
    kernel = build("kernels.cu", "two_phase")
    runs = [
        kernel.launch(10, 64, two_phase_args(), seed=s, resident=10).warp_instructions
        for s in (3, 3, 4)
    ]
    assert runs[0] == runs[1] != runs[2]
