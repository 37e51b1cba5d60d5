"""What the V100's CUDA kernels of every operation ask of the machine and of the operands."""

from __future__ import annotations

import os

import torch

from vlmo import _C

from .. import target


def why_not(cubin: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """One sentence that says why no kernel of ``cubin`` can run on ``device`` in ``dtype``."""
    if device.type != "cuda":
        return f"{device.type} tensors: its kernels run on NVIDIA GPUs."
    capability = target.compute_capability(device)
    if capability is None:
        return f"{device} is not an NVIDIA GPU."
    name = "sm_{}{}".format(*capability)
    if _C.target_for(cubin, *capability) is None:
        built = ", ".join(built for of, built in _C.cubins() if of == cubin)
        return f"{device} is {name}; the kernels are built for {built}."
    if capability >= (8, 0) and os.environ.get("VLMO_VOLTA_ANYWHERE") != "1":
        return f"{device} is {name}; the kernels are for sm_70 and sm_75, and slow elsewhere."
    if dtype == torch.bfloat16:
        return f"{name} has no bf16 tensor cores; use float16."
    if dtype != torch.float16:
        return f"it has no kernel for {str(dtype).removeprefix('torch.')}, only for float16."
    return _C.why_no_driver()
