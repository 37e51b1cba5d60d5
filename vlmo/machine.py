"""What this machine can run, and why not the rest, as tables."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import metadata
from typing import NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table

import vlmo
from vlmo.kernels import BACKEND_NAMES, why_not
from vlmo.kernels.support import OPERATIONS
from vlmo.kernels.target import describe, devices

_VERSIONS_OF = ("torch", "triton", "numpy")


class Answer(NamedTuple):
    """Whether a backend can run an operation on a device; ``reason`` is None if it can."""

    operation: str
    backend: str
    device: torch.device
    dtype: torch.dtype
    reason: str | None


def answers() -> Iterator[Answer]:
    """Every operation, device and backend, in the dtype that is usual on the device."""
    for operation in OPERATIONS:
        for device in devices():
            dtype = torch.float32 if device.type == "cpu" else torch.float16
            for backend in BACKEND_NAMES:
                reason = why_not(operation, backend, device=device, dtype=dtype)
                yield Answer(operation, backend, device, dtype, reason)


def versions() -> dict[str, str]:
    """Versions of what a result can depend on."""
    installed = {name: _version(name) for name in _VERSIONS_OF}
    return {"vlmo": vlmo.__version__, "python": platform.python_version()} | installed


def cubins() -> dict[str, list[str]]:
    """The CUDA kernels in this installation: targets by kernel file."""
    # Imported here because a missing extension must not keep the other facts from being shown.
    from vlmo import _C

    found: dict[str, list[str]] = {}
    for name, target in _C.cubins():
        found.setdefault(name, []).append(target)
    return found


def show_machine(console: Console) -> None:
    """Print versions, devices, built kernels, and the answers."""
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
