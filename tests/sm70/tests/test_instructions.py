"""Arithmetic, warp-level and memory instructions against numpy."""

import math

import numpy as np


def test_half2(build, rng):
    a, b = (rng.standard_normal(2048).astype(np.float16) for _ in range(2))
    out, f = np.zeros(2048, np.float16), np.zeros(1024, np.float32)
    build("kernels.cu", "half2_math").launch(4, 256, [a, b, out, f, 1000])
    fma = (a.astype(np.float64) * b + (a - b).astype(np.float64)).astype(np.float16)
    expected = np.maximum(fma * np.float16(0.5), np.repeat(a[1::2], 2))[:2000]
    assert np.array_equal(out[:2000], expected) and not out[2000:].any()
    assert np.allclose(
        f[:1000], expected[::2].astype(np.float32) + 2 * expected[1::2].astype(np.float32)
    )


def test_float(build, rng):
    x = (rng.standard_normal(64) * 3).astype(np.float32)
    out = np.zeros((8, 64), np.float32)
    build("kernels.cu", "float_math").launch(1, 64, [x, out])
    v = x.astype(np.float64)
    tiny = (x * np.float32(1e-39)).astype(np.float64)
    with np.errstate(over="ignore"):
        inverse = (1 / tiny).astype(np.float32)
    expected = [
        np.exp(v),
        np.exp(v),
        np.tanh(v),
        inverse,
        1 / np.sqrt(abs(v) + 1e-3),
        np.sin(v),
        [math.erf(y) for y in v],
    ]
    for row, (got, want) in enumerate(zip(out, expected, strict=False)):
        assert np.allclose(got, np.asarray(want, np.float32), rtol=2e-6, atol=2e-6), row
    half = x.astype(np.float16)
    toward_zero = np.where(
        abs(half.astype(np.float32)) > abs(x), np.nextafter(half, np.float16(0)), half
    )
    assert np.array_equal(out[7], toward_zero.astype(np.float32))


def test_double(build, rng):
    a, b = rng.standard_normal((2, 64)) * 10.0 ** rng.integers(-30, 30, (2, 64))
    a[:8] = rng.standard_normal(8)
    out, q = np.zeros((3, 64)), np.zeros(64, np.int64)
    build("kernels.cu", "double_math").launch(1, 64, [a, b, out, q])
    assert np.array_equal(out[0], a / b)
    assert np.array_equal(out[1], np.sqrt(abs(a)))
    assert np.array_equal(out[2], np.minimum(a, b))
    assert np.array_equal(q[:8], (a[:8] * 1e12).astype(np.int64))


def test_integer(build, rng):
    n = 256
    a = rng.integers(-(2**31), 2**31 - 1, n, dtype=np.int32)
    b = rng.integers(0, 2**32 - 1, n, dtype=np.uint32)
    out = np.zeros((8, n), np.int64)
    build("kernels.cu", "integer_math").launch(1, n, [a, b, out])

    def signed(v, bits=32):
        v &= (1 << bits) - 1
        return v - (1 << bits) if v >> (bits - 1) else v

    def quotient(p, q):
        return (abs(p) // abs(q)) * (1 if (p < 0) == (q < 0) else -1)

    def byte(v, k):
        return v >> 8 * k & 255

    for i in range(n):
        x, y = int(a[i]), int(b[i])
        u = x & 0xFFFFFFFF
        both = u | y << 32
        cases = [x * 3, x ^ 0x55, int(f"{u:032b}"[::-1], 2), x - 7, min(x, 5), x >> 3, ~x, x | 1]
        expected = [
            signed(x * y, 64),
            quotient(x, y % 97 + 1),
            quotient(x << 20, y | 1),
            bin(y).count("1") + (32 - u.bit_length()) + (y & -y).bit_length(),
            ((both << (i & 31)) >> 32) & 0xFFFFFFFF,
            sum(byte(both, (0x5263 >> 4 * k) & 7) << 8 * k for k in range(4)),
            signed(7 + sum(signed(byte(u, k), 8) * signed(byte(y, k), 8) for k in range(4))),
            cases[i & 7] if i & 7 == 2 else signed(cases[i & 7]),
        ]
        assert out[:, i].tolist() == expected, i


def test_divergence_and_reconvergence(build, rng):
    a = rng.integers(1, 1000, 64, dtype=np.int32)
    x = rng.uniform(1, 2, 64).astype(np.float32)
    x[::7] *= 1e38  # reciprocal is denormal: slow path in some lanes only
    out, total = np.zeros(64, np.int32), np.zeros(64, np.float32)
    build("kernels.cu", "diverge").launch(1, 64, [a, x, out, total])

    def collatz(v):
        steps = 0
        while v != 1 and steps < 200:
            v, steps = 3 * v + 1 if v & 1 else v >> 1, steps + 1
        return steps

    steps = np.array([collatz(int(v)) for v in a]).reshape(2, 32)
    assert np.array_equal(out, (steps * 100 + (steps > 20).sum(1, keepdims=True)).ravel())
    assert np.allclose(
        total.reshape(2, 32), (1 / x.astype(np.float64)).reshape(2, 32).sum(1, keepdims=True)
    )


def test_lock_between_lanes(build):
    lock, counter = np.zeros(1, np.int32), np.zeros(1, np.int32)
    build("kernels.cu", "lane_lock").launch(2, 64, [lock, counter], resident=2)
    assert counter[0] == 128


def test_barrier_forms(build):
    out = np.zeros(192, np.int32)
    build("kernels.cu", "barriers").launch(1, 128, [out])
    assert (out[:128] == len(range(0, 128, 3)) * 4 + 0 * 2 + 1).all()
    assert np.array_equal(out[128:], np.arange(64)[::-1])


def test_generic_addresses(build):
    g = np.arange(16, dtype=np.float32)
    out = np.zeros(33, np.float32)
    build("kernels.cu", "generic").launch(1, 32, [out, g])
    t = np.arange(32)
    assert np.array_equal(out[:32], t.sum() + g[:8].sum() + t * g[:15].sum() + 16)
    assert out[32] == 16


def test_atomics(build, rng):
    a = rng.integers(0, 1000, 1000, dtype=np.int32)
    bins, fsum, u64 = np.zeros(18, np.int32), np.zeros(1, np.float32), np.zeros(4, np.uint64)
    dsum, hsum = np.zeros(1), np.zeros(2, np.float16)
    bins[17] = 10**6
    build("kernels.cu", "atomics").launch(
        3, 128, [a, bins, fsum, u64, dsum, hsum, 1000], resident=3
    )
    assert np.array_equal(bins[:16], np.bincount(a & 15, minlength=16))
    assert bins[16] == a.max() and bins[17] == a.min()
    assert fsum[0] == 500 and dsum[0] == 250 and hsum.tolist() == [3, 6]
    assert u64.tolist() == [a.sum(), 1000 << 33, int(a.max()) << 20, 77]


def test_constants_variables_and_argument_types(build):
    kernel, out = build("kernels.cu", "data"), np.zeros(32, np.float32)
    t = np.arange(32)
    for second in (20, 5):  # the first launch changes a __device__ variable
        kernel.launch(1, 32, [out, 3 << 32, 0.5, 0.25])
        assert np.array_equal(out, ((t * 3) & 7) + 1 + np.array([10, second, 30, 40])[t & 3] + 3.75)
    assert kernel.variable("variable", np.float32).tolist() == [10, 5, 30, 40]
