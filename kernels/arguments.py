"""Checks of arguments, so that every operation refuses bad input in the same words.

A message names the argument and the offending value. A wrong type or dtype raises TypeError; a
wrong shape, device or value raises ValueError. All of it happens before anything is launched.
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
        name: the argument's name, as the caller wrote it.
        value: what was passed.
        shape: the shape it must have; -1 stands for any size.
        dtypes: the dtypes it may have.
        device: the device it must be on.
        item: its number in the list ``name``, if it is in one.
    """
    # A call has some twenty tensors and nearly all of them are right: words are made last.
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
    """The dtype autocast runs matrix products in on this device, or None outside autocast."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context for the body of an operation: dtypes were settled by the caller.

    Autocast stays active inside a torch.library operation, and would round the operands of products
    that are meant to be float32.
    """
    if autocast_dtype(device.type) is None:
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _traced(tensor: Tensor) -> bool:
    """Whether the tensor is one of make_fx or torch.export, which have no values to look at."""
    return is_fake(tensor) or get_proxy_mode() is not None


def check_values(name: str, values: Tensor, wrong: Tensor, complaint: str) -> None:
    """Refuse values marked ``wrong``.

    On the CPU this raises ValueError at once. On a GPU, and in a compiled graph, where looking
    would wait for the device, the same words become an assertion that the device itself checks.
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
