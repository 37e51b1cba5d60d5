"""Transforms of torch.func, forward-mode differentiation and PyTorch's FLOP counter."""

from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from vlmo.kernels import (
    ModalityRouting,
    RelativePositionBias,
    RelativePositionIndex,
    moe_ffn,
    shared_attention,
)

D, F, T, H = 8, 12, 6, 2
IDS = torch.tensor([0, 1, 1, 0, 1, 1])
ROUTINGS = {
    "segments": ModalityRouting.segments([(0, 2), (1, 4)]),
    "ids": ModalityRouting.from_ids(IDS, 2),
}
INDEX = RelativePositionIndex(torch.arange(9).view(3, 3) % 5, 5)


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def operations(backend: str | None = None):
    """Functions of [T, D], by name, with parameters of their own."""
    w1, w2 = [double(F, D), double(F, D)], [double(D, F), double(D, F)]
    scale, table = double(D), double(5, H)

    def ffn(routing):
        options: dict[str, Any] = dict(norm="layer", norm_weight=[scale] * 2, backend=backend)
        return lambda x: moe_ffn(x, routing, w1, w2, layer_scale=scale, **options)

    def attention(x):
        q = x.view(T // 3, 3, H, D // H)
        bias = RelativePositionBias(table, INDEX)
        lengths = torch.tensor([3, 2])
        return shared_attention(
            q, 2 * q, q.sin(), bias=bias, key_lengths=lengths, backend=backend
        ).reshape(T, D)

    return {name: ffn(routing) for name, routing in ROUTINGS.items()} | {"attention": attention}


@pytest.mark.parametrize("name", [*ROUTINGS, "attention"])
def test_transforms_agree_with_backward(name):
    function, x = operations()[name], double(T, D)
    jacobian = torch.autograd.functional.jacobian(function, x)
    tangent = double(T, D)
    expected = torch.einsum("abcd,cd->ab", jacobian, tangent)
    y, pushed, *_ = torch.func.jvp(function, (x,), (tangent,))
    torch.testing.assert_close(y, function(x))
    torch.testing.assert_close(pushed, expected)
    torch.testing.assert_close(torch.func.linearize(function, x)[1](tangent), expected)
    torch.testing.assert_close(torch.func.jacfwd(function)(x), jacobian)
    torch.testing.assert_close(torch.func.jacrev(function)(x), jacobian)
    gradient = torch.func.grad(lambda x: function(x).sum())(x)
    torch.testing.assert_close(gradient, jacobian.sum((0, 1)))
    several = torch.stack([x, 2 * x])
    torch.testing.assert_close(
        torch.vmap(function)(several), torch.stack([*map(function, several)])
    )
    with forward_ad.dual_level():
        dual = function(forward_ad.make_dual(x, tangent))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, expected)
        plain = function(x)  # no tangent: an ordinary call
        assert forward_ad.unpack_dual(plain).tangent is None


@pytest.mark.parametrize("name", ["segments", "attention"])
def test_named_backends_refuse_transforms(name):
    function, x = operations("cpu")[name], double(T, D)
    for call in (
        lambda: torch.func.jvp(function, (x,), (x,)),
        lambda: torch.func.grad(lambda x: function(x).sum())(x),
        lambda: torch.vmap(function)(x[None]),
    ):
        with pytest.raises(NotImplementedError, match="backend 'cpu' has neither forward-mode"):
            call()


def test_vmap_over_checked_values_is_refused():
    q = torch.randn(2, 1, 3, 1, 4)
    with pytest.raises(NotImplementedError, match=r"key_lengths: torch\.vmap cannot map over it"):
        torch.vmap(lambda q, n: shared_attention(q, q, q, key_lengths=n))(q, torch.ones(2, 1).int())


@pytest.mark.parametrize("name", ["packed", *ROUTINGS])
def test_flop_counter_sees_moe_ffn(name):
    routing = ROUTINGS.get(name) or ModalityRouting.packed([[(0, 2)], [(1, 4)]])
    w1 = [torch.randn(F, D, requires_grad=True), torch.randn(2 * F, D, requires_grad=True)]
    w2 = [torch.randn(D, F, requires_grad=True), torch.randn(D, 2 * F, requires_grad=True)]
    x = torch.randn(T, D, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        y = moe_ffn(x, routing, w1, w2)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    expected = 4 * D * F * (2 + 4 * 2)  # two tokens of width F, four of 2 F
    assert (forward.get_total_flops(), backward.get_total_flops()) == (expected, 2 * expected)


def test_flop_counter_of_a_frozen_expert_and_recomputation():
    w1 = [torch.randn(F, D), torch.randn(F, D, requires_grad=True)]
    w2 = [torch.randn(D, F), torch.randn(D, F, requires_grad=True)]
    x = torch.randn(T, D, requires_grad=True)
    y = moe_ffn(x, ROUTINGS["segments"], w1, w2, recompute=True)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    product = 2 * D * F
    assert backward.get_total_flops() == product * (2 * 3 + 4 * 5)


def test_flop_counter_sees_attention():
    q = torch.randn(2, 3, H, 4, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        shared_attention(q, q, q).sum().backward()
    assert counter.get_total_flops() == (4 + 10) * 2 * 3**2 * H * 4
    packed = torch.randn(7, H, 4)
    with FlopCounterMode(display=False) as counter:
        shared_attention(packed, packed, packed, offsets=torch.tensor([0, 3, 7]), max_length=5)
    assert counter.get_total_flops() == 4 * (3**2 + 4**2) * H * 4


def test_meta_tensors_have_shapes():
    x = torch.empty(T, D, device="meta")
    w1, w2 = [torch.empty(F, D, device="meta")] * 2, [torch.empty(D, F, device="meta")] * 2
    ids = IDS.to("meta")
    for routing in (ROUTINGS["segments"], ModalityRouting.from_ids(ids, 2)):
        y = moe_ffn(x, routing, w1, w2)
        assert y.is_meta and y.shape == x.shape
    q = torch.empty(2, 3, H, 4, device="meta")
    assert shared_attention(q, q, q).shape == q.shape
