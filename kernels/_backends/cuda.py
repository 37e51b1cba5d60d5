"""What the CUDA kernels of every operation ask of the machine, and the one place that launches."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from vlmo import _C

from .. import target


def why_not(cubin: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """One sentence that says why no V100 kernel of ``cubin`` can run on ``device`` in ``dtype``."""
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
    """One sentence that says why ``cubin`` has no machine code for ``device``, or None."""
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
        programs: CTAs of the grid.
        threads: of each CTA.
        shared_bytes: dynamic shared memory of each CTA.
        argument: the kernel's only parameter.
        tensors: all that ``argument`` points into.
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
