"""The CUDA backend on the CPU: the V100's machine code, as shipped, in the emulator."""

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
from vlmo.kernels.attention.cuda import arguments as attention
from vlmo.kernels.moe_ffn.cuda import arguments as moe_ffn

PROGRAMS = 2  # CTAs that the host takes to be resident on a multiprocessor


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
def emulated(workers=2 * PROGRAMS, **options):
    """Run ``backend="cuda"`` on CPU tensors; ``options`` go to every launch of the emulator.

    ``workers`` is the number of CTAs that the host takes to be resident at a time.
    """

    def run(cubin, name, programs, threads, shared_bytes, argument, tensors, **defaults):
        kernel(cubin, name).launch(
            *(programs, threads, [bytes(argument)], shared_bytes),
            **{"buffers": memory_of(tensors), **defaults, **options},
        )

    def launch_moe_ffn(cubin, name, device, programs, argument, tensors):
        run(cubin, name, programs, moe_ffn.THREADS, 0, argument, tensors, resident=programs)

    def launch_attention(cubin, name, device, *rest):
        run(cubin, name, *rest)

    def why_not(cubin, device, dtype):
        return None if dtype == torch.float16 else "the emulated kernels take float16."

    with (
        mock.patch.object(moe_ffn, "launch", launch_moe_ffn),
        mock.patch.object(attention, "launch", launch_attention),
        mock.patch.object(target, "multiprocessors", return_value=workers // PROGRAMS),
        mock.patch.object(cuda_target, "why_not", why_not),
    ):
        yield
