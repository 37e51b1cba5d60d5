"""Sensors of NVML, with a fake pynvml module."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from harness.nvml import Sensors, State, open_sensors, throttling

CUDA = torch.device("cuda", 0)
UUID = "8c3f1f6e-4b5a-0000-1111-222233334444"


class NVMLError(Exception):
    """What NVML raises."""


def fake_nvml(**changes) -> types.SimpleNamespace:
    """Two GPUs of which torch sees the second one only."""

    def unsupported(*arguments):
        raise NVMLError("Not Supported")

    gpus = {"GPU-another": "first", f"GPU-{UUID}": "second"}
    clocks = {"sm": 1500, "memory": 2600}

    def handle_of(uuid):
        if uuid not in gpus:
            raise NVMLError("Not Found")
        return gpus[uuid]

    def of_second(value):
        def tell(handle, *arguments):
            assert handle == "second"
            return value(*arguments) if callable(value) else value

        return tell

    functions = dict(
        nvmlDeviceGetClockInfo=of_second(clocks.__getitem__),
        nvmlDeviceGetTemperature=of_second({"gpu": 61}.__getitem__),
        nvmlDeviceGetPowerUsage=of_second(123_000),
        nvmlDeviceGetTotalEnergyConsumption=of_second(5_000),
        nvmlDeviceGetCurrentClocksEventReasons=of_second(0x4 | 0x20),
    )
    functions |= {name: value or unsupported for name, value in changes.items()}
    return types.SimpleNamespace(
        NVMLError=NVMLError,
        NVML_CLOCK_SM="sm",
        NVML_CLOCK_MEM="memory",
        NVML_TEMPERATURE_GPU="gpu",
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=handle_of,
        **functions,
    )


@pytest.fixture
def torch_gpu(monkeypatch):
    """torch's device properties of a GPU."""
    properties = types.SimpleNamespace(uuid=UUID)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", None)
    return properties


def opened(device: torch.device) -> Sensors:
    sensors = open_sensors(device)
    assert isinstance(sensors, Sensors)
    return sensors


def test_torch_s_gpu_is_found_by_its_uuid(monkeypatch, torch_gpu):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    sensors = open_sensors(CUDA)
    assert isinstance(sensors, Sensors)
    reasons = ["power cap", "temperature, by the driver"]
    assert sensors.state() == State(1500, 2600, 61, 123.0, reasons)
    assert sensors.millijoules() == 5_000


def test_what_a_gpu_does_not_tell_is_none(monkeypatch, torch_gpu):
    nothing = dict.fromkeys(
        [
            "nvmlDeviceGetClockInfo",
            "nvmlDeviceGetTemperature",
            "nvmlDeviceGetPowerUsage",
            "nvmlDeviceGetTotalEnergyConsumption",
            "nvmlDeviceGetCurrentClocksEventReasons",  # the older function is not even there
        ]
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(**nothing))
    sensors = opened(CUDA)
    assert sensors.state() == State(None, None, None, None, None)
    assert sensors.millijoules() is None


def test_an_older_driver_is_asked_by_the_older_name(monkeypatch, torch_gpu):
    older = dict(
        nvmlDeviceGetCurrentClocksEventReasons=None,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 0x8,
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(**older))
    assert opened(CUDA).state().throttled == ["hardware slowdown"]


def test_an_idle_gpu_is_not_throttled():
    assert throttling(0x1) == []
    assert throttling(0x1 | 0x80 | 0x8) == ["hardware slowdown", "power brake"]


def test_why_there_are_no_sensors(monkeypatch, torch_gpu):
    assert "NVIDIA GPUs only" in str(open_sensors(torch.device("cpu")))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "nvidia-ml-py" in str(open_sensors(CUDA))
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    torch_gpu.uuid = "of-a-mig-slice"
    assert open_sensors(CUDA) == "NVML does not open this GPU: Not Found"

    def no_driver():
        raise NVMLError("Driver Not Loaded")

    monkeypatch.setattr(sys.modules["pynvml"], "nvmlInit", no_driver)
    assert open_sensors(CUDA) == "NVML does not open this GPU: Driver Not Loaded"
