"""Develop sm_70 (V100) kernels without a GPU: compile, disassemble, emulate, estimate timing."""

import importlib
import sys
from pathlib import Path

__all__ = [
    "CompileError",
    "Compiled",
    "Kernel",
    "KernelFault",
    "LaunchResult",
    "analyse_loops",
    "compare",
    "compile_cuda",
    "disassemble",
    "estimate",
    "fuzz_interleavings",
]

_HOME = {
    "CompileError": "nvrtc",
    "Compiled": "nvrtc",
    "compile_cuda": "nvrtc",
    "disassemble": "sm70.disasm",
    "Kernel": "sm70.emulator",
    "KernelFault": "sm70.emulator",
    "LaunchResult": "sm70.emulator",
    "fuzz_interleavings": "sm70.emulator",
    "estimate": "sm70.timing",
    "compare": "sm70.timing",
    "analyse_loops": "sm70.static_model",
}

# Kernels are compiled as the build compiles them, by csrc/nvrtc.py.
sys.path.append(str(Path(__file__).resolve().parents[2] / "csrc"))


def __getattr__(name):
    """Import modules on first use, so that `python -m sm70.disasm` runs its module once only."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
