"""The passes over rows of moe_ffn on the CPU, for every instruction set of this CPU.

Results are compared with the same formula in float64: rounded once, so within half a unit of the
result's dtype, and a few units of float32.
"""

import pytest
import torch
import torch.nn.functional as F

from settings import threads
from vlmo.kernels.moe_ffn import passes
from vlmo.kernels.moe_ffn.passes import ExpertRows

pytestmark = pytest.mark.usefixtures("instructions")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
COLUMNS = [1, 5, 16, 67]
TOKENS = 150
ROWS = {
    # 10 sequences of 15 tokens, of which tokens 4 to 12 belong to the expert; more than one item
    "run": ExpertRows(0, 90, (15, 4, 9)),
    "index": ExpertRows(0, 80, (0, 0, 0), torch.randperm(TOKENS)[:80].int()),
    "all": ExpertRows(0, TOKENS, (TOKENS, 0, TOKENS)),
}


@pytest.fixture(params=ROWS)
def rows(request) -> ExpertRows:
    return ROWS[request.param]


@pytest.fixture(params=COLUMNS, ids=lambda columns: f"{columns} columns")
def columns(request) -> int:
    torch.manual_seed(0)
    return request.param


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request) -> torch.dtype:
    return request.param


def assert_rounded(actual: torch.Tensor, exact: torch.Tensor, terms: int = 1) -> None:
    """Within half a unit of the dtype, and of the rounding of a float32 sum of ``terms``."""
    half = torch.finfo(actual.dtype).eps / 2
    allowed = half * exact.abs() + 16 * terms**0.5 * torch.finfo(torch.float32).eps
    if actual.dtype == torch.float16:
        allowed = allowed + 2**-25  # subnormal numbers
    off = (actual.double() - exact).abs()
    assert (off <= allowed).all(), f"off by {float((off - allowed).max()):.1e} more than allowed"


def token_matrix(columns: int, dtype: torch.dtype) -> torch.Tensor:
    """``[TOKENS, columns]``, whose rows are not adjacent."""
    return torch.randn(TOKENS, columns + 3).to(dtype)[:, 1 : 1 + columns]


def test_rows_of(rows):
    t = torch.arange(TOKENS)
    chosen = rows.of(t)
    assert len(chosen) == rows.count
    if rows.index is None:
        period, start, length = rows.run
        assert chosen.tolist() == [i for i in range(TOKENS) if start <= i % period < start + length]


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm_and_its_gradient(rows, columns, dtype, kind):
    x = token_matrix(columns, dtype)
    weight, bias = torch.randn(columns), torch.randn(columns) if kind == "layer" else None
    out = torch.empty(rows.count, columns, dtype=dtype)
    statistics = passes.norm(rows, x, weight, bias, kind, 1e-3, out)

    given = rows.of(x).double().requires_grad_()
    leaves = [weight.double().requires_grad_()]
    if bias is not None:
        leaves.append(bias.double().requires_grad_())
        exact = F.layer_norm(given, (columns,), leaves[0], leaves[1], eps=1e-3)
    else:
        exact = F.rms_norm(given, (columns,), leaves[0], eps=1e-3)
    assert_rounded(out, exact.detach(), terms=4)

    d = torch.randn(rows.count, columns).to(dtype)
    dx = torch.full_like(x, 7)
    sums = passes.norm_backward(rows, d, x, statistics, weight, dx)
    expected = torch.autograd.grad(exact, [given, *leaves], d.double())
    assert_rounded(rows.of(dx), expected[0], terms=100)
    for actual, gradient in zip(sums, expected[1:], strict=False):
        assert_rounded(actual, gradient, terms=1000)
    untouched = torch.ones(TOKENS, dtype=torch.bool)
    untouched[rows.of(torch.arange(TOKENS))] = False
    assert (dx[untouched] == 7).all()
    again = passes.norm_backward(rows, d, x, statistics, weight, None)
    assert all(torch.equal(a, b) for a, b in zip(again, sums, strict=True))


@pytest.mark.parametrize("given", ["all", "scale", "token_scale", "residual", "none"])
def test_branch_and_its_gradient(rows, columns, dtype, given):
    scale = torch.randn(columns) if given in ("all", "scale") else None
    token_scale = torch.randn(TOKENS) if given in ("all", "token_scale") else None
    residual = token_matrix(columns, torch.float32) if given in ("all", "residual") else None
    branch = torch.randn(rows.count, columns).to(dtype)
    y = torch.full((TOKENS, columns), 7, dtype=dtype)
    passes.add_branch(rows, y, branch, residual, scale, token_scale)

    factor = torch.ones(rows.count, columns, dtype=torch.float64)
    if token_scale is not None:
        factor = factor * rows.of(token_scale).double()[:, None]
    unscaled = factor
    if scale is not None:
        factor = factor * scale.double()
    exact = branch.double() * factor
    if residual is not None:
        exact = exact + rows.of(residual).double()
    assert_rounded(rows.of(y), exact)
    untouched = torch.ones(TOKENS, dtype=torch.bool)
    untouched[rows.of(torch.arange(TOKENS))] = False
    assert (y[untouched] == 7).all()

    dy, d = token_matrix(columns, dtype), torch.empty(rows.count, columns, dtype=dtype)
    total, dscale = passes.branch_backward(rows, dy, branch, scale, token_scale, d)
    exact = rows.of(dy).double() * factor
    assert_rounded(d, exact)
    assert_rounded(total, exact.sum(0), terms=1000)
    assert_rounded(dscale, (rows.of(dy).double() * unscaled * branch.double()).sum(0), terms=1000)
    total, dscale = passes.branch_backward(rows, dy, None, scale, token_scale, d)
    assert not dscale.any()


def test_column_sums(columns, dtype):
    d = torch.randn(200, columns).to(dtype)
    assert_rounded(passes.column_sums(d), d.double().sum(0), terms=1000)


def test_no_bit_depends_on_the_number_of_threads():
    d = torch.randn(1000, 70)
    found = []
    for count in (1, 2, 5):
        with threads(count):
            found.append(passes.column_sums(d))
    assert all(torch.equal(one, found[0]) for one in found)


def test_no_rows():
    none = ExpertRows(0, 0, (15, 0, 0))
    x, d = torch.randn(15, 4), torch.empty(0, 4)
    mean, deviation = passes.norm(none, x, torch.ones(4), None, "layer", 1e-6, d)
    assert mean is not None and not len(mean) and not len(deviation)
    sums = passes.norm_backward(none, d, x, (mean, deviation), torch.ones(4), torch.empty(15, 4))
    assert not any(t.any() for t in sums)


def test_special_values_survive_conversion(dtype):
    """Infinities, NaN, signed zeros, subnormal numbers, and values that overflow the dtype."""
    values = torch.tensor(
        [0.0, -0.0, 1.0, float("inf"), -float("inf"), float("nan"), 65504, 65519.99, 65520, 1e5]
        + [3.3e38, -3.4e38, 6e-8, 2.98e-8, 2.99e-8, 6.1e-5, 6.09e-5, -5.96e-8, 1.0009765625, 1.0014]
    )
    one = ExpertRows(0, 1, (1, 0, 1))
    y = torch.empty(1, len(values), dtype=dtype)
    passes.add_branch(one, y, values[None], None, None, None)
    torch.testing.assert_close(y[0], values.to(dtype), rtol=0, atol=0, equal_nan=True)
    back = torch.empty(1, len(values))
    passes.add_branch(one, back, values[None].to(dtype), None, None, None)
    expected = values.to(dtype).float()
    torch.testing.assert_close(back[0], expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(back[0].signbit()[:2], expected.signbit()[:2])
