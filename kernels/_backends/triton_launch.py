"""Launches Triton kernels, or compiles several of them in parallel."""

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
        kernel: a function decorated with ``triton.jit``.
        device: device of the tensors.
        programs: size of the grid.
        tile: its numbers of warps and stages are used.
        args: arguments of the kernel.
    """
    options = compile_options(tile)
    if _ahead is not None:
        _ahead.add(kernel, device, *args, grid=(programs,), **options)
        return
    with _on(device):
        kernel[(programs,)](*args, **options)


@contextlib.contextmanager
def compile_only(threads: int | None = None) -> Iterator[None]:
    """Compile the Triton kernels of all calls inside the block without launching them.

    Each variant is compiled once, in a pool of threads, and cached for later calls; the block ends
    when all are compiled. Results of the calls inside are uninitialised memory. A kernel that fails
    to compile raises no error here; the later call that launches it raises it. The block affects
    the whole process: no other thread should call the library meanwhile.

    Args:
        threads: number of compiling threads; None for the number of CPU cores of this process.
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
    """Compiles kernels in a pool of threads."""

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
        """Called by Triton before it compiles; returning True cancels the compilation."""
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
