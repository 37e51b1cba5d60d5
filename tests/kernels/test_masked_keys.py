"""Values at masked keys, and weights of experts without tokens, have no effect."""

import itertools
from dataclasses import dataclass

import pytest
import torch

import moe_ffn_cases as ffn
from attention_cases import (
    PLACES,
    Case,
    call,
    make_dout,
    make_index,
    make_options,
    make_tensors,
    on_every_backend,
    outputs_and_gradients,
)
from vlmo.kernels import RelativePositionBias, shared_attention
from vlmo.kernels.attention import op as ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Masked(Case):
    """A case with both kinds of masks if ``mask`` is "both"."""

    def options(self, device) -> dict:
        options = make_options(self, device)
        if self.mask == "both":
            mask = torch.arange(self.length, device=device) != 1
            options["key_mask"] = mask.expand(self.batch, -1)
            options["key_lengths"] = torch.tensor([self.length, 2, 0], device=device)
        return options


MASKED = [
    Masked(),  # with a sequence without a valid key
    Masked(mask="lengths", index="text", length=5),
    Masked(mask="both", batch=3, index="random", length=40, head_dim=34),
    Masked(mask="mask", index=None, causal=True, heads=1),
    Masked(mask="padding", index="joint", length=70, text=20, grid=(7, 7), heads=1, head_dim=64),
    Masked(mask="lengths", index="random", length=70, heads=1, head_dim=128),
    Masked(mask="mask", index="random", length=70, heads=1, head_dim=128, causal=True),
    Masked(mask="mask", positions=True, heads=2),
]


def valid_keys(options: dict, shape) -> torch.Tensor:
    """``[B, N]`` bool."""
    batch, length = shape[:2]
    valid = torch.ones(batch, length, dtype=torch.bool)
    if "key_mask" in options:
        valid &= options["key_mask"].cpu()
    if "key_lengths" in options:
        valid &= torch.arange(length) < options["key_lengths"].cpu()[:, None]
    return valid


def masked_cases():
    """Every case in every dtype; in Triton's interpreter one of them in make test."""
    for (number, case), dtype, place in itertools.product(enumerate(MASKED), DTYPES, PLACES):
        marks = [pytest.mark.gpu] if place[0] == "cuda" else []
        if place == ("cpu", "triton") and dtype != DTYPES[number % 3]:
            marks.append(pytest.mark.slow)
        yield pytest.param(case, dtype, place, marks=marks, id=f"{'-'.join(place)}-{case}-{dtype}")


@pytest.mark.parametrize(("case", "dtype", "place"), [*masked_cases()], indirect=["place"])
def test_what_lies_under_a_masked_key_changes_nothing(case, dtype, place):
    """Neither the output nor a gradient, bit by bit; its own gradients are exactly 0."""
    device, backend = place
    if reason := ops.BACKENDS[backend].why_not(device, dtype, case.head_dim, 0):
        pytest.skip(reason)
    tensors, options = make_tensors(case, device, dtype), case.options(device)
    masked = ~valid_keys(options, tensors["k"].shape).to(device)
    assert masked.any() and not masked.all()

    def run(lies):
        changed = {n: t.clone() for n, t in tensors.items()}
        for name, value in zip("kv", lies, strict=True):
            changed[name][masked] = value
        return outputs_and_gradients(lambda t: call(case, t, options, backend=backend), changed)

    nan, inf = float("nan"), float("inf")
    expected = run((0.0, 0.0))
    for lies in ((nan, nan), (inf, -inf)):
        for name, value in run(lies).items():
            assert torch.equal(value, expected[name]), (name, lies)
    for name in "kv":
        assert (expected[name][masked] == 0).all(), name
        assert (expected[name][~masked] != 0).any(), name


@pytest.mark.parametrize("case", MASKED[:4], ids=str)
def test_torch_func_of_the_reference_keeps_the_rule(case):
    """Autograd through the oracle, which the other tests do not take."""
    tensors, options = make_tensors(case, "cpu", torch.float32), case.options("cpu")
    masked = ~valid_keys(options, tensors["k"].shape)

    def gradients(value):
        changed = {name: t.clone() for name, t in tensors.items()}
        changed["k"][masked] = changed["v"][masked] = value
        out, backward, *_ = torch.func.vjp(lambda t: call(case, t, options), changed)
        return {"out": out, **backward(make_dout(out))[0]}

    expected, actual = gradients(0.0), gradients(float("nan"))
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name
    for name in "kv":
        assert (actual[name][masked] == 0).all(), name


@on_every_backend
def test_keys_and_values_of_a_packed_projection(place):
    """As a layer has them: q, k and v of one tensor; the queries of masked places are finite."""
    device, backend = place
    case = Masked()
    tensors, options = make_tensors(case, device, place.dtype), case.options(device)
    bias = RelativePositionBias(tensors["table"], make_index(case, device))
    masked = ~options["key_mask"]

    def run(value):
        qkv = torch.stack([tensors[name] for name in "qkv"], 2)
        qkv[:, :, 1:][masked] = value
        qkv.requires_grad_()
        out = shared_attention(qkv, bias=bias, backend=backend, **options)
        return out, *torch.autograd.grad(out, qkv, make_dout(out))

    for actual, expected in zip(run(float("nan")), run(0.0), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("form", ["segments", "ids", "packed"])
def test_parameters_of_an_expert_without_tokens_change_nothing(form, place):
    """And their gradients are exactly 0."""
    case = ffn.Case(pieces=((0, 9), (2, 4)), hidden=(40, 40, 40), form=form)
    tensors = ffn.make_tensors(case, place.device, place.dtype)
    routing = ffn.make_routing(case, place.device)

    def run(value):
        changed = {
            name: [t.clone() for t in item] if isinstance(item, list) else item.clone()
            for name, item in tensors.items()
        }
        for item in changed.values():
            if isinstance(item, list):
                item[1].fill_(value)
        leaves = ffn.leaves(changed)
        out = ffn.call(case, routing, changed, backend=place.backend)
        out.backward(torch.ones_like(out))
        return {"out": out.detach(), **{name: t.grad for name, t in leaves.items()}}

    expected, actual = run(0.0), run(float("nan"))
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name
        if name.endswith("[1]"):
            assert (value == 0).all(), name
