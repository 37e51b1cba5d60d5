"""Fixtures of all tests: the device and the backend to run on, and a seeded generator."""

import importlib.util
import os
from collections.abc import Iterator
from typing import NamedTuple

import pytest

# Threads of a test that spin while they wait would slow down concurrent tests. Libraries read these
# variables when they are loaded; processes that tests start inherit them.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

# A test must not fail because the machine is busy.
settings.register_profile(
    "any-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any-machine")

if not torch.cuda.is_available():
    # Triton's kernels then run in its interpreter. With TRITON_INTERPRET=0 they are compiled for
    # the GPU that PTX_TARGET names, and their PTX runs in the emulator of tests/ptx. Triton reads
    # this when it is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from vlmo import _C  # noqa: E402
from vlmo.kernels._backends import cpu as cpu_target  # noqa: E402

# Kernels in an interpreter or an emulator, and tests that measure them.
INTERPRETED = (("cpu", "triton"), ("cpu", "composed"))
HEAVY_PLACES = (*INTERPRETED, ("cpu", "cuda"))
HEAVY_FOLDERS = {"sm70", "ptx", "benchmarks"}


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    for item in items:
        values = item.callspec.params if hasattr(item, "callspec") else {}
        measures = item.path.stem.startswith(("test_bench", "test_tune"))
        folders = item.path.relative_to(item.config.rootpath).parts
        if values.get("place") in HEAVY_PLACES or measures or HEAVY_FOLDERS & {*folders}:
            item.add_marker(pytest.mark.heavy)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no NVIDIA GPU: torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    """The CPU, and the GPU if there is one: the same test runs on both."""
    return torch.device(request.param)


class Place(NamedTuple):
    """The device and the backend on which a test of an operation runs."""

    device: torch.device
    backend: str

    @property
    def dtype(self) -> torch.dtype:
        """The dtype for tests that need only one; the CUDA kernels require float16."""
        return torch.float16 if self.backend == "cuda" else torch.float32

    @property
    def autocast_dtype(self) -> torch.dtype:
        return torch.float16 if self.backend == "cuda" else torch.bfloat16


def _convert_float(values, source, target, rounding):
    """Round as GPUs do; Triton's interpreter truncates float32 to bfloat16 (Triton 3.7)."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    bits = torch.tensor(values).view(dtypes[source.name])
    return (
        bits.to(dtypes[target.name]).view(getattr(torch, f"int{target.primitive_bitwidth}")).numpy()
    )


@pytest.fixture(
    params=[
        ("cpu", "reference"),
        ("cpu", "cpu"),
        ("cpu", "triton"),
        ("cpu", "composed"),
        ("cpu", "cuda"),
        pytest.param(("cuda", "reference"), marks=pytest.mark.gpu),
        pytest.param(("cuda", "triton"), marks=pytest.mark.gpu),
        pytest.param(("cuda", "composed"), marks=pytest.mark.gpu),
        pytest.param(("cuda", "cuda"), marks=pytest.mark.gpu),
    ],
    ids="-".join,
)
def place(request, monkeypatch) -> Iterator[Place]:
    """Every backend on the CPU, and on the GPU if there is one.

    On the CPU Triton's kernels run in its interpreter, or as PTX in the emulator of tests/ptx, and
    the CUDA kernels in the emulator of tests/sm70.
    """
    from vlmo.kernels import why_not

    device, backend = request.param
    place = Place(torch.device(device), backend)
    if request.param == ("cpu", "cuda"):
        from emulated import emulated

        with emulated():
            yield place
        return
    if request.param in INTERPRETED:
        if torch.cuda.is_available():
            pytest.skip("Triton's interpreter is not used beside a GPU")
        if os.environ["TRITON_INTERPRET"] == "0":
            from ptx.driver import emulated as emulated_ptx

            with emulated_ptx(os.environ.get("PTX_TARGET", "sm_90")) as ptx:
                yield place
            assert not ptx.reports, "\n".join(map(str, ptx.reports))
            return
        from triton.runtime import interpreter

        monkeypatch.setattr(interpreter, "_convert_float", _convert_float)
    if device == "cuda" and (
        reason := why_not("moe_ffn", backend, device=device, dtype=place.dtype)
    ):
        pytest.skip(reason)
    yield place


@pytest.fixture(params=_C.instruction_sets())
def instructions(request, monkeypatch) -> str:
    """Every instruction set of this CPU that the C++ kernels are compiled for."""
    monkeypatch.setattr(cpu_target, "instructions", lambda: request.param)
    return request.param


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Use one thread: small models are far slower if threads wait for cores that are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def _interpreter():
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    from interpreter import improve

    with pytest.MonkeyPatch.context() as patch:
        improve(patch)
        yield


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def launches(monkeypatch) -> list[tuple[str, tuple]]:
    """Names and arguments of the Triton kernels that are launched, in order."""
    from vlmo.kernels._backends import triton_launch

    seen: list[tuple[str, tuple]] = []
    launch = triton_launch.launch

    def spy(kernel, device, programs, tile, *args):
        seen.append((kernel.fn.__name__, args))
        launch(kernel, device, programs, tile, *args)

    monkeypatch.setattr(triton_launch, "launch", spy)
    return seen
