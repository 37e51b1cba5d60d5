"""moe_ffn: parity with eager PyTorch, gradients, the operation's registration, bad input."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from accuracy import assert_as_accurate_as, labelled
from attention_cases import on
from moe_ffn_cases import (
    CASES,
    PAIRS,
    PLACES,
    Case,
    Spy,
    assert_parity,
    call,
    eager,
    eager_autocast,
    expert_ids,
    leaves,
    make_routing,
    make_tensors,
    outputs_and_gradients,
    skip_unless_possible,
)
from vlmo.kernels import ModalityRouting, moe_ffn
from vlmo.kernels.moe_ffn import op as ops
from vlmo.kernels.moe_ffn.call import LISTS


def parity_cases():
    """Every case in every dtype; of those with little to do with the dtype, one in make test."""
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    for (number, case), dtype, (device, backend) in itertools.product(
        enumerate(CASES), dtypes, PLACES
    ):
        marks = [pytest.mark.gpu] if device == "cuda" else []
        interpreted = device == "cpu" and backend in ("triton", "composed")
        if interpreted and number > 4 and dtype != dtypes[number % 3]:
            marks.append(pytest.mark.slow)
        name = f"{device}-{backend}-{case}-{dtype}"
        yield pytest.param(case, dtype, (device, backend), marks=marks, id=name)


@pytest.mark.parametrize(("case", "dtype", "place"), [*parity_cases()], indirect=["place"])
def test_parity(case, dtype, place):
    skip_unless_possible(place, case, dtype)
    assert_parity(case, dtype, place)


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.batch and c.dim == 24 and sum(n for _, n in c.pieces) < 21],
    ids=str,
)
def test_gradcheck(case):
    case = replace(case, dim=5, hidden=tuple(h % 7 + 2 for h in case.hidden), batch=1)
    tensors = make_tensors(case, "cpu", torch.float64)
    routing, flat = make_routing(case, "cpu"), leaves(tensors)

    def function(*_):
        return call(case, routing, tensors)

    assert torch.autograd.gradcheck(function, tuple(flat.values()), fast_mode=True)


@pytest.mark.parametrize(
    ("form", "save_pre", "options"),
    [
        ("segments", True, {}),
        ("ids", False, {}),
        ("segments", True, PAIRS),
        ("segments", True, dict(streams=True)),
    ],
)
@on("cpu", "triton", "composed", "cuda", places=PLACES)
def test_opcheck(form, save_pre, options, place):
    device = place.device
    # Equal widths, or some of the pre-activation would be padding that no kernel writes.
    case = Case(pieces=((0, 3), (1, 5)), form=form, batch=2, dim=8, hidden=(16, 16), **options)
    skip_unless_possible(place, case, place.dtype)
    tensors = make_tensors(case, device, place.dtype)
    leaves(tensors)
    scale = tensors["token_scale"]
    x, residual = (
        [t.detach().reshape(-1, 8).requires_grad_() for t in (v if case.streams else [v])]
        for v in (tensors["x"], tensors["residual"])
    )
    routing = make_routing(case, device)
    arguments = (
        x[0].new_empty(0, 8) if case.streams else x[0],
        *(tensors.get(name, []) for name in LISTS),
        tensors["layer_scale"],
        *((None, None) if case.streams else (scale.reshape(-1), residual[0])),
        *(routing.grouping(16, device) if routing.ids is not None else (None, None, None)),
        [n for piece in routing.pieces for n in piece],
        *("layer", 1e-6, 1e-5, case.activation, save_pre),
        *((x, residual, [t.reshape(-1) for t in scale]) if case.streams else ([], [], [])),
        place.backend,
    )
    torch.library.opcheck(ops.MOE_FFN.forward, arguments)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "wanted", [("sub_norm_weight",), ("sub_norm_bias",), ("w2",), ("w1",), ("layer_scale",), ("x",)]
)
@on("cpu", "triton", "composed", places=PLACES)
def test_single_gradients_with_a_sub_norm(wanted, recompute, place):
    case, device = Case(sub_norm=True), place.device
    skip_unless_possible(place, case, torch.float32)
    routing = make_routing(case, device)

    def gradients(backend: str, **options) -> list[torch.Tensor]:
        tensors = make_tensors(case, device, torch.float32)
        inputs = [t for name in wanted for t in tensors[name]]
        if isinstance(tensors[wanted[0]], torch.Tensor):
            inputs = [tensors[name] for name in wanted]
        for tensor in inputs:
            tensor.requires_grad_()
        y = call(case, routing, tensors, backend=backend, **options)
        return [*torch.autograd.grad(y.square().sum(), inputs)]

    expected = gradients("reference")
    for value, exact in zip(gradients(place.backend, recompute=recompute), expected, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "case",
    [Case(), Case(form="ids"), Case(form="ids", **PAIRS), Case(streams=True)],
    ids=str,
)
def test_compile_fullgraph(case, place):
    device = place.device
    skip_unless_possible(place, case, place.dtype)
    routing = make_routing(case, device)

    def function(tensors):
        return call(case, routing, tensors, backend=place.backend)

    torch._dynamo.reset()  # its limit on recompilations counts those of all backends
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = outputs_and_gradients(function, make_tensors(case, device, place.dtype))
    actual = outputs_and_gradients(compiled, make_tensors(case, device, place.dtype))
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], msg=labelled(name))


@pytest.mark.parametrize(
    "options",
    [dict(norm="none"), dict(norm="layer"), PAIRS, dict(norm="none", streams=True)],
    ids=str,
)
def test_autocast(options, place):
    """Weights are cast, the residual stream stays float32, gradients come in the leaves' dtype."""
    # Wide enough that an expert's largest error is no accident.
    case, device = Case(dim=64, hidden=(96, 96), **options), place.device
    skip_unless_possible(place, case, place.autocast_dtype)
    routing = make_routing(case, device)
    ids = routing.expert_ids(60, device)
    with torch.autocast(device.type, dtype=place.autocast_dtype):
        actual = outputs_and_gradients(
            lambda t: call(case, routing, t, backend=place.backend),
            make_tensors(case, device, torch.float32),
        )
        baseline = outputs_and_gradients(
            lambda t: eager_autocast(case, ids, t), make_tensors(case, device, torch.float32)
        )
    exact = outputs_and_gradients(
        lambda t: eager(case, ids, t),
        {
            k: [t.double() for t in v] if isinstance(v, list) else v.double()
            for k, v in make_tensors(case, device, torch.float32).items()
        },
    )
    for name, value in actual.items():
        assert value.dtype == torch.float32, name
        assert_as_accurate_as(name, value, exact[name], baseline[name])
    no_residual = make_tensors(replace(case, residual=False), device, torch.float32)
    with torch.autocast(device.type, dtype=place.autocast_dtype):
        y = call(case, routing, no_residual, backend=place.backend)
        assert y.dtype == place.autocast_dtype


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("wanted", ["w1[0]", "w1[3]", "b1[1]", "b1[2]", "w1[1] b1[0]"])
def test_gradients_of_a_gate_or_a_value_alone(wanted, recompute, place):
    case, device = Case(hidden=(17, 40), **PAIRS), place.device
    skip_unless_possible(place, case, torch.float32)
    routing, names = make_routing(case, device), wanted.split()

    def gradients(backend: str, **options) -> dict[str, Any]:
        flat = leaves(tensors := make_tensors(case, device, torch.float32))
        for name, tensor in flat.items():
            tensor.requires_grad_(name in names)
        call(case, routing, tensors, backend=backend, **options).square().sum().backward()
        return {name: tensor.grad for name, tensor in flat.items()}

    found, expected = gradients(place.backend, recompute=recompute), gradients("reference")
    assert {name for name, grad in found.items() if grad is not None} == {*names}
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)
        assert found[name].untyped_storage().nbytes() == found[name].nbytes


def test_separate_gates_are_not_copied(spy):
    case = Case(**PAIRS)
    tensors = make_tensors(case, "cpu", torch.float32)
    call(case, make_routing(case, "cpu"), tensors, backend="triton")
    (seen,) = spy.calls
    assert seen.split and seen.pre_columns == (80, 80)
    assert [t.data_ptr() for t in seen.w1] == [t.data_ptr() for t in tensors["w1"]]
    assert [t.data_ptr() for t in seen.b1] == [t.data_ptr() for t in tensors["b1"]]


def test_streams_are_not_copied(spy):
    case = Case(streams=True)
    tensors = make_tensors(case, "cpu", torch.float32)
    leaves(tensors)
    routing = make_routing(case, "cpu")
    y = moe_ffn(routing=None, **tensors, norm="layer", backend="triton")
    assert [t.shape for t in y] == [t.shape for t in tensors["x"]]
    assert len({t.untyped_storage().data_ptr() for t in y}) == 1
    sum(t.sum() for t in y).backward()
    forward, backward = spy.calls
    for seen in (forward, backward):
        for given, name in ((seen.streams, "x"), (seen.token_scales, "token_scale")):
            assert [t.data_ptr() for t in given] == [t.data_ptr() for t in tensors[name]]
        assert seen.x.shape == (0, 24) and seen.tokens == routing.max_length
    assert [t.data_ptr() for t in forward.residuals] == [t.data_ptr() for t in tensors["residual"]]
    assert not backward.residuals  # nothing of them is saved
    for name in ("x", "residual"):
        assert len({t.grad.untyped_storage().data_ptr() for t in tensors[name]}) == 1


@pytest.mark.parametrize("wanted", ["x[0]", "x[1]", "residual[1]", "layer_scale", "x[0] w2[1]"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("norm", ["none", "layer"])
def test_gradients_of_some_streams(wanted, recompute, norm, place):
    case, device = Case(streams=True, norm=norm), place.device
    skip_unless_possible(place, case, torch.float32)
    routing, names = make_routing(case, device), wanted.split()

    def gradients(backend: str, **options) -> list[Any]:
        flat = leaves(tensors := make_tensors(case, device, torch.float32))
        for name, tensor in flat.items():
            tensor.requires_grad_(name in names)
        call(case, routing, tensors, backend=backend, **options).square().sum().backward()
        assert {name for name, tensor in flat.items() if tensor.grad is not None} == {*names}
        return [flat[name].grad for name in names]

    found = gradients(place.backend, recompute=recompute)
    torch.testing.assert_close(found, gradients("reference"), rtol=1e-4, atol=1e-4)


def test_streams_of_which_one_is_used_and_written_over(place):
    case, device = Case(streams=True, residual=False), place.device
    skip_unless_possible(place, case, torch.float32)

    def gradients(backend: str, detour) -> list[torch.Tensor]:
        tensors = make_tensors(case, device, torch.float32)
        flat = leaves(tensors)
        _, image = moe_ffn(routing=None, **tensors, norm="layer", backend=backend)
        detour(image).square().sum().backward()
        return [torch.zeros_like(t) if t.grad is None else t.grad for t in flat.values()]

    expected = gradients("reference", lambda t: 2 * t)
    found = gradients(place.backend, lambda t: t.mul_(2))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lengths", [(0, 5), (0, 0)])
def test_streams_without_tokens(lengths, place):
    case, device = Case(streams=True), place.device
    skip_unless_possible(place, case, torch.float32)
    tensors = make_tensors(case, device, torch.float32)
    for name in ("x", "residual", "token_scale"):
        parts = zip(tensors[name], lengths, strict=True)
        columns = () if name == "token_scale" else (24,)
        tensors[name] = [t.reshape(-1, *columns)[:n].clone() for t, n in parts]
    flat = leaves(tensors)
    y = moe_ffn(routing=None, **tensors, norm="layer", backend=place.backend)
    assert [len(t) for t in y] == [*lengths]
    sum(t.sum() for t in y).backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in flat.values())
    assert not tensors["w1"][0].grad.any()


def test_residual_streams_keep_their_float64(place):
    case, device = Case(streams=True), place.device
    skip_unless_possible(place, case, torch.float32)
    tensors = make_tensors(case, device, torch.float32)
    tensors["residual"] = [t.double() + 1e-9 for t in tensors["residual"]]
    plain = {k: v for k, v in tensors.items() if k != "residual"}
    options = dict(routing=None, norm="layer", backend=place.backend)
    y, branch = moe_ffn(**tensors, **options), moe_ffn(**plain, **options)
    for out, added, residual in zip(y, branch, tensors["residual"], strict=True):
        assert out.dtype == torch.float64
        # The branch is rounded to float32 where it is written alone.
        torch.testing.assert_close(out - residual, added.double(), rtol=1e-6, atol=1e-7)


def test_frozen_expert_gets_no_gradient_and_costs_none(monkeypatch):
    case = Case()
    tensors, routing = make_tensors(case, "cpu", torch.float32), make_routing(case, "cpu")
    leaves(tensors)
    for name in ("w1", "w2", "b1", "b2", "norm_weight", "norm_bias"):
        tensors[name][0].requires_grad_(False)
    seen = []
    implementation = ops.BACKENDS["cpu"]
    backward = implementation.backward

    def spy(dy, pre, args, needs):
        grads = backward(dy, pre, args, needs)
        seen.append([tuple(g.shape) for g in grads])
        return grads

    monkeypatch.setattr(implementation, "backward", spy)
    call(case, routing, tensors, backend="cpu").sum().backward()
    assert tensors["w1"][0].grad is None
    assert tensors["w1"][1].grad is not None
    shapes = seen[0]  # x, w1 x 2, w2 x 2, ...
    assert shapes[1] == (0,)
    assert shapes[2] == (40, 24)
    assert shapes[3] == (0,)


@pytest.fixture
def spy(monkeypatch):
    spy = Spy()
    monkeypatch.setitem(ops.BACKENDS, "triton", spy)
    return spy


@pytest.mark.parametrize(
    ("case", "arithmetic"),
    [
        (Case(), True),
        (Case(pieces=((0, 0), (1, 2), (1, 5), (0, 3))), True),
        (Case(pieces=((1, 2), (0, 5), (1, 9))), False),
        (Case(form="ids"), False),
        (Case(form="packed"), False),
    ],
    ids=str,
)
def test_a_kernel_gets_one_run_per_expert_or_rows_and_offsets(case, arithmetic, spy):
    routing = make_routing(case, "cpu")
    expected = outputs_and_gradients(
        lambda t: call(case, routing, t, backend="reference"),
        make_tensors(case, "cpu", torch.float32),
    )
    assert not routing._grouping  # the reference has no use for it
    actual = outputs_and_gradients(
        lambda t: call(case, routing, t, backend="triton"), make_tensors(case, "cpu", torch.float32)
    )
    torch.testing.assert_close(actual, expected)
    assert len(spy.calls) == 2  # forward and backward
    ids = routing.expert_ids(expert_ids(case).numel(), "cpu")
    for seen in spy.calls:
        if arithmetic:
            assert seen.ids is seen.rows is seen.offsets is None
            assert len(set(seen.pieces[::2])) == len(seen.pieces[::2])
            assert 0 not in seen.pieces[1::2]
        else:
            assert len(seen.pieces) == 0
            assert seen.ids.tolist() == ids.tolist()
            assert seen.rows.tolist() == ids.argsort(stable=True).tolist()
            assert seen.offsets.tolist() == [0, int((ids == 0).sum()), ids.numel()]


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(activation="swiglu", norm="rms", bias=False, norm_bias=False, layer_scale=False),
        Case(pieces=((0, 3), (3, 5), (1, 4)), hidden=(17, 64, 8, 33), form="ids", norm="none"),
        Case(batch=0),
        Case(hidden=(17, 40), **PAIRS),
        Case(sub_norm=True, **PAIRS),
        Case(batch=0, **PAIRS),
        Case(streams=True),
        Case(streams=True, norm="none", activation="swiglu", bias=False),
    ],
    ids=str,
)
def test_recompute_gives_the_same_gradients(case, place):
    skip_unless_possible(place, case, place.dtype)
    routing = make_routing(case, place.device)
    kept, again = (
        outputs_and_gradients(
            lambda t, r=recompute: call(case, routing, t, recompute=r, backend=place.backend),
            make_tensors(case, place.device, place.dtype),
        )
        for recompute in (False, True)
    )
    torch.testing.assert_close(again, kept, rtol=1e-5, atol=1e-5)


def saved_bytes(function, parameters) -> int:
    """Bytes that ``function`` keeps for the backward beside parameters; a storage counts once."""
    known = {p.untyped_storage().data_ptr() for p in parameters}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function()  # alive until the count is done, or an address could be used again
    assert y.requires_grad
    return sum(storages.values())


def test_memory_kept_for_the_backward(device):
    """A GPU keeps at most half of what eager slices keep, a sixth with recompute, at VLMo's width.

    A CPU keeps the activations, too, and what LayerScale multiplies.
    """
    dim, hidden, batch, lengths = 768, 3072, 2, (3, 5)
    case = Case(tuple(enumerate(lengths)), "segments", batch, dim, (hidden,) * 2, token_scale=False)
    tensors = make_tensors(case, device, torch.bfloat16)
    leaves(tensors)
    tensors["residual"] = tensors["x"]
    parameters = [t for name, t in leaves(tensors).items() if name not in ("x", "residual")]
    routing = make_routing(case, device)

    def slices():
        parts = []
        for e, x in enumerate(tensors["x"].split(lengths, dim=1)):
            at = {k: v[e] if isinstance(v, list) else v for k, v in tensors.items()}
            h = F.layer_norm(x, (dim,), at["norm_weight"], at["norm_bias"])
            h = F.linear(F.gelu(F.linear(h, at["w1"], at["b1"])), at["w2"], at["b2"])
            parts.append(x + at["layer_scale"] * h)
        return torch.cat(parts, dim=1)

    eager_bytes = saved_bytes(slices, parameters)
    kept, again = (
        saved_bytes(lambda r=recompute: call(case, routing, tensors, recompute=r), parameters)
        for recompute in (False, True)
    )
    tokens = batch * sum(lengths)
    on_cpu = device.type == "cpu"
    assert kept == 2 * tokens * (2 * (dim + hidden) if on_cpu else dim + hidden)
    assert again == 2 * tokens * dim
    assert kept <= eager_bytes * (0.95 if on_cpu else 0.5)
    assert again <= eager_bytes / 6


@pytest.mark.parametrize("how", ["no_grad", "frozen", "recompute", "recorded"])
def test_the_pre_activation_is_kept_only_for_a_backward(how, spy):
    case = Case()
    tensors, routing = make_tensors(case, "cpu", torch.float32), make_routing(case, "cpu")
    if how != "frozen":
        leaves(tensors)
    with torch.set_grad_enabled(how != "no_grad"):
        call(case, routing, tensors, recompute=how == "recompute", backend="triton")
    (seen,) = spy.calls
    assert seen.save_pre == (how == "recorded")
    assert spy.pre_shape(seen) == ((60, 40 + 40 + 24) if how == "recorded" else (0, 0))


def test_non_contiguous_inputs(place):
    case, device = Case(), place.device
    routing = make_routing(case, device)
    tensors = make_tensors(case, device, place.dtype)
    expected = call(case, routing, tensors, backend=place.backend)
    odd = dict(tensors)
    odd["x"] = tensors["x"].transpose(0, 1).contiguous().transpose(0, 1)
    odd["residual"] = torch.stack([tensors["residual"]] * 2, dim=-1)[..., 0]
    odd["w1"] = [w.T.contiguous().T for w in tensors["w1"]]
    odd["w2"] = [torch.cat([w, w], 1)[:, : w.shape[1]] for w in tensors["w2"]]
    assert not any(t.is_contiguous() for t in (odd["x"], odd["residual"], *odd["w1"], *odd["w2"]))
    torch.testing.assert_close(call(case, routing, odd, backend=place.backend), expected)


def test_experts_do_not_see_each_other(place):
    """NaN in one modality's tokens stays there, forward and backward."""
    case, device = Case(residual=False), place.device
    for form in ("segments", "packed"):
        routing = make_routing(replace(case, form=form), device)
        tensors = make_tensors(replace(case, form=form), device, place.dtype)
        ids = routing.expert_ids(60, device).view(tensors["x"].shape[:-1])
        tensors["x"][ids == 0] = float("nan")
        leaves(tensors)
        y = call(case, routing, tensors, backend=place.backend)
        assert y[ids == 1].isfinite().all()
        y[ids == 1].sum().backward()
        assert tensors["w1"][1].grad.isfinite().all()


GOOD = Case()
HALVES = torch.zeros(40, 24), torch.zeros(40, 24)
STREAMS: dict[str, Any] = dict(
    routing=None, x=[torch.zeros(2, 24), torch.zeros(3, 24)], residual=None, token_scale=None
)
BAD: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "x: expected a tensor, got float": (TypeError, dict(x=1.0)),
    "x: expected a tensor, got NoneType": (TypeError, dict(x=None)),
    r"x\[0\]: expected a tensor, got float": (TypeError, STREAMS | dict(x=[1.0])),
    "x: 0 tensors": (ValueError, STREAMS | dict(x=[])),
    "routing: expected None, because x is a sequence": (
        TypeError,
        STREAMS | dict(routing=ModalityRouting.segments([(0, 2), (1, 3)])),
    ),
    "routing: expected a ModalityRouting, got NoneType": (TypeError, dict(routing=None)),
    r"x\[1\]: width 23, but x\[0\] has 24": (
        ValueError,
        STREAMS | dict(x=[torch.zeros(2, 24), torch.zeros(3, 23)]),
    ),
    r"x\[1\]: dtype float64 is not one of: float32": (
        TypeError,
        STREAMS | dict(x=[torch.zeros(2, 24), torch.zeros(3, 24).double()]),
    ),
    r"x\[1\]: shape \(24,\) has no token dimension": (
        ValueError,
        STREAMS | dict(x=[torch.zeros(2, 24), torch.zeros(24)]),
    ),
    "w1: 2 tensors for 3 experts": (ValueError, STREAMS | dict(x=[torch.zeros(2, 24)] * 3)),
    "residual: expected a sequence like x, got Tensor": (
        TypeError,
        STREAMS | dict(residual=torch.zeros(5, 24)),
    ),
    "residual: 1 tensors, but x is a sequence of 2": (
        ValueError,
        STREAMS | dict(residual=[torch.zeros(2, 24)]),
    ),
    r"residual\[1\]: shape \(2, 24\) does not fit \(3, 24\)": (
        ValueError,
        STREAMS | dict(residual=[torch.zeros(2, 24)] * 2),
    ),
    r"residual\[1\]: dtype float64 is not one of: float32": (
        TypeError,
        STREAMS | dict(residual=[torch.zeros(2, 24), torch.zeros(3, 24).double()]),
    ),
    "residual: expected a tensor, got list": (TypeError, dict(residual=[torch.zeros(3, 20, 24)])),
    r"token_scale\[0\]: shape \(3,\) does not fit \(2\)": (
        ValueError,
        STREAMS | dict(token_scale=[torch.zeros(3), torch.zeros(3)]),
    ),
    "x: dtype int64": (TypeError, dict(x=torch.zeros(3, 20, 24, dtype=torch.int64))),
    r"x: shape \(24,\) has no token dimension": (ValueError, dict(x=torch.zeros(24))),
    "routing: made for sequences of 20 tokens": (ValueError, dict(x=torch.zeros(3, 19, 24))),
    "routing: expected a ModalityRouting": (TypeError, dict(routing=((0, 20),))),
    "w1: 1 tensors for 2 experts": (ValueError, dict(w1=[torch.zeros(40, 24)])),
    "w1: expected a sequence": (TypeError, dict(w1=torch.zeros(2, 40, 24))),
    r"w1\[1\]: shape \(40, 25\) does not fit \(40, 24\)": (
        ValueError,
        dict(w1=[torch.zeros(40, 24), torch.zeros(40, 25)]),
    ),
    "w1: pairs, but activation 'gelu' is not gated": (ValueError, dict(w1=[HALVES] * 2)),
    "w1: 1 pairs for 2 experts": (ValueError, dict(w1=[HALVES], activation="geglu")),
    r"w1\[1\]: 3 tensors, expected gate and value": (
        ValueError,
        dict(w1=[HALVES, [torch.zeros(40, 24)] * 3], activation="geglu"),
    ),
    r"w1\[1\]: expected a pair of gate and value, .* got Tensor": (
        TypeError,
        dict(w1=[HALVES, torch.zeros(80, 24)], activation="geglu"),
    ),
    r"w1\[0\]: expected a pair of gate and value, .* got Tensor": (
        TypeError,
        dict(b1=[[torch.zeros(40)] * 2] * 2, activation="geglu"),
    ),
    r"w1\[1\]\[0\]: shape \(41, 24\) does not fit \(40, 24\)": (
        ValueError,
        dict(w1=[HALVES, (torch.zeros(41, 24), HALVES[1])], activation="geglu", b1=None),
    ),
    r"w1\[0\]\[1\]: expected a tensor, got float": (
        TypeError,
        dict(w1=[(HALVES[0], 1.0), HALVES], activation="geglu", b1=None),
    ),
    r"b1\[1\]\[1\]: shape \(1,\)": (
        ValueError,
        dict(
            w1=[HALVES] * 2,
            b1=[[torch.zeros(40)] * 2, (torch.zeros(40), torch.zeros(1))],
            activation="geglu",
        ),
    ),
    r"b1\[0\]: expected a pair of gate and value, .* got Tensor": (
        TypeError,
        dict(w1=[HALVES] * 2, activation="geglu"),
    ),
    r"w2\[0\]: dtype float64 is not one of: float32": (
        TypeError,
        dict(w2=[torch.zeros(24, 40, dtype=torch.float64)] * 2),
    ),
    r"w2\[0\]: on meta, but the other tensors are on cpu": (
        ValueError,
        dict(w2=[torch.zeros(24, 40, device="meta")] * 2),
    ),
    r"b1\[0\]: shape \(41,\)": (ValueError, dict(b1=[torch.zeros(41)] * 2)),
    "b1: expected a sequence": (TypeError, dict(b1=torch.zeros(2, 40))),
    "b2: 3 tensors for 2 experts": (ValueError, dict(b2=[torch.zeros(24)] * 3)),
    "norm: 'batch' is not one of": (ValueError, dict(norm="batch")),
    "norm_weight: missing for norm 'layer'": (ValueError, dict(norm_weight=None)),
    "norm: 'none', but norm_weight": (ValueError, dict(norm="none")),
    "norm_bias: RMSNorm has none": (ValueError, dict(norm="rms")),
    r"sub_norm_weight\[1\]: shape \(24,\) does not fit \(40\)": (
        ValueError,
        dict(sub_norm_weight=[torch.ones(40), torch.ones(24)]),
    ),
    "sub_norm_weight: 1 tensors for 2 experts": (
        ValueError,
        dict(sub_norm_weight=[torch.ones(40)]),
    ),
    "sub_norm_bias: given without sub_norm_weight": (
        ValueError,
        dict(sub_norm_bias=[torch.zeros(40)] * 2),
    ),
    "activation: 'relu' is not one of": (ValueError, dict(activation="relu")),
    r"layer_scale: shape \(23,\)": (ValueError, dict(layer_scale=torch.zeros(23))),
    r"token_scale: shape \(3, 19\)": (ValueError, dict(token_scale=torch.zeros(3, 19))),
    "token_scale: requires a gradient": (
        ValueError,
        dict(token_scale=torch.zeros(3, 20, requires_grad=True)),
    ),
    r"residual: shape \(3, 20, 23\)": (ValueError, dict(residual=torch.zeros(3, 20, 23))),
    "backend: 'tritn' is not a backend": (ValueError, dict(backend="tritn")),
    "backend 'cuda' cannot run this call: cpu tensors: its kernels run on NVIDIA GPUs": (
        NotImplementedError,
        dict(backend="cuda"),
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    error, changes = BAD[message]
    arguments = make_tensors(GOOD, "cpu", torch.float32)
    arguments |= {"routing": make_routing(GOOD, "cpu"), "norm": "layer", "activation": "gelu"}
    with pytest.raises(error, match=message):
        moe_ffn(**(arguments | changes))
