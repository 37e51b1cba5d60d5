"""moe_ffn's Triton kernels with concurrent programs that wait for each other."""

import pytest
import torch

from interleaved import Hang, Interleaved
from moe_ffn_cases import Case, call, make_routing, make_tensors, outputs_and_gradients
from vlmo.kernels.moe_ffn import counters
from vlmo.kernels.moe_ffn.triton import backward_rows as triton_backward
from vlmo.kernels.moe_ffn.triton import backward_weights as triton_weights
from vlmo.kernels.moe_ffn.triton import forward as triton_forward
from vlmo.kernels.moe_ffn.triton import tiles
from vlmo.kernels.moe_ffn.triton.tiles import Tile, Tiles

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="Triton's interpreter is not used beside a GPU"
    ),
]

CASES = [
    Case(batch=2),
    Case(batch=3, form="ids", activation="swiglu", norm="rms", norm_bias=False, hidden=(48, 33)),
]
KERNELS = {
    "moe_ffn_fwd_kernel": triton_forward,
    "moe_ffn_bwd_rows_kernel": triton_backward,
    "moe_ffn_bwd_weights_kernel": triton_weights,
}


@pytest.fixture
def interleaved(monkeypatch):
    """Programs side by side; NaN in memory that nobody has written; small tiles."""
    monkeypatch.setattr(counters, "COUNTERS", counters.Counters())
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives
    small = Tile(16, 32, 16, 4, 1)
    with tiles.use_tiles(Tiles(small, small, small, small)):
        yield Interleaved(monkeypatch)
    torch.use_deterministic_algorithms(was)


def run(case, backend):
    routing = make_routing(case, "cpu")
    return outputs_and_gradients(
        lambda tensors: call(case, routing, tensors, backend=backend),
        make_tensors(case, "cpu", torch.float32),
    )


def is_right(actual, expected):
    return torch.allclose(actual, expected, rtol=2e-5, atol=2e-5)


def assert_counters_are_zero():
    (buffer,) = counters.COUNTERS._kept.values()
    assert not buffer.any()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_order_of_the_programs_gives_the_same(case, interleaved):
    expected, first = run(case, "reference"), None
    for interleaved.seed in range(3):
        actual = run(case, "triton")
        assert_counters_are_zero()
        first = first or actual
        for name, value in actual.items():
            assert is_right(value, expected[name]), name
            assert torch.equal(value, first[name]), name
    # Else no order has put the waits to the test.
    assert set(interleaved.waits) == set(KERNELS) and all(interleaved.waits.values())


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_that_does_not_wait_is_found_out(kernel, interleaved, monkeypatch):
    monkeypatch.setattr(KERNELS[kernel], "wait", lambda counter, expected: None)
    actual, expected = run(CASES[0], "triton"), run(CASES[0], "reference")
    assert_counters_are_zero()
    assert not all(is_right(value, expected[name]) for name, value in actual.items())


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_that_does_not_signal_is_found_out(kernel, interleaved, monkeypatch):
    monkeypatch.setattr(KERNELS[kernel], "signal", lambda counter: None)
    with pytest.raises(Exception, match="all programs wait") as error:
        run(CASES[0], "triton")
    assert isinstance(error.value, Hang) or isinstance(error.value.__cause__, Hang)
