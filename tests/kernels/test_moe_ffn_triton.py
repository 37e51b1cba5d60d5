"""moe_ffn's Triton kernels: launches, counters, determinism, gradients that are not computed."""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from moe_ffn_cases import (
    PAIRS,
    Case,
    call,
    leaves,
    make_routing,
    make_tensors,
    outputs_and_gradients,
)
from vlmo.kernels._backends import triton as triton_target
from vlmo.kernels.moe_ffn import counters as launch_counters
from vlmo.kernels.moe_ffn.counters import Counters
from vlmo.kernels.moe_ffn.triton import tiles
from vlmo.kernels.moe_ffn.triton.backward_weights import SUM_COLUMNS, add_up
from vlmo.kernels.moe_ffn.triton.device import Config
from vlmo.kernels.moe_ffn.triton.tiles import Tile, Tiles

SMALL = Tile(16, 32, 16, 4, 1)


@pytest.fixture
def triton_place(place):
    if place.backend != "triton":
        pytest.skip("of the Triton backend")
    return place


@pytest.mark.parametrize("form", ["segments", "ids", "packed"])
def test_one_launch_forward_two_backward(form, triton_place, launches):
    device, backend = triton_place
    case = Case(form=form)
    tensors = make_tensors(case, device, torch.float32)
    leaves(tensors)
    y = call(case, make_routing(case, device), tensors, backend=backend)
    assert [name for name, _ in launches] == ["moe_ffn_fwd_kernel"]
    y.sum().backward()
    assert [name for name, _ in launches[1:]] == [
        "moe_ffn_bwd_rows_kernel",
        "moe_ffn_bwd_weights_kernel",
    ]


def test_frozen_weights_cost_no_launch(triton_place, launches):
    device, backend = triton_place
    case = Case()
    tensors = make_tensors(case, device, torch.float32)
    tensors["x"].requires_grad_()
    call(case, make_routing(case, device), tensors, backend=backend).sum().backward()
    assert [name for name, _ in launches[1:]] == ["moe_ffn_bwd_rows_kernel"]


def test_frozen_expert_has_no_tiles(triton_place, launches):
    device, backend = triton_place
    case = Case(layer_scale=False)
    tensors = make_tensors(case, device, torch.float32)
    leaves(tensors)
    for name in ("w1", "w2", "b1", "b2", "norm_weight", "norm_bias"):
        tensors[name][0].requires_grad_(False)
    call(case, make_routing(case, device), tensors, backend=backend).sum().backward()
    work = launches[-1][1][-1]
    assert work.w1_tiles[0] == work.w2_tiles[0] == 0
    assert work.w1_tiles[1] > 0 and work.w2_tiles[1] > 0
    assert work.w1 == work.b1 == work.norm_weight == (False, True)


# Many small tiles: several bands, and tiles of weights that several programs share.
MANY_TILES = [
    Case(batch=4),
    Case(batch=4, form="ids", hidden=(48, 48)),
    Case(batch=3, form="ids", activation="swiglu", norm="rms", norm_bias=False, hidden=(48, 33)),
    Case(batch=3, norm="none", token_scale=False, layer_scale=False, hidden=(48, 32)),
    Case(batch=3, sub_norm=True, hidden=(48, 33)),
    Case(batch=3, form="ids", hidden=(48, 33), **PAIRS),
]


@pytest.mark.parametrize("case", MANY_TILES, ids=str)
def test_many_tiles_agree_with_the_reference_and_repeat(case, triton_place, launches):
    """Bitwise the same in every run; a gradient of D = F / 2 columns among them."""
    device, backend = triton_place
    routing = make_routing(case, device)

    def run(name):
        return outputs_and_gradients(
            lambda tensors: call(case, routing, tensors, backend=name),
            make_tensors(case, device, torch.float32),
        )

    expected = run("reference")
    with tiles.use_tiles(Tiles(SMALL, SMALL, SMALL, SMALL)):
        first, second = run(backend), run(backend)
    work = launches[-1][1][-1]
    counts = zip(work.w1_tiles, work.w2_tiles, work.whole, strict=True)
    assert any(w1 + w2 > whole for w1, w2, whole in counts), "no tile is shared"
    for name, value in first.items():
        torch.testing.assert_close(value, expected[name], rtol=2e-5, atol=2e-5)
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("case", MANY_TILES, ids=str)
def test_separate_launches_change_no_bit(case, triton_place, launches):
    device, backend = triton_place
    routing = make_routing(case, device)

    def run(separate: int | None) -> dict[str, torch.Tensor]:
        launches.clear()
        with tiles.use_tiles(Tiles(SMALL, SMALL, SMALL, SMALL), separate):
            return outputs_and_gradients(
                lambda tensors: call(case, routing, tensors, backend=backend),
                make_tensors(case, device, torch.float32),
            )

    tokens = case.batch * sum(count for _, count in case.pieces)
    together = run(None)
    assert len(launches) == 3
    run(tokens + 1)
    assert len(launches) == 3
    found = run(tokens)
    # Norm and two products; preparation, two products and norm; weights.
    # With a sub-norm, a phase of the forward and one of the backward more.
    assert len(launches) == (8 if case.norm != "none" else 6) + 2 * case.sub_norm
    for name, value in together.items():
        assert torch.equal(value, found[name]), name


DESCRIBED = Tile(16, 32, 16, 4, 1, descriptors=True)
WITH_DESCRIPTORS = [
    Case(batch=4),
    Case(batch=4, form="ids", hidden=(48, 48)),
    Case(pieces=((0, 3), (3, 5), (1, 4)), hidden=(16, 64, 8, 40), form="ids", activation="geglu"),
    Case(pieces=((1, 9),), norm="none", token_scale=False, layer_scale=False),
]


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("case", WITH_DESCRIPTORS, ids=str)
def test_descriptors_change_no_bit(case, save, triton_place, launches):
    device, backend = triton_place
    routing = make_routing(case, device)

    def run(tile: Tile) -> dict[str, torch.Tensor]:
        launches.clear()
        with tiles.use_tiles(Tiles(tile, tile, tile, tile)):
            return outputs_and_gradients(
                lambda tensors: call(case, routing, tensors, backend=backend, recompute=not save),
                make_tensors(case, device, torch.float16),
            )

    through_pointers = run(SMALL)
    assert configs(launches) == {False}
    through_descriptors = run(DESCRIBED)
    assert configs(launches) == {True}
    for name, value in through_pointers.items():
        assert torch.equal(value, through_descriptors[name]), name


def configs(launches) -> set[bool]:
    """Whether the kernels launched were asked to use tensor descriptors."""
    found = [next(a for a in args if isinstance(a, Config)) for _, args in launches]
    return {config.descriptors for config in found}


@pytest.mark.parametrize("reason", ["D", "F", "address", "float32", "pairs"])
def test_operands_that_have_no_descriptor(reason, triton_place, launches):
    device, backend = triton_place
    case = Case(dim=20 if reason == "D" else 24, hidden=(40, 36) if reason == "F" else (40, 40))
    case = replace(case, **PAIRS) if reason == "pairs" else case
    dtype = torch.float32 if reason == "float32" else torch.bfloat16
    tensors = make_tensors(case, device, dtype)
    if reason == "address":
        w1 = tensors["w1"][0]
        tensors["w1"][0] = w1.new_empty(w1.numel() + 1)[1:].view_as(w1).copy_(w1)
    leaves(tensors)
    with tiles.use_tiles(Tiles(DESCRIBED, DESCRIBED, DESCRIBED, DESCRIBED)):
        call(case, make_routing(case, device), tensors, backend=backend).sum().backward()
    assert len(launches) == 3 and configs(launches) == {False}


def test_descriptors_need_a_recent_triton(triton_place, launches, monkeypatch):
    device, backend = triton_place
    monkeypatch.setattr(triton_target, "_TRITON", "3.5.1")
    tensors = make_tensors(Case(), device, torch.bfloat16)
    routing = make_routing(Case(), device)
    with (
        tiles.use_tiles(Tiles(DESCRIBED, DESCRIBED, DESCRIBED, DESCRIBED)),
        pytest.raises(NotImplementedError, match=r"descriptors=True need Triton 3\.6, and 3\.5\.1"),
    ):
        call(Case(), routing, tensors, backend=backend)
    assert not launches


def test_norms_of_two_dtypes(triton_place):
    """One expert's norm in float32 beside a 16-bit x, the other's in 16 bits."""
    device, backend = triton_place
    case = Case(norm_bias=False)
    routing = make_routing(case, device)

    def run(name):
        tensors = make_tensors(case, device, torch.float16)
        tensors["norm_weight"][1] = tensors["norm_weight"][1].float()
        return outputs_and_gradients(lambda t: call(case, routing, t, backend=name), tensors)

    expected, actual = run("reference"), run(backend)
    assert actual["norm_weight[0]"].dtype == torch.float16
    assert actual["norm_weight[1]"].dtype == torch.float32
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=0.02, atol=0.02)


@triton.jit
def add_up_kernel(SUM_DPRE, OUT, rows, C: tl.constexpr, W: tl.constexpr):
    block = tl.program_id(0)
    _, _, _, sums = add_up(SUM_DPRE, SUM_DPRE, SUM_DPRE, SUM_DPRE, block, rows, C, W)
    tl.store(OUT + block * SUM_COLUMNS + tl.arange(0, SUM_COLUMNS), sums)


def test_sums_behind_a_narrow_expert_are_not_read(triton_place, launches):
    """Nobody writes the partial sums of columns that an expert does not have."""
    device, backend = triton_place
    case = Case(hidden=(150, 40), activation="geglu")  # 300 columns and 80
    tensors = make_tensors(case, device, torch.float32)
    leaves(tensors)
    call(case, make_routing(case, device), tensors, backend=backend).sum().backward()
    *_, sums, _, _ = [a for a in launches[-1][1][:7] if isinstance(a, torch.Tensor)]
    rows, _, _, _, config, work = launches[-1][1][-6:]
    blocks = work.sum_blocks[0]
    assert blocks == 2 * 3 and sums.shape[1] == 300
    first_of_expert_1 = -(-3 * 7 // work.rows_block_t)
    sums[first_of_expert_1:, 80:] = float("nan")
    out = torch.full((2, 3 * SUM_COLUMNS.value), float("nan"), device=device)
    add_up_kernel[(blocks,)](sums, out, rows, config, work)
    wide, narrow = tensors["b1"]
    torch.testing.assert_close(out[0, :300], wide.grad)
    torch.testing.assert_close(out[1, :80], narrow.grad)
    assert not out[0, 300:].any() and not out[1, 80:].any()


def test_residual_keeps_its_float64(triton_place):
    device, backend = triton_place
    case = Case()
    tensors = make_tensors(case, device, torch.float32)
    tensors["residual"] = tensors["residual"].double() + 1e6 + 1e-6
    routing = make_routing(case, device)
    actual, expected = (call(case, routing, tensors, backend=b) for b in (backend, "reference"))
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_every_launch_zeroes_its_counters(triton_place):
    device, backend = triton_place
    counters = Counters()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch_counters, "COUNTERS", counters)
        for case in (Case(), Case(form="ids", norm="none")):
            tensors = make_tensors(case, device, torch.float32)
            leaves(tensors)
            call(case, make_routing(case, device), tensors, backend=backend).sum().backward()
            (buffer,) = counters._kept.values()
            assert not buffer.any()


def test_counters_of_an_aborted_launch_are_thrown_away():
    counters, device = Counters(), torch.device("cpu")
    with counters.take(device, 10) as first:
        first.zero_()
    with counters.take(device, 10) as again:
        assert again.data_ptr() == first.data_ptr()

    def abort():
        with counters.take(device, 10) as dirty:
            dirty.fill_(7)
            raise RuntimeError("aborted")

    with pytest.raises(RuntimeError, match="aborted"):
        abort()
    with counters.take(device, 10) as fresh:
        assert not fresh.any()
    with counters.take(device, 2 * fresh.numel()) as larger:
        assert larger.numel() >= 2 * fresh.numel() and not larger.any()


def test_calls_inside_calls_do_not_share_counters():
    """As when another thread launches on the same stream: each takes a buffer of its own."""
    counters, device = Counters(), torch.device("cpu")
    with counters.take(device, 10) as one, counters.take(device, 10) as two:
        assert one.data_ptr() != two.data_ptr()


@pytest.mark.parametrize("save", [True, False])
def test_saved_pre_activation(save, triton_place):
    """What the forward keeps beside x: the pre-activation, T x F numbers, or nothing."""
    device, backend = triton_place
    case = Case(residual=False, layer_scale=False)
    tensors = make_tensors(case, device, torch.bfloat16)
    leaves(tensors)
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        routing = make_routing(case, device)
        call(case, routing, tensors, backend=backend, recompute=not save)
    x = tensors["x"]
    parameters = {t.data_ptr() for name in tensors if name != "x" for t in tensors[name]}
    others = [t for t in kept if t.data_ptr() not in parameters and t.numel()]
    numbers = sum({t.data_ptr(): t.numel() for t in others if t.dtype == x.dtype}.values())
    tokens = x.numel() // case.dim
    assert numbers == tokens * (case.dim + (max(case.hidden) if save else 0))
