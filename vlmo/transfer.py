"""A copy from a device to the host that the host waits for only when it needs it."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """A tensor on its way to the host; nothing waits until :meth:`get`."""

    def __init__(self, tensor: Tensor):
        self._event = None
        if torch.compiler.is_compiling():  # a graph has no events
            self._copy = tensor.to("cpu")
            return
        # A copy that does not block goes to pinned memory.
        self._copy = tensor.to("cpu", non_blocking=True)
        if tensor.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def get(self) -> Tensor:
        """The tensor on the CPU, once it is there."""
        if self._event is not None:
            self._event.synchronize()
        return self._copy
