"""What one forward and one backward of moe_ffn launch, and whether either waits for the GPU.

    python benchmarks/profile_moe_ffn.py [BACKEND]

Exits with 1 if a call of the CUDA runtime synchronises or copies.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import torch

from sublayer import Sublayer, routed, slices
from vlmo.bench import launches
from vlmo.kernels.target import describe


def show(name: str, work: Callable[[], object]) -> list[str]:
    """Print the kernels and the calls of the runtime; those that wait are returned."""
    kernels, calls = launches.count(work)
    print(f"\n{name}: {kernels.total()} on the GPU")
    for kernel, times in kernels.most_common():
        print(f"  {times:3d}  {kernel[:110]}")
    print(f"{name}: calls of the CUDA runtime")
    for call, times in calls.most_common():
        print(f"  {times:3d}  {call}")
    return launches.waiting(calls)


def main() -> int:
    device, backend = torch.device("cuda"), (sys.argv[1:] or ["triton"])[0]
    sublayer = Sublayer.make(
        *(routed(backend), slices),
        tokens=8192,
        dim=768,
        hidden=3072,
        split=(40, 197),
        dtype=torch.bfloat16,
        device=device,
    )
    leaves = [sublayer.x, *(tensor for tensors in sublayer.parameters for tensor in tensors)]

    def output() -> torch.Tensor:
        return sublayer.form(sublayer.x, sublayer.parameters, sublayer.split)

    for _ in range(2):  # compiles, and makes what later calls reuse
        torch.autograd.grad(output(), leaves, sublayer.dy)
    print(f"{describe(device)}, torch {torch.__version__}, backend {backend}")
    print(f"base, {sublayer.tokens} tokens, 40:197, bfloat16, every gradient")
    found = show("forward", output)
    y = output()
    found += show("backward", functools.partial(torch.autograd.grad, y, leaves, sublayer.dy))
    print(f"\nwaits for the GPU or copies: {', '.join(found) or 'nothing'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
