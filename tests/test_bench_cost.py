"""The formulas of vlmo/bench/cost.py, against what PyTorch counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe_ffn_cases import Case, eager, expert_ids, leaves, make_tensors
from vlmo.bench.cost import (
    Cost,
    attention_backward,
    attention_forward,
    moe_ffn_backward,
    moe_ffn_forward,
)
from vlmo.kernels.moe_ffn import reference
from vlmo.trial import Problem, make_call


def counted(case: Case, function) -> tuple[int, int]:
    """FLOPs of the forward and of the backward."""
    tensors = make_tensors(case, "cpu", torch.float32)
    flat = leaves(tensors)
    with FlopCounterMode(display=False) as forward:
        y = function(tensors)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(y.sum(), list(flat.values()))
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_flops_are_those_of_eager_pytorch(activation):
    case = Case(activation=activation, token_scale=False)
    shape, gated = (60, case.dim, case.hidden[0]), activation == "swiglu"
    facts = dict(experts=2, itemsize=4, gated=gated)
    ids = expert_ids(case)
    forward, backward = counted(case, lambda tensors: eager(case, ids, tensors))
    assert moe_ffn_forward(*shape, **facts).flops == forward
    assert moe_ffn_backward(*shape, **facts).flops == backward


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_flops_of_the_backward_with_and_without_recomputation(gated, recomputes):
    problem = Problem(dim=24, hidden=40, tokens=60, split=(2, 4), dtype=torch.float32)
    # Without layer scale, whose gradient costs the reference one more product.
    call = make_call(problem, torch.device("cpu"))._replace(
        layer_scale=None, save_pre=not recomputes
    )
    if gated:
        w1, b1 = ([torch.cat([t, t]) for t in tensors] for tensors in (call.w1, call.b1))
        call = call._replace(w1=w1, b1=b1, activation="swiglu")
    y, pre = reference.forward(call)
    with FlopCounterMode(display=False) as counter:
        reference.backward(torch.ones_like(y), pre, call, [True] * 13)
    facts = dict(experts=2, itemsize=4, gated=gated)
    expected = moe_ffn_backward(60, 24, 40, **facts, recomputes=recomputes)
    assert expected.flops == counter.get_total_flops()


@pytest.mark.parametrize("gated", [False, True])
def test_bytes_are_those_of_the_tensors(gated):
    case = Case(activation="swiglu" if gated else "gelu", token_scale=False)
    tensors = make_tensors(case, "cpu", torch.float16)
    x, residual = tensors.pop("x"), tensors.pop("residual")
    assert residual.shape == x.shape  # in the sublayer they are one tensor, read once
    lists = [value if isinstance(value, list) else [value] for value in tensors.values()]
    parameters = sum(t.nbytes for tensors in lists for t in tensors)
    pre = 60 * tensors["w1"][0].shape[0] * 2

    facts = dict(experts=2, itemsize=2, gated=gated)
    shape = (60, case.dim, case.hidden[0])
    assert moe_ffn_forward(*shape, **facts).bytes == 2 * x.nbytes + parameters
    kept = moe_ffn_forward(*shape, **facts, keeps_pre=True)
    assert kept.bytes == 2 * x.nbytes + parameters + pre
    assert moe_ffn_backward(*shape, **facts).bytes == 3 * x.nbytes + 2 * parameters + pre
    again = moe_ffn_backward(*shape, **facts, recomputes=True)
    assert again.bytes == 3 * x.nbytes + 2 * parameters


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
    facts = dict(itemsize=4, entries=ENTRIES)
    assert attention_forward(*ATTENTION, **facts).flops == forward.get_total_flops()
    assert attention_backward(*ATTENTION, **facts).flops == backward.get_total_flops()
    # One more product, of the size of each of the forward's two.
    again = attention_backward(*ATTENTION, **facts, recomputes=True).flops
    assert again == backward.get_total_flops() + forward.get_total_flops() // 2


def test_bytes_of_attention_are_those_of_the_tensors():
    q, k, v, table = attention_tensors(torch.float16)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32)
    read = sum(t.nbytes for t in (q, k, v))
    facts = dict(itemsize=2, entries=ENTRIES)
    assert attention_forward(*ATTENTION, itemsize=2).bytes == read + out.nbytes
    assert attention_forward(*ATTENTION, **facts).bytes == read + table.nbytes + out.nbytes
    kept = attention_forward(*ATTENTION, **facts, keeps_lse=True)
    assert kept.bytes == read + table.nbytes + out.nbytes + lse.nbytes
    # dq, dk, dv and the table's gradient are as large as what they are of.
    backward = attention_backward(*ATTENTION, **facts)
    assert backward.bytes == 2 * (read + table.nbytes) + 2 * out.nbytes + lse.nbytes


def test_costs_add_up():
    assert Cost(1, 2) + Cost(3, 4) == Cost(4, 6)
