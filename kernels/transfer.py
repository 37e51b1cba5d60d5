"""Asynchronous copies from the host to a device."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a CPU tensor to ``device``, asynchronously through pinned memory.

    From pageable memory, CUDA copies more than 64 KiB synchronously in stream order, so the host
    would wait for all previous work on the stream.
    """
    if torch.device(device).type == "cuda" and not torch.compiler.is_compiling():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
