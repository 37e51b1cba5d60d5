"""The CPU backends do not depend on PyTorch's default dtype and device."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch

import attention_cases as attention
import moe_ffn_cases as ffn
from settings import default_dtype
from vlmo.kernels import RelativePositionBias, shared_attention


def run_attention():
    case = attention.Case()
    tensors = attention.make_tensors(case, "cpu", torch.float32)
    options = attention.make_options(case, "cpu")
    bias = RelativePositionBias(
        tensors["table"].requires_grad_(), attention.make_index(case, "cpu")
    )
    leaves = [*(tensors[name].requires_grad_() for name in "qkv"), bias.table]

    def run():
        out = shared_attention(*leaves[:3], bias=bias, backend="cpu", **options)
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    return run


def run_moe_ffn():
    case = ffn.Case()
    routing = ffn.make_routing(case, "cpu")
    tensors = ffn.make_tensors(case, "cpu", torch.float32)
    leaves = ffn.leaves(tensors)

    def run():
        out = ffn.call(case, routing, tensors, backend="cpu")
        return [out, *torch.autograd.grad(out, [*leaves.values()], torch.ones_like(out))]

    return run


CONTEXTS: dict[str, Callable[[], AbstractContextManager]] = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("make", [run_attention, run_moe_ffn])
def test_defaults_change_nothing(make, context):
    run = make()
    expected = run()
    with CONTEXTS[context]():
        actual = run()
    for ours, plain in zip(actual, expected, strict=True):
        assert ours.dtype == plain.dtype and torch.equal(ours, plain)
