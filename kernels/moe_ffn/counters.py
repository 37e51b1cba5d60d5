"""Counters of a launch: the next ticket, and the progress of each row tile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

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

    @contextlib.contextmanager
    def take(self, device: torch.device, size: int) -> Iterator[Tensor]:
        """A zeroed buffer of at least ``size`` counters, for one launch inside the block."""
        if _capturing(device):
            yield torch.zeros(size, dtype=torch.int32, device=device)
            return
        key = (device, _stream(device))
        # Removed while in use: if the launch raises, the buffer is not put back.
        buffer = self._kept.pop(key, None)
        if buffer is not None and buffer.numel() >= size:
            yield buffer
        else:
            buffer = torch.zeros(max(size, 4096), dtype=torch.int32, device=device)
            yield buffer
            if _in_private_pool(buffer):
                return
        self._kept[key] = buffer


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


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


def take_counters(device: torch.device, size: int) -> contextlib.AbstractContextManager[Tensor]:
    """At least ``size`` zeroed counters for one launch; see :meth:`Counters.take`."""
    return COUNTERS.take(device, size)
