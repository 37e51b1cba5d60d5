"""The CUDA backend of moe_ffn on the CPU: its sm_70 machine code, as shipped, in the emulator."""

import contextlib
import ctypes
import functools
from unittest import mock

import numpy as np
import torch

from sm70 import Kernel
from vlmo import _C
from vlmo.kernels.moe_ffn import cuda_impl, cuda_launch

MULTIPROCESSORS = 2


@functools.cache
def kernel(cubin: str, name: str) -> Kernel:
    return Kernel(_C.image(cubin, "sm_70"), name, strict=True)


def memory_of(tensors) -> list[np.ndarray]:
    """The bytes of the tensors, each storage once."""
    spans = {}
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
def emulated(workers=2 * MULTIPROCESSORS, **options):
    """Run ``backend="cuda"`` on CPU tensors; ``options`` go to every launch of the emulator.

    ``workers`` is the number of CTAs that the host takes to be resident at a time.
    """

    def launch(cubin, name, device, programs, argument, tensors):
        kernel(cubin, name).launch(
            *(programs, cuda_launch.THREADS, [bytes(argument)]),
            **{"resident": programs, "buffers": memory_of(tensors), **options},
        )

    def why_not(device, dtype, width, hidden, activation):
        if dtype != torch.float16:
            return "the emulated kernels take float16."
        return cuda_impl._why_not_sizes(width, hidden, activation)

    with (
        mock.patch.object(cuda_launch, "launch", launch),
        mock.patch.object(cuda_launch, "workers_on", return_value=workers),
        mock.patch.object(cuda_impl, "why_not", why_not),
    ):
        yield
