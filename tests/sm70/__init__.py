"""Develop sm_70 (V100) kernels without a GPU: compile, disassemble, emulate, estimate timing."""

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
    "CompileError": "compile",
    "Compiled": "compile",
    "compile_cuda": "compile",
    "disassemble": "disasm",
    "Kernel": "emulator",
    "KernelFault": "emulator",
    "LaunchResult": "emulator",
    "fuzz_interleavings": "emulator",
    "estimate": "timing",
    "compare": "timing",
    "analyse_loops": "static_model",
}


def __getattr__(name):
    """Import submodules on first use, so that `python -m sm70.compile` needs only NVRTC."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
