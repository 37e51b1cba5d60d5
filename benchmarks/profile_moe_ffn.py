"""Profiles the launches of a forward and a backward of moe_ffn, and their synchronisations.

    python benchmarks/profile_moe_ffn.py [BACKEND]

Exits with status 1 if a call of the CUDA runtime synchronises or copies.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import torch

from bench_moe_ffn import Sublayer, routed
from harness.contenders import Case, leaves
from harness.meter import count_launches, waiting
from vlmo.kernels.target import describe


def show(name: str, work: Callable[[], object]) -> list[str]:
    """Print the kernels and the runtime calls, and return the calls that wait."""
    kernels, calls = count_launches(work)
    print(f"\n{name}: {kernels.total()} on the GPU")
    for kernel, times in kernels.most_common():
        print(f"  {times:3d}  {kernel[:110]}")
    print(f"{name}: calls of the CUDA runtime")
    for call, times in calls.most_common():
        print(f"  {times:3d}  {call}")
    return waiting(calls)


def main() -> int:
    device, backend = torch.device("cuda"), (sys.argv[1:] or ["triton"])[0]
    case = Case(
        *("moe_ffn", "base", torch.bfloat16, "forward+backward"),
        dict(tokens=8192, split="40:197"),
    )
    sublayer = Sublayer(case, device)
    form, inputs = routed(sublayer.split, backend), [sublayer.x, *leaves(sublayer.parameters)]

    def output() -> torch.Tensor:
        return form(sublayer.x, sublayer.parameters)

    for _ in range(2):  # compiles, and fills caches for later calls
        torch.autograd.grad(output(), inputs, sublayer.dy)
    print(f"{describe(device)}, torch {torch.__version__}, backend {backend}")
    print(f"base, {sublayer.tokens} tokens, 40:197, bfloat16, every gradient")
    found = show("forward", output)
    y = output()
    found += show("backward", functools.partial(torch.autograd.grad, y, inputs, sublayer.dy))
    print(f"\nwaits for the GPU or copies: {', '.join(found) or 'nothing'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
