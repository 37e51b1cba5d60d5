"""moe_ffn composed of products and passes: launches, memory, gradients that are not computed."""

import functools
import itertools
from unittest import mock

import pytest
import torch

from attention_cases import on
from moe_ffn_cases import (
    PAIRS,
    PLACES,
    Case,
    assert_parity,
    call,
    leaves,
    make_routing,
    make_tensors,
    outputs_and_gradients,
)
from vlmo.kernels import ModalityRouting, shared_attention, target, use_backend
from vlmo.kernels._backends import triton_launch
from vlmo.kernels.moe_ffn.call import Facts
from vlmo.kernels.moe_ffn.composed import backend

FORWARD = ["norm", "activation", "branch"]
BACKWARD = ["bwd_branch", "bwd_activation", "bwd_norm", "sums"]
on_composed = on("composed", places=PLACES)


def names(launches) -> list[str]:
    return [name.removeprefix("moe_ffn_").removesuffix("_kernel") for name, _ in launches]


@on_composed
@pytest.mark.parametrize("form", ["segments", "packed"])
@pytest.mark.parametrize("experts", [2, 3])
def test_a_pass_is_one_launch_for_all_experts(experts, form, place, launches):
    pieces = ((0, 3), (1, 5), (2, 11))[:experts]
    case = Case(pieces=pieces, hidden=(40,) * experts, form=form)
    tensors = make_tensors(case, place.device, torch.float32)
    leaves(tensors)
    y = call(case, make_routing(case, place.device), tensors, backend=place.backend)
    assert names(launches) == FORWARD
    y.sum().backward()
    assert names(launches)[3:] == BACKWARD


def products_of(case: Case, place, wanted, **options) -> int:
    """Number of products of a backward for the gradients whose names ``wanted`` accepts."""
    tensors = make_tensors(case, place.device, torch.float32)
    for name, tensor in leaves(tensors).items():
        tensor.requires_grad_(wanted(name))
    y = call(case, make_routing(case, place.device), tensors, backend=place.backend, **options)
    with mock.patch.object(torch, "mm", wraps=torch.mm) as product:
        y.sum().backward()
    return product.call_count


@on_composed
def test_gradients_that_are_not_needed_cost_no_product(place):
    """Of two experts: dact, dnormed, dw1 and dw2, twice each; with recompute, h1 and h2, too."""
    count = functools.partial(products_of, Case(), place)
    assert count(lambda name: True) == 8
    assert count(lambda name: True, recompute=True) == 12
    assert count(lambda name: name == "x") == 4
    assert count(lambda name: name == "x", recompute=True) == 6
    assert count(lambda name: "[0]" not in name) == 6
    assert count(lambda name: name.startswith("w2")) == 2
    assert count(lambda name: name.startswith("b1")) == 2
    assert count(lambda name: name in ("b2[0]", "layer_scale")) == 0


SUBSETS = [
    *itertools.chain.from_iterable(
        itertools.combinations(("x", "w1", "w2", "b1", "b2", "layer_scale", "norm_weight"), n)
        for n in (1, 2)
    )
]


@on_composed
@pytest.mark.parametrize("options", [dict(norm="layer"), dict(norm="none"), PAIRS], ids=str)
@pytest.mark.parametrize("recompute", [False, True])
def test_any_subset_of_the_gradients(options, recompute, place):
    case = Case(**options, dim=8, hidden=(6, 10), pieces=((0, 2), (1, 3)))
    routing = make_routing(case, place.device)
    every = outputs_and_gradients(
        lambda t: call(case, routing, t, backend=place.backend, recompute=recompute),
        make_tensors(case, place.device, torch.float32),
    )
    tensors = make_tensors(case, place.device, torch.float32)
    flat = leaves(tensors)
    dy = torch.randn(
        every["y"].shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    ).to(every["y"])
    for subset in SUBSETS:
        # Of lists, the gradient of the second expert.
        chosen = [name for name in flat if name.removesuffix("[1]") in subset]
        if not chosen:
            continue
        for name, tensor in flat.items():
            tensor.requires_grad_(name in chosen)
        y = call(case, routing, tensors, backend=place.backend, recompute=recompute)
        found = torch.autograd.grad(y, [flat[name] for name in chosen], dy)
        for name, gradient in zip(chosen, found, strict=True):
            torch.testing.assert_close(gradient, every[name], rtol=1e-5, atol=1e-6)


@on_composed
def test_results_repeat(place):
    case = Case(batch=40, form="packed")
    routing = make_routing(case, place.device)
    first, second = (
        outputs_and_gradients(
            lambda t: call(case, routing, t, backend=place.backend),
            make_tensors(case, place.device, torch.float32),
        )
        for _ in range(2)
    )
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@on_composed
def test_one_expert_without_a_norm_is_read_in_place(place, launches):
    """The rows of x are those of the products: no pass copies them, or dx."""
    case = Case(pieces=((1, 20),), norm="none")
    tensors = make_tensors(case, place.device, torch.float32)
    leaves(tensors)
    call(case, make_routing(case, place.device), tensors, backend=place.backend).sum().backward()
    assert names(launches) == [*FORWARD[1:], "bwd_branch", "bwd_activation", "sums"]


@on_composed
def test_residual_keeps_its_float64(place):
    case = Case()
    tensors = make_tensors(case, place.device, torch.float32)
    tensors["residual"] = tensors["residual"].double() + 1e6 + 1e-6
    leaves(tensors)
    routing = make_routing(case, place.device)
    actual, expected = (
        call(case, routing, tensors, backend=b) for b in (place.backend, "reference")
    )
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    given = [tensors["x"], *tensors["w1"], tensors["layer_scale"]]
    gradients = (torch.autograd.grad(y.sum(), given) for y in (actual, expected))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def peak_bytes(function) -> int:
    """The largest number of bytes that ``function`` has allocated at a time, on the CPU."""
    with torch.profiler.profile(profile_memory=True) as profile:
        result = function()
    assert result is not None
    events = profile.profiler.kineto_results.events()
    sizes = [e.nbytes() for e in events if e.name() == "[memory]"]
    return max(itertools.accumulate(sizes))


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_peak_memory(activation, monkeypatch):
    """Of products and scratch; the passes, which allocate nothing, are left out."""
    monkeypatch.setattr(triton_launch, "launch", lambda *_: None)
    monkeypatch.setattr(target, "interpreted", lambda: True)
    halves = 2 if activation == "swiglu" else 1
    case = Case(activation=activation, batch=16, dim=64, hidden=(256, 256))
    tensors, routing = make_tensors(case, "cpu", torch.float32), make_routing(case, "cpu")
    tokens, dim, hidden, width = 320, case.dim, 256, 256 * halves

    def run():
        return call(case, routing, tensors, backend="composed")

    # y, norm_e(x) (then h2), h1 and act; the last two share memory unless gated.
    scratch = 4 * tokens * (2 * dim + width + (hidden if halves == 2 else 0))
    assert peak_bytes(run) == scratch
    flat = leaves(tensors)
    # y, and of all tokens h1, h2 and act
    assert peak_bytes(run) == 4 * tokens * (2 * dim + width + hidden)
    y = run()
    dy = torch.ones_like(y)
    gradients = sum(4 * t.numel() for name, t in flat.items() if name != "residual")
    tiles = sum(-(-16 * length // 16) for _, length in case.pieces)
    sums = 4 * tiles * (width + 4 * dim)
    # dh2, dact (then act) and dh1
    scratch = 4 * tokens * (dim + hidden + width)
    found = peak_bytes(lambda: torch.autograd.grad(y, list(flat.values()), dy))
    assert found == gradients + sums + scratch


@pytest.mark.parametrize("form", ["segments", "packed"])
def test_no_value_is_read_from_the_device(form, monkeypatch):
    """So that a call neither waits for a GPU nor ends the capture of a CUDA graph."""

    def read(*_):
        raise AssertionError("a value was read")

    monkeypatch.setattr(triton_launch, "launch", lambda *_: None)
    monkeypatch.setattr(target, "interpreted", lambda: True)
    case = Case(form=form)
    tensors, routing = make_tensors(case, "cpu", torch.float32), make_routing(case, "cpu")
    leaves(tensors)
    for name in ("tolist", "item", "nonzero", "__bool__", "__int__", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, read)
    call(case, routing, tensors, backend="composed").sum().backward()


def test_it_needs_the_counts_on_the_host():
    facts = Facts(torch.float16, 768, (3072, 3072), counted=False)
    reason = backend.why_not(torch.device("cuda"), facts)
    assert reason is not None and "known on the device only" in reason
    assert ModalityRouting.from_ids(torch.tensor([0, 1]), 2).counts == ()
    assert ModalityRouting.segments([(0, 2), (2, 3), (0, 1)]).counts == (3, 0, 3)
    sequences = [[(1, 2), (0, 3)], [(1, 4)]]
    assert ModalityRouting.packed(sequences, num_experts=3).counts == (3, 6, 0)


def test_it_is_named_for_moe_ffn_alone(monkeypatch):
    """Attention is not composed, so a name for every operation is refused, with the reason."""
    case = Case()
    tensors, routing = make_tensors(case, "cpu", torch.float32), make_routing(case, "cpu")
    q = torch.randn(1, 3, 2, 8)
    seen: list[object] = []
    monkeypatch.setattr(target, "interpreted", lambda: True)
    monkeypatch.setattr(triton_launch, "launch", lambda kernel, *_: seen.append(kernel))
    reason = "backend 'composed' cannot run this call: only moe_ffn is composed"
    with use_backend("composed"), pytest.raises(NotImplementedError, match=reason):
        shared_attention(q, q, q)
    names = ("moe_ffn=composed", "shared_attention=cpu,moe_ffn=composed")
    for count, name in enumerate(names, 1):
        with use_backend(name):
            call(case, routing, tensors)
            shared_attention(q, q, q)
        assert len(seen) == count * len(FORWARD)
    monkeypatch.setenv("VLMO_KERNELS", "moe_ffn=composed")
    call(case, routing, tensors)
    assert len(seen) == 3 * len(FORWARD)


@on_composed
@pytest.mark.parametrize("activation", ["gelu_tanh", "geglu"])
def test_blocks_and_steps_that_are_not_full(activation, place):
    """In every pass: more columns than a block has, a rest of columns and of rows."""
    case = Case(activation=activation, dim=300, hidden=(270, 530), batch=3)
    assert_parity(case, torch.float32, place)
