"""Checks which compiled kernel ``triton_launch.launch`` runs, on a driver that only takes notes.

Run without TRITON_INTERPRET; prints a JSON object with Triton's version.
"""

import contextlib
import itertools
import json
import random
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
import triton.language as tl
from triton import JITFunction, knobs
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver

from compiled import NoDriver
from vlmo.kernels._backends import triton_launch
from vlmo.kernels._backends.triton import compile_options

CPU = torch.device("cpu")


@dataclass
class Options:
    num_warps: int = 4
    num_stages: int = 1


class Pair(NamedTuple):
    tensor: Any
    number: Any


class Config(NamedTuple):
    factor: int


@triton.jit(do_not_specialize=["free"])
def kernel(X, MANY, pair, number, free, scale, flag, C: tl.constexpr):
    total = free * scale * C.factor + number
    if flag:
        total += pair.number
    for i in tl.static_range(len(MANY)):
        total += tl.load(MANY[i])
    if pair.tensor is not None:
        total += tl.load(pair.tensor)
    tl.store(X, total)


class Launch(NamedTuple):
    function: Any
    grid: tuple[int, ...]
    stream: int
    args: tuple[Any, ...]


launches: list[Launch] = []


class Launcher:
    """Takes notes of launches; calls hooks as Triton's launcher does."""

    def __init__(self, source, metadata) -> None:
        pass

    def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *args) -> None:
        if enter is not None:
            enter(metadata)
        launches.append(Launch(function, (x, y, z), stream, args))
        if leave is not None:
            leave(metadata)


class Driver(NoDriver):
    def __init__(self) -> None:
        super().__init__("sm_90")
        self.utils, self.launcher_cls = self, Launcher
        self.device, self.stream = 0, 0

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return self.stream

    def get_device_properties(self, device):
        return {"max_shared_mem": 2**20}

    def load_binary(self, name, binary, shared_bytes, device):
        return object(), object(), 0, 0, 1024  # the second is the function

    def unload_module(self, module):
        pass


searches = 0  # for a kernel by Triton
search = JITFunction.run


def counted(self, *args, warmup, **options):
    global searches
    searches += not warmup
    return search(self, *args, warmup=warmup, **options)


def launch(*args, programs=3, options=None) -> tuple[Launch, int]:
    """The launch, and how many times Triton searched for the kernel."""
    before = searches
    triton_launch.launch(kernel, CPU, programs, options or Options(), *args)
    return launches[-1], searches - before


def expected(args, options):
    """The function of the kernel that Triton itself would run."""
    found = kernel.warmup(*args, grid=(1,), **compile_options(options))
    found.run  # noqa: B018 (loads it)
    return found.function


def tensor(dtype=torch.float32, offset=0):
    return torch.empty(64, dtype=dtype)[offset:]


def base() -> dict[str, Any]:
    return dict(
        X=tensor(),
        MANY=(tensor(), tensor()),
        pair=Pair(tensor(), 5),
        number=7,
        free=3,
        scale=0.5,
        flag=True,
        C=Config(2),
    )


VARIANTS: list[dict[str, Any]] = [
    {},
    dict(X=tensor(torch.bfloat16)),
    dict(X=tensor(offset=1)),
    dict(X=tensor(offset=4)),  # aligned as well
    dict(X=torch.nn.Parameter(tensor())),
    dict(MANY=(tensor(offset=1), tensor())),
    dict(MANY=(tensor(), tensor(offset=1))),
    dict(MANY=(tensor(), tensor(torch.float16))),
    dict(MANY=(tensor(),)),
    dict(pair=Pair(None, 5)),
    dict(pair=Pair(tensor(offset=1), 5)),
    dict(pair=Pair(tensor(), 1)),
    dict(pair=Pair(tensor(), 16)),
    dict(pair=Pair(tensor(), 0)),
    dict(pair=Pair(tensor(), True)),
    *(dict(number=n) for n in (0, 1, -1, 16, -16, 9, 2**31 - 1, 2**31, 2**40, -(2**31), 2**63)),
    dict(number=-(2**31) - 1),
    dict(number=1.0),
    *(dict(free=n) for n in (1, 16, 2**33)),
    dict(scale=1),
    dict(flag=False),
    dict(C=Config(3)),
]
# Those that differ in nothing that is compiled.
ALIKE = [dict(), dict(X=tensor(offset=4)), dict(X=torch.nn.Parameter(tensor())), dict(number=9)]


def check_choice() -> None:
    """The same kernel as Triton's own choice, in any order."""
    cases = [
        (tuple({**base(), **changes}.values()), options)
        for changes, options in itertools.product(VARIANTS, (Options(), Options(num_warps=8)))
    ]
    wanted = [expected(*case) for case in cases]
    order = [number for number in range(len(cases)) for _ in range(3)]
    random.Random(0).shuffle(order)
    found = 0
    for number in order:
        args, options = cases[number]
        made, searched = launch(*args, options=options)
        found += searched
        assert made.function is wanted[number], (args, options)
        assert all(a is b for a, b in zip(made.args, args, strict=True))
    assert found <= len(cases), found
    for changes in ALIKE:
        made, searched = launch(*{**base(), **changes}.values(), programs=5)
        assert (made.function, made.grid, searched) == (wanted[0], (5, 1, 1), 0), changes


def check_places(own: Driver) -> None:
    """A stream is passed on; another device or driver has its own kernels."""
    first, _ = launch(*base().values())
    own.stream = 7
    other, searched = launch(*base().values())
    assert (other.stream, other.function, searched) == (7, first.function, 0)
    own.device = 1
    other, searched = launch(*base().values())
    assert searched == 1 and other.function is not first.function
    own.device, own.stream = 0, 0
    assert launch(*base().values())[1] == 0
    driver.set_active(Driver())
    assert launch(*base().values())[1] == 1
    driver.set_active(own)


@contextlib.contextmanager
def hooked(name: str, hook):
    """``hook`` as one of Triton's launch hooks, which are chains of functions since 3.5."""
    chain = getattr(knobs.runtime, name)
    if chain is None:
        with mock.patch.object(knobs.runtime, name, hook):
            yield
        return
    chain.add(hook)
    yield
    chain.remove(hook)


def check_hooks() -> None:
    """Hooks of launches, which profilers use, and hooks that see the arguments first."""
    launch(*base().values())
    seen: list[str] = []

    def enter(metadata):
        seen.append(metadata.get()["name"])

    def leave(metadata):
        seen.append("left")

    for names in (("enter",), ("exit",), ("enter", "exit")):
        seen.clear()
        with contextlib.ExitStack() as stack:
            for name in names:
                hook = enter if name == "enter" else leave
                stack.enter_context(hooked(f"launch_{name}_hook", hook))
            assert launch(*base().values())[1] == 0
        assert seen == [{"enter": "kernel", "exit": "left"}[name] for name in names]
    launch(*base().values())
    assert len(seen) == 2
    kernel.add_pre_run_hook(lambda *args, **options: seen.append("before"))
    assert launch(*base().values())[1] == 1 and seen[-1] == "before"
    kernel.pre_run_hooks.clear()
    assert launch(*base().values())[1] == 0


def check_settings() -> None:
    """Settings of Triton that change what it compiles."""
    plain, _ = launch(*base().values())
    knobs.runtime.debug = True
    debugged, searched = launch(*base().values())
    assert searched == 1 and debugged.function is not plain.function
    assert launch(*base().values())[1] == 0
    knobs.runtime.debug = False
    assert launch(*base().values())[0].function is plain.function


def check_others() -> None:
    """What only Triton can describe is launched, too."""

    class Other(torch.Tensor):
        pass

    args = {**base(), "X": tensor().as_subclass(Other)}
    assert [launch(*args.values())[1] for _ in range(2)] == [1, 1]


def check_the_number_kept() -> None:
    triton_launch._compiled.clear()
    with mock.patch.object(triton_launch, "_MOST", 2):
        for factor in range(2, 7):
            launch(*{**base(), "C": Config(factor)}.values())
            assert len(triton_launch._compiled) <= 2
    assert launch(*{**base(), "C": Config(6)}.values())[1] == 0


def ptx_as_binary(backend, source, *facts) -> bytes:
    return source if isinstance(source, bytes) else source.encode()


if __name__ == "__main__":
    own = Driver()
    driver.set_active(own)
    with (
        mock.patch.object(CUDABackend, "make_cubin", ptx_as_binary),
        mock.patch.object(JITFunction, "run", counted),
    ):
        check_choice()
        check_places(own)
        check_hooks()
        check_settings()
        check_others()
        check_the_number_kept()
    print(json.dumps({"triton": triton.__version__, "launches": len(launches)}))
