"""Hardware checks that the CPU backends of all operations share."""

from __future__ import annotations

import functools
import platform

import torch
from torch import Tensor

from vlmo import _C

# The dtypes that the C++ kernels read and write, and their numbers there (csrc/cpu/elements.h).
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why the CPU backend of an operation cannot run, or None."""
    if device.type != "cpu":
        return f"{device.type} tensors: it is made for the CPU."
    if dtype not in TYPES:
        return f"{dtype}: it computes in float32; the backend 'reference' computes in float64."
    return None


def operand_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the CPU backend multiplies matrices of ``dtype``.

    It is float32 for a 16-bit dtype that this CPU has no instructions for, because PyTorch's 16-bit
    products then take many times as long as float32 products. Every other dtype is kept. The
    backend converts its operands to this dtype once and rounds its results once.
    """
    return torch.float32 if dtype.itemsize == 2 and not _multiplies(dtype) else dtype


def _multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN, PyTorch's only fast 16-bit path, supports ``dtype`` on this CPU."""
    return bool(torch.backends.mkldnn.enabled) and _has_instructions(dtype)


@functools.cache
def _has_instructions(dtype: torch.dtype) -> bool:
    # These functions are private, but PyTorch's own products and torch.compile use them as well.
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, name[dtype]):
        return False
    if not getattr(torch.ops.mkldnn, name[dtype])():
        return False
    # On AVX-512 without its BF16 extension, oneDNN accepts bfloat16 but emulates the instructions.
    emulated = torch.cpu._is_avx512_supported() and not torch.cpu._is_avx512_bf16_supported()
    return not (dtype == torch.bfloat16 and is_x86() and emulated)


def is_x86() -> bool:
    """Whether this is a 64-bit x86 CPU."""
    return platform.machine().lower() in ("x86_64", "amd64")


@functools.cache
def instructions() -> str:
    """The instruction set of the C++ kernels: the widest that this CPU has and PyTorch uses.

    PyTorch's environment variable ``ATEN_CPU_CAPABILITY`` restricts both.
    """
    allowed = torch.backends.cpu.get_cpu_capability().lower()
    names = _C.instruction_sets()
    if is_x86() and allowed == "avx2":
        names = [name for name in names if name in ("avx2", "portable")]
    elif is_x86() and allowed == "default":
        names = ["portable"]
    return names[0]


def with_adjacent_elements(t: Tensor) -> Tensor:
    """``t``, copied unless the elements of its last dimension are adjacent."""
    return t if t.stride(-1) == 1 else t.contiguous()


@functools.cache
def multiplies_itself(dtype: torch.dtype) -> bool:
    """Whether :func:`matmul` multiplies matrices of ``dtype`` faster than PyTorch on this CPU.

    PyTorch's float32 products are MKL's on x86, which are fast on Intel's CPUs only.
    """
    return dtype == torch.float32 and instructions() != "portable" and not _C.is_intel()


def matmul(a: Tensor, b: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """``a @ b + bias`` of float32 matrices, by this library's C++ kernel.

    a and b may be transposed views; ``out`` has adjacent elements in its rows.
    """
    rows, depth = a.shape
    columns = b.shape[1]
    if out is None:
        out = a.new_empty(rows, columns)
    a, a_transposed, a_row = _laid_out(a)
    b, b_transposed, b_row = _laid_out(b)
    bias = None if bias is None else bias.contiguous()
    _C.matmul(
        instructions(),
        torch.get_num_threads(),
        (a.data_ptr(), b.data_ptr(), out.data_ptr(), 0 if bias is None else bias.data_ptr()),
        (a_transposed, b_transposed),
        (a_row, b_row, out.stride(0)),
        (rows, columns, depth),
    )
    return out


def _laid_out(t: Tensor) -> tuple[Tensor, bool, int]:
    """A matrix, copied if needed; whether it lies transposed; and the stride of its rows."""
    if t.stride(1) == 1:
        return t, False, t.stride(0)
    if t.stride(0) == 1:
        return t, True, t.stride(1)
    return t.contiguous(), False, t.shape[1]
