"""Matrix products: mma and ldmatrix in handwritten PTX, wgmma with Triton's operand layouts."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from ptx.driver import emulated
from ptx.tests.programs import findings, program, run


def test_matrices_to_shared_memory_and_back():
    """stmatrix and ldmatrix.trans: four 8 x 8 matrices of 16-bit numbers come back transposed."""
    body = """
    mov.u32 %r0, global_smem;
    mad.lo.u32 %r1, %r99, 16, %r0;
    mad.wide.u32 %d1, %r99, 16, %d100;
    ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [ %d1 + 0 ];
    stmatrix.sync.aligned.m8n8.x4.shared.b16 [ %r1 + 0 ], {%r10, %r11, %r12, %r13};
    bar.warp.sync -1;
    ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%r20, %r21, %r22, %r23}, [ %r1 + 0 ];
    mad.wide.u32 %d1, %r99, 16, %d101;
    st.global.v4.b32 [ %d1 + 0 ], {%r20, %r21, %r22, %r23};
    """
    fragments = np.random.default_rng(0).integers(0, 2**16, (32, 4, 2)).astype(np.uint16)
    out = np.zeros_like(fragments)
    assert run(program(body, parameters=2), fragments, out).reports == []
    # Lane l has two neighbouring elements of row l / 4 of each matrix.
    matrices, transposed = (
        x.reshape(8, 4, 4, 2).transpose(2, 0, 1, 3).reshape(4, 8, 8) for x in (fragments, out)
    )
    assert (transposed == matrices.transpose(0, 2, 1)).all()
    assert findings(program(body.replace("bar.warp.sync -1;", ""), parameters=2), fragments, out)


REGISTERS = range(10, 14), range(14, 16), range(20, 24)


@pytest.mark.parametrize("type_", ["f16", "bf16", "tf32"])
def test_mma(type_):
    depth = 8 if type_ == "tf32" else 16
    shape = f"m16n8k{depth}"
    a_, b_, c_ = (f"{{{', '.join(f'%r{k}' for k in r)}}}" for r in REGISTERS)
    body = f"""
    mad.wide.u32 %d1, %r99, 16, %d100;
    ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [ %d1 + 0 ];
    mad.wide.u32 %d2, %r99, 8, %d101;
    ld.global.v2.b32 {{%r14, %r15}}, [ %d2 + 0 ];
    mad.wide.u32 %d3, %r99, 16, %d102;
    ld.global.v4.b32 {{%r20, %r21, %r22, %r23}}, [ %d3 + 0 ];
    mma.sync.aligned.{shape}.row.col.f32.{type_}.{type_}.f32 {c_}, {a_}, {b_}, {c_};
    st.global.v4.b32 [ %d3 + 0 ], {{%r20, %r21, %r22, %r23}};
    """
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32}[type_]
    generator = torch.Generator().manual_seed(1)
    # Small integers are exact in every type.
    a, b = (
        torch.randint(-8, 9, s, generator=generator).to(dtype) for s in ((16, depth), (depth, 8))
    )
    c = torch.randint(-8, 9, (16, 8), generator=generator).float()
    # PTX ISA, "Matrix Fragments for mma.m16n8k16" and "mma.m16n8k8".
    lane = torch.arange(32)
    group, place = lane // 4, lane % 4
    if type_ == "tf32":
        left = [a[group + 8 * (k % 2), place + 4 * (k // 2)] for k in range(4)]
        right = [b[place + 4 * k, group] for k in range(2)]
    else:
        left = [
            torch.stack([a[group + 8 * (k % 2), 2 * place + 8 * (k // 2) + i] for i in range(2)], 1)
            for k in range(4)
        ]
        right = [
            torch.stack([b[2 * place + 8 * k + i, group] for i in range(2)], 1) for k in range(2)
        ]
    rows = [group + 8 * (k // 2) for k in range(4)]
    columns = [2 * place + k % 2 for k in range(4)]
    sums = torch.stack([c[r, n] for r, n in zip(rows, columns, strict=True)], 1).contiguous()
    arrays = [torch.stack(x, 1).contiguous() for x in (left, right)]
    as_numpy = [
        x.view(torch.int16 if x.element_size() == 2 else torch.int32).numpy() for x in arrays
    ]
    result = sums.numpy()
    assert run(program(body, parameters=3), *as_numpy, result).reports == []
    expected = a.double() @ b.double() + c.double()
    assert all((result[:, k] == expected[rows[k], columns[k]].numpy()).all() for k in range(4))


@triton.jit
def product(
    A,
    B,
    C,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    A_ACROSS: tl.constexpr,
    B_ACROSS: tl.constexpr,
    FROM_REGISTERS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(A + (k[None, :] * M + m[:, None] if A_ACROSS else m[:, None] * K + k[None, :]))
    b = tl.load(B + (k[:, None] * N + n[None, :] if B_ACROSS else n[None, :] * K + k[:, None]))
    if FROM_REGISTERS:
        a = a * 2
    acc = tl.dot(a, b, input_precision=PRECISION)
    tl.store(C + m[:, None] * N + n[None, :], acc)


@pytest.mark.parametrize("across", [(0, 0), (1, 0), (0, 1), (1, 1)], ids=str)
@pytest.mark.parametrize(
    "size", [(64, 16, 16), (64, 64, 64), (128, 32, 32), (64, 256, 128)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_wgmma(dtype, size, across):
    multiply(dtype, size, across, from_registers=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_wgmma_with_an_operand_in_registers(dtype):
    multiply(dtype, (64, 64, 64), (0, 1), from_registers=True)


@pytest.mark.parametrize("size", [(64, 16, 16), (64, 64, 32)], ids=str)
def test_wgmma_in_tf32(size):
    multiply(torch.float32, size, (0, 0), from_registers=False)


def multiply(dtype, size, across, from_registers: bool) -> None:
    rows, columns, depth = size
    generator = torch.Generator().manual_seed(2)
    a = torch.randint(-8, 9, (depth, rows) if across[0] else (rows, depth), generator=generator)
    b = torch.randint(
        -8, 9, (depth, columns) if across[1] else (columns, depth), generator=generator
    )
    c = torch.zeros(rows, columns)
    with emulated("sm_90") as gpu:
        product[(1,)](a.to(dtype), b.to(dtype), c, *size, *across, from_registers, "tf32")
    (launch,) = gpu.launches
    assert launch.machine.executed(launch.results[0])["wgmma"] > 0
    assert not gpu.reports, gpu.reports
    left, right = a.t() if across[0] else a, b if across[1] else b.t()
    assert (c.double() == (1 + from_registers) * (left.double() @ right.double())).all()
