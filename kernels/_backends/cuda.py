"""Hardware checks and the launch function that the CUDA kernels of all operations share."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from vlmo import _C

from .. import target


def why_not(cubin: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why V100 kernels of ``cubin`` cannot run on ``device`` in ``dtype``, or None."""
    if reason := why_not_built(cubin, device):
        return reason
    capability = target.compute_capability(device)
    assert capability is not None
    name = "sm_{}{}".format(*capability)
    if capability >= (8, 0) and os.environ.get("VLMO_VOLTA_ANYWHERE") != "1":
        return f"{device} is {name}; the kernels are for sm_70 and sm_75, and slow elsewhere."
    if dtype == torch.bfloat16:
        return f"{name} has no bf16 tensor cores; use float16."
    if dtype != torch.float16:
        return f"it has no kernel for {str(dtype).removeprefix('torch.')}, only for float16."
    return _C.why_no_driver()


def why_not_built(cubin: str, device: torch.device) -> str | None:
    """The reason why ``cubin`` has no machine code for ``device``, or None."""
    if device.type != "cuda":
        return f"{device.type} tensors: its kernels run on NVIDIA GPUs."
    capability = target.compute_capability(device)
    if capability is None:
        return f"{device} is not an NVIDIA GPU."
    if _C.target_for(cubin, *capability) is None:
        name = "sm_{}{}".format(*capability)
        built = ", ".join(built for of, built in _C.cubins() if of == cubin)
        return f"{device} is {name}; the kernels are built for {built}."
    return None


def launch(
    cubin: str,
    kernel: str,
    device: torch.device,
    programs: int,
    threads: int,
    shared_bytes: int,
    argument: ctypes.Structure,
    tensors: Sequence[Tensor | None],
) -> None:
    """Run a kernel on the current stream.

    Args:
        programs: number of CTAs in the grid.
        threads: number of threads per CTA.
        shared_bytes: dynamic shared memory per CTA.
        argument: the kernel's only parameter.
        tensors: all tensors that ``argument`` points into.
    """
    del tensors
    _C.launch(
        cubin,
        kernel,
        grid=(programs, 1, 1),
        block=(threads, 1, 1),
        shared_bytes=shared_bytes,
        stream=torch.cuda.current_stream(device).cuda_stream,
        device=device.index if device.index is not None else torch.cuda.current_device(),
        args=bytes(argument),
    )
