"""Compiles the Triton kernels of moe_ffn for an absent GPU and reports the results.

``python tests/kernels/compiled.py table:sm_90`` prints one JSON line for each kernel that the
library would launch on that GPU, with the tensor-core instructions in the PTX, the bytes of local
memory, its accesses inside main loops and the registers in the machine code, and the shared memory.
``layer`` instead of ``table`` does this for VLMo's layer in bfloat16 only, and ``descriptors`` for
16-bit layers whose operands are read through tensor descriptors. ``options`` compiles the
cases of the parity tests in small tiles, because the interpreter that runs them does not check
types. ``types`` only checks types. ``lanes`` compiles two cases in tiles so small that every sum is
over lanes. ``composed`` and ``composed-types`` do for the passes of the backend "composed" what
``table`` and ``types`` do for the backend "triton". Several jobs may be given. Run without
TRITON_INTERPRET; nothing is launched.
"""

import contextlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver

from machine_code import disassemble, loop_of
from moe_ffn_cases import CASES, Case, expert_ids, make_tensors
from vlmo.kernels._backends import triton_launch
from vlmo.kernels._backends.triton import compile_options, operands_of
from vlmo.kernels.moe_ffn.call import GATED, LISTS, Call
from vlmo.kernels.moe_ffn.composed import backend as composed_impl
from vlmo.kernels.moe_ffn.triton import arguments as host
from vlmo.kernels.moe_ffn.triton import backend as triton_impl
from vlmo.kernels.moe_ffn.triton import tiles

INSTRUCTIONS = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")
SEQUENCES, DIM, HIDDEN = 32, 768, 3072
# VLMo's layer; a decoder's, routed by ids; BEiT-3's; a decoder's with gate and value as separate
# tensors; without a saved pre-activation.
LAYERS = {
    "vlmo": dict(activation="gelu", norm="layer", ids=False, save_pre=True),
    "decoder": dict(activation="swiglu", norm="rms", ids=True, save_pre=True),
    "beit3": dict(activation="gelu", norm="layer", ids=False, save_pre=True, sub_norm=True),
    "split": dict(activation="swiglu", norm="rms", ids=True, save_pre=True, split=True),
    "vlmo, recomputed": dict(activation="gelu", norm="layer", ids=False, save_pre=False),
    "decoder, recomputed": dict(activation="swiglu", norm="rms", ids=True, save_pre=False),
    "beit3, recomputed": dict(
        activation="gelu", norm="layer", ids=False, save_pre=False, sub_norm=True
    ),
}


class NoDriver:
    """A substitute for a GPU's driver that suffices for compiling."""

    def __init__(self, generation: str) -> None:
        self.target = GPUTarget("cuda", int(generation.removeprefix("sm_")), 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch  # Triton caches kernels by device

    def get_current_stream(self, device):
        return 0


def run_case(
    dtype,
    activation,
    norm,
    ids,
    save_pre,
    *,
    sub_norm=False,
    split=False,
    implementation=triton_impl,
):
    """Forward and backward of a call on tensors without storage."""
    experts, halves = 2, 2 if activation in GATED and not split else 1
    first = 2 * experts if split else experts  # tensors of the first layers
    tokens = SEQUENCES * 237

    def new(*shape, of=dtype):
        return torch.empty(shape, dtype=of, device="meta")

    def each(*shape, number=experts):
        return [new(*shape) for _ in range(number)]

    index = [new(tokens, of=torch.int32)] * 2 + [new(experts + 1, of=torch.int32)]
    call = Call._make(
        [
            *(new(tokens, DIM), each(halves * HIDDEN, DIM, number=first), each(DIM, HIDDEN)),
            *(each(halves * HIDDEN, number=first), each(DIM), each(DIM)),
            each(DIM) if norm == "layer" else [],
            *((each(HIDDEN), each(HIDDEN)) if sub_norm else ([], [])),
            *(new(DIM), new(tokens), new(tokens, DIM)),
            *(index if ids else [None] * 3),
            *([0, 40, 1, 197], norm, 1e-6, 1e-5, activation, save_pre, [], [], []),
        ]
    )
    y, pre = implementation.forward(call)
    needs = [True] * (2 + sum(len(getattr(call, name)) for name in LISTS))
    implementation.backward(y, pre, call, needs)


def listed(value) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def run_options(case, x_dtype, half, save_pre, needs, implementation=triton_impl):
    """Forward and backward of a parity test's case; ``needs`` names the gradients to compute."""
    tensors = make_tensors(case, "meta", half)
    tokens, experts = expert_ids(case).numel(), len(case.hidden)
    index = [
        torch.empty(n, dtype=torch.int32, device="meta") for n in (tokens, tokens, experts + 1)
    ]
    runs = [expert for expert, _ in case.pieces]
    indexed = case.form != "segments" or len(runs) > len(set(runs))
    counts = torch.bincount(expert_ids(case), minlength=experts).tolist()
    counted = enumerate(counts) if indexed or case.streams else case.pieces
    lists = [tensors.get(name, []) for name in LISTS]
    scales = [t.reshape(-1) for t in listed(tensors.get("token_scale"))]
    x, residual = (
        [t.reshape(-1, columns).to(x_dtype) for t in listed(tensors.get(name))]
        for name, columns in (("x", case.dim), ("residual", case.linear or case.dim))
    )
    singles = [None if case.streams or not parts else parts[0] for parts in (scales, residual)]
    call = Call._make(
        [
            *(x[0].new_empty(0, case.dim) if case.streams else x[0], *lists),
            *(tensors.get("layer_scale"), *singles),
            *(index if indexed else [None] * 3),
            [number for piece in counted for number in piece],
            *(case.norm, 1e-6, 1e-5, case.activation, save_pre),
            *((x, residual, scales) if case.streams else ([], [], [])),
        ]
    )
    y, pre = implementation.forward(call)
    wanted = ["x" in needs, *(n in needs for n, t in zip(LISTS, lists, strict=True) for _ in t)]
    wanted += ["layer_scale" in needs] if case.layer_scale else []
    wanted += ["x" in needs for _ in call.streams]
    implementation.backward(y, pre, call, wanted)


def all_options(facts, implementation) -> None:
    everything = ("x", *LISTS, "layer_scale")
    half = torch.bfloat16
    facts["wanted"], facts["dtype"] = (lambda name: True), str(half)
    for case in CASES:
        if case.batch:
            facts["case"] = str(case)
            run_options(case, half, half, True, everything, implementation)
    facts["case"] = "a residual of float64"
    run_options(CASES[0], torch.float64, torch.float32, True, everything, implementation)
    plain = replace(CASES[0], norm="none", layer_scale=False, token_scale=False)
    for case, x_dtype in ((CASES[0], torch.float32), (plain, half)):
        for needs in (("x",), ("w1",), ("w2",), ("b1", "b2"), ("layer_scale",), ("norm_weight",)):
            facts["case"] = f"{case}, {x_dtype} x, gradients of {needs}"
            run_options(case, x_dtype, half, len(needs) > 1, needs, implementation)


def with_descriptors(row: tiles.Tiles) -> tiles.Tiles:
    return tiles.Tiles(*(replace(getattr(row, f.name), descriptors=True) for f in fields(row)))


def say(**facts) -> None:
    """Print a line of JSON that includes Triton's version."""
    print(json.dumps(dict(triton=triton.__version__, **facts)), flush=True)


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL and SHARED of the only kernel in a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (line,) = [line for line in text.splitlines() if "REG:" in line]
    return {name: int(value) for name, value in (part.split(":") for part in line.split())}


def local_in_loops(cubin: bytes) -> int:
    """Number of instructions inside main loops that access spilled registers."""
    return sum(i.name in ("LDL", "STL") for i in loop_of(disassemble(cubin)))


def contracted(ptx: str) -> int:
    """Number of fused multiply-adds that combine a lane's own values with those of another lane.

    They round the two differently, so lanes that should hold the same sum differ; see
    :func:`vlmo.kernels._backends.triton_device.term`.
    """
    lanes = set(re.findall(r"shfl\.sync\S*\s+(%\w+)", ptx))
    moves = re.findall(r"mov\.b32\s+(%\w+), (%\w+);", ptx)
    lanes |= {to for to, source in moves if source in lanes}
    operands = re.findall(r"fma\.rn\.f32\s+%\w+, (.*);", ptx)
    return sum(not lanes.isdisjoint(of_one.split(", ")) for of_one in operands)


class TypesFit(Exception):
    """Raised when the types of a kernel have been checked."""


def types_only():
    """Inside the block, compilation stops with :class:`TypesFit` after the type check."""
    return mock.patch.object(CUDABackend, "make_ttgir", side_effect=TypesFit)


def run_jobs(compile_for, *jobs: str) -> None:
    """Call ``compile_for(generation, what)`` for each job "what:generation"."""
    for job in jobs:
        what, generation = job.split(":")
        driver.set_active(NoDriver(generation))
        with types_only() if what.endswith("types") else contextlib.nullcontext():
            compile_for(generation, what)


def compile_for(generation: str, what: str) -> None:
    facts: dict = {"generation": generation}
    implementation: Any = composed_impl if what.startswith("composed") else triton_impl
    what = {"composed": "table", "composed-types": "types"}.get(what, what)

    def choose(device, dtype):
        if what in ("options", "types"):
            return tiles.INTERPRETED
        if what == "lanes":
            return tiles.Tiles(*[tiles.Tile(16, 32, 16, 4, 2)] * 4)
        row = tiles.TABLE[generation, operands_of(dtype)]
        return with_descriptors(row) if what == "descriptors" else row

    def compile_only(kernel, device, programs, tile, *args):
        name = kernel.fn.__name__.removeprefix("moe_ffn_").removesuffix("_kernel")
        if not facts["wanted"](name):
            return
        try:
            compiled = kernel.warmup(*args, grid=(programs,), **compile_options(tile))
        except TypesFit:
            say(what=what, kernel=name)
            return
        ptx, found = compiled.asm["ptx"], resources(compiled.asm["cubin"])
        counts = {name: ptx.count(name) for name in INSTRUCTIONS}
        say(
            what=what,
            kernel=name,
            generation=generation,
            case=facts["case"],
            dtype=facts["dtype"],
            tile=str(tile),
            registers=found["REG"],
            local_bytes=found["STACK"] + found["LOCAL"],
            local_in_loops=local_in_loops(compiled.asm["cubin"]),
            shared_bytes=compiled.metadata.shared,
            products=compiled.asm["ttgir"].count("dot"),
            async_copies=ptx.count("cp.async.c"),
            tensor_copies=ptx.count("cp.async.bulk.tensor"),
            contracted=contracted(ptx),
            **counts,
        )

    with (
        mock.patch.object(triton_launch, "launch", compile_only),
        mock.patch.object(host, "workers_on", lambda device, tile: 132 * tile.programs),
        mock.patch.object(tiles, "choose", choose),
    ):
        if what in ("options", "types"):
            all_options(facts, implementation)
            return
        if what == "lanes":
            facts["wanted"], facts["dtype"] = (lambda name: True), str(torch.float16)
            for case in (CASES[0], Case(activation="geglu", dim=23)):
                facts["case"] = str(case)
                run_options(case, torch.float16, torch.float16, True, ("x", *LISTS, "layer_scale"))
            return
        for dtype, tf32 in ((torch.bfloat16, False), (torch.float32, False), (torch.float32, True)):
            torch.backends.cuda.matmul.allow_tf32 = tf32
            for layer, options in LAYERS.items():
                saved = options["save_pre"]
                if tf32 and (layer != "vlmo" or implementation is composed_impl):
                    continue
                if what == "layer" and (layer, dtype) != ("vlmo", torch.bfloat16):
                    continue
                described = dtype == torch.bfloat16 and not options.get("split")
                if what == "descriptors" and not described:
                    continue
                every = saved or implementation is composed_impl
                facts["wanted"] = (lambda name: True) if every else (lambda name: "rows" in name)
                facts["case"], facts["dtype"] = layer, str(dtype) + " tf32" * tf32
                run_case(dtype, **options, implementation=implementation)


if __name__ == "__main__":
    run_jobs(compile_for, *itertools.islice(sys.argv, 1, None))
