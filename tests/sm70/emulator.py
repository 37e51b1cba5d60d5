"""Run sm_70 kernels on the CPU, on numpy arrays, with memory and synchronisation checks.

    kernel = Kernel(cubin, "name")
    kernel.launch(grid, block, [array, 3, 1.5], smem=1024)

A launch that finds problems raises `KernelFault` with a readable list of them, unless check=False.
"""

import bisect
import ctypes
import hashlib
import os
import pathlib
import struct
import warnings
from dataclasses import dataclass, field

import numpy as np

from . import codegen
from .cache import build_shared_library, cache_dir
from .disasm import disassemble
from .elf import Cubin

ALIGNMENT = 256  # of a buffer in bytes, as from cudaMalloc
COMPILER_FLAGS = ("-O1", "-ftree-loop-vectorize", "-march=native", "-ffp-contract=off")

KINDS = [
    "global load out of bounds",
    "global store/atomic out of bounds",
    "global access misaligned",
    "shared access out of bounds",
    "shared access misaligned",
    "local access out of bounds",
    "shared race: read after write",
    "shared race: write after read",
    "shared race: write after write",
    "deadlock at barrier",
    "no progress (spinning, hang)",
    "instruction limit reached (hang?)",
    "unimplemented instruction",
    "jump outside the kernel",
]
RACES = {KINDS[k] for k in (6, 7, 8)}
CTA_ORDERS = {"ascending": 0, "descending": 1, "random": 2}


class KernelFault(RuntimeError):
    """A launch found errors or races; `result` holds the details."""

    def __init__(self, result):
        super().__init__(str(result))
        self.result = result


class _Report(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_int32),
        ("size", ctypes.c_int32),
        ("address", ctypes.c_uint64),
        ("cta", ctypes.c_int32),
        ("warp", ctypes.c_int32),
        ("lane", ctypes.c_int32),
        ("other", ctypes.c_int32),
        ("pc", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    ]


class _LaunchConfig(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint32),
        ("local_bytes", ctypes.c_uint32),
        ("resident", ctypes.c_int32),
        ("races", ctypes.c_int32),
        ("weak", ctypes.c_int32),
        ("cta_order", ctypes.c_int32),
        ("seed", ctypes.c_uint64),
        ("slice", ctypes.c_int64),
        ("first", ctypes.c_uint64),
        ("last", ctypes.c_uint64),
        ("max_instructions", ctypes.c_uint64),
        ("hang_instructions", ctypes.c_uint64),
    ]


_TRACE_CALLBACK = ctypes.CFUNCTYPE(
    None,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_uint64,
    ctypes.c_void_p,
    ctypes.c_uint64,
)


@dataclass
class Problem:
    """One error or race, with the instruction that caused it."""

    kind: str
    pc: int
    instruction: str
    cta: int
    warp: int
    lane: int
    address: int
    size: int
    other: int  # second warp of a race; barrier number of a deadlock
    where: str = ""  # address relative to a kernel argument

    def __str__(self):
        text = f"{self.kind}: CTA {self.cta} warp {self.warp}"
        if self.lane >= 0:
            text += f" lane {self.lane}"
        if self.kind in RACES:
            text += f" against warp {self.other}"
        if self.size:
            text += f", {self.size} bytes at {self.where or hex(self.address)}"
        if self.kind == "deadlock at barrier":
            text += f", barrier {self.other}"
        return f"{text}, pc 0x{self.pc:x}: {self.instruction}"


@dataclass
class LaunchResult:
    """Outcome of a launch."""

    problems: list
    num_errors: int
    num_races: int
    counts: np.ndarray  # executions of each instruction (warp level)
    opcodes: dict = field(repr=False, default_factory=dict)  # opcode -> executions

    @property
    def ok(self):
        return not (self.num_errors or self.num_races)

    @property
    def warp_instructions(self):
        return int(self.counts.sum())

    def __str__(self):
        lines = [f"{self.num_errors} errors, {self.num_races} races"]
        return "\n  ".join(lines + [str(p) for p in self.problems])


def dim3(x):
    """Grid or block size as three numbers."""
    x = (x,) if np.isscalar(x) else tuple(x)
    return tuple(int(v) for v in x) + (1,) * (3 - len(x))


def aligned_copy(array):
    """A byte buffer of exactly the array's size at an aligned address; returns (owner, view)."""
    owner = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    start = -owner.ctypes.data % ALIGNMENT
    view = owner[start : start + array.nbytes]
    view[:] = array.reshape(-1).view(np.uint8)
    return owner, view


class Kernel:
    """One kernel of a cubin, translated to native code (cached by content).

    `strict` raises NotImplementedError for instructions that the emulator does not implement.
    Otherwise they are listed in `unimplemented`, a warning is issued, and executing one is an error
    of the launch.
    """

    def __init__(self, cubin, name=None, strict=False):
        image = getattr(cubin, "image", cubin)
        if isinstance(image, (str, os.PathLike)):
            image = pathlib.Path(image).read_bytes()
        self.elf = Cubin(image)
        functions = disassemble(image)
        if name is None:
            if len(functions) != 1:
                raise ValueError(
                    f"the cubin holds several kernels, choose one of {sorted(functions)}"
                )
            name = next(iter(functions))
        if name not in functions:
            raise KeyError(f"no kernel {name!r}; the cubin holds {sorted(functions)}")
        self.name = name
        self.instructions = functions[name]
        self.registers = self.elf.registers(name)
        self.static_shared = self.elf.static_shared(name)
        stack = self.elf.stack_size(name)
        self.local_bytes = 16384 if stack is None else max(1024, (stack + 1023) // 512 * 512)
        self.parameter_base, self.parameters = self.elf.parameters(name)
        translation = codegen.translate(self.instructions)
        self.unimplemented = translation.unimplemented
        if self.unimplemented:
            message = f"kernel {name}: unimplemented instructions\n  " + "\n  ".join(
                map(str, self.unimplemented)
            )
            if strict:
                raise NotImplementedError(message)
            warnings.warn(message, stacklevel=2)
        self._lib = self._build(translation.source)
        self._globals = self._place_globals()

    # --- set-up

    @staticmethod
    def _build(source):
        """Compile the generated code together with runtime.cpp and load it."""
        runtime = pathlib.Path(__file__).with_name("runtime.cpp")
        generated = cache_dir() / f"kernel-{hashlib.sha256(source.encode()).hexdigest()[:20]}.inc"
        if not generated.exists():
            temporary = generated.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(source)
            os.replace(temporary, generated)
        flags = [*COMPILER_FLAGS, f'-DSM70_KERNEL="{generated}"']
        lib = ctypes.CDLL(str(build_shared_library(runtime, flags, extra=source, stem="kernel")))
        u64, pointer = ctypes.c_uint64, ctypes.c_void_p
        lib.emu_errors.restype = lib.emu_races.restype = lib.emu_reports.restype = u64
        lib.emu_buffer.argtypes = [u64, u64]
        lib.emu_constant.argtypes = [ctypes.c_int, ctypes.c_uint32, pointer, ctypes.c_uint32]
        lib.emu_reports.argtypes = [pointer, u64]
        lib.emu_counts.argtypes = [pointer]
        lib.emu_trace.argtypes = [_TRACE_CALLBACK]
        lib.emu_run.argtypes = [ctypes.POINTER(_LaunchConfig)]
        return lib

    def _place_globals(self):
        """Memory for __device__ variables: section name -> (owner, view)."""
        out = {}
        for name in (".nv.global.init", ".nv.global"):
            section = self.elf.sections.get(name)
            if section:
                data = np.zeros(section.size, np.uint8)
                if section.data:
                    data[:] = np.frombuffer(section.data, np.uint8)
                out[name] = aligned_copy(data)
        return out

    def _load_constants(self):
        """Fill constant banks 1..7: __constant__ data, literals, addresses of __device__ data."""
        for section in self.elf.sections.values():
            prefix = ".nv.constant"
            if not section.name.startswith(prefix) or not section.data:
                continue
            bank, _, owner = section.name[len(prefix) :].partition(".")
            if bank == "0" or owner not in ("", self.name):
                continue
            data = bytearray(section.data)
            for offset, symbol, addend in self.elf.relocations(section.name):
                home = self._globals.get(symbol.section)
                if home:
                    base = struct.unpack_from("<Q", data, offset)[0] if addend is None else addend
                    struct.pack_into("<Q", data, offset, home[1].ctypes.data + symbol.value + base)
            self._lib.emu_constant(int(bank), 0, bytes(data), len(data))

    def variable(self, name, dtype=np.uint8):
        """numpy view of a __device__ variable."""
        for symbol in self.elf.symbols:
            if symbol.name == name and symbol.section in self._globals:
                view = self._globals[symbol.section][1]
                return view[symbol.value : symbol.value + symbol.size].view(dtype)
        raise KeyError(f"no __device__ variable {name!r}")

    # --- launch

    def _pack_arguments(self, args):
        """(parameter block, buffers [(argument index, array, owner, view)])."""
        if self.parameters and len(args) != len(self.parameters):
            raise TypeError(f"{self.name} takes {len(self.parameters)} arguments, got {len(args)}")
        buffers, block = [], bytearray()

        def place(k, data):
            if self.parameters:
                parameter = self.parameters[k]
                if len(data) != parameter.size:
                    raise TypeError(
                        f"argument {k} of {self.name} has {parameter.size} bytes, got {len(data)}"
                    )
                offset = parameter.offset
            else:
                offset = -(-len(block) // len(data)) * len(data)
            block.extend(b"\0" * (offset + len(data) - len(block)))
            block[offset : offset + len(data)] = data

        for k, arg in enumerate(args):
            size = self.parameters[k].size if self.parameters else None
            if isinstance(arg, np.ndarray):
                if not arg.flags.c_contiguous:
                    raise ValueError(f"argument {k}: array must be C-contiguous")
                owner, view = aligned_copy(arg)
                buffers.append((k, arg, owner, view))
                place(k, struct.pack("<Q", view.ctypes.data))
            elif arg is None:
                place(k, bytes(8))
            elif isinstance(arg, bytes):
                place(k, arg)
            elif isinstance(arg, np.generic):
                place(k, arg.tobytes())
            elif isinstance(arg, (bool, int)):
                place(k, (int(arg) & (1 << 8 * (size or 4)) - 1).to_bytes(size or 4, "little"))
            elif isinstance(arg, float):
                place(k, struct.pack({2: "<e", 8: "<d"}.get(size or 4, "<f"), arg))
            else:
                raise TypeError(f"argument {k}: cannot pass {type(arg).__name__}")
        block.extend(bytes(-len(block) % 8))
        return bytes(block), buffers

    def launch(
        self,
        grid,
        block,
        args,
        smem=0,
        *,
        resident=None,
        seed=None,
        slice=None,
        cta_order="ascending",
        weak_memory=False,
        races=True,
        check=True,
        ctas=None,
        max_instructions=10**10,
        hang_instructions=20_000_000,
        trace=None,
        buffers=(),
    ) -> LaunchResult:
        """Run the kernel; arrays are updated in place.

        args          arrays, Python or numpy scalars (converted to the size the kernel declares),
                      None for a null pointer, bytes for a struct
        smem          dynamic shared memory in bytes
        resident      CTAs in flight at a time (default 1, or the whole grid up to 64 with a seed);
                      a kernel that waits for other CTAs needs as many as on the device
        seed          None: round robin over the CTAs; a number: random interleaving of CTAs and
                      warps
        slice         instructions that a warp runs before the next warp (maximum, with a seed)
        cta_order     order in which CTAs start: "ascending", "descending" or "random"
        weak_memory   keep the global stores of a CTA private until a fence or a random later moment
        races         check shared memory for races
        check         raise KernelFault if anything was found
        ctas          (first, last): run only these CTAs
        hang_instructions   abort after this many warp instructions without a store, barrier or exit
        trace         callback(cta, warp, records, addresses), used by the timing model
        buffers       arrays whose memory the kernel may access in place, through pointers inside a
                      struct; reports number them after the arguments
        """
        grid, block = dim3(grid), dim3(block)
        threads, total = int(np.prod(block)), int(np.prod(grid))
        if not 0 < threads <= 1024:
            raise ValueError(f"{threads} threads per block")
        shared = self.static_shared + smem
        if shared > 96 * 1024:
            raise ValueError(f"{shared} bytes of shared memory; sm_70 has 98304 per CTA")
        if self.registers and -(-self.registers // 8) * 8 * 32 * -(-threads // 32) > 65536:
            raise ValueError(
                f"{self.registers} registers x {threads} threads do not fit into the register file"
            )
        first, last = ctas or (0, total)
        if resident is None:
            resident = 1 if seed is None else min(last - first, 64)
        parameters, copies = self._pack_arguments(args)
        in_place = [
            (len(args) + k, array, None, array.reshape(-1).view(np.uint8))
            for k, array in enumerate(buffers)
        ]
        lib = self._lib
        lib.emu_reset()
        for _, _, _, view in copies + in_place:
            lib.emu_buffer(view.ctypes.data, view.nbytes)
        for _, view in self._globals.values():
            lib.emu_buffer(view.ctypes.data, view.nbytes)
        self._load_constants()
        lib.emu_constant(0, self.parameter_base, parameters, len(parameters))
        callback = _wrap_trace(trace)
        lib.emu_trace(callback)
        config = _LaunchConfig(
            (ctypes.c_uint32 * 3)(*grid),
            (ctypes.c_uint32 * 3)(*block),
            shared,
            self.local_bytes,
            max(1, resident),
            int(races),
            int(weak_memory),
            CTA_ORDERS[cta_order],
            0 if seed is None else int(seed) + 1,
            slice or (20000 if seed is None else 200),
            first,
            min(last, total),
            max_instructions,
            hang_instructions,
        )
        lib.emu_run(ctypes.byref(config))
        result = self._collect(copies + in_place)
        for _, array, _, view in copies:
            array.reshape(-1).view(np.uint8)[:] = view
        if check and not result.ok:
            raise KernelFault(result)
        return result

    def _collect(self, buffers):
        """Read the counters and reports of the launch."""
        counts = np.zeros(len(self.instructions), np.uint64)
        self._lib.emu_counts(counts.ctypes.data)
        reports = (_Report * 64)()
        n = self._lib.emu_reports(reports, 64)
        opcodes: dict[str, int] = {}
        for inst, count in zip(self.instructions, counts, strict=True):
            opcodes[inst.op] = opcodes.get(inst.op, 0) + int(count)
        opcodes = dict(sorted(opcodes.items(), key=lambda x: -x[1]))
        problems = [self._describe(r, buffers) for r in reports[:n]]
        return LaunchResult(
            problems, self._lib.emu_errors(), self._lib.emu_races(), counts, opcodes
        )

    def _describe(self, r, buffers):
        """The Problem of a report, with its instruction and the argument nearest to the address."""
        index = r.pc // 16
        text = self.instructions[index].text if index < len(self.instructions) else "?"
        where = ""
        if KINDS[r.kind].startswith("global") and buffers:
            starts = sorted((view.ctypes.data, k, view.nbytes) for k, _, _, view in buffers)
            start, k, size = starts[max(0, bisect.bisect(starts, (r.address, 1 << 30, 0)) - 1)]
            offset = r.address - start
            if -(1 << 30) < offset < size + (1 << 30):
                where = f"argument {k} byte offset {offset} (size {size})"
        return Problem(
            KINDS[r.kind], r.pc, text, r.cta, r.warp, r.lane, r.address, r.size, r.other, where
        )


def _wrap_trace(trace):
    """ctypes callback that passes traces to Python as numpy arrays."""
    if trace is None:
        return _TRACE_CALLBACK(0)

    def array(pointer, shape, dtype):
        n = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return (
            np.frombuffer(ctypes.string_at(pointer, n), dtype).reshape(shape)
            if n
            else np.zeros(shape, dtype)
        )

    def callback(cta, warp, records, n, addresses, n_addresses):
        trace(
            cta,
            warp,
            array(records, (n, 3), np.uint32),
            array(addresses, (n_addresses,), np.uint64),
        )

    return _TRACE_CALLBACK(callback)


def fuzz_interleavings(
    kernel, grid, block, make_args, verify, smem=0, *, seeds=10, resident=None, **options
):
    """Launch a kernel under many random interleavings, to expose ordering bugs between CTAs.

    make_args() returns fresh arguments and verify(args) raises (or returns False) if the result is
    wrong. `seeds` is a number or an iterable. Random CTA order and weak memory are enabled. The
    error names the failing seed, so that launch(..., seed=...) reproduces it.
    """
    options = {"cta_order": "random", "weak_memory": True, **options}
    for seed in range(seeds) if isinstance(seeds, int) else seeds:
        args = make_args()
        try:
            kernel.launch(grid, block, args, smem, seed=seed, resident=resident, **options)
            outcome = verify(args)
        except Exception as error:
            raise AssertionError(f"interleaving with seed {seed} failed: {error}") from error
        if outcome is False:
            raise AssertionError(f"interleaving with seed {seed}: wrong result")
