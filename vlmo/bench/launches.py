"""What one call does on the GPU and asks of the CUDA runtime, by the profiler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

# What would make the host wait, or go over the bus.
_CALLS = ("StreamSynchronize", "EventSynchronize", "Memcpy")
WAITING = tuple(f"{interface}{call}" for interface in ("cuda", "cu") for call in _CALLS)


def count(work: Callable[[], object]) -> tuple[Counter[str], Counter[str]]:
    """Kernels (with copies and fills) by name, and calls of the CUDA runtime by name."""
    kernels: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work()
    for event in profiler.events() or ():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            # The GPU's side of a record_function is not a launch.
            if not getattr(event, "is_user_annotation", False):
                kernels[event.name] += 1
        elif event.name.startswith("cu"):
            calls[event.name] += 1
    return kernels, calls


def waiting(calls: Counter[str]) -> list[str]:
    """The calls that make the host wait for the GPU, or copy."""
    return sorted(name for name in calls if name.startswith(WAITING))
