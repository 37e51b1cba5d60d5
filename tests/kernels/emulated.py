"""The CUDA backend on the CPU: the shipped machine code for the V100 in the emulator."""

import contextlib
import ctypes
import functools
from unittest import mock

import numpy as np
import torch

from sm70 import Kernel
from vlmo import _C
from vlmo.kernels import target
from vlmo.kernels._backends import cuda as cuda_target

PROGRAMS = 2  # resident CTAs per multiprocessor that the host assumes


@functools.cache
def kernel(cubin: str, name: str) -> Kernel:
    return Kernel(_C.image(cubin, "sm_70"), name, strict=True)


def memory_of(tensors) -> list[np.ndarray]:
    """The bytes of the tensors, with each storage once."""
    spans: dict[int, int] = {}
    for tensor in tensors:
        if tensor is not None and tensor.numel():
            at, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
            if not tensor.is_contiguous():
                storage = tensor.untyped_storage()
                at, size = storage.data_ptr(), storage.nbytes()
            spans[at] = max(size, spans.get(at, 0))
    return [
        np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(at))
        for at, size in spans.items()
    ]


@contextlib.contextmanager
def emulated(workers=2 * PROGRAMS, **options):
    """Run ``backend="cuda"`` on CPU tensors; ``options`` are passed to every emulated launch.

    ``workers`` is the number of resident CTAs that the host assumes.
    """

    def launch(cubin, name, device, programs, threads, shared_bytes, argument, tensors):
        # The kernels of moe_ffn wait for each other's CTAs.
        resident = {"resident": programs} if cubin.startswith("moe_ffn") else {}
        kernel(cubin, name).launch(
            *(programs, threads, [bytes(argument)], shared_bytes),
            **{"buffers": memory_of(tensors), **resident, **options},
        )

    def why_not(cubin, device, dtype):
        return None if dtype == torch.float16 else "the emulated kernels take float16."

    with (
        mock.patch.object(cuda_target, "launch", launch),
        mock.patch.object(target, "multiprocessors", return_value=workers // PROGRAMS),
        mock.patch.object(cuda_target, "why_not", why_not),
    ):
        yield
