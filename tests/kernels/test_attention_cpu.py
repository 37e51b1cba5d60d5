"""The C++ kernels of shared_attention, for each instruction set that this CPU has."""

import os

import pytest
import torch

from attention_cases import (
    Case,
    assert_parity,
    call,
    make_dout,
    make_options,
    make_tensors,
    outputs_and_gradients,
)
from conftest import Place
from settings import threads
from vlmo import _C
from vlmo.kernels import RelativePositionBias, RelativePositionIndex, shared_attention
from vlmo.kernels._backends import cpu as cpu_target

pytestmark = pytest.mark.usefixtures("instructions")

CPU = Place(torch.device("cpu"), "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request) -> torch.dtype:
    return request.param


def plain(length: int, head_dim: int, **more) -> Case:
    return Case(index=None, length=length, head_dim=head_dim, mask=None, **more)


CASES = [
    # Lengths beside multiples of the vectors, of the blocks of queries (48) and of keys (240).
    plain(1, 64),
    plain(15, 65),
    plain(16, 17),
    plain(17, 128, causal=True),
    plain(47, 34),
    # Few dimensions have scores so large that rounding the log-sum-exp shows (docs/attention.md).
    plain(48, 2, scale=0.25),
    plain(49, 3, heads=1, batch=1, scale=0.25),
    plain(239, 64, heads=1),
    plain(240, 17, heads=1, causal=True),
    plain(241, 65, heads=1),
    plain(480, 16, heads=1, batch=1),
    plain(500, 34, heads=1, causal=True),
    plain(70, 1, scale=0.25),
    plain(33, 200, scale=0.5),
    Case(length=500, mask="lengths", index="random", heads=1, head_dim=17, entries=400),
    Case(length=241, mask="mask", index="random", heads=2, head_dim=64, entries=400),
    # Results of more than a megabyte.
    Case(length=257, mask="mask", index="random", batch=4, heads=9, head_dim=64, entries=400),
    # Keys that are left out, the first ones of a causal sequence among them.
    Case(length=70, mask="mask", index="random", batch=3, causal=True, heads=2),
    Case(length=241, mask="mask", index=None, causal=True, heads=1, head_dim=65),
    Case(mask="padding", batch=5),
    Case(mask="padding", batch=5, causal=True),
    Case(length=97, mask="lengths", index=None, causal=True, head_dim=3),
    # Rows of the bias: by place, in several runs, at random; of more entries than it has pairs.
    Case(length=60, index="random", positions="runs", mask=None),
    Case(length=50, index="random", positions="order", mask="mask", head_dim=34),
    Case(length=241, index="random", positions="runs", mask=None, heads=1, causal=True),
    Case(length=60, index="random", mask=None, entries=100_000, heads=2),
    # Packed sequences: short and long ones, empty ones, some longer than a block.
    Case(index="random", lengths=(5, 70, 0, 5, 66, 66, 5, 66), mask=None, heads=2),
    Case(index=None, lengths=(47, 49, 1, 241), mask=None, causal=True, heads=2),
    Case(index="random", lengths=(16, 48, 100), mask=None, positions="runs", head_dim=17),
    Case(index="random", lengths=(16, 48, 100), mask=None, positions="order", causal=True),
    Case(index="random", lengths=(300, 3, 17), mask=None, heads=1, head_dim=65, entries=400),
    Case(index=None, lengths=(0, 0), mask=None),
    Case(batch=0),
    Case(index=None, length=0, mask=None),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case, dtype):
    assert_parity(case, dtype, CPU)


@pytest.mark.parametrize("count", [2, 7])
@pytest.mark.parametrize(
    "case",
    [
        Case(length=241, mask="mask", index="random", batch=3, entries=400),
        Case(index="random", lengths=(5, 70, 0, 66, 240), mask=None, causal=True, positions="runs"),
        Case(index=None, length=20, batch=1, heads=1, mask=None),  # more threads than items
    ],
    ids=str,
)
def test_parity_on_threads(case, dtype, count):
    with threads(count):
        assert_parity(case, dtype, CPU)


def test_entries_of_minus_infinity(dtype):
    def close(tensors):
        tensors["table"][::3] = -INF

    case = Case(length=70, index="random", entries=30, mask="mask", heads=2)
    assert_parity(case, dtype, CPU, close)


def results(case: Case, tensors: dict, options: dict) -> dict[str, torch.Tensor]:
    return outputs_and_gradients(lambda t: call(case, t, options, backend="cpu"), tensors)


def assert_same(actual: dict, expected: dict, *names: str) -> None:
    for name in names or expected:
        assert torch.equal(actual[name], expected[name]), name


REPEATED = [
    Case(length=100, index="random", mask="mask", batch=4, heads=2),
    Case(index="random", lengths=(5, 240, 0, 66), mask=None, causal=True, positions="runs"),
    plain(300, 17, heads=1, batch=1),
]


@pytest.mark.parametrize("case", REPEATED, ids=str)
def test_results_repeat_and_do_not_depend_on_threads(case, dtype):
    """But for the order of sums in the table's gradient, which depends on the number of threads."""
    tensors, options = make_tensors(case, "cpu", dtype), make_options(case, "cpu")
    alone = results(case, tensors, options)
    for count in (1, 2, 3, 7, 16):
        with threads(count):
            first, second = (results(case, tensors, options) for _ in range(2))
        assert_same(second, first)
        assert_same(first, alone, "out", "q", "k", "v")
        if case.index:
            tolerance = 1e-5 if dtype == torch.float32 else 1e-2
            torch.testing.assert_close(
                first["table"], alone["table"], rtol=tolerance, atol=tolerance
            )


def last_dimension_of_stride_2(t):
    return torch.stack([t, torch.full_like(t, NAN)], -1).flatten(-2)[..., ::2]


def at_an_odd_address(t):
    """One element after the start of a row with an odd number of elements."""
    padded = torch.full((*t.shape[:-1], t.shape[-1] + 3), NAN, dtype=t.dtype)
    padded[..., 1 : t.shape[-1] + 1] = t
    return padded[..., 1 : t.shape[-1] + 1]


def heads_first(t):
    return t.transpose(0, -2).contiguous().transpose(0, -2)


def of_a_packed_projection(t):
    return torch.stack([torch.full_like(t, NAN), t, torch.full_like(t, NAN)], -3).select(-3, 1)


VIEWS = [last_dimension_of_stride_2, at_an_odd_address, heads_first, of_a_packed_projection]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("case", [plain(50, 65), Case(lengths=(5, 17), mask=None, head_dim=33)])
def test_views(view, case, dtype):
    case = Case(**{**vars(case), "index": None})
    tensors, options = make_tensors(case, "cpu", dtype), make_options(case, "cpu")
    expected = results(case, tensors, options)
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    viewed = {name: view(t) for name, t in leaves.items()}
    assert not any(t.is_contiguous() for t in viewed.values())
    out = call(case, viewed, options, backend="cpu")
    grads = torch.autograd.grad(out, [*leaves.values()], make_dout(out))
    assert_same({"out": out, **dict(zip(leaves, grads, strict=True))}, expected)


def test_expanded_operands(dtype):
    """One key and value for all tokens and heads: strides of 0."""
    q, row = torch.randn(2, 20, 3, 16).to(dtype), torch.randn(16).to(dtype)
    expanded = row.expand(2, 20, 3, 16)
    for actual in (
        shared_attention(q, expanded, expanded, backend="cpu"),
        shared_attention(q, expanded.contiguous(), expanded.contiguous(), backend="cpu"),
    ):
        torch.testing.assert_close(actual, expanded, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nan_stays_in_its_sequence(name, dtype):
    case = Case(index="random", lengths=(5, 52, 60), mask=None, heads=2)
    tensors, options = make_tensors(case, "cpu", dtype), make_options(case, "cpu")
    expected = results(case, tensors, options)
    tensors[name][5:57] = NAN
    actual = results(case, tensors, options)
    assert actual["out"][5:57].isnan().all()
    for kind in ("out", "q", "k", "v"):
        for part in (slice(0, 5), slice(57, None)):
            assert torch.equal(actual[kind][part], expected[kind][part]), kind


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_query_affects_its_own_output_only(value, dtype):
    case = plain(100, 32)
    tensors, options = make_tensors(case, "cpu", dtype), make_options(case, "cpu")
    expected = call(case, tensors, options, backend="cpu")
    tensors["q"][0, 60, 1] = value
    actual = call(case, tensors, options, backend="cpu")
    assert actual[0, 60, 1].isnan().all()
    actual[0, 60, 1] = expected[0, 60, 1]
    assert torch.equal(actual, expected)


def test_masked_keys_change_nothing(dtype):
    case = Case(length=70, index="random", mask="mask", batch=3, causal=True, heads=2, head_dim=33)
    tensors, options = make_tensors(case, "cpu", dtype), make_options(case, "cpu")
    expected = results(case, tensors, options)
    masked = ~options["key_mask"]
    for value in (NAN, INF):
        changed = {name: t.clone() for name, t in tensors.items()}
        changed["k"][masked] = changed["v"][masked] = value
        assert_same(results(case, changed, options), expected)
    assert all((expected[name][masked] == 0).all() for name in "kv")
    assert (expected["out"][0] == 0).all()  # the sequence without a valid key
    assert all((expected[name][0] == 0).all() for name in "qkv")


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("length", [5, 20, 50])
def test_entries_of_absent_queries_change_nothing(value, length, dtype):
    """Entries of rows that a short sequence does not have, beside its last query in a vector."""
    matrix = torch.arange(64)[:, None].expand(64, 64)
    index = RelativePositionIndex(matrix, 64)
    qkv = [torch.randn(length, 2, 16).to(dtype) for _ in range(3)]
    table = torch.randn(64, 2)
    offsets = torch.tensor([0, length])

    def run(table):
        leaves = [t.clone().requires_grad_() for t in (*qkv, table)]
        bias = RelativePositionBias(leaves[3], index)
        out = shared_attention(*leaves[:3], bias=bias, offsets=offsets, max_length=64)
        return out, *torch.autograd.grad(out, leaves, make_dout(out))

    changed = table.clone()
    changed[length:] = value
    for actual, expected in zip(run(changed), run(table), strict=True):
        assert torch.equal(actual, expected)


def test_a_transposed_index(dtype):
    """Copies keep the strides of a transposed matrix."""
    matrix, table = torch.randint(0, 9, (50, 50)), torch.randn(9, 2)
    q, k, v = (torch.randn(2, 50, 2, 16).to(dtype) for _ in range(3))
    indices = [RelativePositionIndex(m, 9) for m in (matrix.t(), matrix.t().contiguous())]
    assert indices[0].matrix.stride() == (1, 50)
    biases = [RelativePositionBias(table, index) for index in indices]
    outs = [shared_attention(q, k, v, bias=bias, backend="cpu") for bias in biases]
    assert torch.equal(*outs)


def test_without_the_gradient_of_the_table(dtype):
    case = Case(length=50, index="random", mask="lengths")
    tensors, options = make_tensors(case, "cpu", dtype), make_options(case, "cpu")
    expected = results(case, tensors, options)
    leaves = [tensors[name].requires_grad_() for name in "qkv"]
    out = call(case, tensors, options, backend="cpu")
    grads = torch.autograd.grad(out, leaves, make_dout(out))
    assert_same(dict(zip("qkv", grads, strict=True)), expected, "q", "k", "v")
    tensors["table"].requires_grad_()
    out = call(case, tensors, options, backend="cpu")
    (table,) = torch.autograd.grad(out, [tensors["table"]], make_dout(out))
    assert torch.equal(table, expected["table"])
    assert table.is_contiguous()  # as the fake of the operation says


def test_the_bound_of_lengths_takes_no_memory(dtype):
    q = torch.randn(7, 2, 16).to(dtype)
    offsets = torch.tensor([0, 3, 7])
    outs = [
        shared_attention(q, q, q, offsets=offsets, max_length=bound, backend="cpu")
        for bound in (4, 10**12)
    ]
    assert torch.equal(*outs)


def test_numbers_of_16_bits_are_kept():
    """With a single key, out is v: every finite number passes, and so does dout to dv."""
    for dtype in (torch.bfloat16, torch.float16):
        numbers = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
        numbers = numbers[numbers.isfinite()]
        if dtype == torch.bfloat16:  # products of bfloat16 flush denormal numbers to zero
            numbers = numbers[numbers.abs() >= torch.finfo(dtype).tiny]
        v = numbers[: len(numbers) // 64 * 64].view(-1, 1, 1, 64).clone().requires_grad_()
        zeros = torch.zeros_like(v)
        out = shared_attention(zeros, zeros, v, backend="cpu")
        (dv,) = torch.autograd.grad(out, v, v.detach())
        assert torch.equal(out, v) and torch.equal(dv, v)


def test_float64_is_left_to_the_reference():
    q = torch.randn(1, 3, 2, 4, dtype=torch.float64)
    assert torch.equal(shared_attention(q, q, q), shared_attention(q, q, q, backend="reference"))
    with pytest.raises(NotImplementedError, match=r"'cpu' cannot run this call: torch\.float64"):
        shared_attention(q, q, q, backend="cpu")


def test_an_instruction_set_that_is_missing(monkeypatch):
    monkeypatch.setattr(cpu_target, "instructions", lambda: "altivec")
    q = torch.randn(1, 3, 2, 4)
    with pytest.raises(ValueError, match="this CPU has no 'altivec'"):
        shared_attention(q, q, q, backend="cpu")


class TestChoice:
    """Which instruction set is chosen."""

    @pytest.fixture(autouse=True)
    def instructions(self):  # one run of each test, with the function as it is
        cpu_target.instructions.cache_clear()
        yield
        cpu_target.instructions.cache_clear()

    def test_the_widest(self):
        if "ATEN_CPU_CAPABILITY" in os.environ:
            pytest.skip("ATEN_CPU_CAPABILITY restricts the choice")
        assert cpu_target.instructions() == _C.instruction_sets()[0]
        assert _C.instruction_sets()[-1] == "portable"

    @pytest.mark.parametrize(("capability", "allowed"), [("AVX2", "avx2"), ("DEFAULT", "portable")])
    def test_not_more_than_pytorch_uses(self, capability, allowed, monkeypatch):
        if allowed not in _C.instruction_sets() or not cpu_target.is_x86():
            pytest.skip(f"this CPU has no {allowed}")
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        assert cpu_target.instructions() == allowed
