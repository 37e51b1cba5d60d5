"""Measures the host time of a call of the Triton backend, without a GPU.

    TRITON_INTERPRET=0 python benchmarks/host_cost.py [--profile]

writes ``host_cost.json`` and ``.md`` into the folder ``results`` beside this file. Triton's own
launcher runs on a pretended driver (:mod:`harness.pretended`), so a call contains everything that
the host does, except for what needs a GPU: the CUDA allocator, the queries of stream and device,
autograd's thread of the device, and the driver. A time is the minimum of many repetitions.
``--profile`` prints where the time goes instead.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from harness import pretended
from harness.cpu import describe_cpu
from vlmo.files import replacing
from vlmo.kernels import (
    ModalityRouting,
    RelativePositionBias,
    RelativePositionIndex,
    moe_ffn,
    shared_attention,
)

RESULTS = Path(__file__).parent / "results"
DTYPE = torch.bfloat16
# The host time depends on the number of tensors, not on their sizes. These are small, because
# PyTorch's CPU allocator, unlike that of CUDA, asks the system for each large tensor.
BATCH, TEXT, GRID, DIM, HIDDEN, HEADS, HEAD_DIM = 4, 8, 3, 64, 256, 2, 64
MODES = ("forward", "forward, recorded", "forward + backward")
BLOCK = 4  # calls per repetition: few, so that some repetitions are not interrupted


def parameter(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def moe_ffn_call() -> tuple[Callable[[], Tensor], list[Tensor]]:
    """A joint layer of VLMo with everything optional, and all tensors that get a gradient."""
    names = {
        **dict(w1=(HIDDEN, DIM), w2=(DIM, HIDDEN), b1=(HIDDEN,), b2=(DIM,)),
        **dict(norm_weight=(DIM,), norm_bias=(DIM,)),
    }
    lists: dict[str, Any] = {
        name: [parameter(*shape) for _ in range(2)] for name, shape in names.items()
    }
    length = TEXT + GRID**2 + 1
    x, scale = parameter(BATCH, length, DIM), parameter(DIM)
    token_scale = torch.ones(BATCH, length, dtype=DTYPE)
    routing = ModalityRouting.segments([(0, TEXT), (1, GRID**2 + 1)])
    options: Any = dict(norm="layer", layer_scale=scale, token_scale=token_scale, residual=x)

    def call() -> Tensor:
        return moe_ffn(x, routing, **lists, **options, backend="triton")

    return call, [x, scale, *(tensor for tensors in lists.values() for tensor in tensors)]


def attention_call() -> tuple[Callable[[], Tensor], list[Tensor]]:
    """A joint layer of VLMo with the relative position bias, and q, k and v in one tensor."""
    index = RelativePositionIndex.joint(GRID, TEXT)
    table = parameter(index.entries, HEADS, dtype=torch.float32)
    qkv = parameter(BATCH, index.matrix.shape[0], 3, HEADS, HEAD_DIM)

    def call() -> Tensor:
        return shared_attention(qkv, bias=RelativePositionBias(table, index), backend="triton")

    return call, [qkv, table]


CALLS = {"moe_ffn": moe_ffn_call, "shared_attention": attention_call}


def step_of(mode: str, call: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], Any]:
    """A function without arguments that makes the call in this mode."""
    ones = torch.ones_like(call())

    def both() -> None:
        for leaf in leaves:
            leaf.grad = None
        call().backward(ones)

    return both if mode == MODES[-1] else call


def microseconds(step: Callable[[], Any], seconds: float) -> float:
    """The least time of a block of calls within some seconds, per call."""
    least, end = float("inf"), time.perf_counter() + seconds
    while least == float("inf") or time.perf_counter() < end:
        begin = time.perf_counter()
        for _ in range(BLOCK):
            step()
        least = min(least, time.perf_counter() - begin)
    return least / BLOCK * 1e6


def profile(step: Callable[[], Any]) -> None:
    with cProfile.Profile() as profiled:
        for _ in range(1000):
            step()
    pstats.Stats(profiled).sort_stats("tottime").print_stats(30)


def rows(seconds: float, profiling: bool) -> list[dict[str, Any]]:
    """A row for each operation and mode, each measured for some seconds, or their profiles."""
    found = []
    for name, make in CALLS.items():
        call, leaves = make()
        for mode in MODES:
            with torch.set_grad_enabled(mode != MODES[0]):
                step = step_of(mode, call, leaves)
                step()  # compiles
                before = pretended.launches()
                step()
                launches = pretended.launches() - before
                if profiling:
                    print(name, mode)
                    profile(step)
                else:
                    row = dict(operation=name, mode=mode, launches=launches)
                    found.append({**row, "microseconds": round(microseconds(step, seconds), 1)})
    return found


def write(found: list[dict[str, Any]], folder: Path) -> None:
    machine = {**describe_cpu(), "torch": torch.__version__, "triton": triton.__version__}
    data = {"machine": machine, "rows": found}
    with replacing(folder / "host_cost.json") as path:
        path.write_text(json.dumps(data, indent=1) + "\n")
    text = [
        "# Host time of a call of the Triton backend",
        "",
        "By `benchmarks/host_cost.py`, which says what is left out; measured on a CPU with a",
        f"pretended driver. {machine.get('cpu', 'unknown CPU')}; torch {machine['torch']}, Triton",
        f"{machine['triton']}. The least time of many repetitions.",
        "",
        "| operation | mode | launches | us |",
        "|---|---|--:|--:|",
        *(
            f"| {r['operation']} | {r['mode']} | {r['launches']} | {r['microseconds']} |"
            for r in found
        ),
    ]
    with replacing(folder / "host_cost.md") as path:
        path.write_text("\n".join(text) + "\n")
    print(*text[6:], sep="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each operation and mode")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the results go")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with pretended.pretended():
        results = rows(arguments.seconds, arguments.profile)
    if not arguments.profile:
        write(results, arguments.folder)
