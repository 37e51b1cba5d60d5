"""Measures the roofline of this device: memory copy rate and matrix multiplication rate."""

from __future__ import annotations

import functools
from typing import Any

import torch

from harness.contenders import Work
from harness.cost import Cost
from harness.meter import times, wall_seconds

# Far more than any cache, even of a server CPU.
_COPIED_BYTES = 2**29
_GPU_SIZE = 8192
# Target duration of a CPU's matrix product, long enough to use all threads.
_CPU_SECONDS = 0.02


class Roof:
    """Upper bounds of the rates on a device, each measured when first needed.

    Args:
        device: device to measure.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.matrix_tflops: dict[str, float] = {}

    @functools.cached_property
    def copy_gb_per_s(self) -> float:
        """Rate of copying a large tensor, reads plus writes, in 1e9 bytes per second."""
        return copy_gb_per_s(self._device)

    def attainable_tflops(self, cost: Cost, dtype: torch.dtype) -> float:
        """The lower of the matrix rate and the memory-bound rate at the intensity of ``cost``.

        Small problems may exceed it, because data in a cache are read faster than a copy. float32
        is measured with or without TF32, according to ``torch.backends.cuda.matmul``.
        """
        name = str(dtype).removeprefix("torch.")
        if name not in self.matrix_tflops:
            self.matrix_tflops[name] = matrix_tflops(self._device, dtype)
        return min(self.matrix_tflops[name], self.copy_gb_per_s * cost.flops / cost.bytes / 1e3)

    def rates(self) -> dict[str, Any]:
        """The rates measured so far, for a report."""
        if not self.matrix_tflops:
            return {}
        return dict(copy_gb_per_s=self.copy_gb_per_s, matrix_tflops=self.matrix_tflops)


def copy_gb_per_s(device: torch.device, size: int = _COPIED_BYTES) -> float:
    """Rate of copying ``size`` bytes, reads plus writes."""
    source, target = (torch.ones(size // 4, device=device) for _ in range(2))
    return 2 * size / _seconds(functools.partial(target.copy_, source), device) / 1e9


def matrix_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Rate of a square product of random numbers: zeros would draw less power and clock higher.

    On a CPU, of the faster of PyTorch's two libraries: MKL is slow on AMD's CPUs in float32.
    """
    size = _GPU_SIZE
    if device.type != "cuda":
        size = 192  # not a power of two, whose rows map to few sets of a cache
        while size < _GPU_SIZE and _fastest(_products(size, dtype, device)[0]) < _CPU_SECONDS:
            size *= 2
    found = (_seconds(work, device) for work in _products(size, dtype, device))
    return 2 * size**3 / min(found) / 1e12


def _products(size: int, dtype: torch.dtype, device: torch.device) -> list[Work]:
    a, b, c = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    works: list[Work] = [functools.partial(torch.mm, a, b, out=c)]
    one_dnn = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if device.type == "cpu" and dtype == torch.float32 and one_dnn:
        linear = torch.ops.mkldnn._linear_pointwise
        works.append(functools.partial(linear, a, b, None, "none", [], ""))
    for work in works:
        work()
    return works


def _fastest(work: Work) -> float:
    """Seconds of the fastest of a few calls: a disturbed one would make the product too small."""
    return min(wall_seconds(work) for _ in range(3))


def _seconds(work: Work, device: torch.device) -> float:
    """Seconds of the fastest call, the best that the device can do."""
    work()
    calls = 50 if device.type == "cuda" else 7
    [seconds] = times([work], device, calls=[calls])
    return min(seconds)
