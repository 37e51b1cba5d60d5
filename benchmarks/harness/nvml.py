"""Reads a GPU's clocks, temperature, throttling, power and energy through NVML.

NVML is part of the driver; its Python module is ``pynvml`` from the package nvidia-ml-py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

# NVML_CLOCKS_EVENT_REASON_*, without bit 1 (idle GPU), which does not limit clocks under load.
_REASONS = {
    0x2: "clocks set by the user",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "clocks synchronised with other GPUs",
    0x20: "temperature, by the driver",
    0x40: "temperature, by the hardware",
    0x80: "power brake",
    0x100: "clocks of the display",
    0x200: "board limit",
    0x400: "reliability",
}


class State(NamedTuple):
    """A reading of the sensors; None for values that this GPU does not report."""

    clock_mhz: int | None  # clock of the multiprocessors
    memory_clock_mhz: int | None
    temperature_c: int | None
    watts: float | None
    throttled: list[str] | None  # reasons that limit the clocks


class Sensors:
    """The sensors of a GPU; created by :func:`open_sensors`."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    def state(self) -> State:
        """Read all sensors."""
        power = self._ask("nvmlDeviceGetPowerUsage")
        bits = self._ask("nvmlDeviceGetCurrentClocksEventReasons")
        if bits is None:  # drivers before 535
            bits = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons")
        return State(
            clock_mhz=self._ask("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_SM),
            memory_clock_mhz=self._ask("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_MEM),
            temperature_c=self._ask("nvmlDeviceGetTemperature", self._nvml.NVML_TEMPERATURE_GPU),
            watts=None if power is None else power / 1e3,
            throttled=None if bits is None else throttling(bits),
        )

    def millijoules(self) -> int | None:
        """Energy since the driver was loaded; None before Volta or if it is not reported."""
        return self._ask("nvmlDeviceGetTotalEnergyConsumption")

    def _ask(self, name: str, *arguments: Any) -> Any:
        try:
            return getattr(self._nvml, name)(self._handle, *arguments)
        except (AttributeError, self._nvml.NVMLError):  # too old a pynvml; unsupported GPU
            return None


def throttling(bits: int) -> list[str]:
    """Names of the reasons that are set in NVML's bits."""
    return [name for bit, name in _REASONS.items() if bits & bit]


def open_sensors(device: torch.device) -> Sensors | str:
    """Sensors of torch's device, or the reason why there are none.

    The GPU is identified by its UUID, because CUDA_VISIBLE_DEVICES changes torch's device numbers.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return "NVML knows NVIDIA GPUs only"
    try:
        import pynvml
    except ImportError:
        return "pynvml (of the package nvidia-ml-py) is not installed"
    try:
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid
        return Sensors(pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
    except pynvml.NVMLError as error:  # no access, another driver, a part of a GPU (MIG)
        return f"NVML does not open this GPU: {error}"
