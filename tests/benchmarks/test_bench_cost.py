"""The formulas of benchmarks/harness/cost.py, compared with PyTorch's FLOP counter."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from harness.cost import (
    Cost,
    attention_backward,
    attention_forward,
    moe_ffn_backward,
    moe_ffn_forward,
)
from moe_ffn_cases import Case, eager, expert_ids, leaves, make_tensors


def counted(case: Case, function) -> tuple[int, int]:
    """FLOPs of the forward and of the backward."""
    tensors = make_tensors(case, "cpu", torch.float32)
    flat = leaves(tensors)
    with FlopCounterMode(display=False) as forward:
        y = function(tensors)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(y.sum(), list(flat.values()))
    return forward.get_total_flops(), backward.get_total_flops()


def test_flops_are_those_of_eager_pytorch():
    case = Case(token_scale=False)
    shape = (60, case.dim, case.hidden[0])
    facts: dict[str, Any] = dict(experts=2, itemsize=4)
    ids = expert_ids(case)
    forward, backward = counted(case, lambda tensors: eager(case, ids, tensors))
    assert moe_ffn_forward(*shape, **facts).flops == forward
    assert moe_ffn_backward(*shape, **facts).flops == backward


def test_bytes_are_those_of_the_tensors():
    case = Case(token_scale=False)
    tensors = make_tensors(case, "cpu", torch.float16)
    x, residual = tensors.pop("x"), tensors.pop("residual")
    assert residual.shape == x.shape  # in the sublayer they are one tensor, read once
    lists = [value if isinstance(value, list) else [value] for value in tensors.values()]
    parameters = sum(t.nbytes for tensors in lists for t in tensors)
    pre = 60 * tensors["w1"][0].shape[0] * 2

    facts: dict[str, Any] = dict(experts=2, itemsize=2)
    shape = (60, case.dim, case.hidden[0])
    assert moe_ffn_forward(*shape, **facts).bytes == 2 * x.nbytes + parameters
    kept = moe_ffn_forward(*shape, **facts, keeps_pre=True)
    assert kept.bytes == 2 * x.nbytes + parameters + pre
    assert moe_ffn_backward(*shape, **facts).bytes == 3 * x.nbytes + 2 * parameters + pre


# Sequences, tokens, heads, numbers of a head; entries of the table.
ATTENTION, ENTRIES = (3, 10, 2, 8), 7


def attention_tensors(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """q, k, v and the table."""
    sequences, length, heads, dim = ATTENTION
    shapes = [(sequences, heads, length, dim)] * 3 + [(ENTRIES, heads)]
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def test_flops_of_attention_are_those_of_eager_pytorch():
    q, k, v, table = attention_tensors()
    index = torch.arange(ATTENTION[1] ** 2).reshape(ATTENTION[1], -1) % ENTRIES
    with FlopCounterMode(display=False) as forward:
        scores = q @ k.transpose(2, 3) + table[index].permute(2, 0, 1)
        y = scores.softmax(dim=-1) @ v
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(y.sum(), [q, k, v, table])
    facts: dict[str, Any] = dict(itemsize=4, entries=ENTRIES)
    assert attention_forward(*ATTENTION, **facts).flops == forward.get_total_flops()
    assert attention_backward(*ATTENTION, **facts).flops == backward.get_total_flops()


def test_bytes_of_attention_are_those_of_the_tensors():
    q, k, v, table = attention_tensors(torch.float16)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32)
    read = sum(t.nbytes for t in (q, k, v))
    facts: dict[str, Any] = dict(itemsize=2, entries=ENTRIES)
    assert attention_forward(*ATTENTION, itemsize=2).bytes == read + out.nbytes
    assert attention_forward(*ATTENTION, **facts).bytes == read + table.nbytes + out.nbytes
    kept = attention_forward(*ATTENTION, **facts, keeps_lse=True)
    assert kept.bytes == read + table.nbytes + out.nbytes + lse.nbytes
    # dq, dk, dv and the table's gradient are as large as what they are of.
    backward = attention_backward(*ATTENTION, **facts)
    assert backward.bytes == 2 * (read + table.nbytes) + 2 * out.nbytes + lse.nbytes


def test_costs_add_up():
    assert Cost(1, 2) + Cost(3, 4) == Cost(4, 6)
