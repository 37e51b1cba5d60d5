"""moe_ffn's CUDA kernels: parity at their own edge cases, interleavings, launches, machine code.

Without a GPU the sm_70 machine code runs in the emulator, as in all tests. Activations other than
gelu and swiglu are only tested in test_moe_ffn.py, because translating a kernel takes time.
"""

import contextlib
import ctypes
import json
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import emulated as emulator
from accuracy import assert_as_accurate_as
from emulated import emulated
from moe_ffn_cases import (
    Case,
    call,
    eager,
    eager_autocast,
    expert_ids,
    leaves,
    make_routing,
    make_tensors,
    outputs_and_gradients,
)
from sm70 import KernelFault, disassemble
from sm70.elf import Cubin
from sm70.static_model import main_loops
from sm70.timing import occupancy
from vlmo import _C
from vlmo.kernels import target
from vlmo.kernels._backends import cuda as cuda_target
from vlmo.kernels.moe_ffn import counters as launch_counters
from vlmo.kernels.moe_ffn.call import Facts
from vlmo.kernels.moe_ffn.counters import Counters
from vlmo.kernels.moe_ffn.cuda import arguments as cuda_launch
from vlmo.kernels.moe_ffn.cuda import backend as cuda_impl
from vlmo.kernels.moe_ffn.cuda import backward_rows as cuda_gradients
from vlmo.kernels.moe_ffn.cuda import backward_weights as cuda_weights
from vlmo.kernels.moe_ffn.cuda import forward as cuda_forward

pytestmark = pytest.mark.heavy

CUBINS = ("moe_ffn_fwd", "moe_ffn_bwd_rows", "moe_ffn_bwd_weights")
ACTIVATIONS = ("gelu", "gelu_tanh", "swiglu", "geglu")
KERNELS = [
    *((cubin, f"{cubin}_{activation}") for cubin in CUBINS[:2] for activation in ACTIVATIONS),
    (CUBINS[2], CUBINS[2]),
]

in_cuda = pytest.mark.parametrize(
    "place",
    [("cpu", "cuda"), pytest.param(("cuda", "cuda"), marks=pytest.mark.gpu)],
    indirect=True,
    ids="-".join,
)

# Four row tiles of the second expert, the last of 10 rows; widths that end in the middle of tiles,
# steps and chunks of 128 columns, unequal.
LARGE = Case(pieces=((0, 40), (1, 197)), batch=2, dim=136, hidden=(264, 136))
# The gated one first: its kernels can be translated while test_moe_ffn.py translates the others.
CASES = [
    Case(
        *(((0, 20), (1, 150)), "segments", 1, 136, (72, 264), "swiglu", "rms"),
        bias=False,
        norm_bias=False,
    ),
    LARGE,
    Case(pieces=((0, 150), (2, 131)), batch=1, dim=72, hidden=(264, 72, 136), form="ids"),
    Case(pieces=((1, 3), (0, 129), (1, 2)), batch=1, dim=264, hidden=(72, 136), form="packed"),
    Case(pieces=((0, 20), (1, 50)), batch=1, dim=72, activation="swiglu", split=True),
]


@dataclass
class Launch:
    kernel: str
    programs: int
    argument: Any
    left: np.ndarray  # the counters behind the launch


@contextlib.contextmanager
def recorded():
    """Append every launch in the block to the list that it yields; end it before emulated()."""
    seen: list[Launch] = []
    launch = cuda_target.launch

    def spy(cubin, kernel, device, programs, threads, shared_bytes, argument, tensors):
        launch(cubin, kernel, device, programs, threads, shared_bytes, argument, tensors)
        counters = next(
            t for t in tensors if t is not None and t.data_ptr() == argument.call.counters
        )
        left = counters[: argument.call.num_counters].cpu().numpy().copy()
        seen.append(Launch(kernel, programs, argument, left))

    with mock.patch.object(cuda_target, "launch", spy):
        yield seen


@pytest.fixture
def record(place):
    """record(): from now on every launch is appended to the list that it returns."""
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(recorded())


def widened(tensors: dict) -> dict:
    return {
        k: [t.double() for t in v] if isinstance(v, list) else v.double()
        for k, v in tensors.items()
    }


def run(case, device, dtype=torch.float16, change=lambda tensors: None, **options):
    tensors, routing = make_tensors(case, device, dtype), make_routing(case, device)
    change(tensors)
    return outputs_and_gradients(
        lambda t: call(case, routing, t, **{"backend": "cuda", **options}), tensors
    )


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


# ---- results


@in_cuda
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case, place):
    device = place.device
    ids = make_routing(case, device).expert_ids(expert_ids(case).numel(), device)
    exact = outputs_and_gradients(
        lambda t: eager(case, ids, t), widened(make_tensors(case, device, torch.float16))
    )
    baseline = outputs_and_gradients(
        lambda t: eager(case, ids, t), make_tensors(case, device, torch.float16)
    )
    actual = run(case, device)
    for name, value in actual.items():
        assert_as_accurate_as(name, value, exact[name], baseline[name])
    assert_equal(run(case, device, recompute=True), actual)


@in_cuda
@pytest.mark.parametrize("wanted", ["w1[0]", "w1[3] b1[2]"])
def test_gradients_of_a_gate_or_a_value_alone(wanted, place):
    case, device, names = CASES[-1], place.device, wanted.split()

    def gradients(backend: str) -> list[Any]:
        flat = leaves(tensors := make_tensors(case, device, torch.float16))
        for name, tensor in flat.items():
            tensor.requires_grad_(name in names)
        routing = make_routing(case, device)
        with emulated() if device.type == "cpu" else contextlib.nullcontext():
            call(case, routing, tensors, backend=backend).float().sum().backward()
        assert {name for name, tensor in flat.items() if tensor.grad is not None} == {*names}
        return [flat[name].grad for name in names]

    torch.testing.assert_close(gradients("cuda"), gradients("reference"), rtol=0.01, atol=0.01)


@in_cuda
def test_float32_around_float16_products(place):
    """Autocast leaves x, the norms, the layer scale and the residual stream in float32."""
    case, device = LARGE, place.device
    ids = make_routing(case, device).expert_ids(expert_ids(case).numel(), device)
    with torch.autocast(device.type, dtype=torch.float16):
        actual = run(case, device, torch.float32)
        baseline = outputs_and_gradients(
            lambda t: eager_autocast(case, ids, t), make_tensors(case, device, torch.float32)
        )
    exact = outputs_and_gradients(
        lambda t: eager(case, ids, t), widened(make_tensors(case, device, torch.float32))
    )
    for name, value in actual.items():
        assert value.dtype == torch.float32, name
        assert_as_accurate_as(name, value, exact[name], baseline[name])


@in_cuda
@pytest.mark.parametrize(
    ("dtype", "shift", "rtol", "atol"),
    [
        # Shifts at which the next shorter dtype would be off by more than is allowed.
        (torch.bfloat16, 64, 2**-7, 0),
        (torch.float32, 64, 0, 4e-3),
        (torch.float64, 2**20, 0, 4e-3),
    ],
    ids=str,
)
def test_residual_keeps_its_digits(dtype, shift, rtol, atol, place):
    """float32 is added inside the kernel, float64 and bfloat16 behind it."""
    case, device = Case(), place.device

    def change(tensors):
        tensors["residual"] = tensors["residual"].to(dtype) * 1.1 + shift

    actual = run(case, device, change=change)
    expected = run(case, device, change=change, backend="reference")
    assert actual["y"].dtype == actual["residual"].dtype == dtype
    assert torch.equal(actual["residual"], expected["residual"])
    torch.testing.assert_close(actual.pop("y"), expected.pop("y"), rtol=rtol, atol=atol)
    assert actual["x"].dtype == torch.float16
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=0.02, atol=0.02)


@in_cuda
def test_norms_of_two_dtypes(place):
    def change(tensors):
        tensors["norm_weight"][1] = tensors["norm_weight"][1].float()

    case = Case(norm_bias=False)
    actual = run(case, place.device, change=change)
    expected = run(case, place.device, change=change, backend="reference")
    assert actual["norm_weight[0]"].dtype == torch.float16
    assert actual["norm_weight[1]"].dtype == torch.float32
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=0.02, atol=0.02)


# ---- what is launched and computed


@in_cuda
@pytest.mark.parametrize("form", ["segments", "ids", "packed"])
def test_one_launch_forward_two_backward(form, place, record):
    launches = record()
    run(Case(form=form), place.device)
    assert [launch.kernel for launch in launches] == [
        "moe_ffn_fwd_gelu",
        "moe_ffn_bwd_rows_gelu",
        "moe_ffn_bwd_weights",
    ]


@in_cuda
def test_recompute_launches_the_forward_again(place, record):
    launches = record()
    run(Case(), place.device, recompute=True)
    first, again, *backward = launches
    assert first.kernel == again.kernel == "moe_ffn_fwd_gelu"
    assert first.argument.pre is None and again.argument.pre is not None
    assert first.argument.y is not None and again.argument.y is None
    assert [launch.kernel for launch in backward] == [
        "moe_ffn_bwd_rows_gelu",
        "moe_ffn_bwd_weights",
    ]


@in_cuda
def test_frozen_weights_cost_no_launch(place, record):
    case, launches = Case(), record()
    tensors = make_tensors(case, place.device, torch.float16)
    tensors["x"].requires_grad_()
    call(case, make_routing(case, place.device), tensors, backend="cuda").sum().backward()
    _, backward = launches
    assert backward.kernel == "moe_ffn_bwd_rows_gelu"
    unwanted = ("dbranch", "normed", "hidden", "sum_dbranch", "sum_dpre", "sum_norm")
    assert [getattr(backward.argument, name) for name in unwanted] == [None] * len(unwanted)
    assert tensors["x"].grad.isfinite().all()


@in_cuda
def test_frozen_expert_gets_no_gradient_and_costs_none(place, record):
    case, launches = LARGE, record()
    everything = run(case, place.device)
    all_blocks = list(launches[-1].argument.sum_blocks)
    tensors = make_tensors(case, place.device, torch.float16)
    flat = leaves(tensors)
    frozen = {f"{name}[0]" for name in cuda_weights.WITHOUT_SUB_NORM}
    for name in frozen:
        flat[name].requires_grad_(False)
    y = call(case, make_routing(case, place.device), tensors, backend="cuda")
    generator = torch.Generator().manual_seed(3)
    y.backward(torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y))
    of_first, of_second = launches[-1].argument.gradients[:2]
    assert [getattr(of_first, name) for name in cuda_weights.WITHOUT_SUB_NORM] == [None] * 6
    assert all(getattr(of_second, name) for name in cuda_weights.WITHOUT_SUB_NORM)
    assert all_blocks == list(launches[-1].argument.sum_blocks)
    for name, leaf in flat.items():
        if name in frozen:
            assert leaf.grad is None
        else:  # tiles may be shared by other CTAs, and then sums have another order
            torch.testing.assert_close(leaf.grad, everything[name], rtol=4e-3, atol=4e-3)


# ---- CTAs in any order


@pytest.fixture(scope="module")
def plain():
    with emulated(workers=6):
        return run(LARGE, "cpu")


@pytest.mark.parametrize("resident", [1, 2, 3, 6])
@pytest.mark.parametrize("seed", range(3))
def test_any_interleaving_gives_the_same_bits(seed, resident, plain, monkeypatch):
    """With fewer CTAs in flight than launched too: none waits for one that has not begun."""
    counters = Counters()
    monkeypatch.setattr(launch_counters, "COUNTERS", counters)
    how = dict(seed=seed, cta_order="random", weak_memory=True, resident=resident)
    with emulated(workers=6, **how), recorded() as launches:
        assert_equal(run(LARGE, "cpu", recompute=seed == 1), plain)
        assert all(launch.programs == 6 for launch in launches)
        for launch in launches:
            assert launch.left.size > 3 and not launch.left.any(), launch.kernel
    assert len(launches) == (4 if seed == 1 else 3)
    (buffer,) = counters._kept.values()
    assert not buffer.any()


def test_staggered_ctas_give_the_same_bits(plain, monkeypatch):
    """As launches of many tasks are, which are too long for the emulator."""
    monkeypatch.setattr(cuda_launch, "STAGGERED", 1)
    with emulated(workers=6), recorded() as launches:
        assert_equal(run(LARGE, "cpu"), plain)
    staggers = [launch.argument.call.stagger for launch in launches]
    assert staggers == [cuda_launch.STAGGER, cuda_launch.STAGGER, 0]


def test_gated_kernels_under_random_interleaving():
    case = CASES[0]
    assert case.activation == "swiglu"
    with emulated(workers=6):
        expected = run(case, "cpu")
    for seed in range(2):
        with emulated(workers=6, seed=seed, cta_order="random", weak_memory=True, resident=3):
            assert_equal(run(case, "cpu"), expected)


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        *(("moe_ffn_fwd_gelu", n) for n in ("x", "residual", "normed", "pre", "hidden", "y")),
        *(("moe_ffn_bwd_rows_gelu", n) for n in ("dy", "pre", "dpre", "sum_norm", "dx")),
        *(("moe_ffn_bwd_weights", n) for n in ("dpre", "normed", "sum_dpre", "dlayer_scale")),
    ],
)
def test_the_emulator_knows_where_tensors_end(kernel, name, monkeypatch):
    """Without its last 16 bytes each is reported: nothing above was read or written outside."""
    memory_of, address = emulator.memory_of, None

    def short(tensors):
        return [a[:-16] if a.ctypes.data == address else a for a in memory_of(tensors)]

    monkeypatch.setattr(emulator, "memory_of", short)
    with emulated():
        launch = cuda_target.launch

        def cut(cubin, launched, device, programs, threads, shared_bytes, argument, tensors):
            nonlocal address
            address = getattr(argument, name) if launched == kernel else None
            launch(cubin, launched, device, programs, threads, shared_bytes, argument, tensors)

        with (
            mock.patch.object(cuda_target, "launch", cut),
            pytest.raises(KernelFault, match=r"global .* out of bounds"),
        ):
            run(Case(), "cpu")


# ---- what it refuses


def refuses(*, device: str = "cuda:0", **changes: Any) -> str | None:
    facts = Facts(torch.float16, 768, (3072, 3072))._replace(**changes)
    return cuda_impl.why_not(torch.device(device), facts)


def test_why_not_names_the_obstacle(monkeypatch):
    assert refuses(device="cpu") == "cpu tensors: its kernels run on NVIDIA GPUs."
    monkeypatch.setattr(target, "compute_capability", lambda device: None)
    assert refuses() == "cuda:0 is not an NVIDIA GPU."
    for capability in ((6, 1), (8, 0)):
        monkeypatch.setattr(target, "compute_capability", lambda device, c=capability: c)
        assert refuses() == (
            "cuda:0 is sm_{}{}; the kernels are built for sm_70, sm_75.".format(*capability)
        )
    monkeypatch.setattr(target, "compute_capability", lambda device: (7, 5))
    assert refuses(dtype=torch.bfloat16) == "sm_75 has no bf16 tensor cores; use float16."
    assert refuses(dtype=torch.float32) == "it has no kernel for float32, only for float16."
    assert refuses(hidden=(3072,) * 33) == "33 experts; the kernels take at most 32."
    assert refuses(activation="relu2") == "its kernels have no activation 'relu2'."
    assert refuses(sub_norm=True) == "its kernels have no sub_norm."
    assert refuses(streams=True) == "its kernels read all tokens from one tensor."
    eight = "is not a multiple of 8, as loads of 16 bytes need."
    assert refuses(width=772) == f"model dimension 772 {eight}"
    assert refuses(hidden=(3072, 3076)) == f"hidden width 3076 {eight}"
    large: dict[str, Any] = dict(width=2**15, hidden=(8, 2**15))
    assert refuses(**large, activation="swiglu") == (
        "a weight of 2147483648 elements is not below 2**31."
    )
    monkeypatch.setattr(_C, "why_no_driver", lambda: "libcuda.so.1 not found.")
    assert refuses(**large) == "libcuda.so.1 not found."
    monkeypatch.setattr(_C, "why_no_driver", lambda: None)
    assert refuses() is None
    # Built for a newer GPU, to test it there, it still has to be asked for.
    monkeypatch.setattr(target, "compute_capability", lambda device: (9, 0))
    monkeypatch.setattr(_C, "target_for", lambda *_: "sm_90")
    assert refuses() == (
        "cuda:0 is sm_90; the kernels are for sm_70 and sm_75, and slow elsewhere."
    )
    monkeypatch.setenv("VLMO_VOLTA_ANYWHERE", "1")
    assert refuses() is None
    assert refuses(hidden=(3072,) * 32) is None


def test_cpu_tensors_are_refused():
    with pytest.raises(
        NotImplementedError, match="'cuda' cannot run this call: cpu tensors: its kernels run on"
    ):
        run(Case(), "cpu")


# ---- machine code


@pytest.mark.parametrize(
    ("structure", "cubin"),
    [
        (cuda_forward.ForwardArgument, "moe_ffn_fwd"),
        (cuda_gradients.BackwardRowsArgument, "moe_ffn_bwd_rows"),
        (cuda_weights.BackwardWeightsArgument, "moe_ffn_bwd_weights"),
    ],
)
@pytest.mark.parametrize("built", ["sm_70", "sm_75"])
def test_argument_has_the_size_of_the_parameter(structure, cubin, built):
    for name in kernels_of(cubin):
        _, parameters = Cubin(_C.image(cubin, built)).parameters(name)
        assert [(p.offset, p.size) for p in parameters] == [(0, ctypes.sizeof(structure))]
    assert ctypes.sizeof(structure) < 4096


def kernels_of(cubin: str) -> list[str]:
    return [kernel for of, kernel in KERNELS if of == cubin]


def test_the_kernels_are_all_there():
    for cubin in CUBINS:
        assert [built for name, built in _C.cubins() if name == cubin] == ["sm_70", "sm_75"]
        for built in ("sm_70", "sm_75"):
            assert set(json.loads(_C.resources(cubin, built))) == set(kernels_of(cubin))


@pytest.mark.parametrize("built", ["sm_70", "sm_75"])
@pytest.mark.parametrize(("cubin", "kernel"), KERNELS)
def test_kernel_fits_twice_on_a_multiprocessor(cubin, kernel, built):
    resources = json.loads(_C.resources(cubin, built))[kernel]
    assert resources["spill_stores"] == resources["spill_loads"] == resources["stack"] == 0
    assert resources["registers"] <= 255
    assert resources["shared"] <= 48 * 1024
    if built == "sm_70":
        assert (
            occupancy(resources["registers"], cuda_launch.THREADS, resources["shared"])
            == cuda_launch.PROGRAMS
        )
    else:  # 64 KiB of shared memory
        assert resources["shared"] <= 64 * 1024


def main_loop(instructions) -> tuple[int, int]:
    """First and last instruction of the loop with the most products."""

    def products(loop):
        return sum(i.op == "HMMA" for i in instructions[loop[0] : loop[1] + 1])

    return max(main_loops(instructions), key=products)


@pytest.mark.parametrize(("cubin", "kernel"), KERNELS)
def test_volta_code(cubin, kernel):
    """No local memory; a step of the main loop is a warp's 64 x 64 x 32, and nothing twice."""
    instructions = disassemble(_C.image(cubin, "sm_70"))[kernel]
    assert not {i.op for i in instructions} & {"LDL", "STL"}
    first, last = main_loop(instructions)
    products = [i for i in instructions[first : last + 1] if i.op == "HMMA"]
    assert all(i.mods[0] == "884" for i in products)
    assert len(products) == 4 * (64 // 16) * (64 // 16) * (cuda_launch.STEP // 4)


def wavefronts(size: int, lanes: list[int], addresses: np.ndarray) -> tuple[int, int]:
    """Cycles that a shared access of ``size`` bytes a lane takes, and those it cannot do without.

    As timing.cpp counts: 8-byte accesses are served in half warps, 16-byte ones in quarter warps.
    """
    group, total, ideal = {8: 16, 16: 8}.get(size, 32), 0, 0
    for first in range(0, 32, group):
        banks: dict[int, set[int]] = {}
        for lane, address in zip(lanes, addresses, strict=True):
            if first <= lane < first + group:
                for word in range(int(address) // 4, (int(address) + size + 3) // 4):
                    banks.setdefault(word % 32, set()).add(word)
        total += max(map(len, banks.values()), default=0)
        ideal += bool(banks)
    return total, ideal


def test_main_loops_have_no_bank_conflicts():
    traces: list[tuple[np.ndarray, np.ndarray]] = []
    launches = []
    # The weights' kernel needs two steps: 40 tokens of an expert.
    case = Case(pieces=((0, 40),), hidden=(40,), batch=1, dim=40)
    with emulated(trace=lambda cta, warp, records, addresses: traces.append((records, addresses))):
        launch = cuda_target.launch

        def spy(cubin, kernel, *rest):
            traces.clear()
            launch(cubin, kernel, *rest)
            launches.append((cubin, kernel, list(traces)))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda_target, "launch", spy)
            run(case, "cpu")
    assert [kernel for _, kernel, _ in launches] == [
        "moe_ffn_fwd_gelu",
        "moe_ffn_bwd_rows_gelu",
        "moe_ffn_bwd_weights",
    ]
    for cubin, kernel, warps in launches:
        assert_no_conflicts(kernel, emulator.kernel(cubin, kernel).instructions, warps)


def assert_no_conflicts(kernel, instructions, warps):
    first, last = main_loop(instructions)
    accesses = {"LDS": 0, "STS": 0}
    seen = set()
    for records, addresses in warps:
        for index, mask, at in records:
            instruction = instructions[index]
            if not first <= index <= last or instruction.op not in accesses or not mask:
                continue
            lanes = [lane for lane in range(32) if int(mask) >> lane & 1]
            touched = addresses[at : at + len(lanes)]
            key = (index, int(mask), touched.tobytes())
            if key in seen:
                continue
            seen.add(key)
            total, ideal = wavefronts(instruction.access_bytes, lanes, touched)
            assert total == ideal, f"{kernel}: {instruction.text}: {total} cycles for {ideal}"
            accesses[instruction.op] += 1
    # In a step a thread reads 2 x 16 fragments and stores 2 x 4 chunks.
    assert accesses["LDS"] >= 32 and accesses["STS"] >= 8, accesses
