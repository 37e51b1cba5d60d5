"""The formulas of vlmo/bench/cost.py, against what PyTorch counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe_ffn_cases import Case, eager, expert_ids, leaves, make_tensors
from vlmo.bench.cost import Cost, moe_ffn_backward, moe_ffn_forward
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


def test_costs_add_up():
    assert Cost(1, 2) + Cost(3, 4) == Cost(4, 6)
