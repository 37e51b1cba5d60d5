"""Where a program runs and in which dtype: what the user names, checked before anything starts."""

from __future__ import annotations

import torch

from vlmo.kernels import why_not
from vlmo.kernels.dispatch import requested
from vlmo.kernels.target import compute_capability, devices

OPERATIONS = ("moe_ffn", "shared_attention")  # that the model calls


def chosen_device(name: str) -> torch.device:
    """The device of a name: "auto" for the GPU if there is one, "cpu", "cuda" or "cuda:1".

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
    """The 16-bit type to compute in: bfloat16 where the GPU has it, float16 on older ones."""
    capability = compute_capability(device)
    if capability is None:
        return None
    return torch.bfloat16 if capability >= (8, 0) else torch.float16


def chosen_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """The autocast dtype of a name: "auto", "float32" (none), "bfloat16" or "float16".

    Raises:
        ValueError: another name.
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
    """Raise now what would otherwise come up in the middle of the program.

    Args:
        backend: asked for by name; None for that of ``use_backend`` or ``VLMO_KERNELS``, if any.
        device: to run on.
        autocast: dtype of the products; None for float32.

    Raises:
        ValueError: there is no such backend.
        NotImplementedError: it cannot run on this device in this dtype.
    """
    name = requested(backend)
    if name is None:
        return
    dtype = autocast or torch.float32
    for operation in OPERATIONS:
        reason = why_not(operation, name, device=device, dtype=dtype)
        if reason is not None:
            raise NotImplementedError(
                f"backend {name!r} cannot run {operation} on {device}: {reason}"
            )
