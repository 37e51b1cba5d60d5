"""Settings of PyTorch inside a ``with`` block."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch


@contextlib.contextmanager
def _setting(get: Callable[[], Any], change: Callable[[Any], Any], value: Any) -> Iterator[None]:
    before = get()
    change(value)
    try:
        yield
    finally:
        change(before)


def threads(count: int) -> AbstractContextManager[None]:
    """The number of threads of this process."""
    return _setting(torch.get_num_threads, torch.set_num_threads, count)


def default_dtype(dtype: torch.dtype) -> AbstractContextManager[None]:
    return _setting(torch.get_default_dtype, torch.set_default_dtype, dtype)
