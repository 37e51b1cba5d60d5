"""Launches Triton kernels, or compiles several of them in parallel.

Triton finds the compiled kernel for a call by a specialisation of each argument, which takes the
host longer than a small kernel takes on a GPU. :func:`launch` therefore keeps the compiled kernels
under a key of its own, which is quick to make, and passes the arguments to Triton's launcher.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import itertools
import operator
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import Parameter
from triton.compiler import CompiledKernel
from triton.runtime import driver

from .triton import Options, compile_options

_ahead: _Ahead | None = None


def launch(kernel: Any, device: torch.device, programs: int, tile: Options, *args: Any) -> None:
    """Run ``kernel`` on the current stream of ``device``; inside :func:`compile_only`, compile it.

    Args:
        kernel: a function decorated with ``triton.jit``.
        device: device of the tensors.
        programs: size of the grid.
        tile: its numbers of warps and stages are used, and whether it has tensor descriptors.
        args: arguments of the kernel.
    """
    if _ahead is not None:
        _ahead.add(kernel, device, *args, grid=(programs,), **compile_options(tile))
        return
    with _on(device):
        if getattr(tile, "descriptors", False):
            # Triton asks an allocator for their memory; the caller may have set another one.
            contextvars.copy_context().run(_run_with_scratch, kernel, (programs,), tile, args)
        else:
            _run(kernel, (programs,), tile, args)


def _run_with_scratch(*args: Any) -> None:
    triton.set_allocator(_allocate)
    _run(*args)


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device="cuda")  # aligned to 512 bytes


_compiled: dict[tuple, CompiledKernel] = {}
_MOST = 4096  # compiled kernels that are kept; beyond, all are looked up again
# Settings of Triton that change what it compiles; versions lack some.
_SETTINGS = [
    functools.partial(operator.attrgetter(name), group)
    for group, name in (
        (triton.knobs.runtime, "debug"),
        (triton.knobs.compilation, "instrumentation_mode"),
        (triton.knobs.compilation, "fpsan_homomorphic_casts"),
    )
    if hasattr(group, name)
]
_DIVISIBLE = ("not by 16", "by 16")  # no integers: these are in the key for themselves
_constant: dict[Any, list[bool]] = {}  # per kernel: which of its parameters are constants


def _run(kernel: Any, grid: tuple[int], tile: Options, args: tuple[Any, ...]) -> None:
    """``kernel[grid](*args)`` on the current device, whose second call finds the kernel faster."""
    hooks = triton.knobs.runtime
    if (
        not isinstance(kernel, triton.JITFunction)  # interpreted
        or kernel.pre_run_hooks
        or getattr(hooks, "add_stages_inspection_hook", None) is not None
    ):
        kernel[grid](*args, **compile_options(tile))
        return
    active = driver.active
    device = active.get_current_device()
    key = _key_of(kernel, (active, device), tile, args)
    compiled = None if key is None else _compiled.get(key)
    if compiled is None:
        compiled = kernel[grid](*args, **compile_options(tile))
        if key is not None and isinstance(compiled, CompiledKernel):
            if len(_compiled) >= _MOST:
                _compiled.clear()
            _compiled[key] = compiled
        return
    # What JITFunction.run does once it has found the kernel.
    stream = active.get_current_stream(device)
    enter, leave, described = hooks.launch_enter_hook, hooks.launch_exit_hook, None
    # Since Triton 3.5 these are chains of hooks, which the launcher calls even if they are empty.
    if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
        described = compiled.launch_metadata(grid, stream, *args)
    else:
        enter = leave = None
    run = compiled.run  # loads the kernel when first read
    function, packed = compiled.function, compiled.packed_metadata
    run(*grid, 1, 1, stream, function, packed, described, enter, leave, *args)


def _key_of(
    kernel: Any, place: tuple[Any, ...], tile: Options, args: tuple[Any, ...]
) -> tuple | None:
    """Everything that decides which compiled kernel runs; None if only Triton can tell.

    On NVIDIA GPUs Triton compiles a variant for the dtypes of tensors and whether 16 divides their
    addresses, for integers that are 1, divisible by 16 or wide, and for each value of a constant.

    Args:
        place: the driver and the device.
    """
    key: list[Any] = [kernel.fn, *place, tile.num_warps, tile.num_stages]
    key += [setting() for setting in _SETTINGS]
    constant = _constant.get(kernel.fn)
    if constant is None:
        constant = _constant[kernel.fn] = [param.is_constexpr for param in kernel.params]
    key += itertools.compress(args, constant)
    addresses: list[int] = []
    variable = itertools.compress(args, map(operator.not_, constant))
    if len(args) != len(constant) or not _describe(variable, key.append, addresses.append):
        return None
    if functools.reduce(operator.or_, addresses, 0) % 16:
        key += [address % 16 == 0 for address in addresses]
    return tuple(key)


def _describe(
    values: Iterable[Any], add: Callable[[Any], None], point: Callable[[int], None]
) -> bool:
    """Pass to ``add`` what Triton specialises on, and addresses to ``point``; False if unknown."""
    for value in values:
        kind = type(value)
        if kind is Tensor or kind is Parameter:
            add(value.dtype)
            point(value.data_ptr())
        elif value is None:
            add(None)
        elif kind is int:
            # Few integers are 1, or wide: these are in the key themselves.
            add(_DIVISIBLE[value % 16 == 0] if 1 < value < 2**31 else value)
        elif kind is float or kind is bool:
            add(kind)
        elif isinstance(value, tuple):
            add((kind, len(value)))
            if not _describe(value, add, point):
                return False
        else:
            return False
    return True


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


_HERE = contextlib.nullcontext()


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context in which ``device`` is the current one."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return _HERE
    return torch.cuda.device(device)
