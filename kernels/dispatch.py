"""Which backend runs a call: argument > use_backend() > VLMO_KERNELS > first that can."""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

BACKEND_NAMES = ("cuda", "triton", "cpu", "reference")
_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))
# The backends of devices on which a GPU's kernel would run in an interpreter, for tests: such a
# kernel has to be asked for by name.
_USUAL = {"cpu": "cpu", "meta": "reference"}

# A plain module global: Dynamo guards on it, so a compiled model recompiles when it changes.
_forced: str | None = None


class _Block:
    """One open ``use_backend``."""

    def __init__(self, name: str | None):
        self.name, self.thread = name, threading.get_ident()


_open: list[_Block] = []  # in the order in which they were opened


class Backend(Protocol):
    """What an implementation module offers to the dispatch, besides forward and backward."""

    def why_not(self, *facts: Any) -> str | None:
        """None if the call described by ``facts`` can run, else one sentence with the reason."""


def check_name(name: str | None, source: str) -> None:
    """Raise ValueError if ``name`` is no backend; ``source`` says who gave it."""
    if name is not None and name not in BACKEND_NAMES:
        raise ValueError(f"{source}: {name!r} is not a backend; choose from {BACKEND_NAMES}")


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Run every operation inside the ``with`` block on the backend ``name``.

    None gives the choice back to ``VLMO_KERNELS`` and the order of preference.

    The choice holds for the whole process, not for one thread: autograd recomputes checkpointed
    blocks in threads of its own, which must use the backend of the forward pass. Of several open
    blocks the one opened last decides; a block that differs from one that another thread holds open
    gives a warning. Threads that need different backends pass ``backend=`` to each call.

    Raises:
        ValueError: ``name`` is no backend.
    """
    global _forced
    check_name(name, "use_backend")
    block = _Block(name)
    for other in _open:
        if other.thread != block.thread and other.name != name:
            warnings.warn(
                f"use_backend({name!r}) holds for the whole process, and another thread is inside "
                f"use_backend({other.name!r}): its operations run on {name!r} as well.",
                stacklevel=3,
            )
    _open.append(block)
    _forced = name
    try:
        yield
    finally:
        _open.remove(block)  # which may not be the last one: blocks of threads can overlap
        _forced = _open[-1].name if _open else None


def requested(argument: str | None) -> str | None:
    """The backend asked for by name, or None: the first of the three sources that speaks."""
    check_name(argument, "backend")
    if argument is not None:
        return argument
    if _forced is not None:
        return _forced
    variable = os.environ.get("VLMO_KERNELS") or None
    check_name(variable, "VLMO_KERNELS")
    return variable


def choose(
    operation: str, backends: Mapping[str, Backend], argument: str | None, *facts: Any
) -> str:
    """Name the backend for one call.

    Args:
        operation: name of the operation, for messages.
        backends: implementations in order of preference.
        argument: the call's own ``backend=`` argument.
        facts: what ``why_not`` of the implementations judges by.

    Raises:
        ValueError: the name asked for is no backend.
        NotImplementedError: the backend asked for cannot run this call (with its reason), or none
            can (with every backend's reason).
    """
    name = requested(argument)
    if name is not None:
        reason = backends[name].why_not(*facts)
        if reason is not None:
            raise NotImplementedError(
                f"{operation}: backend {name!r} cannot run this call: {reason}"
            )
        return name
    reasons = []
    for candidate, implementation in backends.items():
        reason = implementation.why_not(*facts)
        if reason is None:
            return candidate
        reasons.append(f"{candidate}: {reason}")
    raise NotImplementedError(f"{operation}: no backend can run this call. " + " ".join(reasons))


def resolve(
    operation: str,
    backends: Mapping[str, Backend],
    argument: str | None,
    tensors: Iterable[Tensor | None],
    device: torch.device,
    *facts: Any,
) -> str:
    """The backend of one call.

    Transforms of torch.func and forward-mode differentiation look inside an operation, and graphs
    of ``torch.export``, ``torch.jit.trace`` and what builds on them (ONNX) are to run without this
    library: both get the reference, which is plain ATen operations. If a kernel backend was asked
    for by name, its operation is in an exported graph, and whoever runs that must have imported
    :mod:`vlmo.kernels`, or lower it by :func:`vlmo.kernels.decompositions`.

    Args:
        operation, backends, argument: as for :func:`choose`.
        tensors: those of the call that may have a derivative.
        device: of the call; the first of the facts that ``why_not`` judges by. On the CPU the
            first backend that can is not what is wanted: see :data:`_USUAL`.
        facts: the others.

    Raises:
        ValueError, NotImplementedError: as :func:`choose`; also a named backend other than the
            reference under a transform.
    """
    name = requested(argument)
    if transformed(tensors):
        if name not in (None, "reference"):
            raise NotImplementedError(
                f"{operation}: backend {name!r} has neither forward-mode derivatives nor rules for "
                "the transforms of torch.func (grad, jvp, vmap, ...); the backend 'reference' has "
                "both"
            )
        return "reference"
    if name is None and exporting():
        return "reference"
    return choose(operation, backends, name or _USUAL.get(device.type), device, *facts)


def transformed(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a transform of torch.func or forward-mode differentiation sees this call.

    Both look inside an operation. The kernels, which only have a backward formula, would give them
    zeros.
    """
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():
        return True
    return forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )


def exporting() -> bool:
    """Whether ``torch.export`` or ``torch.jit.trace`` records what runs now."""
    # Not is_exporting(), which Dynamo of torch 2.8 takes to be true in every graph.
    return torch.compiler._is_exporting_flag or torch.jit.is_tracing()


def runs_eagerly(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a call runs at once on these plain tensors, traced and replaced by nothing."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack()  # a mode: fake tensors, a FLOP counter
        or torch._C._are_functorch_transforms_active()
    ) and _PLAIN.issuperset(map(type, tensors))
