"""Devices: selection by name, capabilities of this machine, and asynchronous copies to the host.

Names given by a user are checked before anything starts.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import metadata
from typing import NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

import vlmo
from vlmo.kernels import BACKEND_NAMES, why_not
from vlmo.kernels.dispatch import NAMED_OPERATIONS, requested
from vlmo.kernels.support import OPERATIONS
from vlmo.kernels.target import compute_capability, describe, devices

_VERSIONS_OF = ("torch", "triton", "numpy")


def chosen_device(name: str) -> torch.device:
    """The device with a name: "auto" for the GPU if there is one, "cpu", "cuda" or "cuda:1".

    Raises:
        ValueError: this machine has no such device.
    """
    available = devices()
    types = {device.type for device in available}
    if name == "auto":
        return torch.device("cuda" if "cuda" in types else "cpu")
    if name not in types and name not in map(str, available):
        raise ValueError(f"device: {name!r} is not one of this machine's {sorted(types)}")
    return torch.device(name)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The 16-bit type for matrix products: bfloat16 if the GPU supports it, else float16."""
    capability = compute_capability(device)
    if capability is None:
        return None
    return torch.bfloat16 if capability >= (8, 0) else torch.float16


def chosen_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """The autocast dtype with a name: "auto", "float32" (none), "bfloat16" or "float16".

    Raises:
        ValueError: ``name`` is none of these.
    """
    if name == "auto":
        return autocast_dtype(device)
    known = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ValueError(f"dtype: {name!r} is not one of {['auto', *known]}")
    return known[name]


def require_backend(
    backend: str | None, device: torch.device, autocast: torch.dtype | None
) -> None:
    """Raise now the error that would otherwise occur in the middle of the program.

    Args:
        backend: backend requested by name; None for that of ``use_backend`` or ``VLMO_KERNELS``, if
            any.
        device: device to run on.
        autocast: dtype of the matrix products; None for float32.

    Raises:
        ValueError: there is no such backend.
        NotImplementedError: it cannot run on this device with this dtype.
    """
    dtype = autocast or torch.float32
    for operation in NAMED_OPERATIONS:
        name = requested(operation, backend)
        if name is None:
            continue
        reason = why_not(operation, name, device=device, dtype=dtype)
        if reason is not None:
            raise NotImplementedError(
                f"backend {name!r} cannot run {operation} on {device}: {reason}"
            )


class HostCopy:
    """An asynchronous copy of a tensor to the host; only :meth:`get` waits for it."""

    def __init__(self, tensor: Tensor):
        self._event = None
        if torch.compiler.is_compiling():  # compiled graphs have no events
            self._copy = tensor.to("cpu")
            return
        # A non-blocking copy allocates pinned memory.
        self._copy = tensor.to("cpu", non_blocking=True)
        if tensor.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def get(self) -> Tensor:
        """Wait for the copy and return the tensor on the CPU."""
        if self._event is not None:
            self._event.synchronize()
        return self._copy


class Answer(NamedTuple):
    """Whether a backend can run an operation on a device; ``reason`` is None if it can."""

    operation: str
    backend: str
    device: torch.device
    dtype: torch.dtype
    reason: str | None


def answers() -> Iterator[Answer]:
    """All combinations of operation, device and backend, in the usual dtype of the device."""
    for operation in OPERATIONS:
        for device in devices():
            dtype = torch.float32 if device.type == "cpu" else torch.float16
            for backend in BACKEND_NAMES:
                reason = why_not(operation, backend, device=device, dtype=dtype)
                yield Answer(operation, backend, device, dtype, reason)


def versions() -> dict[str, str]:
    """Versions of the software that a result can depend on."""
    installed = {name: _version(name) for name in _VERSIONS_OF}
    return {"vlmo": vlmo.__version__, "python": platform.python_version()} | installed


def cubins() -> dict[str, list[str]]:
    """The CUDA kernels in this installation: target architectures by kernel file."""
    # Imported here so that the other information is shown even if the extension is missing.
    from vlmo import _C

    found: dict[str, list[str]] = {}
    for name, target in _C.cubins():
        found.setdefault(name, []).append(target)
    return found


def show_machine(console: Console) -> None:
    """Print versions, devices, built kernels, and which backends can run."""
    facts = Table.grid(padding=(0, 2))
    for name, version in versions().items():
        facts.add_row(name, version)
    for device in devices():
        facts.add_row(str(device), describe(device))
    for name, targets in cubins().items():
        facts.add_row("cubin", f"{name}: {', '.join(targets)}")
    console.print(facts)

    table = Table(title="What can run here", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("operation", "device", "backend"):
        table.add_column(column, no_wrap=True)
    table.add_column("runs")
    before = None
    for answer in answers():
        place = (answer.operation, f"{answer.device} {_short(answer.dtype)}")
        if before is not None and place != before:
            table.add_section()
        shown = place if place != before else ("", "")
        verdict = "[green]yes[/]" if answer.reason is None else answer.reason
        table.add_row(*shown, answer.backend, verdict)
        before = place
    console.print(table)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
