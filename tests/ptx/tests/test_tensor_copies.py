"""Copies of tiles by tensor descriptors: exact products, planted faults, rules of order."""

import pytest
import torch

from ptx.driver import Emulated, emulated
from ptx.machine import Interleaving
from ptx.tests import tensor_kernels

TILE = (128, 128, 64)
INTERLEAVINGS = (
    *(Interleaving(seed=seed, quantum=5 + 100 * (seed % 2), limit=10_000_000) for seed in range(3)),
    Interleaving(seed=3, late=False, limit=10_000_000),
)


def operands(*shapes: tuple[int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    """Small integers: their products are exact in every type."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(-8, 9, shape, generator=generator).to(dtype) for shape in shapes]


def multiply(
    size=(200, 136, 200),
    tile=TILE,
    dtype=torch.float16,
    across=False,
    specialize=False,
    change=str,
) -> Emulated:
    """Run the product with a change to its PTX; without one it must be exact."""
    rows, columns, depth = size
    a, b = operands((rows, depth), (depth, columns) if across else (columns, depth), dtype=dtype)
    grid = (-(-rows // tile[0]) * -(-columns // tile[1]),)
    with emulated("sm_90", INTERLEAVINGS) as gpu:
        gpu.change = change
        c = torch.empty(rows, columns)
        tensor_kernels.product[grid](
            *(a, b, c, rows, columns, depth, *tile, across, specialize), num_warps=4, num_stages=3
        )
    if change is str:
        assert (c.double() == a.double() @ (b if across else b.t()).double()).all()
    return gpu


def assert_clean(gpu: Emulated) -> None:
    assert not gpu.reports, gpu.reports
    for launch in gpu.launches:
        assert launch.machine.executed(launch.results[0])["cp.async.bulk.tensor"] > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("depth", [16, 32, 64, 128])
def test_product(dtype, depth):
    """Boxes with rows of 32, 64 and 128 bytes, each with its swizzle, some beyond the tensors."""
    assert_clean(multiply((200, 136, 200), (64, 64, depth), dtype))


@pytest.mark.parametrize("tile", [TILE, (64, 32, 32), (64, 16, 64)], ids=str)
def test_operand_across(tile):
    assert_clean(multiply(tile=tile, across=True))


@pytest.mark.parametrize("expert", [0, 1])
def test_selected_descriptor(expert):
    rows, columns, depth = 200, 136, 200
    a, *b = operands((rows, depth), *[(columns, depth)] * 2, dtype=torch.float16)
    with emulated("sm_90", INTERLEAVINGS) as gpu:
        c = torch.empty(rows, columns)
        tensor_kernels.selected_product[4,](
            *(a, *b, c, rows, columns, depth, expert, *TILE), num_warps=4, num_stages=3
        )
    assert (c.double() == a.double() @ b[expert].double().t()).all()
    assert_clean(gpu)


@pytest.mark.parametrize("depth", [64, 200, 520])
def test_specialized_warps(depth):
    gpu = multiply((200, 136, depth), specialize=True)
    assert_clean(gpu)
    assert gpu.launches[0].machine.kernel.threads == 384
