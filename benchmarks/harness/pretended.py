"""A pretended NVIDIA driver, so that Triton's own launcher runs without a GPU.

Kernels are compiled as for a GPU, and their launches are counted but not run, so results are
uninitialised memory. Tensors stay in host memory. Triton must not be imported with
TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

from vlmo.kernels import target
from vlmo.kernels._backends.triton import operands_of
from vlmo.kernels._backends.triton_device import INTERPRETED
from vlmo.kernels.attention.triton import tiles as attention_tiles
from vlmo.kernels.moe_ffn.triton import tiles as moe_ffn_tiles

# Set while the kernels are imported, so that they are compiled as for a GPU.
assert not INTERPRETED

GENERATION, ARCHITECTURE, MULTIPROCESSORS = "sm_90", 90, 132
SOURCE = Path(__file__).parent / "libcuda.c"


class _Driver(nvidia.CudaDriver):
    def __init__(self) -> None:  # that of the base class asks torch.cuda
        self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
        self.get_device_capability = lambda device=0: divmod(ARCHITECTURE, 10)
        self.get_current_stream = lambda device: 0
        self.get_current_device = lambda: 0
        self.set_current_device = lambda device: None

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCHITECTURE, 32)


@functools.cache
def _library() -> ctypes.CDLL:
    """The pretended libcuda.so.1, loaded so that Triton's modules link to it."""
    folder = tempfile.mkdtemp(prefix="pretended-libcuda-")
    path = os.path.join(folder, "libcuda.so.1")
    command = ["cc", "-O2", "-w", "-shared", "-fPIC", str(SOURCE)]
    subprocess.run([*command, "-Wl,-soname,libcuda.so.1", "-o", path], check=True)
    os.symlink(path, path.removesuffix(".1"))  # Triton 3.4 links to this name
    knobs.nvidia.libcuda_path = folder
    # Like CUDA's allocator, malloc shall keep large blocks instead of returning them to the system.
    threshold_of_mmap, threshold_of_trimming = -3, -1
    for option in (threshold_of_mmap, threshold_of_trimming):
        ctypes.CDLL(None).mallopt(option, 2**30)
    library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    library.pretended_launches.restype = ctypes.c_uint64
    return library


def launches() -> int:
    """The number of launches so far."""
    return _library().pretended_launches()


def _always(value: Any) -> Callable[..., Any]:
    """A function that returns ``value``; a mock would take as long as the rest of a call."""

    def function(*_: Any) -> Any:
        return value

    return function


@contextlib.contextmanager
def pretended() -> Iterator[None]:
    """Run the Triton kernels on CPU tensors as on an H100 that does nothing."""
    _library()
    previous = driver._active if hasattr(driver, "_active") else None

    def moe_ffn_row(device: torch.device, dtype: torch.dtype) -> Any:
        return moe_ffn_tiles.TABLE[GENERATION, operands_of(dtype)]

    def attention_row(device: torch.device, dtype: torch.dtype, head_dim: int) -> Any:
        width = attention_tiles.width_of(head_dim)
        return attention_tiles.TABLE[GENERATION, operands_of(dtype), width]

    with contextlib.ExitStack() as stack:
        for change in (
            mock.patch.object(target, "interpreted", _always(True)),  # accepts CPU tensors
            mock.patch.object(target, "multiprocessors", _always(MULTIPROCESSORS)),
            mock.patch.object(moe_ffn_tiles, "built_in", moe_ffn_row),
            mock.patch.object(attention_tiles, "choose", attention_row),
        ):
            stack.enter_context(change)
        driver.set_active(_Driver())
        try:
            yield
        finally:
            driver.set_active(previous)
