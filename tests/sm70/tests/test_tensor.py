"""Tensor-core instructions: wmma in all layouts, and a GEMM with mma.m8n8k4."""

import numpy as np
import pytest

LAYOUTS = [
    "rr_f32_16x16",
    pytest.param("rc_f32_16x16", marks=pytest.mark.slow),
    pytest.param("cr_f32_16x16", marks=pytest.mark.slow),
    "cc_f32_16x16",
    "rc_f16_16x16",
    "cr_f16_16x16",
    "rr_f32_32x8",
    "cc_f32_8x32",
]


@pytest.mark.parametrize("name", LAYOUTS)
def test_wmma(build, rng, name):
    layout, accumulator, shape = name.split("_")
    m, n = map(int, shape.split("x"))
    a = rng.standard_normal((m, 16)).astype(np.float16)
    b = rng.standard_normal((16, n)).astype(np.float16)
    c = rng.standard_normal((m, n)).astype(np.float16 if accumulator == "f16" else np.float32)
    expected = a.astype(np.float32) @ b.astype(np.float32) + c

    def store(x, order):
        return np.ascontiguousarray(x if order == "r" else x.T)

    build("wmma.cu", name).launch(1, 32, [store(a, layout[0]), store(b, layout[1]), c])
    assert np.abs(c - expected).max() < (0.05 if accumulator == "f16" else 1e-5)


def test_gemm(build, rng):
    m, n, k = 128, 192, 256
    a = rng.standard_normal((m, k)).astype(np.float16)
    w = rng.standard_normal((n, k)).astype(np.float16)
    c = np.zeros((m, n), np.float16)
    result = build("gemm.cu", "gemm").launch((n // 64, m // 64), 128, [a, w, c, m, n, k])
    expected = a.astype(np.float32) @ w.astype(np.float32).T
    assert np.abs(c - expected).max() < 0.05
    # A warp executes m8n8k4 of four quad pairs in four steps: 4 * 8 * 8 * 4 products per 4 HMMA.
    assert result.opcodes["HMMA"] == m * n * k // (4 * 8 * 8 * 4) * 4
