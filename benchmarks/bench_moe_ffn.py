"""The routed feed-forward sublayer beside a dense one and beside slices, forward and backward.

    pytest benchmarks --benchmark-enable --save-results

Without ``--benchmark-enable`` this is a smoke test at tiny sizes. See conftest.py for the report.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from reporting import benchmarks_enabled
from sublayer import Sublayer, compiled, dense, routed, slices
from vlmo.bench.cost import Cost, moe_ffn_backward, moe_ffn_forward
from vlmo.kernels import BACKEND_NAMES, why_not

PHASES = ("forward", "forward+backward")
ROUTED = tuple(f"moe_ffn:{backend}" for backend in BACKEND_NAMES)
OTHERS = ("slices", "slices-compiled", "dense", "dense-compiled")
SIZES = {"base": (768, 3072), "large": (1024, 4096), "tiny": (32, 48)}  # D, F


class Case(NamedTuple):
    dtype: torch.dtype
    size: str
    tokens: int
    split: tuple[int, ...]
    phase: str
    contender: str

    @property
    def labels(self) -> dict[str, object]:
        dtype, split = str(self.dtype).removeprefix("torch."), ":".join(map(str, self.split))
        return self._asdict() | dict(operation="moe_ffn", dtype=dtype, split=split)

    def __str__(self) -> str:
        return "-".join(str(self.labels[name]) for name in self._fields)


def cases(full: bool, device: torch.device) -> list[Case]:
    """What is told first if time runs out comes first."""
    if full:
        dtypes = [torch.bfloat16, torch.float16]
        sizes, tokens = ["base", "large"], [32768, 8192, 131072]
        splits = [(40, 197), (50, 50), (5, 55, 40)]
    else:
        dtypes = [torch.bfloat16 if device.type == "cuda" else torch.float32]
        sizes, tokens, splits = ["tiny"], [30], [(3, 4), (2, 1, 4)]
    return [
        Case(dtype, size, count, split, phase, contender)
        for dtype in dtypes
        for size in sizes
        for count in tokens
        for split in splits
        for phase in PHASES
        for contender in (*ROUTED, *OTHERS)
        # The split makes no difference to a dense layer.
        if not (contender.startswith("dense") and split is not splits[0])
    ]


def pytest_generate_tests(metafunc):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    full = benchmarks_enabled(metafunc.config) and device.type == "cuda"
    metafunc.parametrize("case", cases(full, device), ids=str)
    metafunc.parametrize("device", [device], ids=str)


def bench_moe_ffn(case, device, measured):
    name, _, option = case.contender.partition(":")
    if name == "moe_ffn":
        reason = why_not("moe_ffn", option, device=device, dtype=case.dtype)
        if reason is not None:
            pytest.skip(f"{option}: {reason}")
        form, eager = routed(option), slices
    else:
        eager = dense if name.startswith("dense") else slices
        form = compiled(eager, device) if name.endswith("compiled") else eager
    dim, hidden = SIZES[case.size]
    sublayer = Sublayer.make(
        *(form, eager),
        tokens=case.tokens,
        dim=dim,
        hidden=hidden,
        split=case.split,
        dtype=case.dtype,
        device=device,
    )
    backward = case.phase != "forward"
    wrong = [d for d in sublayer.check(backward=backward) if not d.ok]
    assert not wrong, f"not exact enough to be timed: {wrong}"

    shape = (sublayer.tokens, dim, hidden)
    facts = dict(experts=1 if eager is dense else len(case.split), itemsize=case.dtype.itemsize)
    cost = moe_ffn_forward(*shape, **facts, keeps_pre=backward)
    cost += moe_ffn_backward(*shape, **facts) if backward else Cost(0, 0)
    work = sublayer.forward_and_backward if backward else sublayer.forward
    measured(work, device, case.dtype, cost, case.labels)
