"""Cycle estimate of one V100 SM from an emulated launch.

The model takes the stall counts and scoreboards that ptxas wrote into each instruction and the
addresses of the emulated run. All other hardware parameters (`ASSUMED`, `_UNITS`, `TENSOR`) are
plausible assumptions that have NOT been calibrated against a V100: use the results to compare
variants of a kernel and to find the limiting unit, not as run times. `assumptions()` lists all of
them.
"""

import ctypes
import functools
import pathlib
from typing import NamedTuple

import numpy as np

from .cache import build_shared_library
from .emulator import dim3

# Keep in step with the enumerations in timing.cpp.
PIPES = [
    "FMA",
    "ALU",
    "FP16",
    "TENSOR",
    "XU",
    "SHARED",
    "GLOBAL",
    "BRANCH",
    "BARRIER",
    "EXIT",
    "OTHER",
    "MISC",
]
STALLS = ["fixed", "scoreboard", "memory_queue", "pipe_busy", "barrier"]
NONE, LOAD, STORE, ATOMIC = range(4)

SCHEDULERS = 4
REGISTERS_PER_SM, SHARED_PER_SM, WARPS_PER_SM, CTAS_PER_SM = 65536, 96 * 1024, 64, 32
SHARED_CARVEOUTS = (0, 8, 16, 32, 64, 96)  # KiB
L1_AND_SHARED = 128  # KiB


class Assumption(NamedTuple):
    """A constant of the model that has not been measured on a V100."""

    value: float | None
    unit: str
    meaning: str


ASSUMED = {
    "l2_bytes_per_cycle": Assumption(20.0, "bytes/cycle", "what L2 delivers to one SM"),
    "dram_bytes_per_cycle": Assumption(6.6, "bytes/cycle", "what DRAM delivers to one SM"),
    "dram_fraction": Assumption(0.25, "", "part of the L2 traffic that goes on to DRAM"),
    "l1_latency": Assumption(28, "cycles", "of a global load that hits L1"),
    "l2_latency": Assumption(165, "cycles", "of one that misses L1, behind the queue for L2"),
    "dram_latency": Assumption(320, "cycles", "of one that misses L2, behind the queue for DRAM"),
    "shared_latency": Assumption(19, "cycles", "of a shared load without conflicts"),
    "queue_depth": Assumption(8, "requests", "that wait for the load/store unit, a scheduler"),
    "l1_bytes": Assumption(None, "bytes", "of L1, by default what shared memory leaves of 128 KiB"),
    "barrier_latency": Assumption(12, "cycles", "from the last warp's arrival until all go on"),
    "branch_penalty": Assumption(4, "cycles", "lost by a branch that is taken"),
    "cta_overhead": Assumption(150, "cycles", "from the end of a CTA to the start of the next"),
    "operands_of_memory": Assumption(
        2, "cycles", "from a load or store until its registers may change"
    ),
    "operands_of_pipe": Assumption(
        4, "cycles", "the same for other instructions with a scoreboard"
    ),
    "atomic_passes": Assumption(2, "", "a shared atomic's wavefronts beside those of a store"),
}
DEFAULTS = {name: assumption.value for name, assumption in ASSUMED.items()}

# opcode -> (pipe, cycles the pipe of a scheduler is busy, latency)
_UNITS = {
    ("FMA", 2, 6): "FFMA FMUL FADD IMAD",
    ("FP16", 2, 6): "HFMA2 HADD2 HMUL2 HSET2 HSETP2",
    ("XU", 8, 22): "MUFU F2F F2I I2F FRND POPC FLO BREV",
    ("SHARED", 1, 20): "LDS STS ATOMS",
    ("GLOBAL", 1, 28): "LDG STG LD ST RED ATOM ATOMG LDL STL",
    ("MISC", 2, 25): "SHFL",
    ("MISC", 4, 25): "S2R LDC MATCH B2R",
    ("BRANCH", 2, 4): "BRA BSSY BSYNC CALL RET BRX WARPSYNC BREAK",
    ("BARRIER", 1, 10): "BAR",
    ("EXIT", 1, 1): "EXIT",
    ("OTHER", 1, 10): "NOP DEPBAR YIELD MEMBAR ERRBAR CCTL NANOSLEEP",
    ("OTHER", 4, 8): "DADD DMUL DFMA DSETP",
}
UNITS = {op: unit for unit, ops in _UNITS.items() for op in ops.split()}
DEFAULT_UNIT = ("ALU", 2, 6)
# HMMA by accumulator dtype: (cycles the pipe of a scheduler is busy, latency)
TENSOR = {"F32": (2, 10), "F16": (4, 10)}

ACCESS = {
    **dict.fromkeys("LDG LDS LD LDL".split(), LOAD),
    **dict.fromkeys("STG STS ST STL".split(), STORE),
    **dict.fromkeys("RED ATOM ATOMG ATOMS".split(), ATOMIC),
}


def classify(inst):
    """(pipe name, issue cycles, latency) of an instruction."""
    if inst.op == "HMMA":
        return "TENSOR", *TENSOR["F32" if "F32" in inst.mods[1:3] else "F16"]
    if inst.op == "BAR" and "ARV" in inst.mods:
        return "OTHER", 1, 10
    return UNITS.get(inst.op, DEFAULT_UNIT)


def assumptions(**parameters):
    """Yield (name, value, meaning) of each uncalibrated constant; `parameters` as in estimate()."""
    for name, (default, unit, meaning) in ASSUMED.items():
        value = parameters.get(name, default)
        yield name, "derived" if value is None else f"{value} {unit}".strip(), meaning
    pipes = [(*unit, names.replace(" ", ", ")) for unit, names in _UNITS.items()]
    pipes += [("TENSOR", *rate, f"HMMA that adds up in {kind}") for kind, rate in TENSOR.items()]
    pipes += [(*DEFAULT_UNIT, "every other instruction")]
    for pipe, busy, latency, meaning in pipes:
        yield f"{pipe} pipe", f"busy {busy}, latency {latency} cycles", meaning


class _StaticInfo(ctypes.Structure):
    _fields_ = [
        (n, ctypes.c_int)
        for n in (
            "pipe",
            "occupancy",
            "stall",
            "write_barrier",
            "read_barrier",
            "wait_mask",
            "latency",
            "access",
            "bytes",
            "may_branch",
        )
    ]


class _Parameters(ctypes.Structure):
    _fields_ = [
        (n, ctypes.c_double)
        for n in ("l2_bytes_per_cycle", "dram_bytes_per_cycle", "dram_fraction")
    ] + [
        (n, ctypes.c_int)
        for n in (
            "l1_latency",
            "l2_latency",
            "dram_latency",
            "shared_latency",
            "queue_depth",
            "l1_bytes",
            "barrier_latency",
            "branch_penalty",
            "cta_overhead",
            "operands_of_memory",
            "operands_of_pipe",
            "atomic_passes",
        )
    ]


class _Result(ctypes.Structure):
    _fields_ = [
        (n, ctypes.c_uint64)
        for n in (
            "cycles",
            "issued",
            "tensor_busy",
            "idle_slots",
            "shared_wavefronts",
            "shared_ideal",
            "sectors",
            "l1_miss_sectors",
            "lsu_busy",
        )
    ] + [("stalls", ctypes.c_uint64 * len(STALLS)), ("pipe_busy", ctypes.c_uint64 * len(PIPES))]


@functools.lru_cache(None)
def _library():
    source = pathlib.Path(__file__).with_name("timing.cpp")
    return ctypes.CDLL(str(build_shared_library(source, ["-O2"], stem="timing")))


def occupancy(registers, threads, shared_bytes):
    """Occupancy: the number of CTAs that fit on one SM."""
    warps = -(-threads // 32)
    limits = [WARPS_PER_SM // warps, CTAS_PER_SM]
    if registers:
        limits.append(REGISTERS_PER_SM // (-(-registers * 32 // 256) * 256 * warps))
    if shared_bytes:
        limits.append(SHARED_PER_SM // (-(-shared_bytes // 256) * 256))
    return max(1, min(limits))


def _static_table(instructions):
    """The properties of each instruction that the model needs."""
    table = (_StaticInfo * len(instructions))()
    for k, inst in enumerate(instructions):
        (pipe, busy, latency), c = classify(inst), inst.control
        table[k] = _StaticInfo(
            PIPES.index(pipe),
            busy,
            c.stall,
            c.write_barrier,
            c.read_barrier,
            c.wait,
            latency,
            ACCESS.get(inst.op, NONE),
            inst.access_bytes,
            int(inst.op in ("BRA", "CALL", "RET", "BRX")),
        )
    return table


def _collect_traces(kernel, grid, block, args, smem, resident, ctas, options):
    """Run the CTAs in the emulator; returns the traces in CTA and warp order."""
    traces = {}

    def keep(cta, warp, records, addresses):
        traces[cta, warp] = records, addresses

    # The CTAs of a range with a step run one by one: they must not wait for each other.
    runs = [(ctas.start, ctas.stop)] if ctas.step == 1 else [(cta, cta + 1) for cta in ctas]
    for run in runs:
        kernel.launch(grid, block, args, smem, resident=resident, ctas=run, trace=keep, **options)
    ordered = [traces[k] for k in sorted(traces)]
    records, addresses = [r for r, _ in ordered], [a for _, a in ordered]
    starts = [
        np.cumsum([0] + [len(x) for x in part]).astype(np.uint64) for part in (records, addresses)
    ]
    flat_addresses = (
        np.concatenate(addresses) if len(addresses) and starts[1][-1] else np.zeros(1, np.uint64)
    )
    return (
        np.ascontiguousarray(np.concatenate(records)),
        starts[0],
        np.ascontiguousarray(flat_addresses),
        starts[1],
    )


def estimate(
    kernel,
    grid,
    block,
    args,
    smem=0,
    *,
    ctas=None,
    resident=None,
    launch_options=None,
    **parameters,
):
    """Cycles and utilisation of one SM that runs the given CTAs, as a dict.

    ctas       (first, last) or a range: the CTAs of this SM (default: as many as are resident)
    resident   CTAs on the SM at a time (default: occupancy by registers, threads and shared memory)
    parameters override DEFAULTS

    Keys: cycles, ctas, resident, warp_instructions; as fractions of the peak
      tensor_utilisation   busy time of the tensor pipes
      issue_utilisation    issue slots used
      lsu_utilisation      busy time of the load/store unit
      pipes                busy time of each pipe
    and shared_wavefronts, bank_conflict_factor (1.0: none), global_sectors, l1_miss_sectors,
    stalls (warp-cycles by reason), hot_spots (instructions with the most scoreboard and queue
    stalls).
    """
    grid, block = dim3(grid), dim3(block)
    threads, total = int(np.prod(block)), int(np.prod(grid))
    shared = kernel.static_shared + smem
    resident = resident or occupancy(kernel.registers, threads, shared)
    ctas = ctas or (0, min(resident, total))
    ctas = ctas if isinstance(ctas, range) else range(*ctas)
    values = {**DEFAULTS, **parameters}
    unknown = set(values) - set(DEFAULTS)
    if unknown:
        raise TypeError(f"unknown parameters {sorted(unknown)}")
    if values["l1_bytes"] is None:
        used = min(shared * resident, SHARED_PER_SM)
        values["l1_bytes"] = (
            L1_AND_SHARED - next(c for c in SHARED_CARVEOUTS if c * 1024 >= used)
        ) * 1024

    records, record_start, addresses, address_start = _collect_traces(
        kernel, grid, block, args, smem, resident, ctas, launch_options or {}
    )
    table, out = _static_table(kernel.instructions), _Result()
    stall_at = np.zeros(len(kernel.instructions), np.uint64)

    def pointer(array):
        return array.ctypes.data_as(ctypes.c_void_p)

    status = _library().sm_timing(
        table,
        pointer(records),
        pointer(record_start),
        pointer(addresses),
        pointer(address_start),
        len(record_start) - 1,
        -(-threads // 32),
        resident,
        ctypes.byref(_Parameters(**values)),
        ctypes.byref(out),
        pointer(stall_at),
    )
    if status:
        raise RuntimeError("timing model made no progress")

    cycles = out.cycles
    hottest = np.argsort(-stall_at.astype(np.int64))[:6]
    return {
        "cycles": cycles,
        "ctas": len(ctas),
        "resident": resident,
        "warp_instructions": out.issued,
        "tensor_utilisation": out.tensor_busy / (SCHEDULERS * cycles),
        "issue_utilisation": out.issued / (SCHEDULERS * cycles),
        "lsu_utilisation": out.lsu_busy / cycles,
        "lsu_wavefronts": out.lsu_busy,
        "shared_wavefronts": out.shared_wavefronts,
        "bank_conflict_factor": out.shared_wavefronts / out.shared_ideal
        if out.shared_ideal
        else 1.0,
        "global_sectors": out.sectors,
        "l1_miss_sectors": out.l1_miss_sectors,
        "pipes": {
            name: busy / (SCHEDULERS * cycles)
            for name, busy in zip(PIPES, out.pipe_busy, strict=True)
            if busy and name in ("FMA", "ALU", "FP16", "TENSOR", "XU")
        },
        "stalls": dict(zip(STALLS, out.stalls, strict=True)),
        "hot_spots": [
            (kernel.instructions[k].pc, kernel.instructions[k].text, int(stall_at[k]))
            for k in hottest
            if stall_at[k]
        ],
    }


def compare(a, b, names=("a", "b")):
    """Text table of two estimates, with the ratio b / a."""
    rows = [
        (k, a[k], b[k])
        for k in a
        if isinstance(a[k], (int, float)) and isinstance(b.get(k), (int, float))
    ]
    for group in ("pipes", "stalls"):
        keys = dict.fromkeys([*a[group], *b[group]])
        rows += [(f"{group[:-1]} {k}", a[group].get(k, 0), b[group].get(k, 0)) for k in keys]

    def number(x):
        return f"{x:.3f}" if isinstance(x, float) else str(x)

    lines = [f"{'':24s}{names[0]:>14s}{names[1]:>14s}{'ratio':>9s}"]
    for key, x, y in rows:
        ratio = f"{y / x:.3f}" if x else "-"
        lines.append(f"{key:24s}{number(x):>14s}{number(y):>14s}{ratio:>9s}")
    return "\n".join(lines)
