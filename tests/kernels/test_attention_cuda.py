"""shared_attention's CUDA kernels: sizes, scores, strides, interleavings, launches, machine code.

Without a GPU the sm_70 machine code runs in the emulator, as in all tests.
"""

import ctypes
import json
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch

import emulated as emulator
from attention_cases import (
    Case,
    assert_parity,
    call,
    make_dout,
    make_index,
    make_options,
    make_tensors,
    on_cuda,
    outputs_and_gradients,
)
from emulated import emulated
from sm70 import KernelFault, disassemble
from sm70.elf import Cubin
from sm70.timing import occupancy
from vlmo import _C
from vlmo.kernels import RelativePositionBias, RelativePositionIndex, shared_attention, target
from vlmo.kernels._backends import cuda as cuda_target
from vlmo.kernels.attention.cuda import arguments, backend, backward, bias_gradient, forward

pytestmark = pytest.mark.heavy

HALF = torch.float16
KERNELS = [
    *(("attention_fwd", f"attention_fwd_{name}") for name in ("64_2", "64_4", "128_4")),
    *(
        (cubin, f"{cubin}_{dim}")
        for cubin in ("attention_bwd_q", "attention_bwd_kv", "attention_bwd_table")
        for dim in (64, 128)
    ),
]
CUBINS = sorted({cubin for cubin, _ in KERNELS})


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan():
    if torch.cuda.is_available():  # there it would refuse operations of the tests
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclass
class Launch:
    cubin: str
    kernel: str
    programs: int
    threads: int
    shared_bytes: int
    argument: Any


@pytest.fixture
def launches(place):
    """What is launched, in order."""
    seen: list[Launch] = []
    launch = cuda_target.launch

    def spy(cubin, kernel, device, programs, threads, shared_bytes, argument, tensors):
        seen.append(Launch(cubin, kernel, programs, threads, shared_bytes, argument))
        launch(cubin, kernel, device, programs, threads, shared_bytes, argument, tensors)

    with mock.patch.object(cuda_target, "launch", spy):  # ends before the place does
        yield seen


def run(case: Case, device="cpu", change=lambda tensors: None, **more) -> dict[str, torch.Tensor]:
    tensors, options = make_tensors(case, device, HALF), make_options(case, device)
    change(tensors)
    options |= more
    return outputs_and_gradients(lambda t: call(case, t, options, backend="cuda"), tensors)


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


# ---- results

SIZES: dict[int, dict[str, Any]] = {
    1: dict(index="random"),
    17: dict(index="image", grid=(4, 4), mask="lengths"),
    40: dict(index="text", text=40),
    64: dict(index="random"),
    129: dict(index="joint", grid=(8, 12), text=32, mask="padding"),
    197: dict(index="image", grid=(14, 14), heads=1),
    237: dict(index="joint", grid=(14, 14), text=40, mask="padding", heads=1),
    300: dict(index="random", heads=1, batch=1),
}
SIZED = [
    Case(**dict(heads=2, mask=None, length=length, head_dim=head_dim) | options)
    for head_dim in (34, 64, 128)
    for length, options in SIZES.items()
]
OTHERS = [
    # A sequence without a valid key; queries without one, above a mask's first key.
    Case(index="random", length=150, heads=1, head_dim=34),
    Case(index="random", length=150, heads=1, causal=True, head_dim=64),
    Case(index="random", length=150, heads=1, mask="lengths", causal=True),
    Case(index=None, length=150, heads=1, mask=None, causal=True, head_dim=128),
    Case(index=None, length=20, heads=2, mask=None, head_dim=1),
    Case(index=None, length=237, heads=1, mask="lengths", head_dim=64),
    # Packed sequences, in the index's order and in any.
    Case(index="random", heads=2, lengths=(129, 0, 3, 200, 64), mask=None),
    Case(index="joint", heads=2, lengths=(9, 15, 2), mask=None),
    Case(index="random", heads=1, lengths=(129, 3, 200, 0), mask=None, positions=True, causal=True),
    Case(index="random", length=70, head_dim=64, batch=5, heads=1),
    Case(index="random", length=1030, head_dim=64, batch=1, heads=1, mask=None),
    # Scales that the kernels do not divide by.
    Case(scale=-0.3, head_dim=34),
    Case(scale=0.0),
    Case(scale=1e-35),
    Case(scale=2.0**-90),
    # Tables: the largest in the table's window, several windows, too large for shared memory;
    # numbers of 16 bits that look negative, and of 32 bits.
    Case(index="random", length=70, heads=1, mask=None, entries=8192),
    Case(index="random", length=70, heads=2, mask=None, entries=14_001),
    Case(index="random", length=70, heads=2, mask="lengths", entries=65_536),
    Case(index="random", length=70, heads=2, mask=None, entries=70_001, head_dim=64),
    Case(index="joint", length=70, heads=1, entries=70_001, text=20, grid=(7, 7), mask="padding"),
]


@on_cuda
@pytest.mark.parametrize("case", SIZED + OTHERS, ids=str)
def test_parity(case, place):
    assert_parity(case, HALF, place)


def growing(tensors, size):
    """Scores that grow along the keys, to ``size`` at a scale of 1/8."""
    q, k = tensors["q"], tensors["k"]
    q[..., 0] = 8
    k[..., 0] = torch.linspace(-size / 2, size / 2, k.shape[1])[:, None]


def falling(tensors, size):
    growing(tensors, -size)


def large(tensors, size):
    tensors["q"] *= size / 4
    tensors["k"] *= 4


def shifted(tensors, size):
    tensors["table"] = tensors["table"].float() + size


def masked(tensors, size):
    """Entries that leave no weight, as masks in older code do."""
    tensors["table"][::2] = size


@on_cuda
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "change",
    [
        partial(growing, size=30),
        partial(growing, size=300),
        partial(growing, size=10_000),
        partial(falling, size=10_000),
        partial(large, size=1000),
        partial(shifted, size=-100),
        partial(shifted, size=100),
        partial(masked, size=-1e4),
    ],
    ids=lambda change: f"{change.func.__name__} {change.keywords['size']}",
)
def test_scores_of_any_size(change, head_dim, place):
    """The forward raises its maximum late, and only when it must."""
    # A power of two: eager PyTorch's product with the scale then rounds nothing.
    case = Case(
        index="random", length=150, batch=1, heads=1, head_dim=head_dim, mask=None, scale=0.125
    )
    assert_parity(case, HALF, place, change)


def test_the_maximum_is_raised_late(monkeypatch):
    """Steps are done again where scores outgrow the first maximum, and only there."""
    counts = []
    launch = emulator.Kernel.launch

    def count(self, *args, **options):
        result = launch(self, *args, **options)
        counts.append(result.warp_instructions)
        return result

    monkeypatch.setattr(emulator.Kernel, "launch", count)
    case = Case(index=None, length=150, batch=1, heads=1, head_dim=64, mask=None, scale=0.125)
    options = make_options(case, "cpu")
    for change in (falling, growing):
        for size in (2, 300):
            tensors = make_tensors(case, "cpu", HALF)
            change(tensors, size)
            with emulated():
                call(case, tensors, options, backend="cuda")
    calm, steep, slow, steps = counts
    assert calm == steep == slow < steps


@on_cuda
@pytest.mark.parametrize("size", [-1e4, 1e4])
def test_a_shift_of_the_bias_changes_little(size, place):
    """Scores start from the bias: each of 16 steps of the product rounds as large numbers do."""
    case = Case(index="random", length=70, heads=1, head_dim=64, mask=None)
    shift = partial(shifted, size=size)
    expected, actual = (run(case, place.device, change) for change in (lambda t: None, shift))
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name].to(value), rtol=0.02, atol=0.02)


@on_cuda
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_table_gradient_tells_of_an_overflow(value, place):
    """A gradient scaler looks for what is not finite; integers would hide it."""
    case = Case(mask=None)
    tensors = make_tensors(case, place.device, HALF)
    tensors["table"].requires_grad_()
    out = call(case, tensors, {}, backend="cuda")
    dout = torch.ones_like(out)
    dout[0, 3, 1, 2] = value
    (gradient,) = torch.autograd.grad(out, tensors["table"], dout)
    assert gradient[:, 1].isnan().any()
    assert gradient[:, [0, 2]].isfinite().all()


@on_cuda
@pytest.mark.parametrize("size", [2.0**-20, 2.0**12])
def test_table_gradient_of_any_size(size, place):
    """The integers that sum it up fit the gradient, which loss scaling makes small or large."""
    case = Case(mask=None)
    tensors = make_tensors(case, place.device, HALF)
    tensors["table"] = tensors["table"].float().requires_grad_()
    gradients = []
    for factor in (1.0, size):
        out = call(case, tensors, {}, backend="cuda")
        (gradient,) = torch.autograd.grad(out, tensors["table"], make_dout(out).sign() * factor)
        gradients.append(gradient / factor)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


@on_cuda
def test_queries_without_a_key(place):
    """They get zeros, and give none of their gradient to anybody."""
    case = Case(index="random", length=70, heads=1, causal=True, head_dim=64)
    mask = torch.ones(2, 70, dtype=torch.bool, device=place.device)
    mask[:, :40] = mask[1] = False
    actual = run(case, place.device, key_mask=mask)
    for name in ("out", "q"):
        assert (actual[name][:, :40] == 0).all() and (actual[name][1] == 0).all(), name
        assert (actual[name][0, 40:] != 0).any()
    for name in ("k", "v"):
        assert (actual[name][:, :40] == 0).all() and (actual[name][1] == 0).all(), name
    for value in actual.values():
        assert value.isfinite().all()


# ---- strides

PACKED = Case(index="random", length=70, heads=2, head_dim=64, mask=None)


def run_packed(case, device, head_dim=None):
    tensors = make_tensors(case, device, HALF)
    qkv = torch.stack([tensors[name] for name in "qkv"], dim=2)

    def function(t):
        bias = RelativePositionBias(t["table"], make_index(case, device))
        return shared_attention(t["qkv"], bias=bias, backend="cuda")

    found = outputs_and_gradients(function, {"qkv": qkv, "table": tensors["table"]})
    return {"out": found["out"], "table": found["table"]} | {
        name: found["qkv"][:, :, i] for i, name in enumerate("qkv")
    }


@on_cuda
@pytest.mark.parametrize("case", [PACKED, replace(PACKED, head_dim=34)], ids=str)
def test_packed_qkv_is_read_where_it_lies(case, place, launches):
    expected = run(case, place.device)
    apart = launches[0].argument.call
    launches.clear()
    assert_equal(run_packed(case, place.device), expected)
    packed = launches[0].argument.call
    dim = -(-case.head_dim // 8) * 8
    assert apart.q.token == case.heads * dim
    # A head dim off the multiples of 8 takes a copy.
    assert packed.q.token == case.heads * dim * (3 if dim == case.head_dim else 1)


@on_cuda
@pytest.mark.parametrize(("span", "token"), [(2 * 70 * 128 + 1, 128), (2 * 70 * 128, 64)])
def test_sequences_that_span_too_many_bytes_are_copied(span, token, place, launches, monkeypatch):
    expected = run_packed(PACKED, place.device)
    launches.clear()
    monkeypatch.setattr(arguments, "MAX_SPAN", span)
    assert_equal(run_packed(PACKED, place.device), expected)
    for launch in launches:
        assert [getattr(launch.argument.call, n).token for n in "qkv"] == [token] * 3


@pytest.mark.parametrize(("tokens", "stride"), [(19, 2304), (20, 768), (21, 64)])
def test_places_have_32_bits(tokens, stride):
    """2**21 tokens of 12 heads of 64 lie too far apart unless the heads are outermost."""
    tokens = 2**tokens
    q, _, _ = torch.empty(1, tokens, 3, 12, 64, dtype=HALF, device="meta").unbind(2)
    readable = arguments.readable(q, tokens // 2 if stride == 2304 else tokens)
    assert readable.shape == q.shape and readable.stride(1) == stride
    assert readable.stride(3) == 1


@on_cuda
@pytest.mark.parametrize(
    ("index", "table"), [("joint", True), (None, False)], ids=["with a table", "without"]
)
def test_no_launch_without_a_number(index, table, place, launches):
    tensors: dict[str, torch.Tensor] = {}
    cases = [Case(index=index, batch=0)]
    if index is None:
        cases.append(Case(index=None, length=0, mask=None))
    for case in cases:
        found = run(case, place.device)
        assert found["out"].shape == make_tensors(case, "cpu", HALF)["q"].shape
        tensors |= found
    offsets = torch.zeros(3, dtype=torch.int32, device=place.device)
    q = torch.zeros(0, 2, 16, dtype=HALF, device=place.device, requires_grad=True)
    out = shared_attention(q, q, q, offsets=offsets, max_length=0, backend="cuda")
    out.sum().backward()
    assert q.grad is not None and out.shape == q.grad.shape == q.shape
    assert not launches
    if table:
        assert (tensors["table"] == 0).all()


# ---- what is launched


@on_cuda
def test_launches(place, launches):
    """One forward, two backward, one more for the table's gradient: only if it is wanted."""
    case = Case()
    tensors, options = make_tensors(case, place.device, HALF), make_options(case, place.device)
    tensors["q"].requires_grad_()
    names = ["attention_fwd", "attention_bwd_q", "attention_bwd_kv"]
    call(case, tensors, options, backend="cuda").sum().backward()
    assert [launch.cubin for launch in launches] == names
    launches.clear()
    tensors["table"].requires_grad_()
    call(case, tensors, options, backend="cuda").sum().backward()
    assert [launch.cubin for launch in launches] == [*names, "attention_bwd_table"]


@contextmanager
def recorded(multiprocessors=2):
    """What would be launched; nothing is."""
    seen: list[Launch] = []

    def launch(cubin, kernel, device, programs, threads, shared_bytes, argument, tensors):
        seen.append(Launch(cubin, kernel, programs, threads, shared_bytes, argument))

    with emulated(workers=2 * multiprocessors), pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_target, "launch", launch)
        yield seen


JOINT = Case(
    index="joint", length=237, batch=2, heads=4, head_dim=64, mask=None, grid=(14, 14), text=40
)


@pytest.mark.parametrize(("multiprocessors", "expected"), [(4, 4), (5, 0)])
def test_long_launches_are_staggered(multiprocessors, expected):
    with recorded(multiprocessors) as launches:
        run(JOINT)
    assert [launch.programs for launch in launches[:3]] == [16, 32, 32]
    staggers = [launch.argument.call.stagger for launch in launches]
    assert staggers == [expected, multiprocessors, multiprocessors, 0]


def test_staggered_ctas_give_the_same_bits():
    results = []
    for multiprocessors in (2, 1000):
        with emulated(workers=2 * multiprocessors):
            results.append(run(replace(JOINT, index=None)))
    assert_equal(*results)


@pytest.mark.parametrize(("capability", "entries"), [((7, 0), 17_000), ((7, 5), 8_800)])
def test_a_table_is_in_shared_memory_if_the_gpu_has_room(capability, entries, monkeypatch):
    case = Case(index="random", length=70, heads=1, mask=None, head_dim=64)
    monkeypatch.setattr(target, "compute_capability", lambda device: capability)
    found = []
    for more in (0, 3000):
        with recorded() as launches:
            run(replace(case, entries=entries + more))
        found.append([launch.argument.call.bias.in_shared for launch in launches[:3]])
        limit = (96 if capability == (7, 0) else 64) * 1024
        assert all(launch.shared_bytes <= limit for launch in launches[:3])
        if not more:
            assert max(launch.shared_bytes for launch in launches[:3]) > 0.9 * limit
    assert found == [[1, 1, 1], [0, 0, 0]]


# ---- CTAs in any order

INTERLEAVED = [
    replace(JOINT, length=129, heads=1, grid=(8, 12), text=32, mask="padding"),
    Case(index="random", heads=2, lengths=(100, 3, 70), mask=None, positions=True, causal=True),
]


@pytest.mark.parametrize("case", INTERLEAVED, ids=str)
@pytest.mark.parametrize("resident", [1, 2, 4])
def test_any_interleaving_gives_the_same_bits(resident, case):
    with emulated():
        expected = run(case)
    for seed in range(2):
        how = dict(seed=seed, cta_order="random", weak_memory=True, resident=resident)
        with emulated(**how):
            assert_equal(run(case), expected)


def test_wide_heads_under_random_interleaving():
    case = replace(INTERLEAVED[0], head_dim=128, batch=1)
    with emulated():
        expected = run(case)
    with emulated(seed=0, cta_order="random", weak_memory=True, resident=2):
        assert_equal(run(case), expected)


@on_cuda
def test_results_repeat_bit_by_bit(place):
    assert_equal(run(JOINT, place.device), run(JOINT, place.device))


@pytest.mark.parametrize(
    ("cubin", "path"),
    [
        *(
            ("attention_fwd", path)
            for path in (
                *("call.q.data", "call.k.data", "call.v.data", "call.bias.table", "out.data"),
                *("call.bias.narrow", "call.bias.affine", "call.key_mask", "call.lse"),
            )
        ),
        *(("attention_bwd_q", path) for path in ("out.data", "dout.data", "dq.data", "delta")),
        *(("attention_bwd_kv", path) for path in ("dout.data", "dk.data", "dv.data", "delta")),
        *(("attention_bwd_table", path) for path in ("dout.data", "delta", "partial")),
    ],
)
def test_the_emulator_knows_where_tensors_end(cubin, path, monkeypatch):
    """Without its last 16 bytes each is reported: nothing above was read or written outside."""
    memory_of, address = emulator.memory_of, None

    def short(tensors):
        return [a[:-16] if a.ctypes.data == address else a for a in memory_of(tensors)]

    monkeypatch.setattr(emulator, "memory_of", short)
    case = Case(length=16, text=6, index="random", head_dim=64, batch=2, heads=1)
    with emulated():
        launch = cuda_target.launch

        def cut(launched, kernel, device, programs, threads, shared_bytes, argument, tensors):
            nonlocal address
            address = None
            if launched == cubin:
                address = argument
                for name in path.split("."):
                    address = getattr(address, name)
            launch(launched, kernel, device, programs, threads, shared_bytes, argument, tensors)

        with (
            mock.patch.object(cuda_target, "launch", cut),
            pytest.raises(KernelFault, match=r"global .* out of bounds"),
        ):
            run(case)


# ---- what it refuses


def refuses(**changes) -> str | None:
    facts: dict[str, Any]
    facts = dict(device=torch.device("cuda", 0), dtype=HALF, head_dim=64, entries=1126)
    return backend.why_not(**(facts | changes))


def test_why_not_names_the_obstacle(monkeypatch):
    assert refuses(device=torch.device("cpu")) == "cpu tensors: its kernels run on NVIDIA GPUs."
    monkeypatch.setattr(target, "compute_capability", lambda device: (8, 0))
    assert refuses() == "cuda:0 is sm_80; the kernels are built for sm_70, sm_75."
    monkeypatch.setattr(_C, "why_no_driver", lambda: None)
    monkeypatch.setattr(target, "compute_capability", lambda device: (7, 5))
    assert refuses() is None
    assert refuses(dtype=torch.bfloat16) == "sm_75 has no bf16 tensor cores; use float16."
    assert refuses(dtype=torch.float32) == "it has no kernel for float32, only for float16."
    assert refuses(head_dim=65) == (
        "head dim 65 is above 64, the largest for which the 64 KiB of shared memory of sm_75 are "
        "enough."
    )
    monkeypatch.setattr(target, "compute_capability", lambda device: (7, 0))
    for head_dim in (1, 65, 128):
        assert refuses(head_dim=head_dim) is None
    assert refuses(head_dim=129) == "head dim 129 is above 128."


def test_cpu_tensors_are_refused():
    with pytest.raises(
        NotImplementedError, match="'cuda' cannot run this call: cpu tensors: its kernels run on"
    ):
        run(Case())


# ---- machine code


@pytest.mark.parametrize(
    ("structure", "cubin"),
    [
        (forward.ForwardArgument, "attention_fwd"),
        (backward.BackwardQArgument, "attention_bwd_q"),
        (backward.BackwardKVArgument, "attention_bwd_kv"),
        (bias_gradient.BackwardTableArgument, "attention_bwd_table"),
    ],
)
@pytest.mark.parametrize("built", ["sm_70", "sm_75"])
def test_argument_has_the_size_of_the_parameter(structure, cubin, built):
    for name in (kernel for of, kernel in KERNELS if of == cubin):
        _, parameters = Cubin(_C.image(cubin, built)).parameters(name)
        assert [(p.offset, p.size) for p in parameters] == [(0, ctypes.sizeof(structure))]


def test_the_kernels_are_all_there():
    for cubin in CUBINS:
        assert [built for name, built in _C.cubins() if name == cubin] == ["sm_70", "sm_75"]
        for built in ("sm_70", "sm_75"):
            kernels = {kernel for of, kernel in KERNELS if of == cubin}
            assert set(json.loads(_C.resources(cubin, built))) == kernels


@pytest.fixture(scope="module")
def base_launches() -> dict[str, Launch]:
    """One launch of each kernel, with the table of the base model."""
    found: dict[str, Launch] = {}
    for changes in ({}, {"length": 40, "index": "text"}, {"head_dim": 128}):
        case = replace(JOINT, **changes, batch=1, heads=1)
        with recorded() as launches:
            tensors = make_tensors(case, "cpu", HALF)
            index = RelativePositionIndex.joint(14, 40)
            if case.length == 40:
                index = RelativePositionIndex.text(14, 40)
            tensors["table"] = torch.zeros(index.entries, 1, requires_grad=True)
            bias = RelativePositionBias(tensors["table"], index)
            q = tensors["q"].requires_grad_()
            shared_attention(q, q, q, bias=bias, backend="cuda").sum().backward()
        found |= {launch.kernel: launch for launch in launches}
    return found


@pytest.mark.parametrize("built", ["sm_70", "sm_75"])
@pytest.mark.parametrize(("cubin", "kernel"), KERNELS)
def test_kernel_fits_on_a_multiprocessor(cubin, kernel, built, base_launches):
    resources, launch = json.loads(_C.resources(cubin, built))[kernel], base_launches[kernel]
    assert resources["spill_stores"] == resources["spill_loads"] == resources["stack"] == 0
    assert resources["registers"] <= 255
    assert resources["shared"] == 0  # all of it is asked for by the launch
    if built == "sm_70":
        programs = occupancy(resources["registers"], launch.threads, launch.shared_bytes)
        assert programs >= (1 if "128" in kernel else 2)
    elif "128" not in kernel:  # wide heads are refused
        assert launch.shared_bytes <= 64 * 1024


# Rows of a warp, and the products of a step of its main loop with 32 columns: in head dims.
PRODUCTS = {
    "attention_fwd_64_2": (32, 2),
    "attention_fwd_64_4": (32, 2),
    "attention_fwd_128_4": (16, 2),
    "attention_bwd_q_64": (16, 3),
    "attention_bwd_q_128": (16, 3),
    "attention_bwd_kv_64": (16, 4),
    "attention_bwd_kv_128": (16, 4),
    "attention_bwd_table_64": (32, 2),
    "attention_bwd_table_128": (32, 2),
}


@pytest.mark.parametrize(("cubin", "kernel"), KERNELS)
def test_volta_code(cubin, kernel):
    """No local memory; every product is one of the V100's, and nothing is there twice."""
    instructions = disassemble(_C.image(cubin, "sm_70"))[kernel]
    assert not {i.op for i in instructions} & {"LDL", "STL"}
    products = [i for i in instructions if i.op == "HMMA"]
    assert all(i.mods[0] == "884" for i in products)
    rows, factors = PRODUCTS[kernel]
    depth = factors * (128 if "128" in kernel else 64)
    # Four instructions multiply 8 x 8 x 4 in each of a warp's four quad pairs.
    assert len(products) == 4 * rows * 32 * depth // (4 * 8 * 8 * 4)
