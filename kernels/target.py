"""Properties of the GPU; no other file queries them."""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

import torch


class Generation(NamedTuple):
    """GPUs that share a row of tiles: lowest compute capability, and shared memory per program."""

    since: tuple[int, int]
    shared_bytes: int


GENERATIONS = {
    "sm_80": Generation((8, 0), 163 * 1024),  # Ampere: A100
    "sm_86": Generation((8, 6), 99 * 1024),  # Ampere and Ada: A10, RTX 30, L40, RTX 40
    "sm_90": Generation((9, 0), 227 * 1024),  # Hopper: H100, H200
    "sm_100": Generation((10, 0), 227 * 1024),  # Blackwell: B200
    "sm_120": Generation((12, 0), 99 * 1024),  # Blackwell: RTX 50
}


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def compute_capability(device: torch.device | str) -> tuple[int, int] | None:
    """Compute capability of an NVIDIA GPU, e.g. (7, 0) for a V100; None for any other device."""
    device = torch.device(device)
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


def generation_of(capability: tuple[int, int]) -> str:
    """Name of the newest generation that is not newer than ``capability``."""
    return [name for name, since in GENERATIONS.items() if since.since <= capability][-1]


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of an NVIDIA GPU."""
    return _multiprocessors(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _l2_bytes(index: int) -> int:
    return torch.cuda.get_device_properties(index).L2_cache_size


def l2_bytes(device: torch.device) -> int:
    """Size of the L2 cache of an NVIDIA GPU; that of an A100 for tensors on other devices."""
    if device.type != "cuda":
        return 40 * 2**20
    return _l2_bytes(torch.cuda.current_device() if device.index is None else device.index)


def interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU; Triton decides this when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def describe(device: torch.device | str) -> str:
    """One line about a device, e.g. ``NVIDIA V100 (sm_70, 32 GiB)``."""
    capability = compute_capability(device)
    if capability is None:
        return torch.device(device).type
    properties = torch.cuda.get_device_properties(device)
    memory = properties.total_memory / 2**30
    return f"{properties.name} (sm_{capability[0]}{capability[1]}, {memory:.0f} GiB)"


def devices() -> list[torch.device]:
    """The devices of this machine that can run operations: the CPU, then every visible GPU."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in gpus)]
