"""The one place that launches Triton kernels, or compiles several of them at a time."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton

from .triton import Options, compile_options

_ahead: _Ahead | None = None


def launch(kernel: Any, device: torch.device, programs: int, tile: Options, *args: Any) -> None:
    """Run ``kernel`` on the current stream of ``device``; inside :func:`compile_only`, compile it.

    Args:
        kernel: what ``triton.jit`` returned.
        device: of the tensors.
        programs: size of the grid.
        tile: the number of warps and of stages.
        args: of the kernel.
    """
    options = compile_options(tile)
    if _ahead is not None:
        _ahead.add(kernel, device, *args, grid=(programs,), **options)
        return
    with _on(device):
        kernel[(programs,)](*args, **options)


@contextlib.contextmanager
def compile_only(threads: int | None = None) -> Iterator[None]:
    """Calls inside the block compile their Triton kernels and launch none of them.

    Each variant is compiled once, in one of several threads, and kept for later calls; the block
    ends when all are compiled. Results of the calls inside are memory that nobody has written. A
    kernel that does not compile is no error here, but one of the call that needs it. The block is
    for the whole process: no other thread should call the library meanwhile.

    Args:
        threads: that compile at a time; as many as there are CPU cores for this process if None.
    """
    global _ahead
    assert _ahead is None, "compile_only inside compile_only"
    hooks = triton.knobs.runtime
    previous = hooks.jit_cache_hook
    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
        _ahead = _Ahead(pool)
        hooks.jit_cache_hook = _ahead.asked
        try:
            yield
        finally:
            _ahead = None
            pool.shutdown()
            hooks.jit_cache_hook = previous


class _Ahead:
    """Kernels that are compiled in a pool of threads."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._lock = threading.Lock()
        self._asking = threading.local()
        self._seen: set[tuple[Any, Any]] = set()

    def add(self, kernel: Any, device: torch.device, *args: Any, **options: Any) -> None:
        self._asking.new = False
        self._compile(kernel, device, args, options)
        new = self._asking.new
        del self._asking.new
        if new:
            self._pool.submit(self._compile, kernel, device, args, options)

    def asked(self, *, key: Any, fn: Any, **facts: Any) -> bool:
        """Triton calls this before it compiles, and does not if the result is true."""
        if not hasattr(self._asking, "new"):
            return False  # a thread of the pool
        with self._lock:
            name = (fn.jit_function, key)
            self._asking.new = name not in self._seen
            self._seen.add(name)
        return True

    def _compile(self, kernel: Any, device: torch.device, args: Any, options: Any) -> None:
        with _on(device):
            kernel.warmup(*args, **options)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
