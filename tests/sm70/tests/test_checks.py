"""Injected faults must be found, and correct variants must pass."""

import pathlib
import struct

import numpy as np
import pytest

from sm70 import Kernel, KernelFault, compile_cuda

GEMM = pathlib.Path(__file__).with_name("gemm.cu")


def fault(kernel, *launch, **options):
    with pytest.raises(KernelFault) as caught:
        kernel.launch(*launch, **options)
    return caught.value.result


def test_race(build):
    kernel, out = build("kernels.cu", "race"), np.zeros(64, np.float32)
    result = fault(kernel, 1, 64, [out, 0])
    assert result.num_races and not result.num_errors
    found = {p.kind: p.instruction for p in result.problems}
    assert (
        "LDS" in found["shared race: read after write"]
        and "STS" in found["shared race: write after read"]
    )
    kernel.launch(1, 64, [out, 1])
    assert (out == np.arange(64)[::-1]).all()


def test_race_in_gemm(rng):
    """Without the barrier between two K steps a tile is overwritten while other warps read it."""
    kernel = Kernel(compile_cuda(GEMM, defines=["NO_SYNC"]))
    a, w, c = (
        np.zeros((64, 256), np.float16),
        np.zeros((64, 256), np.float16),
        np.zeros((64, 64), np.float16),
    )
    assert fault(kernel, 1, 128, [a, w, c, 64, 64, 256]).num_races


def test_out_of_bounds(build):
    out = np.zeros(64, np.float32)
    result = fault(build("kernels.cu", "out_of_bounds"), 1, 32, [out, 60])
    problem = result.problems[0]
    assert result.num_errors == 28 and problem.kind == "global store/atomic out of bounds"
    assert problem.where == "argument 0 byte offset 256 (size 256)" and "STG" in problem.instruction
    assert problem.lane == 4 and out[60:].all()


def test_buffers_are_accessed_in_place(build):
    """Pointers inside a struct: their arrays are passed as `buffers` and bounds-checked."""
    kernel = build("kernels.cu", "scale")
    x, y = np.arange(40, dtype=np.float32), np.full(48, -1, np.float32)

    def argument(n):
        return struct.pack("<QQixxxx", x.ctypes.data, y.ctypes.data, n)

    kernel.launch(1, 32, [argument(40)], buffers=[x, y[:40]])
    assert (y[:40] == 2 * x).all() and (y[40:] == -1).all()

    result = fault(kernel, 1, 32, [argument(40)], buffers=[x, y[:33]])
    problem = result.problems[0]
    assert result.num_errors == 7 and problem.kind == "global store/atomic out of bounds"
    # The struct is argument 0, x counts as 1 and y as 2.
    assert problem.where == "argument 2 byte offset 132 (size 132)"
    assert fault(kernel, 1, 32, [argument(40)], buffers=[y]).problems[0].kind == (
        "global load out of bounds"
    )


def test_misaligned(build):
    result = fault(
        build("kernels.cu", "misaligned"), 1, 32, [np.zeros(64, np.int8), np.zeros(32, np.int32), 2]
    )
    assert result.problems[0].kind == "global access misaligned"


def test_barrier_hang(build):
    result = fault(build("kernels.cu", "barrier_hang"), 1, 64, [np.zeros(64, np.float32)])
    assert {(p.kind, p.warp, p.other) for p in result.problems} == {
        ("deadlock at barrier", 0, 1),
        ("deadlock at barrier", 1, 2),
    }
    assert "BAR.SYNC" in result.problems[0].instruction


def test_arguments_are_checked(build):
    kernel = build("kernels.cu", "race")
    with pytest.raises(TypeError, match="takes 2 arguments"):
        kernel.launch(1, 64, [np.zeros(64, np.float32)])
    with pytest.raises(TypeError, match="argument 1 of race has 4 bytes"):
        kernel.launch(1, 64, [np.zeros(64, np.float32), np.int64(1)])
    with pytest.raises(ValueError, match="shared memory"):
        kernel.launch(1, 64, [np.zeros(64, np.float32), 1], smem=98304)
