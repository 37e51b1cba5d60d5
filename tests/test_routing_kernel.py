"""The CUDA routing index: its machine code on the emulator, and the kernel itself on a GPU."""

import ctypes
import json
import struct
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sm70 import Kernel
from vlmo import _C
from vlmo.kernels import target
from vlmo.kernels.routing import cuda_impl

UNWRITTEN = -77
TARGETS = ("sm_70", "sm_75", "sm_80", "sm_90", "sm_100", "sm_120")


@dataclass(frozen=True)
class Case:
    tokens: int
    experts: int
    tile: int = 64
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
    # Tiles of one row, of a prime, of all rows, and larger than any number of tokens.
    *(Case(197, 3, tile) for tile in (1, 61, 197, 2**31 - 1)),
    Case(1024, 32, 1, "one expert"),
]


def oracle(ids, num_experts, tile):
    """rows, offsets, tiles, num_tiles in plain Python."""
    groups = [np.flatnonzero(ids == expert) for expert in range(num_experts)]
    outside = np.flatnonzero((ids < 0) | (ids >= num_experts))
    offsets = np.cumsum([0, *map(len, groups)])
    tiles = [
        (expert, first)
        for expert in range(num_experts)
        for first in range(offsets[expert], offsets[expert + 1], tile)
    ]
    unused = -(-len(ids) // tile) + num_experts - len(tiles)
    rows = np.concatenate([*groups, outside])
    return rows, offsets, np.array(tiles + [(-1, 0)] * unused), np.array([len(tiles)])


def emulate(kernel, case, **options):
    ids = case.make_ids()
    max_tiles = -(-case.tokens // case.tile) + case.experts
    shapes = (case.tokens, case.experts + 1, (max_tiles, 2), 1)
    outputs = [np.full(shape, UNWRITTEN, np.int32) for shape in shapes]
    arguments = [ids, *outputs, case.tokens, case.experts, case.tile]
    kernel.launch(1, cuda_impl.block_threads(case.tokens), arguments, **options)
    return outputs


def assert_index(outputs, case):
    expected = oracle(case.make_ids(), case.experts, case.tile)
    for name, got, want in zip(
        ("rows", "offsets", "tiles", "num_tiles"), outputs, expected, strict=True
    ):
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
    """cuda_impl.index itself, with the emulator in the place of the driver and CPU tensors."""
    case = Case(197, 3)

    def as_array(pointer, shape):
        return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_int32)), shape)

    def launch(cubin, kernel, *, grid, block, shared_bytes, stream, device, args):
        assert (cubin, kernel, stream) == ("routing_index", volta_kernel.name, 1234)
        *pointers, tokens, experts, tile = struct.unpack("qqqqqiii", args)
        shapes = [(tokens,), (tokens,), (experts + 1,), (-(-tokens // tile) + experts, 2), (1,)]
        arrays = [as_array(*pair) for pair in zip(pointers, shapes, strict=True)]
        volta_kernel.launch(grid, block, [*arrays, tokens, experts, tile], shared_bytes)

    monkeypatch.setattr(_C, "launch", launch)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=1234))
    strided = torch.from_numpy(case.make_ids().repeat(2))[::2]
    outputs = cuda_impl.index(strided, case.experts, case.tile)
    assert_index([output.numpy() for output in outputs], case)


def test_parameter_block_matches_the_kernel(volta_kernel):
    layout = [(parameter.offset, parameter.size) for parameter in volta_kernel.parameters]
    assert layout == [*((8 * i, 8) for i in range(5)), *((40 + 4 * i, 4) for i in range(3))]


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
    assert cuda_impl.why_not(torch.zeros(3, dtype=torch.int32), 2, 64) == (
        "ids are on cpu, not on a CUDA device."
    )

    device = torch.device("cuda", 0)
    ids = SimpleNamespace(device=device, dtype=torch.int32, numel=lambda: 3)
    monkeypatch.setattr(target, "compute_capability", lambda device: (6, 1))
    assert cuda_impl.why_not(ids, 2, 64) == (
        f"cuda:0 is sm_61; the kernel is built for {', '.join(TARGETS)}."
    )
    monkeypatch.setattr(target, "compute_capability", lambda device: (7, 2))
    assert cuda_impl.why_not(ids, 33, 64) == "33 experts; the kernel takes 1 to 32."
    assert "tiles of 0 rows" in cuda_impl.why_not(ids, 2, 0)
    monkeypatch.setattr(_C, "why_no_driver", lambda: "libcuda.so.1 not found.")
    assert cuda_impl.why_not(ids, 32, 64) == "libcuda.so.1 not found."
    ids.dtype = torch.int64
    assert cuda_impl.why_not(ids, 2, 64) == "ids are torch.int64; the kernel reads int32."


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gpu_index(case):
    ids = torch.from_numpy(case.make_ids())
    if torch.cuda.is_available():
        ids = ids.cuda()
    if reason := cuda_impl.why_not(ids, case.experts, case.tile):
        pytest.skip(reason)
    assert_index(
        [output.cpu().numpy() for output in cuda_impl.index(ids, case.experts, case.tile)], case
    )
