"""shared_attention's Triton kernels: sizes, launches, determinism, memory, the table's sums."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attention_cases import (
    Case,
    assert_parity,
    call,
    make_index,
    make_options,
    make_tensors,
    on_triton,
    outputs_and_gradients,
)
from vlmo.kernels import RelativePositionBias, RelativePositionIndex, shared_attention
from vlmo.kernels._backends import triton_launch
from vlmo.kernels.attention.call import Call
from vlmo.kernels.attention.triton import arguments as host
from vlmo.kernels.attention.triton import backend as triton_impl
from vlmo.kernels.attention.triton import tiles
from vlmo.kernels.attention.triton.tiles import Tile, Tiles

pytestmark = on_triton

SMALL = Tile(16, 16, 4, 1)


@pytest.fixture
def small_tiles(monkeypatch):
    """Many tiles in short sequences, and several for each program of the table's kernel."""
    monkeypatch.setattr(tiles, "choose", lambda *_: Tiles(SMALL, SMALL, SMALL, SMALL))


SIZES: dict[int, dict[str, Any]] = {
    1: dict(index="random"),
    17: dict(index="image", grid=(4, 4)),
    40: dict(index="text", text=40),
    64: dict(index="random"),
    129: dict(index="joint", grid=(8, 12), text=32, mask="padding", heads=1),
    197: dict(index="image", grid=(14, 14), heads=1),
    237: dict(index="joint", grid=(14, 14), text=40, mask="padding", heads=1),
    300: dict(index="random", heads=1),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZED = [
    pytest.param(
        Case(**dict(heads=2, mask=None, length=length, head_dim=head_dim) | options),
        dtype,
        # Long sequences take seconds in the interpreter: both widths, and all dtypes, but not both.
        marks=[pytest.mark.slow]
        if length > 100 and (head_dim == 34) != (dtype == DTYPES[1])
        else [],
    )
    for length, options in SIZES.items()
    for head_dim in (34, 64)
    for dtype in DTYPES
]
OTHERS = [
    # a sequence without a valid key, causal with and without a bias, the widest head
    Case(index="random", length=150, heads=1, head_dim=34),
    Case(index="random", length=150, heads=1, mask="lengths", causal=True),
    Case(index=None, length=150, heads=1, mask=None, causal=True),
    Case(index="random", length=70, heads=1, mask=None, head_dim=128),
    Case(index=None, length=20, heads=2, mask=None, head_dim=1),
    # packed, in the index's order and in any
    Case(index="random", heads=2, lengths=(129, 0, 3, 200, 64), mask=None),
    Case(index="random", heads=2, lengths=(129, 3, 200, 0), mask=None, positions=True, causal=True),
]


@pytest.mark.parametrize(("case", "dtype"), [*SIZED, *itertools.product(OTHERS, DTYPES)], ids=str)
def test_parity_of_sizes(case, dtype, place):
    assert_parity(case, dtype, place)


@pytest.fixture(params=[True, False], ids=["expanded", "lookup"])
def expanded(request, monkeypatch):
    """Both forms of the bias, whatever pays."""
    monkeypatch.setattr(host, "expands", lambda call: request.param and call.table is not None)
    return request.param


# of 85 rows
LARGE_INDEX: dict[str, Any] = dict(index="joint", heads=2, grid=(8, 8), text=20, mask=None)
FORMS = [
    Case(batch=3, index="random", length=37, mask="padding", causal=True),
    Case(lengths=(33, 0, 5, 50), positions="gaps", **LARGE_INDEX),
    Case(lengths=(50, 1, 33, 0), positions="distinct", causal=True, **LARGE_INDEX),
    Case(lengths=(33, 50), positions=False, **LARGE_INDEX),
    Case(length=40, positions="distinct", **LARGE_INDEX | dict(mask="lengths")),
    Case(length=40, positions="gaps", head_dim=34, **LARGE_INDEX | dict(mask="mask")),
]


@pytest.mark.parametrize(
    ("case", "dtype"), [*zip(FORMS, itertools.cycle(DTYPES), strict=False)], ids=str
)
def test_both_forms_of_the_bias(case, dtype, expanded, place, small_tiles):
    assert_parity(case, dtype, place)


def test_what_pays(place):
    """Expanding takes many pairs of tokens, a bias that fits into L2, and distinct positions."""

    def expands(case: Case, **options) -> bool:
        tensors, index = make_tensors(case, "meta", torch.bfloat16), make_index(case, "meta")
        lookup = (tensors["table"], index.matrix, index.affine, index.short)
        q, k, v = (tensors[name] for name in "qkv")
        given = Call(q, k, v, *lookup, None, None, None, 0, None, False, 1.0)
        return host.expands(given._replace(**options))

    case = Case(index="image", grid=(14, 14), length=197, batch=2)
    positions = torch.empty(2, 197, dtype=torch.int32, device="meta")
    assert expands(case)
    assert not expands(replace(case, batch=1))
    assert not expands(replace(case, heads=64, grid=(24, 24), length=577))
    assert not expands(case, positions=positions)
    assert expands(case, positions=positions, distinct=True)


def test_unused_entries_of_the_table_do_not_matter(place, expanded):
    """Positions without a token read entries that nothing else reads, and those may be NaN."""
    case = Case(batch=3, length=9, mask=None, positions="gaps")
    tensors, options = make_tensors(case, place.device, place.dtype), make_options(case, "cpu")
    options["positions"] = options["positions"].to(place.device)
    expected = outputs_and_gradients(
        lambda t: call(case, t, options, backend=place.backend), tensors
    )
    index = make_index(case, "cpu").matrix.long()
    used = torch.zeros(len(tensors["table"]), dtype=torch.bool)
    for positions in options["positions"].cpu().long():
        used[index[positions][:, positions].flatten()] = True
    assert not used.all()
    tensors["table"][~used] = float("nan")
    actual = outputs_and_gradients(lambda t: call(case, t, options, backend=place.backend), tensors)
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


MANY_TILES = [
    Case(batch=3, heads=2, index="random", length=37, mask="padding"),
    Case(batch=2, heads=1, index="random", length=61, mask=None, causal=True),
    Case(heads=1, index="random", lengths=(33, 5, 50), mask=None),
    Case(heads=1, index="joint", lengths=(33, 5, 50), mask=None, positions=True),
]


@pytest.mark.parametrize("case", MANY_TILES, ids=str)
def test_many_tiles(case, place, small_tiles):
    assert_parity(case, place.dtype, place)


@pytest.mark.parametrize("case", [MANY_TILES[0], MANY_TILES[3]], ids=str)
def test_results_repeat_bit_by_bit(case, place, small_tiles):
    tensors = make_tensors(case, place.device, torch.float16)
    options = make_options(case, place.device)
    first, second = (
        outputs_and_gradients(lambda t: call(case, t, options, backend=place.backend), tensors)
        for _ in range(2)
    )
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_launches(place, launches):
    """One forward, two backward, one more for the table's gradient: only if it is wanted.

    Before the forward and the backward, one more expands the bias.
    """
    case = Case()
    tensors, options = make_tensors(case, place.device, place.dtype), make_options(case, "cpu")
    options["key_mask"] = options["key_mask"].to(place.device)
    expand = "attention_expand_kernel"
    names = [expand, "attention_fwd_kernel"]
    names += [expand, "attention_bwd_q_kernel", "attention_bwd_kv_kernel"]
    tensors["q"].requires_grad_()
    call(case, tensors, options, backend=place.backend).sum().backward()
    assert [name for name, _ in launches] == names
    launches.clear()
    tensors["table"].requires_grad_()
    call(case, tensors, options, backend=place.backend).sum().backward()
    assert [name for name, _ in launches] == [*names, "attention_bwd_table_kernel"]


def test_no_launch_without_a_number(place, launches):
    for case in (Case(batch=0), Case(index=None, length=0, mask=None)):
        tensors = make_tensors(case, place.device, place.dtype)
        options = make_options(case, place.device)
        outputs_and_gradients(lambda t: call(case, t, options, backend=place.backend), tensors)  # noqa: B023
    assert not launches


class Sizes(TorchDispatchMode):
    """The shapes of the tensors that operations give, in descending order of their size."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.shapes.append(tuple(tensor.shape))
        self.shapes.sort(key=math.prod, reverse=True)
        return result


def test_no_tensor_of_pairs(place, monkeypatch, expanded):
    """Forward and backward allocate nothing as large as N x N, for all heads together.

    The exception is an expanded bias, whatever the number of sequences: one, and two in the
    backward.
    """
    # The interpreter would copy what it is given.
    monkeypatch.setattr(triton_launch, "launch", lambda *_: None)
    case = Case(index="random", length=150, heads=2, mask=None)
    tensors, index = make_tensors(case, place.device, place.dtype), make_index(case, place.device)
    given = Call._make(
        [
            *(*(tensors[name] for name in "qkv"), tensors["table"]),
            *(index.matrix, index.affine, index.short, None, None, None, 0, None, False, 0.25),
            False,
        ]
    )
    with Sizes() as sizes:
        out, lse = triton_impl.forward(given)
        triton_impl.backward(out, out, lse, given, [True] * 4)
    biases = [(2, 150, 256)] * 3 if expanded else []
    assert sizes.shapes[: len(biases)] == biases
    assert tensors["q"].numel() <= math.prod(sizes.shapes[len(biases)]) < case.length**2


def test_known_entries_of_the_index_are_not_read(place):
    """A tile of regular keys knows its entries by arithmetic: others may stand in the matrix."""
    case = Case(grid=(14, 14), text=40, length=237, heads=1, batch=1, mask=None)
    tensors = make_tensors(case, place.device, place.dtype)
    right, wrong = make_index(case, place.device), make_index(case, place.device)
    wrong.short[:, 128:] = wrong.matrix[:, 128:] = 0  # what is left are whole tiles

    def run(index):
        def function(t):
            bias = RelativePositionBias(t["table"], index)
            return shared_attention(t["q"], t["k"], t["v"], bias=bias, backend=place.backend)

        return outputs_and_gradients(function, tensors)

    expected, actual = run(right), run(wrong)
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


def test_index_of_32_bits(place):
    """More entries than 16 bits can tell apart; and the last that 16 bits can."""
    q, k, v = torch.randn(3, 1, 20, 1, 16, device=place.device).unbind(0)
    for entries in (70_000, 65_536):
        generator = torch.Generator().manual_seed(0)
        matrix = torch.randint(entries - 9000, entries, (20, 20), generator=generator)
        index = RelativePositionIndex(matrix, entries).to(place.device)
        assert bool(index.short.numel()) == (entries == 65_536)
        results = []
        for backend in (place.backend, "reference"):
            table = torch.randn(entries, 1, generator=generator.manual_seed(1))
            table = table.to(place.device).requires_grad_()
            bias = RelativePositionBias(table, index)
            out = shared_attention(q, k, v, bias=bias, backend=backend)
            out.square().sum().backward()
            results.append((out.detach(), table.grad))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)


def test_places_of_64_bits(place, monkeypatch):
    """Where 32 bits may not be enough for a place, results are the same."""
    case = Case(lengths=(9, 15, 2), mask=None, positions=True)
    tensors, options = make_tensors(case, place.device, place.dtype), make_options(case, "cpu")
    options = {
        n: o.to(place.device) if isinstance(o, torch.Tensor) else o for n, o in options.items()
    }

    def run():
        return outputs_and_gradients(
            lambda t: call(case, t, options, backend=place.backend), tensors
        )

    expected = run()
    monkeypatch.setattr(host, "span_of", lambda call, length: 2**31)
    for name, value in run().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("size", [2.0**-100, 2.0**80])
def test_table_gradient_of_any_size(size, place):
    """The integers that sum it up fit the gradient, which loss scaling makes small or large."""
    case = Case(mask=None)
    tensors = make_tensors(case, place.device, torch.float32)
    tensors["table"].requires_grad_()
    gradients = []
    for factor in (1.0, size):
        out = call(case, tensors, {}, backend=place.backend)
        (gradient,) = torch.autograd.grad(out, tensors["table"], torch.full_like(out, factor))
        gradients.append(gradient / factor)
    torch.testing.assert_close(*gradients)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_table_gradient_tells_of_an_overflow(value, place):
    """A gradient scaler looks for what is not finite; integers would hide it."""
    case = Case(mask=None)
    tensors = make_tensors(case, place.device, torch.float32)
    tensors["table"].requires_grad_()
    out = call(case, tensors, {}, backend=place.backend)
    dout = torch.ones_like(out)
    dout[0, 3, 1, 2] = value
    (gradient,) = torch.autograd.grad(out, tensors["table"], dout)
    assert gradient[:, 1].isnan().any()
    assert gradient[:, [0, 2]].isfinite().all()
