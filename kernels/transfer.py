"""Copies from the host to a device that the host does not wait for."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A CPU tensor on ``device``.

    Through pinned memory: from any other, CUDA copies more than 64 KiB in the order of the stream
    while the host waits, which is a wait for all work before it.
    """
    if torch.device(device).type == "cuda" and not torch.compiler.is_compiling():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
