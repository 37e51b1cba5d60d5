"""What moe_ffn does to save host time: it keeps plans of launches, and leaves out checks."""

import contextlib
from typing import Any

import pytest
import torch

from moe_ffn_cases import PAIRS, Case, call, leaves, make_routing, make_tensors
from vlmo.kernels.moe_ffn import api
from vlmo.kernels.moe_ffn.triton import launch, tiles
from vlmo.kernels.moe_ffn.triton.tiles import Tile, Tiles

SMALL = Tile(16, 32, 16, 4, 1)
PLANS = (launch._plan_forward, launch._plan_backward)


@pytest.fixture
def triton_place(place):
    if place.backend != "triton":
        pytest.skip("of the Triton backend")
    return place


def misses() -> list[int]:
    return [plan.cache_info().misses for plan in PLANS]


def run(place, case=None, dtype=torch.float32, frozen=(), row=None, recompute=False):
    """The output and the gradients of a call, with some parameters frozen."""
    case = case or Case()
    tensors = make_tensors(case, place.device, dtype)
    flat = leaves(tensors)
    for name in frozen:
        flat[name].requires_grad_(False)
    with contextlib.nullcontext() if row is None else tiles.use_tiles(row):
        routing = make_routing(case, place.device)
        y = call(case, routing, tensors, backend=place.backend, recompute=recompute)
        y.sum().backward()
    return {"y": y.detach(), **{name: leaf.grad for name, leaf in flat.items()}}


def test_a_problem_is_planned_once(triton_place):
    run(triton_place)
    before = misses()
    run(triton_place)
    assert misses() == before


# Each differs from the first in one of the things that a plan depends on.
CALLS: list[dict[str, Any]] = [
    dict(),
    dict(case=Case(batch=2)),
    dict(case=Case(pieces=((0, 13), (1, 7)))),
    dict(case=Case(form="ids")),
    dict(case=Case(norm="rms", norm_bias=False)),
    dict(case=Case(layer_scale=False)),
    dict(case=Case(bias=False)),
    dict(case=Case(hidden=(40, 24))),
    dict(case=Case(**PAIRS), frozen=("w1[1]", "b1[2]")),
    dict(dtype=torch.bfloat16),
    dict(recompute=True),
    dict(frozen=("w1[0]", "b2[1]")),
    dict(frozen=("x", "layer_scale")),
    dict(row=Tiles(SMALL, SMALL, SMALL, SMALL)),
]


def test_plans_of_other_calls_change_nothing(triton_place):
    """Every call gives the same bits with the plans of the calls before it as without any."""
    alone = []
    for options in CALLS:
        for plan in PLANS:
            plan.cache_clear()
        alone.append(run(triton_place, **options))
    for options, expected in zip(CALLS, alone, strict=True):
        for name, value in run(triton_place, **options).items():
            assert (value is None) == (expected[name] is None), (options, name)
            assert value is None or torch.equal(value, expected[name]), (options, name)
    assert launch._plan_backward.cache_info().currsize >= len(CALLS)


def test_tf32_is_read_at_every_call(triton_place, launches):
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed in (False, True, False):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            run(triton_place)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    configs = [args[-2] if "weights" in name else args[-1] for name, args in launches]
    assert [config.precision for config in configs] == ["ieee"] * 3 + ["tf32"] * 3 + ["ieee"] * 3


def test_gradients_share_no_memory(triton_place):
    found = run(triton_place)
    storages = {value.untyped_storage().data_ptr() for value in found.values()}
    assert len(storages) == len(found)


def test_parameters_that_fit_are_not_checked_one_by_one(monkeypatch):
    """The function that makes the error messages sees only those that do not fit."""
    seen = []
    check = api.check_tensor

    def spy(name, *args, **options):
        seen.append(name)
        check(name, *args, **options)

    monkeypatch.setattr(api, "check_tensor", spy)
    case = Case()
    tensors = make_tensors(case, "cpu", torch.float32)
    routing = make_routing(case, "cpu")
    call(case, routing, tensors, backend="reference")
    vectors = ["layer_scale", "token_scale", "residual"]
    assert seen == ["x", "w2", "w2", *vectors]

    parameter = tensors["b1"][1]
    for wrong, error in (
        (parameter[:-1], ValueError),
        (parameter.double(), TypeError),
        (parameter.to("meta"), ValueError),
    ):
        tensors["b1"][1] = wrong
        with pytest.raises(error, match=r"b1\[1\]"):
            call(case, routing, tensors, backend="reference")
    # The same object with another shape.
    tensors["b1"][1] = parameter
    call(case, routing, tensors, backend="reference")
    parameter.data = parameter.data[:-1]
    with pytest.raises(ValueError, match=r"b1\[1\]: shape \(39,\) does not fit \(40\)"):
        call(case, routing, tensors, backend="reference")
