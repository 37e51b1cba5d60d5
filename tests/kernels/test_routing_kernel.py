"""The CUDA routing index: its machine code in the emulator, and the kernel on a GPU."""

import ctypes
import json
import struct
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sm70 import Kernel
from vlmo import _C
from vlmo.kernels import routing_index, target

UNWRITTEN = -77
TARGETS = ("sm_70", "sm_75", "sm_80", "sm_90", "sm_100", "sm_120")


@dataclass(frozen=True)
class Case:
    tokens: int
    experts: int
    ids: str = "uniform"

    def make_ids(self) -> np.ndarray:
        rng = np.random.default_rng(self.tokens)
        uniform = rng.integers(0, self.experts, self.tokens)
        ids = {
            "uniform": uniform,
            "runs": np.sort(uniform),
            "one expert": np.full(self.tokens, self.experts - 1),
            "empty experts": uniform // 2 * 2,
            "some out of range": rng.integers(-2, self.experts + 2, self.tokens),
            "all out of range": np.where(uniform % 2, np.iinfo(np.int32).min, self.experts),
        }
        return ids[self.ids].astype(np.int32)


CASES = [
    # Every length with every number of experts.
    *(Case(t, e) for t in (0, 1, 31, 32, 33, 197, 1024) for e in (1, 2, 3, 5, 32)),
    *(Case(4099, e) for e in (2, 3, 32)),
    # What ids may look like.
    *(
        Case(t, 5, ids=kind)
        for t in (33, 197, 1024)
        for kind in ("runs", "one expert", "empty experts", "some out of range", "all out of range")
    ),
    Case(4099, 32, ids="some out of range"),
    Case(1024, 1, ids="some out of range"),
    Case(1024, 32, "one expert"),
]


def oracle(ids, num_experts):
    """rows and offsets in plain Python."""
    groups = [np.flatnonzero(ids == expert) for expert in range(num_experts)]
    outside = np.flatnonzero((ids < 0) | (ids >= num_experts))
    return np.concatenate([*groups, outside]), np.cumsum([0, *map(len, groups)])


def emulate(kernel, case, **options):
    ids = case.make_ids()
    outputs = [np.full(size, UNWRITTEN, np.int32) for size in (case.tokens, case.experts + 1)]
    arguments = [ids, *outputs, case.tokens, case.experts]
    kernel.launch(1, routing_index.block_threads(case.tokens), arguments, **options)
    return outputs


def assert_index(outputs, case):
    expected = oracle(case.make_ids(), case.experts)
    for name, got, want in zip(("rows", "offsets"), outputs, expected, strict=True):
        np.testing.assert_array_equal(got, want, err_msg=name)


@pytest.fixture(scope="module")
def volta_kernel():
    """The very machine code that ships, translated for the CPU; every launch is race-checked."""
    return Kernel(_C.image("routing_index", "sm_70"), "routing_index_kernel", strict=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_emulated_index(volta_kernel, case):
    assert_index(emulate(volta_kernel, case), case)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    "case", [Case(197, 3), Case(1024, 32, ids="some out of range"), Case(4099, 2)], ids=str
)
def test_emulated_index_under_random_interleaving(volta_kernel, case, seed):
    assert_index(emulate(volta_kernel, case, seed=seed, weak_memory=True), case)


def test_index_passes_what_the_kernel_reads(volta_kernel, monkeypatch):
    """The launch itself, with the emulator in the place of the driver and CPU tensors."""
    case = Case(197, 3)

    def as_array(pointer, shape):
        return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_int32)), shape)

    def launch(cubin, kernel, *, grid, block, shared_bytes, stream, device, args):
        assert (cubin, kernel, stream) == ("routing_index", volta_kernel.name, 1234)
        *pointers, tokens, experts = struct.unpack("qqqii", args)
        shapes = [(tokens,), (tokens,), (experts + 1,)]
        arrays = [as_array(*pair) for pair in zip(pointers, shapes, strict=True)]
        volta_kernel.launch(grid, block, [*arrays, tokens, experts], shared_bytes)

    monkeypatch.setattr(_C, "launch", launch)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=1234))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    strided = torch.from_numpy(case.make_ids().repeat(2))[::2]
    outputs = routing_index.launch(strided, case.experts)
    assert_index([output.numpy() for output in outputs], case)


def test_parameter_block_matches_the_kernel(volta_kernel):
    layout = [(parameter.offset, parameter.size) for parameter in volta_kernel.parameters]
    assert layout == [(0, 8), (8, 8), (16, 8), (24, 4), (28, 4)]


@pytest.mark.parametrize("built", TARGETS)
def test_kernel_keeps_to_registers(built):
    assert _C.image("routing_index", built).startswith(b"\x7fELF")
    kernel = json.loads(_C.resources("routing_index", built))["routing_index_kernel"]
    assert kernel["spill_stores"] == kernel["spill_loads"] == kernel["stack"] == 0
    assert kernel["registers"] <= 64, "1024 threads need 65536 registers or less"


def test_volta_code_has_no_local_memory(volta_kernel):
    opcodes = {instruction.op for instruction in volta_kernel.instructions}
    assert not opcodes & {"LDL", "STL"}
    assert "VOTE" in opcodes


def test_why_not_names_the_obstacle(monkeypatch):
    assert routing_index.why_not_cuda(torch.zeros(3, dtype=torch.int32), 2) == (
        "cpu tensors: its kernels run on NVIDIA GPUs."
    )

    device = torch.device("cuda", 0)
    ids: Any = SimpleNamespace(device=device, dtype=torch.int32, numel=lambda: 3)
    monkeypatch.setattr(target, "compute_capability", lambda device: (6, 1))
    assert routing_index.why_not_cuda(ids, 2) == (
        f"cuda:0 is sm_61; the kernels are built for {', '.join(TARGETS)}."
    )
    monkeypatch.setattr(target, "compute_capability", lambda device: (7, 2))
    assert routing_index.why_not_cuda(ids, 33) == "33 experts; the kernel takes 1 to 32."
    monkeypatch.setattr(_C, "why_no_driver", lambda: "libcuda.so.1 not found.")
    assert routing_index.why_not_cuda(ids, 32) == "libcuda.so.1 not found."
    ids.dtype = torch.int64
    assert routing_index.why_not_cuda(ids, 2) == "ids are torch.int64; the kernel reads int32."


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gpu_index(case):
    ids = torch.from_numpy(case.make_ids())
    if torch.cuda.is_available():
        ids = ids.cuda()
    if reason := routing_index.why_not_cuda(ids, case.experts):
        pytest.skip(reason)
    assert_index([output.cpu().numpy() for output in routing_index.launch(ids, case.experts)], case)
