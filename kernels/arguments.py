"""Argument checks with uniform error messages for all operations.

A message names the argument and the offending value. A wrong type or dtype raises TypeError; a
wrong shape, device or value raises ValueError. All checks run before any kernel is launched.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from .dispatch import exporting

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(
    name: str,
    value: object,
    *,
    shape: Sequence[int] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    device: torch.device | None = None,
    item: int | None = None,
) -> None:
    """Check one tensor argument.

    Args:
        name: the argument's name in the public signature.
        value: the value that was passed.
        shape: the required shape; -1 accepts any size.
        dtypes: the accepted dtypes.
        device: the required device.
        item: index of the tensor if ``name`` is a list.
    """
    # A call has some twenty tensors, nearly all valid, so messages are formatted only on failure.
    if not isinstance(value, Tensor):
        raise TypeError(f"{_item(name, item)}: expected a tensor, got {type(value).__name__}")
    if shape is not None and value.shape != shape and not _fits(value.shape, shape):
        wanted = ", ".join("any" if size == -1 else str(size) for size in shape)
        raise ValueError(f"{_item(name, item)}: shape {tuple(value.shape)} does not fit ({wanted})")
    if dtypes is not None and value.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(
            f"{_item(name, item)}: dtype {str(value.dtype).removeprefix('torch.')} is not one of: "
            f"{allowed}"
        )
    if device is not None and value.device != device:
        raise ValueError(
            f"{_item(name, item)}: on {value.device}, but the other tensors are on {device}"
        )


def _fits(shape: torch.Size, wanted: Sequence[int]) -> bool:
    return len(shape) == len(wanted) and all(
        want in (-1, have) for have, want in zip(shape, wanted, strict=True)
    )


def _item(name: str, item: int | None) -> str:
    return name if item is None else f"{name}[{item}]"


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Check that ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}: {value!r} is not one of {tuple(choices)}")


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype in which autocast runs matrix products on this device; None outside autocast."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context that disables autocast in the body of an operation, whose dtypes are already final.

    Autocast stays active inside a torch.library operation and would round the operands of products
    that must be computed in float32.
    """
    if autocast_dtype(device.type) is None:
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _traced(tensor: Tensor) -> bool:
    """Whether the tensor comes from make_fx or torch.export and has no values."""
    return is_fake(tensor) or get_proxy_mode() is not None


def check_values(name: str, values: Tensor, wrong: Tensor, complaint: str) -> None:
    """Reject values marked ``wrong``.

    On the CPU this raises ValueError at once. On a GPU and in a compiled graph, where reading the
    values would synchronise with the device, the same message becomes a device-side assertion.
    A graph of ``torch.export`` or ``torch.jit.trace`` checks nothing.
    """
    if exporting():
        return
    if values.device.type == "cpu" and not (torch.compiler.is_compiling() or _traced(wrong)):
        if torch._C._functorch.is_batchedtensor(wrong):
            raise NotImplementedError(
                f"{name}: torch.vmap cannot map over it, because its values are checked"
            )
        if bool(wrong.any()):
            value = values.reshape(-1)[wrong.reshape(-1).nonzero()[0, 0]].item()
            raise ValueError(f"{name}: {value} is {complaint}")
    elif values.device.type != "meta":
        torch._assert_async(~wrong.any(), f"{name}: a value is {complaint}")
