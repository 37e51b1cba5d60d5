"""The float32 matrix product of the CPU backend, for every instruction set of this CPU."""

import pytest
import torch

from accuracy import assert_as_accurate_as
from settings import threads
from vlmo.kernels._backends import cpu as cpu_target

pytestmark = pytest.mark.usefixtures("instructions")

# Rows, columns and depth, around the sizes of tiles (4 to 12), panels (12 to 48) and parts (256).
SIZES = [(1, 1, 1), (7, 50, 3), (8, 48, 256), (9, 49, 257), (100, 47, 385), (193, 400, 600)]


def laid_out(rows: int, columns: int, how: str) -> torch.Tensor:
    """A random matrix: contiguous, transposed, a part of a wider one, or with strides of 2."""
    if how == "transposed":
        return torch.randn(columns, rows).T
    if how == "part":
        return torch.randn(rows, columns + 5)[:, 2 : 2 + columns]
    if how == "strided":
        return torch.randn(2 * rows, 2 * columns)[::2, ::2]
    return torch.randn(rows, columns)


@pytest.mark.parametrize("how", ["contiguous", "transposed", "part", "strided"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_product(size, how):
    torch.manual_seed(0)
    rows, columns, depth = size
    bias = torch.randn(columns)
    for of_b in ("contiguous", how):
        a, b = laid_out(rows, depth, how), laid_out(depth, columns, of_b)
        found, biased = cpu_target.matmul(a, b), cpu_target.matmul(a, b, bias)
        exact = a.double() @ b.double()
        # The rounding of the largest partial sum, twice; a missing product is far larger.
        allowed = 2 * torch.finfo(torch.float32).eps * (a.abs() @ b.abs() + bias.abs())
        assert ((found - exact).abs() <= allowed).all()
        assert ((biased - (exact + bias)).abs() <= allowed).all()


@pytest.mark.parametrize("depth", [768, 3072])
def test_long_sums_are_as_accurate_as_those_of_pytorch(depth):
    torch.manual_seed(0)
    a, b = torch.randn(100, depth), torch.randn(depth, 200)
    exact = a.double() @ b.double()
    assert_as_accurate_as("product", cpu_target.matmul(a, b), exact, a @ b)


def test_the_output_is_written_in_place_and_nothing_beside_it():
    whole = torch.full((9, 60), 7.0)
    out = whole[1:8, 3:53]
    a, b = torch.randn(7, 20), torch.randn(20, 50)
    assert cpu_target.matmul(a, b, None, out) is out
    assert torch.equal(out, cpu_target.matmul(a, b))
    out.fill_(7)
    assert torch.equal(whole, torch.full_like(whole, 7))


@pytest.mark.parametrize("size", [(0, 3, 4), (5, 0, 3), (5, 6, 0)], ids=str)
def test_empty(size):
    rows, columns, depth = size
    a, b, bias = torch.randn(rows, depth), torch.randn(depth, columns), torch.randn(columns)
    assert torch.equal(cpu_target.matmul(a, b, bias), bias.expand(rows, columns))


def test_no_bit_depends_on_the_number_of_threads():
    a, b = torch.randn(193, 600), torch.randn(600, 500)
    found = []
    for count in (1, 2, 5):
        with threads(count):
            found += [cpu_target.matmul(a, b), cpu_target.matmul(a.T.contiguous().T, b)]
    assert all(torch.equal(one, found[0]) for one in found)


def test_not_a_number_stays_in_its_row_and_column():
    a, b = torch.randn(50, 300), torch.randn(300, 100)
    a[3, 7], b[5, 70] = float("nan"), float("inf")
    found = cpu_target.matmul(a, b)
    assert torch.equal(found.isfinite(), (a @ b).isfinite())
