"""What the CPU backend of every operation asks of the machine."""

from __future__ import annotations

import functools
import platform

import torch


def operand_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the CPU backend multiplies matrices of ``dtype``.

    float32 for a 16-bit dtype that this CPU has no instructions for: there PyTorch's products of
    16-bit matrices take many times as long as those of float32. Every other dtype is kept. The
    backend then widens its operands once and rounds its results once.
    """
    return torch.float32 if dtype.itemsize == 2 and not _multiplies(dtype) else dtype


def _multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN, PyTorch's only fast way, multiplies 16-bit matrices of ``dtype`` here."""
    return bool(torch.backends.mkldnn.enabled) and _has_instructions(dtype)


@functools.cache
def _has_instructions(dtype: torch.dtype) -> bool:
    # Private, but what PyTorch's own products and torch.compile ask.
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, name[dtype]):
        return False
    if not getattr(torch.ops.mkldnn, name[dtype])():
        return False
    # On AVX-512 without its BF16 extension oneDNN takes bfloat16, but emulates the instructions.
    emulated = torch.cpu._is_avx512_supported() and not torch.cpu._is_avx512_bf16_supported()
    return not (dtype == torch.bfloat16 and is_x86() and emulated)


def is_x86() -> bool:
    """Whether this is an x86 CPU of 64 bits."""
    return platform.machine().lower() in ("x86_64", "amd64")
