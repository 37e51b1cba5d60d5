"""vlmo._C: the embedded cubins, and its calls of a fake CUDA driver."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from vlmo import _C

pytestmark = pytest.mark.heavy

HERE = pathlib.Path(__file__).parent
# Loads the module by its file: importing vlmo would cost a second for torch in every process.
PREAMBLE = f"""
import importlib.util, struct
spec = importlib.util.spec_from_file_location("_C", {_C.__file__!r})
_C = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_C)
def launch(shared_bytes=0, device=0, cubin="routing_index", kernel="routing_index_kernel"):
    args = struct.pack("qi", 513, -1)
    try:
        _C.launch(cubin, kernel, (1, 2, 3), (32, 4, 5), shared_bytes, 99, device, args)
    except RuntimeError as error:
        print("RuntimeError", error, flush=True)
"""


@pytest.fixture(scope="session")
def fake_driver(tmp_path_factory):
    """A folder with a libcuda.so.1 that logs what it is asked to do."""
    folder = tmp_path_factory.mktemp("driver")
    compiler = os.environ.get("CXX", "g++")
    source, library = HERE / "fake_libcuda.cpp", folder / "libcuda.so.1"
    command = [compiler, "-std=c++17", "-shared", "-fPIC", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    return folder


def calls(folder, script, capability="70", fail=""):
    """Lines that the fake driver and the script print in a process of their own."""
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(folder),
        "FAKE_CAPABILITY": capability,
        "FAKE_FAIL": fail,
    }
    command = [sys.executable, "-c", PREAMBLE + script]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [line.strip() for line in run.stdout.splitlines()]


def test_import_does_not_start_the_driver(fake_driver):
    assert calls(fake_driver, "_C.cubins(); _C.image('routing_index', 'sm_70')") == []


def test_first_launch(fake_driver):
    assert calls(fake_driver, "launch()") == [
        "cuInit",
        "cuDeviceGet 0",
        "cuDevicePrimaryCtxRetain 100",
        "cuCtxPushCurrent 100",
        "cuModuleLoadData 70",
        "cuModuleGetFunction routing_index_kernel",
        # int64 513, int32 -1, without padding behind it
        "cuLaunchKernel 1 2 3 / 32 4 5 / 0 / 99 / 1 : 1 2 0 0 0 0 0 0 255 255 255 255",
        "cuCtxPopCurrent",
    ]


def test_each_device_loads_once(fake_driver):
    log = calls(fake_driver, "launch(); launch(); launch(device=1); launch(device=1)")
    assert sum(line.startswith("cuModuleLoadData") for line in log) == 2
    assert sum(line.startswith("cuDevicePrimaryCtxRetain") for line in log) == 2
    assert sum(line.startswith("cuLaunchKernel") for line in log) == 4
    assert log.count("cuInit") == 1


def test_threads_load_once(fake_driver):
    script = """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(8) as pool:
    list(pool.map(lambda _: launch(), range(64)))
"""
    log = calls(fake_driver, script)
    assert sum(line.startswith("cuModuleLoadData") for line in log) == 1
    assert sum(line.startswith("cuModuleGetFunction") for line in log) == 1
    assert sum(line.startswith("cuLaunchKernel") for line in log) == 64


def test_large_shared_memory_is_opted_into_once(fake_driver):
    script = "[launch(shared_bytes=n) for n in (49152, 50000, 50000, 49999, 98304)]"
    log = [line for line in calls(fake_driver, script) if line.startswith("cuFuncSetAttribute")]
    assert log == ["cuFuncSetAttribute 8 50000", "cuFuncSetAttribute 8 98304"]


@pytest.mark.parametrize(("capability", "loaded"), [("70", "70"), ("72", "70"), ("75", "75")])
def test_the_fitting_cubin_is_loaded(fake_driver, capability, loaded):
    assert f"cuModuleLoadData {loaded}" in calls(fake_driver, "launch()", capability)


def test_no_cubin_fits(fake_driver):
    log = calls(fake_driver, "launch()", "61")
    assert log[-1] == "RuntimeError routing_index_kernel: no cubin 'routing_index' for sm_61"


@pytest.mark.parametrize(
    "call",
    [
        "cuDeviceGet",
        "cuDevicePrimaryCtxRetain",
        "cuCtxPushCurrent",
        "cuModuleLoadData",
        "cuModuleGetFunction",
        "cuLaunchKernel",
    ],
)
def test_errors_name_kernel_call_and_error(fake_driver, call):
    log = calls(fake_driver, "launch()", fail=call)
    assert f"RuntimeError routing_index_kernel: {call}: CUDA_ERROR_FAKE" in log
    pushed = sum(line.startswith("cuCtxPushCurrent") for line in log)
    popped = log.count("cuCtxPopCurrent")
    assert popped == (pushed if call != "cuCtxPushCurrent" else 0)


def test_why_no_driver(fake_driver, tmp_path):
    script = "print(_C.why_no_driver()); launch()"
    broken = calls(fake_driver, script, fail="cuInit")
    reason = "the NVIDIA driver does not start: CUDA_ERROR_FAKE."
    assert broken == ["cuInit", reason, f"RuntimeError routing_index_kernel: {reason}"]
    assert calls(fake_driver, "print(_C.why_no_driver())") == ["cuInit", "None"]


def test_target_for():
    volta, newer = {(7, 0): "sm_70", (7, 2): "sm_70", (7, 5): "sm_75"}, {(8, 0): "sm_80"}
    newer |= {(8, 9): "sm_80", (9, 0): "sm_90", (10, 3): "sm_100", (12, 1): "sm_120"}
    for capability, expected in {(6, 1): None, (11, 0): None, **volta, **newer}.items():
        assert _C.target_for("routing_index", *capability) == expected
    assert _C.target_for("no such kernel", 7, 0) is None


def test_every_cubin_is_an_elf_file_with_its_resources():
    assert {("routing_index", "sm_70"), ("routing_index", "sm_75")} <= set(_C.cubins())
    for name, target in _C.cubins():
        assert _C.image(name, target).startswith(b"\x7fELF")
        assert json.loads(_C.resources(name, target)), f"{name} for {target} holds no kernel"
    with pytest.raises(KeyError, match="no cubin 'routing_index' for sm_999"):
        _C.image("routing_index", "sm_999")
