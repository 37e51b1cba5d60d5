"""Calls of shared_attention for the tests: cases, tensors, and the eager baseline."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from accuracy import assert_as_accurate_as, relative_errors
from vlmo.kernels import RelativePositionBias, RelativePositionIndex, shared_attention
from vlmo.kernels.attention.cuda import backend as cuda_impl

# A backend and a device on which a test runs. The fixture ``place`` of conftest.py sets them up.
PLACES = [
    *(("cpu", backend) for backend in ("reference", "cpu", "triton", "cuda")),
    *(("cuda", backend) for backend in ("reference", "triton", "cuda")),
]


def on(*backends: str, places=PLACES):
    """Run a test on these backends, on every device that they support."""
    places = [
        pytest.param(place, marks=[pytest.mark.gpu] if place[0] == "cuda" else [])
        for place in places
        if place[1] in backends
    ]
    return pytest.mark.parametrize("place", places, ids="-".join, indirect=True)


on_every_backend = on("reference", "cpu", "triton", "cuda")
on_every_registered_backend = on("cpu", "triton", "cuda")
on_triton = on("triton")
on_cuda = on("cuda")


@dataclass(frozen=True)
class Case:
    """One call; the default is a joint sequence of 5 text and 10 image tokens with padding."""

    index: str | None = "joint"  # "joint", "image", "text", "random" or None
    length: int = 15
    batch: int = 2
    heads: int = 3
    head_dim: int = 16
    mask: str | None = "mask"  # "mask", "padding" (of the text), "lengths" or None
    causal: bool = False
    lengths: tuple = ()  # of packed sequences
    # True: below 15, at random; "runs" or "order" of all rows; "distinct": at random, but none
    # twice in a sequence; "gaps": the same in ascending order
    positions: bool | str = False
    scale: float | None = None
    grid: tuple = (3, 3)
    text: int = 5
    entries: int = 11  # of a random index

    def __str__(self):
        changed = [f"{k}={v}" for k, v in vars(self).items() if v != getattr(Case, k, None)]
        return ",".join(changed).replace(" ", "") or "joint"


CASES = [
    Case(),
    Case(index="image", length=10, mask=None),
    Case(index="text", length=5, mask="lengths"),
    Case(index="random", length=37, mask="lengths"),
    Case(index=None, mask=None),
    Case(index=None, mask="lengths", causal=True, head_dim=34),
    Case(index=None, mask="mask", scale=0.5),
    Case(index=None, length=1, mask=None),
    Case(positions=True),
    Case(index=None, length=0, mask=None),
    Case(batch=0),
    # packed: an empty sequence among others, alone, with the index read by position
    Case(index=None, lengths=(3, 0, 15, 1), mask=None),
    Case(index=None, lengths=(7,), mask=None, causal=True),
    Case(index="random", lengths=(9, 15, 2), mask=None),
    Case(index="joint", lengths=(9, 15, 2), mask=None, positions=True),
    # an index of more rows than a sequence
    Case(batch=4, length=12, positions="distinct"),
    Case(lengths=(9, 0, 15, 4), mask=None, positions="gaps"),
]
# Triton specialises on sizes of 1.
ONES = Case(index="random", length=1, batch=1, heads=1, head_dim=1, mask=None)


def make_index(case: Case, device) -> Any:  # RelativePositionIndex | None
    grid, text = case.grid, case.text
    if case.index is None:
        return None
    if case.index == "random":
        generator = torch.Generator().manual_seed(4)
        length = max(case.lengths, default=case.length)
        matrix = torch.randint(0, case.entries, (length, length), generator=generator)
        return RelativePositionIndex(matrix, case.entries).to(device)
    make = {
        "joint": lambda: RelativePositionIndex.joint(grid, text, text + 3),
        "image": lambda: RelativePositionIndex.image(grid, text + 3),
        "text": lambda: RelativePositionIndex.text(grid, text, text + 3),
    }
    return make[case.index]().to(device)


def make_tensors(case: Case, device, dtype) -> dict:
    generator = torch.Generator().manual_seed(5)
    rows = (sum(case.lengths),) if case.lengths else (case.batch, case.length)
    shape = (*rows, case.heads, case.head_dim)
    tensors = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
        for name in "qkv"
    }
    index = make_index(case, device)
    if index is not None:
        table = torch.randn(index.entries, case.heads, generator=generator, dtype=torch.float64)
        tensors["table"] = table.to(device, dtype)
    return tensors


def make_options(case: Case, device) -> dict:
    generator = torch.Generator().manual_seed(6)
    options: dict = {"causal": case.causal, "scale": case.scale}
    if case.mask == "mask":
        mask = torch.rand(case.batch, case.length, generator=generator) > 0.4
        mask[:1] = False  # a sequence without a valid key
        options["key_mask"] = mask.to(device)
    if case.mask == "padding":
        lengths = torch.linspace(1, case.text, case.batch).round().long()
        place = torch.arange(case.length)
        mask = (place < lengths[:, None]) | (place >= case.text)
        options["key_mask"] = mask.to(device)
    if case.mask == "lengths":
        options["key_lengths"] = torch.tensor([case.length, 2], device=device)
    if case.lengths:
        offsets = torch.tensor([0, *case.lengths]).cumsum(0)
        options |= {"offsets": offsets.to(device), "max_length": max(case.lengths) + 2}
        if case.index and not case.positions:
            options["max_length"] = max(case.lengths)
    if case.positions:
        rows = (sum(case.lengths),) if case.lengths else (case.batch, case.length)
        options["positions"] = make_positions(case, rows, generator).to(device)
        options["distinct"] = case.positions in ("distinct", "gaps")
    return options


def make_positions(case: Case, rows: tuple, generator: torch.Generator) -> Tensor:
    if case.positions is True:
        return torch.randint(0, 15, rows, generator=generator)
    size = len(make_index(case, "cpu").matrix)
    if case.positions in ("distinct", "gaps"):
        lengths = case.lengths or (case.length,) * case.batch
        each = [torch.randperm(size, generator=generator)[:length] for length in lengths]
        if case.positions == "gaps":
            each = [positions.sort().values for positions in each]
        return torch.cat(each).view(rows)
    if case.positions == "order":
        return torch.randint(0, size, rows, generator=generator)
    place = torch.arange(rows[-1])
    jumps = 5 * (place >= rows[-1] // 3) + 7 * (place >= rows[-1] // 2)
    return ((place + jumps) % size).expand(rows)


def eager(case: Case, tensors: dict, options: dict) -> Tensor:
    """Attention as unilm computes it, one sequence at a time, with autograd."""
    index = make_index(case, tensors["q"].device)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    wide = torch.promote_types(tensors["q"].dtype, torch.float32)

    def one(q, k, v, allowed, positions):  # [N, H, K]
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        scores = (q * scale).to(wide) @ k.to(wide).transpose(1, 2)
        if index is not None:
            matrix = index.matrix.long()[positions][:, positions]
            scores = scores + tensors["table"].to(wide)[matrix].permute(2, 0, 1)
        if case.causal:
            allowed = allowed & torch.ones_like(scores[0], dtype=torch.bool).tril()
        valid = allowed.any(-1, keepdim=True)
        scores = scores.masked_fill(~(allowed | ~valid), float("-inf"))
        p = scores.softmax(-1).to(v.dtype) * valid.to(v.dtype)
        return (p @ v).transpose(0, 1)

    outs = []
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    if case.lengths:
        runs: list = [slice(int(a), int(b)) for a, b in options["offsets"].unfold(0, 2, 1)]
    else:
        runs = [*range(case.batch)]
    for number, run in enumerate(runs):
        length = q[run].shape[0]
        allowed = torch.ones(1, length, dtype=torch.bool, device=q.device)
        if "key_mask" in options:
            allowed = options["key_mask"][number][None]
        if "key_lengths" in options:
            allowed = (torch.arange(length, device=q.device) < options["key_lengths"][number])[None]
        positions = torch.arange(length, device=q.device)
        if case.positions:
            positions = options["positions"][run]
        outs.append(one(q[run], k[run], v[run], allowed, positions))
    if not outs:
        return q + 0 * k + 0 * v
    return torch.cat(outs) if case.lengths else torch.stack(outs)


def call(case: Case, tensors: dict, options: dict, **more) -> Tensor:
    bias = None
    if case.index is not None:
        bias = RelativePositionBias(tensors["table"], make_index(case, tensors["q"].device))
    return shared_attention(tensors["q"], tensors["k"], tensors["v"], bias=bias, **options, **more)


def make_dout(out: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)


def outputs_and_gradients(function, tensors: dict) -> dict[str, Tensor]:
    tensors = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    out = function(tensors)
    out.backward(make_dout(out))
    grads = {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in tensors.items()}
    return {"out": out.detach(), **grads}


def assert_parity(
    case: Case, dtype: torch.dtype, place, change=None
) -> dict[str, tuple[float, ...]]:
    """Check the output and every gradient of a case against the error bound.

    Args:
        change: changes the tensors, for example so that attention is concentrated on few keys.

    Returns:
        By name, the relative error of ``place.backend`` and that of eager PyTorch in ``dtype``.
    """
    device, backend = place
    if backend == "cuda" and (reason := cuda_impl.why_not(device, dtype, case.head_dim, 0)):
        pytest.skip(reason)
    tensors, options = make_tensors(case, device, dtype), make_options(case, device)
    if change is not None:
        change(tensors)
    wide = {name: t.double() for name, t in tensors.items()}
    exact = outputs_and_gradients(lambda t: eager(case, t, options), wide)
    baseline = outputs_and_gradients(lambda t: eager(case, t, options), tensors)
    actual = outputs_and_gradients(lambda t: call(case, t, options, backend=backend), tensors)
    slack = {}
    few_keys = dtype == torch.float32 or case.length == 1 or change is not None
    centers = backend == "reference" or (backend == "cpu" and dtype != torch.bfloat16)
    if few_keys and not centers:
        slack = delta_error(case, wide, exact["out"], dtype)
    for name, value in actual.items():
        off = value - exact[name]
        allowed = off.clamp(-slack.get(name, 0), slack.get(name, 0))
        assert_as_accurate_as(name, (value - allowed).to(value), exact[name], baseline[name])
    return relative_errors(actual, baseline, exact)


def delta_error(case: Case, tensors: dict, out: Tensor, dtype: torch.dtype) -> dict[str, float]:
    """The effect of rounding out on the gradients of queries with few keys.

    The gradient of a score is p (dp - delta). Eager PyTorch uses delta = sum(p dp) over the keys,
    which gives exactly 0 for a single key. Kernels use rowsum(dout * out), which is mathematically
    equal and needs no extra pass over the keys, but out and the log-sum-exp, from which p is
    recomputed, are rounded.
    """
    if out.numel() == 0:
        return {}
    error = torch.finfo(dtype).eps * float((out * make_dout(out)).abs().sum(-1).max())
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    return {
        "q": error * scale * float(tensors["k"].abs().max()),
        "k": error * scale * float(tensors["q"].abs().max()),
        "table": error * case.batch,
    }
