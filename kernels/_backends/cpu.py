"""Hardware checks that the CPU backends of all operations share."""

from __future__ import annotations

import functools
import platform

import torch

from vlmo import _C


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
