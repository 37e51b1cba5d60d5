"""Run a kernel's PTX on host memory, and report the findings."""

from __future__ import annotations

import ctypes
import functools
import pathlib
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from sm70.cache import build_shared_library

from .text import parse
from .translate import Program

FINDINGS = [  # in the order of the enumeration Finding in machine.h
    "shared memory: read races with write",
    "shared memory: two writes race",
    "shared memory: write races with read",
    "global memory: read races with write",
    "global memory: two writes race",
    "global memory: write races with read",
    "plain access races with atomic operation",
    "read of shared memory that nobody has written",
    "read of global memory that nobody has written",
    "access to bytes of a copy in flight",
    "product reads shared memory without a proxy fence behind the write",
    "write to memory with more readers than are remembered",
    "asynchronous work is never waited for",
    "register of a product in flight",
    "copy of a tile reads global memory without a proxy fence behind the write",
    "copy of a tile overwrites shared memory without a proxy fence behind the write",
    "descriptor is used without a tensormap fence behind its write",
]
_THREADS, _REAL_THREADS = 2048, 1024  # MAX_THREADS and REAL_THREADS in machine.h
_FORMATS = {"i1": "<i1", "u1": "<u1", "fp16": "<f2", "fp32": "<f4", "fp64": "<f8"}
_FORMATS |= {f"{kind}{8 * size}": f"<{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)}


class Fault(Exception):
    """A launch that could not continue."""


class Interleaving(NamedTuple):
    """The schedule of a launch's CTAs and warps. The same values give the same run everywhere."""

    resident: int = 3  # CTAs in flight at a time
    seed: int = 0
    quantum: int = 50  # about how many instructions a warp runs at a time
    skew: bool = True  # some CTAs are far slower than others for a while
    shuffle: bool = False  # CTAs start in random order
    late: bool = True  # copies and products execute at their wait, else when they are issued
    races: bool = True
    conflicts: bool = False  # count bank conflicts
    limit: int = 2_000_000_000  # on the instructions of all warps


class Report(NamedTuple):
    """Accesses at one pair of statements that violate a rule."""

    finding: str
    statement: str
    other: str
    address: int
    thread: str
    other_thread: str
    times: int

    def __str__(self) -> str:
        other = f"\n    {self.other} by {self.other_thread}" if self.other else ""
        where = f"at 0x{self.address:x}, {self.times} times"
        return f"{self.finding} {where}\n    {self.statement} by {self.thread}{other}"


class Result(NamedTuple):
    """The reports of a launch, and how often it has executed each statement."""

    reports: list[Report]
    warp_count: np.ndarray  # per statement: warps that reached it
    lane_count: np.ndarray  # per statement: lanes that executed it
    # Per statement, if bank conflicts were counted: passes through the banks of shared memory, and
    # their number without conflicts.
    wavefronts: np.ndarray
    ideal_wavefronts: np.ndarray


class _Report(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("finding", "at", "other")),
        ("address", ctypes.c_uint64),
        *((name, ctypes.c_uint32) for name in ("thread", "other_thread", "count")),
    ]


class _Options(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_int) for n in ("races", "late", "resident", "quantum", "skew", "shuffle")),
        ("conflicts", ctypes.c_int),
        *((name, ctypes.c_uint64) for name in ("seed", "limit")),
    ]


@functools.cache
def _library() -> ctypes.CDLL:
    here = pathlib.Path(__file__).parent
    headers = "".join(path.read_text() for path in sorted(here.glob("*.h")))
    flags = ["-std=c++20", "-O2", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing"]
    library = ctypes.CDLL(
        str(build_shared_library(here / "machine.cpp", flags, headers, stem="ptx"))
    )
    library.ptx_new.restype = ctypes.c_void_p
    library.ptx_error.restype = library.ptx_names.restype = ctypes.c_char_p
    return library


def knows(name: str) -> bool:
    """Whether the machine implements an instruction of this name."""
    return bool(_library().ptx_knows(name.encode()))


def names() -> set[str]:
    """The names of all instructions that the machine implements."""
    return set(_library().ptx_names().decode().split())


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


class Machine:
    """A compiled kernel that can be launched.

    Args:
        text: PTX with one entry.
        shared_bytes: dynamic shared memory of a CTA.

    Raises:
        Unsupported: the PTX has a construct that the emulator does not implement.
    """

    def __init__(self, text: str, shared_bytes: int) -> None:
        self.kernel = parse(text)
        self.program = program = Program(self.kernel, knows)
        names = (ctypes.c_char_p * len(program.names))(*(n.encode() for n in program.names))
        codes, pool = np.ascontiguousarray(program.codes), np.array(program.pool, np.int64)
        specials = np.array(program.specials, np.int64)
        library = _library()
        self._handle = ctypes.c_void_p(
            library.ptx_new(
                *(len(program.names), names, _pointer(codes), len(pool), _pointer(pool)),
                *(len(program.registers), _pointer(program.registers), self.kernel.threads),
                *(shared_bytes, _pointer(specials)),
            )
        )
        weakref.finalize(self, library.ptx_delete, self._handle)

    def launch(
        self,
        grid: int,
        arguments: Sequence[tuple[str, int | float]],
        buffers: Mapping[tuple[int, int], np.ndarray | None],
        interleaving: Interleaving,
    ) -> Result:
        """Run ``grid`` CTAs.

        Args:
            arguments: Triton's type ("i32", "fp32", "*" for an address) and value of each
                parameter; the remaining parameters are zero.
            buffers: (address, size) of the memory that may be accessed, mapped to an array with one
                byte per byte, which is 0 until it has been written, or None if all is written.

        Raises:
            Fault: an access is out of bounds or misaligned, or a barrier or the launch never
                completes.
        """
        block = np.zeros(self.kernel.parameter_bytes, np.uint8)
        assert len(arguments) <= len(self.kernel.parameters)
        for (type_, value), parameter in zip(arguments, self.kernel.parameters, strict=False):
            number = np.array(value, "<u8" if type_.startswith("*") else _FORMATS[type_])
            end = parameter.offset + parameter.width
            assert number.nbytes == parameter.width, (type_, parameter)
            block[parameter.offset : end] = np.frombuffer(number.tobytes(), np.uint8)
        table = np.array(
            [
                (at, size, 0 if written is None else written.ctypes.data)
                for (at, size), written in sorted(buffers.items(), key=lambda item: item[0])
            ],
            np.uint64,
        )
        options = _Options(**interleaving._asdict())
        library, count = _library(), len(self.kernel.statements)
        library.ptx_launch(
            *(self._handle, grid, _pointer(block), len(block), _pointer(table), len(buffers)),
            ctypes.byref(options),
        )
        if error := library.ptx_error(self._handle).decode():
            number, where, what = error.split("\n", 2)
            statement = self._statement(int(number)) if number else ""
            raise Fault("\n    ".join(filter(None, (what, statement, where))))
        counts = [np.zeros(count, np.uint64) for _ in range(4)]
        library.ptx_counts(self._handle, *map(_pointer, counts))
        return Result(self._reports(), *counts)

    def executed(self, result: Result) -> Counter[str]:
        """How often warps have executed each of the machine's instructions."""
        counts: Counter[str] = Counter()
        for name, count in zip(self.program.names, result.warp_count, strict=True):
            counts[name] += int(count)
        return counts

    def _reports(self) -> list[Report]:
        found = ctypes.POINTER(_Report)()
        count = _library().ptx_reports(self._handle, ctypes.byref(found))
        return [
            Report(
                *(FINDINGS[r.finding], self._statement(r.at), self._statement(r.other), r.address),
                *(_thread(r.thread), _thread(r.other_thread), r.count),
            )
            for r in found[:count]
        ]

    def _statement(self, number: int) -> str:
        if number < 0:
            return ""
        s = self.kernel.statements[number]
        return f"{s.source}, line {s.line} of the PTX: {s.text[:90]}"


def _thread(number: int) -> str:
    if not number:
        return "several threads"
    cta, thread = divmod(number - 1, _THREADS)
    if thread >= _REAL_THREADS:
        return f"CTA {cta}, copies of its mbarrier {thread - _REAL_THREADS}"
    return f"CTA {cta}, thread {thread}"
