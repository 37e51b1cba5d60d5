"""Compiles the Triton kernels of shared_attention for an absent GPU.

``python tests/kernels/compiled_attention.py table:sm_90`` prints one JSON line per kernel, as does
compiled.py, which documents the alternatives to ``table``. Run without TRITON_INTERPRET; nothing is
launched.
"""

import itertools
import re
import sys
from unittest import mock

import torch

from attention_cases import CASES, ONES, Case, make_index, make_options, make_tensors
from compiled import (
    INSTRUCTIONS,
    TypesFit,
    contracted,
    local_in_loops,
    resources,
    run_jobs,
    say,
)
from vlmo.kernels import RelativePositionIndex
from vlmo.kernels._backends import triton_launch
from vlmo.kernels._backends.triton import compile_options, operands_of
from vlmo.kernels.attention.call import Call
from vlmo.kernels.attention.triton import arguments as host
from vlmo.kernels.attention.triton import backend as triton_impl
from vlmo.kernels.attention.triton import tiles

BATCH, HEADS = 32, 12
HEAD_DIMS = (64, 34, 128)
# VLMo's joint layer, on a packed qkv; sequences without padding, also with distinct positions and
# with any, which looks up the bias; a decoder's.
LAYERS = {
    "vlmo": dict(masked=True),
    "ragged": dict(packed=True),
    "training": dict(packed=True, placed=True, distinct=True),
    "order": dict(packed=True, placed=True),
    "decoder": dict(biased=False, causal=True),
}


def run(call: Call) -> None:
    """Forward and backward of a call on tensors without storage."""
    out, lse = triton_impl.forward(call)
    triton_impl.backward(out, out, lse, call, [True] * 4)


def layer(
    head_dim,
    dtype,
    masked=False,
    packed=False,
    placed=False,
    distinct=False,
    biased=True,
    causal=False,
) -> Call:
    index = RelativePositionIndex.joint(14, 40).to("meta")
    length = index.matrix.shape[0]

    def new(*shape, of=dtype):
        return torch.empty(shape, dtype=of, device="meta")

    rows = (BATCH * 197,) if packed else (BATCH, length)
    lookup: tuple = (None,) * 4
    if biased:
        table = new(index.entries, 12, HEADS, of=torch.float32)[:, 3]
        lookup = (table, index.matrix, index.affine, index.short)
    return Call._make(
        [
            *(*new(*rows, 3, HEADS, head_dim).unbind(-3), *lookup),
            new(BATCH, length, of=torch.bool) if masked else None,
            None,
            new(BATCH + 1, of=torch.int32) if packed else None,
            length if packed else 0,
            new(*rows, of=torch.int32) if placed else None,
            *(causal, head_dim**-0.5, distinct),
        ]
    )


def run_case(case: Case, dtype: torch.dtype) -> None:
    """Forward and backward of a case of the parity tests."""
    tensors = make_tensors(case, "meta", dtype)
    options, index = make_options(case, "meta"), make_index(case, "meta")
    lookup: tuple = (None,) * 4
    if index is not None:
        lookup = (tensors["table"], index.matrix, index.affine, index.short)
    names = ("key_mask", "key_lengths", "offsets")
    call = Call._make(
        [
            *(*(tensors[name] for name in "qkv"), *lookup, *map(options.get, names)),
            *(options.get("max_length", 0), options.get("positions"), case.causal, 0.25),
            options.get("distinct", False),
        ]
    )
    run(call)


def all_options() -> None:
    cases = [case for case in CASES if case.batch and case.length]
    for dtype, case in itertools.product((torch.bfloat16, torch.float32), [*cases, ONES]):
        run_case(case, dtype)
    with mock.patch.object(host, "span_of", return_value=2**31):
        for case in cases:
            run_case(case, torch.bfloat16)


def compile_for(generation: str, what: str) -> None:
    facts: dict = {"generation": generation}

    def choose(device, dtype, head_dim):
        if what in ("options", "types", "lanes"):
            return tiles.INTERPRETED
        return tiles.TABLE[generation, operands_of(dtype), tiles.width_of(head_dim)]

    def compile_only(kernel, device, programs, tile, *args):
        name = kernel.fn.__name__.removeprefix("attention_").removesuffix("_kernel")
        try:
            compiled = kernel.warmup(*args, grid=(programs,), **compile_options(tile))
        except TypesFit:
            say(what=what, kernel=name)
            return
        ptx, found = compiled.asm["ptx"], resources(compiled.asm["cubin"])
        # In bfloat16, nothing else is float16.
        copies = re.findall(r"async_copy_global_to_local.*ptr<f16>.*", compiled.asm["ttgir"])
        say(
            what=what,
            kernel=name,
            **facts,
            tile=str(tile),
            registers=found["REG"],
            local_bytes=found["STACK"] + found["LOCAL"],
            local_in_loops=local_in_loops(compiled.asm["cubin"]),
            shared_bytes=compiled.metadata.shared,
            async_copies=ptx.count("cp.async.c"),
            bias_copies=len(copies),
            narrow_bias_copies=sum("contiguity = 8" not in copy for copy in copies),
            contracted=contracted(ptx),
            **{name: ptx.count(name) for name in INSTRUCTIONS},
        )

    with (
        mock.patch.object(triton_launch, "launch", compile_only),
        mock.patch.object(host.target, "multiprocessors", return_value=132),
        mock.patch.object(tiles, "choose", choose),
    ):
        if what in ("options", "types"):
            all_options()
            return
        if what == "lanes":
            run_case(ONES, torch.bfloat16)
            return
        for dtype, tf32 in ((torch.bfloat16, False), (torch.float32, False), (torch.float32, True)):
            torch.backends.cuda.matmul.allow_tf32 = tf32
            for head_dim, (name, options) in itertools.product(HEAD_DIMS, LAYERS.items()):
                if what == "layer" and (head_dim, name, dtype) != (64, "vlmo", torch.bfloat16):
                    continue
                facts |= dict(dtype=str(dtype) + " tf32" * tf32, head_dim=head_dim, case=name)
                run(layer(head_dim, dtype, **options))


if __name__ == "__main__":
    run_jobs(compile_for, *itertools.islice(sys.argv, 1, None))
