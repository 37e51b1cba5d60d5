"""Counters of a launch: the next ticket, and the progress of each row tile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Counters:
    """int32 counters that are zero between launches, because every launch resets them.

    Launches on a stream are sequential, so there is one buffer per device and stream, and a call
    needs one launch instead of two. During the capture of a CUDA graph, and in the private memory
    pool around a capture, each call gets a new buffer: the graph may be replayed on any stream, and
    memory of a private pool must not outlive it. The buffer of a launch that raised is discarded.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[torch.device, int], Tensor] = {}

    def take(self, device: torch.device, size: int) -> Taken:
        """A context with a zeroed buffer of at least ``size`` counters, for one launch inside."""
        return Taken(self._kept, device, size)


class Taken:
    """The context of :meth:`Counters.take`. A generator would take the host twice as long."""

    def __init__(self, kept: dict[Any, Tensor], device: torch.device, size: int) -> None:
        self._kept, self._device, self._size = kept, device, size
        self._key: tuple[torch.device, int] | None = None  # where the buffer is kept afterwards

    def __enter__(self) -> Tensor:
        device, size = self._device, self._size
        if _capturing(device):
            return torch.zeros(size, dtype=torch.int32, device=device)
        key = self._key = (device, _stream(device))
        # Removed while in use: if the launch raises, the buffer is not put back.
        buffer = self._kept.pop(key, None)
        if buffer is None or buffer.numel() < size:
            buffer = torch.zeros(max(size, 4096), dtype=torch.int32, device=device)
            if _in_private_pool(buffer):
                self._key = None
        self._buffer = buffer
        return buffer

    def __exit__(self, error: object, *_: object) -> None:
        if error is None and self._key is not None:
            self._kept[self._key] = self._buffer


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _stream(device: torch.device) -> int:
    # As Triton and Inductor ask: torch.cuda.current_stream makes an object, which takes longer.
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def _in_private_pool(tensor: Tensor) -> bool:
    # cudaMallocAsync has neither private pools nor memory snapshots.
    if tensor.device.type != "cuda" or torch.cuda.get_allocator_backend() != "native":
        return False
    address = tensor.data_ptr()
    for segment in torch.cuda.memory_snapshot():
        if segment["address"] <= address < segment["address"] + segment["total_size"]:
            return tuple(segment["segment_pool_id"]) != (0, 0)
    return False


COUNTERS = Counters()


def take_counters(device: torch.device, size: int) -> Taken:
    """At least ``size`` zeroed counters for one launch; see :meth:`Counters.take`."""
    return COUNTERS.take(device, size)
