"""moe_linear: what its parity cases (moe_ffn_cases.py) do not show."""

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from attention_cases import on
from moe_ffn_cases import (
    PLACES,
    Case,
    call,
    eager,
    expert_ids,
    leaves,
    make_routing,
    make_tensors,
    outputs_and_gradients,
    skip_unless_possible,
)
from vlmo.kernels import ModalityRouting, moe_linear, use_backend
from vlmo.kernels.moe_ffn import op as ops
from vlmo.kernels.moe_ffn.call import LISTS, Call

CASE = Case(linear=40)
D, OUT = 6, 10
ROUTING = ModalityRouting.segments([(0, 2), (1, 3)])


def registered(case: Case, routing: ModalityRouting, tensors: dict) -> Call:
    """The call that a case makes, with rows by segments or an index."""
    tokens = len(expert_ids(case))
    index: Any = [None] * 3
    if routing.ids is not None:
        index = routing.grouping(tokens, tensors["x"].device)
    return Call._make(
        [
            tensors["x"].reshape(tokens, -1),
            *(tensors.get(name, []) for name in LISTS),
            tensors.get("layer_scale"),
            tensors["token_scale"].reshape(tokens) if case.token_scale else None,
            tensors["residual"].reshape(tokens, -1) if case.residual else None,
            *index,
            [n for piece in routing.pieces for n in piece],
            *(case.norm, 1e-6, 1e-5, "gelu", True, [], [], []),
        ]
    )


@pytest.mark.parametrize("form", ["segments", "ids"])
@on("cpu", "triton", "composed", places=PLACES)
def test_opcheck(form, place):
    case = Case(pieces=((0, 3), (1, 5)), form=form, batch=2, dim=8, linear=16)
    skip_unless_possible(place, case, place.dtype)
    tensors = make_tensors(case, place.device, place.dtype)
    leaves(tensors)
    made = registered(case, make_routing(case, place.device), tensors)
    x, residual = made.x, made.residual
    assert residual is not None
    inputs = made._replace(
        x=x.detach().requires_grad_(), residual=residual.detach().requires_grad_()
    )
    torch.library.opcheck(ops.MOE_LINEAR.forward, (*inputs, place.backend))


def test_gradcheck():
    case = replace(CASE, dim=5, linear=4, batch=1)
    tensors, routing = make_tensors(case, "cpu", torch.float64), make_routing(case, "cpu")
    inputs = tuple(leaves(tensors).values())
    assert torch.autograd.gradcheck(lambda *_: call(case, routing, tensors), inputs, fast_mode=True)


@pytest.mark.parametrize("wanted", ["x", "w2", "b2", "norm_weight", "norm_bias", "layer_scale"])
@on("cpu", "triton", "composed", places=PLACES)
def test_single_gradients(wanted, place):
    skip_unless_possible(place, CASE, torch.float32)
    routing = make_routing(CASE, place.device)

    def gradients(backend: str) -> list[torch.Tensor]:
        tensors = make_tensors(CASE, place.device, torch.float32)
        found = tensors[wanted]
        inputs = found if isinstance(found, list) else [found]
        for tensor in inputs:
            tensor.requires_grad_()
        y = call(CASE, routing, tensors, backend=backend)
        return [*torch.autograd.grad(y.square().sum(), inputs)]

    expected = gradients("reference")
    for value, exact in zip(gradients(place.backend), expected, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["segments", "ids"])
def test_the_cuda_backend_multiplies_with_pytorch(form):
    """Its functions for moe_linear run on any device."""
    case = replace(CASE, form=form)
    routing, backend = make_routing(case, "cpu"), ops.BACKENDS["cuda"]
    tensors = make_tensors(case, "cpu", torch.float32)
    ids = routing.expert_ids(len(expert_ids(case)), "cpu")
    expected = outputs_and_gradients(lambda t: eager(case, ids, t), tensors)
    made = registered(case, routing, tensors)
    with torch.no_grad():
        y, saved = backend.forward(made)
    assert saved.numel() == 0
    torch.testing.assert_close(y.view_as(expected["y"]), expected["y"])
    names = [n for n in expected if n not in ("y", "residual")]
    fields = ["x", *LISTS, "layer_scale"]
    order = sorted(names, key=lambda name: fields.index(name.split("[")[0]))
    generator = torch.Generator().manual_seed(3)
    dy = torch.randn(expected["y"].shape, generator=generator, dtype=torch.float64).to(y)
    needs = [name != "b2[1]" for name in order]
    found = backend.backward(dy.view_as(y), saved, made, needs)
    for name, gradient, need in zip(order, found, needs, strict=True):
        if need:
            torch.testing.assert_close(gradient.view_as(expected[name]), expected[name])
        else:
            assert gradient.numel() == 0


@pytest.mark.parametrize("norm", ["layer", "none"])
def test_autocast(norm):
    case = replace(CASE, norm=norm)
    routing, tensors = make_routing(case, "cpu"), make_tensors(case, "cpu", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = call(case, routing, {k: v for k, v in tensors.items() if k != "residual"})
    assert y.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        y = call(case, routing, tensors)
    assert y.dtype == torch.float32
    expected = eager(case, expert_ids(case), tensors)
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)


@pytest.mark.heavy
@pytest.mark.parametrize("form", ["segments", "ids"])
def test_compiled(form):
    case = replace(CASE, form=form)
    routing = make_routing(case, "cpu")

    def function(tensors):
        return call(case, routing, tensors)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = outputs_and_gradients(function, make_tensors(case, "cpu", torch.float32))
    actual = outputs_and_gradients(compiled, make_tensors(case, "cpu", torch.float32))
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value)


def test_flop_counter():
    weight = [torch.randn(OUT, D, requires_grad=True), torch.randn(OUT, D)]
    x = torch.randn(5, D, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        y = moe_linear(x, ROUTING, weight)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert forward.get_total_flops() == 2 * D * OUT * 5
    assert backward.get_total_flops() == 2 * D * OUT * (5 + 2)  # one weight is frozen


def test_meta_tensors_have_shapes():
    weight = [torch.empty(OUT, D, device="meta")] * 2
    y = moe_linear(torch.empty(4, 5, D, device="meta"), ROUTING, weight)
    assert y.is_meta and y.shape == (4, 5, OUT)


def test_its_backend_has_a_name_of_its_own():
    weight, x = [torch.randn(OUT, D)] * 2, torch.randn(5, D)
    with use_backend("moe_linear=cuda"), pytest.raises(NotImplementedError, match=r"^moe_linear: "):
        moe_linear(x, ROUTING, weight)
    with use_backend("moe_ffn=cuda"), mock.patch.object(ops.BACKENDS["cuda"], "forward", None):
        assert moe_linear(x, ROUTING, weight).shape == (5, OUT)


X = torch.zeros(5, D)
WEIGHT, BIAS, NORM = [torch.zeros(OUT, D)] * 2, [torch.zeros(OUT)] * 2, [torch.ones(D)] * 2
BAD: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "x: shape (6,) has no token dimension": (ValueError, dict(x=torch.zeros(D))),
    "routing: expected a ModalityRouting, got list": (TypeError, dict(routing=[0, 1])),
    "weight: expected a sequence of one tensor per expert": (TypeError, dict(weight=WEIGHT[0])),
    "weight: 1 tensors for 2 experts": (ValueError, dict(weight=WEIGHT[:1])),
    "weight: 0 tensors for 2 experts": (ValueError, dict(weight=[])),
    "weight[1]: shape (10, 7)": (ValueError, dict(weight=[WEIGHT[0], torch.zeros(OUT, 7)])),
    "weight[1]: shape (9, 6) does not fit (10, 6)": (
        ValueError,
        dict(weight=[WEIGHT[0], torch.zeros(9, D)]),
    ),
    "weight[0]: dtype float16": (TypeError, dict(weight=[w.half() for w in WEIGHT])),
    "bias: 1 tensors": (ValueError, dict(bias=BIAS[:1])),
    "bias[0]: shape (6,)": (ValueError, dict(bias=NORM)),
    "norm: 'batch' is not one of": (ValueError, dict(norm="batch")),
    "norm_weight: missing": (ValueError, dict(norm="layer")),
    "norm: 'none', but": (ValueError, dict(norm_weight=NORM)),
    "norm_weight[0]: shape (10,)": (ValueError, dict(norm="rms", norm_weight=BIAS)),
    "norm_bias: RMSNorm has none": (
        ValueError,
        dict(norm="rms", norm_weight=NORM, norm_bias=NORM),
    ),
    "layer_scale: shape (6,) does not fit (10)": (ValueError, dict(layer_scale=torch.ones(D))),
    "token_scale: shape (4,)": (ValueError, dict(token_scale=torch.ones(4))),
    "residual: shape (5, 6) does not fit (5, 10)": (ValueError, dict(residual=X)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    error, changes = BAD[message]
    arguments: dict[str, Any] = dict(x=X, routing=ROUTING, weight=WEIGHT, bias=BIAS) | changes
    with pytest.raises(error) as raised:
        moe_linear(**arguments)
    assert str(raised.value).startswith(message)
