"""An emulated GPU for Triton: Triton compiles for it and launches on it; the machine runs the PTX.

Of the library, only the functions that query the GPU (its name, its multiprocessors) are replaced.
Tensors stay in host memory. Triton must not be imported with TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver

from vlmo.kernels import target
from vlmo.kernels._backends.triton import operands_of
from vlmo.kernels._backends.triton_device import INTERPRETED
from vlmo.kernels.attention.triton import tiles as attention_tiles
from vlmo.kernels.moe_ffn.triton import tiles as moe_ffn_tiles
from vlmo.kernels.target import GENERATIONS

from .machine import Fault, Interleaving, Machine, Report, Result

# Set while the kernels are imported, so that they are compiled as for a GPU.
assert not INTERPRETED

TARGETS = ("sm_80", "sm_90", "sm_120")
INTERLEAVINGS = (
    Interleaving(),
    Interleaving(resident=2, seed=1, quantum=5, shuffle=True),
    Interleaving(resident=1, seed=2, quantum=400, late=False),
)
CACHE = pathlib.Path("build/ptx")  # compiled kernels, relative to the working directory


class Launch(NamedTuple):
    """One launch of a kernel."""

    kernel: str
    machine: Machine
    grid: int
    memory_bytes: int  # of all tensors that it may access
    results: list[Result]  # one per interleaving

    @property
    def reports(self) -> list[Report]:
        return [report for result in self.results for report in result.reports]


class Emulated:
    """The emulated GPU that :func:`emulated` yields.

    Attributes:
        interleavings: each later launch runs in all of these in turn, from the same memory.
        change: a function that changes the PTX before it runs; tests inject faults with it.
        launches: the launches so far.
    """

    def __init__(self, interleavings: Sequence[Interleaving]) -> None:
        self.interleavings = tuple(interleavings)
        self.change: Callable[[str], str] = str
        self.launches: list[Launch] = []
        self._unwritten: dict[int, tuple[torch.UntypedStorage, np.ndarray]] = {}

    @property
    def reports(self) -> list[Report]:
        return [report for launch in self.launches for report in launch.reports]

    def note_empty(self, tensor: torch.Tensor) -> torch.Tensor:
        """Fill the tensor with bytes that are NaN in every floating dtype; mark it unwritten."""
        storage = tensor.untyped_storage()
        if storage.nbytes():
            _bytes_of(storage)[:] = 0xFF
            self._unwritten[storage.data_ptr()] = storage, np.zeros(storage.nbytes(), np.uint8)
        return tensor

    def written(self, storage: torch.UntypedStorage) -> np.ndarray | None:
        """Per byte whether it has been written, or None if that is not tracked.

        A storage to which the host has written before the first launch counts as written entirely.
        """
        held, written = self._unwritten.get(storage.data_ptr(), (None, None))
        if held is None or written is None or held.nbytes() != storage.nbytes():
            return None
        if not written.any() and (_bytes_of(storage) != 0xFF).any():
            written[:] = 1
        return written

    def launch(
        self, kernel: str, text: str, shared_bytes: int, grid: int, arguments: list[tuple[str, Any]]
    ) -> None:
        """Run a kernel in each interleaving.

        Args:
            arguments: Triton's type and the value of each parameter; tensors for pointers.
        """
        machine = _machine(self.change(text), shared_bytes)
        values = [(t, v.data_ptr() if t.startswith("*") else v) for t, v in arguments]
        memory = _Memory(self, [v for t, v in arguments if t.startswith("*")])
        results = []
        for interleaving in self.interleavings:
            memory.restore()
            results.append(machine.launch(grid, values, memory.buffers, interleaving))
            if (address := memory.changed()) is not None:
                names = zip(machine.kernel.parameters, values, strict=False)
                name = next((p.name for p, (_, v) in names if v == address), hex(address))
                raise Fault(f"{kernel}: the memory of {name} differs with {interleaving}")
        size = sum(size for _, size in memory.buffers)
        self.launches.append(Launch(kernel, machine, grid, size, results))


class _Memory:
    """The memory a launch may access, with its contents before and after the first run."""

    def __init__(self, state: Emulated, tensors: Sequence[torch.Tensor]) -> None:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
        self._written = {at: state.written(s) for at, s in storages.items() if s.nbytes()}
        self._bytes = {at: _bytes_of(storages[at]) for at in self._written}
        self.buffers = {(at, len(b)): self._written[at] for at, b in self._bytes.items()}
        self._before = {at: data.copy() for at, data in self._bytes.items()}
        self._written_before = {
            at: written.copy() for at, written in self._written.items() if written is not None
        }
        self._after: dict[int, np.ndarray] = {}

    def restore(self) -> None:
        for at, data in self._before.items():
            self._bytes[at][:] = data
        for at, written in self._written_before.items():
            self.buffers[at, len(written)][:] = written  # type: ignore[index]

    def changed(self) -> int | None:
        """The address of a tensor whose contents differ from those after the first run, or None."""
        self._after = self._after or {at: data.copy() for at, data in self._bytes.items()}
        return next((at for at, b in self._bytes.items() if (b != self._after[at]).any()), None)


_active: Emulated | None = None  # Triton caches launchers for good: they look this up


@contextlib.contextmanager
def emulated(
    generation: str, interleavings: Sequence[Interleaving] = INTERLEAVINGS, multiprocessors: int = 4
) -> Iterator[Emulated]:
    """Run the Triton kernels on CPU tensors as the PTX of a GPU generation, such as "sm_90".

    The tiles are those of the library's tables for that generation.

    Args:
        multiprocessors: their number on the GPU, from which the library chooses its grids.

    Raises:
        Fault: inside the block, if a launch cannot continue, or leaves different memory in
            different interleavings.
    """
    global _active
    state = Emulated(interleavings)
    before, previous = _active, driver._active if hasattr(driver, "_active") else None
    with contextlib.ExitStack() as stack:
        for change in (
            mock.patch.object(CUDABackend, "make_cubin", _ptx_as_binary),
            mock.patch.object(knobs.cache, "dir", str(CACHE)),
            mock.patch.object(target, "interpreted", _always(True)),  # accepts CPU tensors
            mock.patch.object(target, "multiprocessors", _always(multiprocessors)),
            mock.patch.object(moe_ffn_tiles, "built_in", _moe_ffn_row(generation)),
            mock.patch.object(attention_tiles, "choose", _attention_row(generation)),
            *_noting(state),
        ):
            stack.enter_context(change)
        driver.set_active(_Driver(generation))
        _active = state
        try:
            yield state
        finally:
            _active = before
            driver.set_active(previous)


def _always(value: Any) -> Callable[..., Any]:
    """A function that returns ``value``. It is no mock, so that torch.compile can trace it."""

    def function(*_: Any) -> Any:
        return value

    return function


def _moe_ffn_row(generation: str):
    def row(device: torch.device, dtype: torch.dtype) -> moe_ffn_tiles.Tiles:
        return moe_ffn_tiles.TABLE[generation, operands_of(dtype)]

    return row


def _attention_row(generation: str):
    def row(device: torch.device, dtype: torch.dtype, head_dim: int) -> attention_tiles.Tiles:
        operands, width = operands_of(dtype), attention_tiles.width_of(head_dim)
        return attention_tiles.TABLE[generation, operands, width]

    return row


def _noting(state: Emulated) -> Iterator[Any]:
    """Patches that mark memory which PyTorch leaves uninitialised as unwritten."""
    for place, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        original = getattr(place, name)

        def noting(*args, original=original, **kwargs):
            tensor = original(*args, **kwargs)
            real = type(tensor) is torch.Tensor and tensor.device.type == "cpu"
            return state.note_empty(tensor) if real else tensor

        yield mock.patch.object(place, name, noting)


def _ptx_as_binary(backend, source, metadata, options, capability) -> bytes:
    """Replaces CUDABackend.make_cubin, which runs ptxas."""
    return source if isinstance(source, bytes) else source.encode()


@functools.lru_cache(maxsize=32)
def _machine(text: str, shared_bytes: int) -> Machine:
    return Machine(text, shared_bytes)


def _bytes_of(storage: torch.UntypedStorage) -> np.ndarray:
    memory = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
    return np.ctypeslib.as_array(memory)


class _Driver:
    """The interface that Triton requires of a driver."""

    def __init__(self, generation: str) -> None:
        self.target = GPUTarget("cuda", int(generation.removeprefix("sm_")), 32)
        self.shared_bytes = GENERATIONS[generation].shared_bytes
        self.utils = self
        self.launcher_cls = _Launcher

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch  # Triton caches kernels per device

    def get_current_stream(self, device):
        return 0

    def get_device_properties(self, device):
        return {"max_shared_mem": self.shared_bytes}

    def load_binary(self, name, binary, shared_bytes, device):
        """(module, function, registers, spills, maximum threads)."""
        return object(), (binary.decode(), shared_bytes), 0, 0, 1024


class _Launcher:
    """Launches a compiled kernel, as Triton's CudaLauncher does."""

    def __init__(self, source, metadata) -> None:
        self.name = source.fn.fn.__name__
        self.types = tuple(source.signature.values())
        self.scratch_bytes, self.scratch_align = (  # of a program
            metadata.global_scratch_size,
            metadata.global_scratch_align,
        )

    def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *args) -> None:
        assert _active is not None and y == z == 1
        text, shared_bytes = function
        arguments = [*_flattened(self.types, args)]
        if self.scratch_bytes:  # the first of the compiler's own parameters
            arguments.append(("*", self._scratch(x, _active)))
        _active.launch(self.name, text, shared_bytes, x, arguments)

    def _scratch(self, programs: int, state: Emulated) -> torch.Tensor:
        """Unwritten global memory for the programs, which keep descriptors of tensors there."""
        size = programs * self.scratch_bytes
        memory = state.note_empty(torch.empty(size + self.scratch_align, dtype=torch.uint8))
        begin = -memory.data_ptr() % self.scratch_align
        return memory[begin : begin + size]


def _flattened(types, values) -> Iterator[tuple[str, Any]]:
    """(type, value) of each parameter that is not a compile-time constant."""
    if isinstance(types, (tuple, list)):
        for type_, value in itertools.zip_longest(types, values):
            yield from _flattened(type_, value)
    elif types != "constexpr":
        yield types, values
