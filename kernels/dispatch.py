"""Selects the backend of a call: argument > use_backend() > VLMO_KERNELS > first that can run."""

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

BACKEND_NAMES = ("cuda", "triton", "composed", "cpu", "reference")
# The operations that a name can choose a backend for: "moe_ffn=composed,shared_attention=triton".
NAMED_OPERATIONS = ("moe_ffn", "moe_linear", "shared_attention")
_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))
# The backends of devices on which Triton kernels can only run in its interpreter, which is for
# tests: such a kernel must be requested by name.
_USUAL = {"cpu": ("cpu", "reference"), "meta": ("reference",)}

# A plain module global: Dynamo guards on it, so a compiled model recompiles when it changes.
_forced: str | None = None


class _Block:
    """A ``use_backend`` block that is active."""

    def __init__(self, name: str | None):
        self.name, self.thread = name, threading.get_ident()


_open: list[_Block] = []  # in the order in which they were entered


class Backend(Protocol):
    """The interface of an implementation module to the dispatch, besides forward and backward."""

    def why_not(self, *facts: Any) -> str | None:
        """None if the call described by ``facts`` can run, else the reason in one sentence."""


class Missing:
    """A backend that an operation does not have."""

    def __init__(self, reason: str):
        self._reason = reason

    def why_not(self, *facts: Any) -> str:
        return self._reason


def check_name(name: str | None, source: str) -> None:
    """Raise ValueError unless ``name`` is a backend, or backends by operation.

    Args:
        name: ``"triton"``, or ``"moe_ffn=composed"``, several of these separated by commas.
        source: the origin of the name.
    """
    if name is None:
        return
    for part in name.split(","):
        operation, _, backend = part.rpartition("=")
        if backend not in BACKEND_NAMES:
            raise ValueError(f"{source}: {backend!r} is not a backend; choose from {BACKEND_NAMES}")
        if name not in BACKEND_NAMES and operation not in NAMED_OPERATIONS:
            raise ValueError(
                f"{source}: {part!r} names no operation; choose from {NAMED_OPERATIONS}"
            )


def name_for(operation: str, name: str | None) -> str | None:
    """The backend that a name as in :func:`check_name` requests for an operation, if any."""
    if name is None or "=" not in name:
        return name
    return dict(part.split("=") for part in name.split(",")).get(operation)


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Run every operation inside the ``with`` block on the backend ``name``.

    ``"moe_ffn=composed"`` names a backend for one operation, and leaves the choice for the others
    as it is; several are separated by commas. Not every operation has every backend. None restores
    the choice by ``VLMO_KERNELS`` and the order of preference.

    The choice applies to the whole process, not to one thread: autograd recomputes checkpointed
    blocks in its own threads, which must use the backend of the forward pass. The block entered
    last takes precedence; a warning is given if it differs from an active block of another thread.
    Threads that need different backends pass ``backend=`` to each call.

    Raises:
        ValueError: ``name`` is not a backend, or names an operation that does not exist.
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
        _open.remove(block)  # not always the last one: blocks of different threads can overlap
        _forced = _open[-1].name if _open else None


def requested(operation: str, argument: str | None) -> str | None:
    """The backend requested by name, or None: the first of the three sources that has one."""
    check_name(argument, "backend")
    name = name_for(operation, argument) or name_for(operation, _forced)
    if name is not None:
        return name
    variable = os.environ.get("VLMO_KERNELS") or None
    check_name(variable, "VLMO_KERNELS")
    return name_for(operation, variable)


def choose(
    operation: str, backends: Mapping[str, Backend], argument: str | None, *facts: Any
) -> str:
    """Return the name of the backend for a call.

    Args:
        operation: name of the operation, for error messages.
        backends: implementations in order of preference.
        argument: the call's own ``backend=`` argument.
        facts: arguments of ``why_not`` of the implementations.

    Raises:
        ValueError: the requested name is not a backend.
        NotImplementedError: the requested backend cannot run this call (with its reason), or no
            backend can (with the reason of each).
    """
    name = requested(operation, argument)
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
    """The backend of a call.

    Transforms of torch.func and forward-mode differentiation must see the inside of an operation,
    and graphs of ``torch.export`` and ``torch.jit.trace`` (also for ONNX) should run without this
    library: both use the reference, which consists of plain ATen operations. If a kernel backend
    was requested by name, an exported graph contains its operation. To run such a graph, import
    :mod:`vlmo.kernels` first, or lower it with :func:`vlmo.kernels.decompositions`.

    Args:
        operation, backends, argument: as for :func:`choose`.
        tensors: tensors of the call that may have a derivative.
        device: device of the call, which is the first argument of ``why_not``. On some devices not
            every backend that can run is considered: see :data:`_USUAL`.
        facts: the other arguments of ``why_not``.

    Raises:
        ValueError, NotImplementedError: as :func:`choose`; also a named backend other than the
            reference under a transform.
    """
    name = requested(operation, argument)
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
    usual = _USUAL.get(device.type)
    if name is None and usual is not None:
        backends = {candidate: backends[candidate] for candidate in usual}
    return choose(operation, backends, name, device, *facts)


def transformed(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is applied to this call.

    Both need more rules than the backward formula that kernels have, and would get zeros from them.
    """
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():
        return True
    return forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )


def exporting() -> bool:
    """Whether ``torch.export`` or ``torch.jit.trace`` is recording."""
    # Not is_exporting(), which Dynamo of torch 2.8 treats as true in every graph.
    return torch.compiler._is_exporting_flag or torch.jit.is_tracing()


def runs_eagerly(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a call runs eagerly on these tensors: nothing traces, transforms or intercepts it."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack()  # a mode, such as fake tensors or a FLOP counter
        or torch._C._are_functorch_transforms_active()
    ) and _PLAIN.issuperset(map(type, tensors))
