"""The gradients of packed queries, keys and values: one tensor, and not copied if possible."""

from typing import Any

import pytest
import torch

from vlmo.kernels import shared_attention
from vlmo.kernels.attention import packing


def test_views_of_one_tensor_are_found():
    whole = torch.randn(2, 5, 3, 4, 8)
    found = packing.packed(whole.unbind(-3))
    assert found is not None and torch.equal(found, whole) and found.data_ptr() == whole.data_ptr()
    part = whole[1:]
    found = packing.packed(part.unbind(-3))
    assert found is not None and torch.equal(found, part)


@pytest.mark.parametrize(
    "views",
    [
        lambda t: [v.clone() for v in t.unbind(-3)],
        lambda t: t.unbind(-3)[::-1],
        lambda t: t[:, ::2].unbind(-3),
        lambda t: t.transpose(-3, -2).contiguous().unbind(-2),
        lambda t: t[..., :4].unbind(-3),
        lambda t: [*t.unbind(-3)[:2], t[:, :, 2].clone()],
    ],
    ids=["copies", "reversed", "every other token", "heads outside", "narrow", "one copy"],
)
def test_other_layouts_are_not(views):
    assert packing.packed(views(torch.randn(2, 6, 3, 4, 8))) is None


@pytest.mark.parametrize("dense", [True, False])
def test_the_gradient_is_that_of_three_tensors(dense):
    torch.manual_seed(0)
    offsets = torch.tensor([0, 7, 12])
    options: dict[str, Any] = {} if dense else dict(offsets=offsets, max_length=7)
    whole = torch.randn(*((3, 4) if dense else (12,)), 3, 2, 16, requires_grad=True)
    apart = [t.detach().clone().requires_grad_() for t in whole.unbind(-3)]
    out, expected = shared_attention(whole, **options), shared_attention(*apart, **options)
    assert torch.equal(out, expected)
    dout = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, whole, dout)
    assert torch.equal(gradient, torch.stack(torch.autograd.grad(expected, apart, dout), -3))
    assert gradient.is_contiguous()


def test_the_gradient_is_not_copied():
    whole = torch.randn(3, 4, 3, 2, 16, requires_grad=True)
    copied = []

    class Watched(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            copied.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    out = shared_attention(whole).sum()
    found = packing._Unpack.backward(None, *packing.empty(whole[..., 0, :, :]))
    assert found.shape == whole.shape
    with Watched():
        packing._Unpack.backward(None, *packing.empty(whole[..., 0, :, :]))
        assert not {"stack", "cat", "clone", "copy_"} & {*copied}
        packing._Unpack.backward(None, *(t.clone() for t in whole.detach().unbind(-3)))
    assert "stack" in copied
    out.backward()
    assert whole.grad is not None
