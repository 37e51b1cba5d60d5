"""Contenders: each passes the accuracy check, wrong ones fail, unavailable ones give a reason."""

import itertools
import sys
import types
from importlib import metadata
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

import bench_attention as attention
import bench_moe_ffn as moe_ffn
from bench_attention import Attention
from bench_moe_ffn import Sublayer, feed_forward, slices
from harness import contenders, peers
from harness.contenders import Case, Contender, Scale
from harness.session import is_ours
from report import NOTES
from vlmo.kernels import BACKEND_NAMES

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]
PHASES = ["forward", "forward+backward"]


def sublayer(phase="forward+backward", *, dtype=torch.float32, size="tiny", split="3:4", tokens=70):
    return Sublayer(Case("moe_ffn", size, dtype, phase, dict(tokens=tokens, split=split)), CPU)


def enter(problem: Any, form, eager) -> str:
    """One more contender, on the parameters of the eager ones."""
    entry = Contender(lambda chosen: form, lambda chosen: eager, lambda: problem.parameters)
    name = f"another {len(problem.entered)}"
    problem.entered[name] = entry
    return name


def assert_exact(problem, contender):
    """By the rule if it is ours; others only compute what they say, whatever a CPU makes of it."""
    found = problem.check(contender)
    factor = 1 if is_ours(contender) else {torch.float32: 1000, torch.bfloat16: 16}[problem.x.dtype]
    assert not [d for d in found if not d.actual <= factor * d.allowed]
    return found


@pytest.mark.parametrize(
    ("split", "phase", "dtype"),
    [
        ("3:4", "forward", torch.float32),
        ("3:4", "forward+backward", torch.bfloat16),
        ("2:1:4", "forward", torch.bfloat16),
        ("2:1:4", "forward+backward", torch.float32),
    ],
    ids=str,
)
def test_contenders_of_moe_ffn(split, phase, dtype):
    problem = sublayer(phase, dtype=dtype, split=split)
    ran = []
    for contender in problem.contenders:
        # The interpreter has tests of its own.
        if contender in ("vlmo:triton", "vlmo:composed") or problem.why_not(contender) is not None:
            continue
        assert assert_exact(problem, contender)[0].name == "y"
        result = problem.work(contender)()
        if phase == "forward":
            assert result.shape == problem.x.shape and not result.requires_grad
        else:
            assert result[0].shape == problem.x.shape
        ran.append(contender)
    expected = {"vlmo:reference", "slices", "masks", "dense"}
    assert expected | {f"{name}-compiled" for name in expected if name[0] != "v"} <= {*ran}


def test_gradients_that_are_checked():
    problem = sublayer()
    assert problem.x.shape == (10, 7, 32) and (problem.tokens, problem.samples) == (70, 10)
    # y, dx, six of each expert, the layer scale
    for contender, experts in (("slices", 2), ("dense", 1)):
        names = [deviation.name for deviation in problem.check(contender)]
        assert names[:2] == ["y", "dx"] and len(names) == 2 + 6 * experts + 1
        assert len(problem.work(contender)()) == len(names) - 1


class WrongGradient(torch.autograd.Function):
    """Right but for the gradient of the last row."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        dy = dy.clone()
        dy[-1, -1] *= 1.01
        return dy


def test_a_wrong_contender_is_found_out():
    right = slices((3, 4))
    for phase in PHASES:
        problem = sublayer(phase)
        another = enter(problem, lambda x, p: right(WrongGradient.apply(x), p), right)
        found = {deviation.name: deviation.ok for deviation in problem.check(another)}
        assert found.get("dx", False) is False and ("dx" in found) == (phase != "forward")
    swapped = enter(problem, slices((4, 3)), right)
    assert not all(deviation.ok for deviation in problem.check(swapped))
    tanh = enter(problem, slices((3, 4), "gelu_tanh"), right)
    assert not all(deviation.ok for deviation in problem.check(tanh))


def test_a_check_at_full_size_costs_one_call_of_the_contender():
    tokens, right = [], slices((3, 4))

    def counted(x, p):
        tokens.append(x.shape[0] * x.shape[1])
        return right(x, p)

    problem = sublayer(tokens=7 * 50)
    another = enter(problem, counted, counted)
    for _ in range(2):
        assert_exact(problem, another)
    # The three sequences in the same dtype and in float64, but once for all contenders.
    assert tokens == [350, 21, 21, 350]


def test_what_is_checked_is_what_is_timed():
    problem, made = sublayer(), []

    def make(chosen):
        made.append(chosen)
        return slices((3, 4))

    entry = problem.entered["slices"]
    problem.entered["another"] = entry._replace(make=make)
    assert_exact(problem, "another")
    problem.work("another")()
    assert made == [None]


def test_unknown_contender():
    with pytest.raises(ValueError, match=r"contender: 'slice' is none of vlmo:cuda, .*slices"):
        sublayer().work("slice")


def test_cost_and_cases_of_moe_ffn():
    forward, both = sublayer("forward"), sublayer()
    assert both.cost.flops == 3 * forward.cost.flops == 3 * 4 * 70 * 32 * 48
    for scale in Scale:
        cases = moe_ffn.SUITE.cases(CPU, scale)
        assert len({str(case) for case in cases}) == len(cases)
        assert all(case.labels["suite"] == moe_ffn.SUITE.name for case in cases)
    [first, *_] = moe_ffn.SUITE.cases(CPU, Scale.full)
    assert str(first) == "moe_ffn-base-bfloat16-forward-32768-40:197"
    on_cpu = moe_ffn.SUITE.cases(CPU, Scale.cpu)
    assert {case.size for case in on_cpu} == {"base"}
    expected = {*itertools.product((torch.float32, torch.bfloat16), PHASES)}
    assert {(c.dtype, c.phase) for c in on_cpu} == expected | {(torch.float16, "forward")}
    assert both.contenders[: len(BACKEND_NAMES)] == tuple(f"vlmo:{b}" for b in BACKEND_NAMES)


def test_the_swiglu_of_liger_multiplies_as_much():
    for size in ("base", "large"):
        dim, hidden = moe_ffn.SIZES[size]
        problem = sublayer(size=size, split="1:1", tokens=2)
        [w1, w2] = [getattr(problem.entered["liger"].parameters(), name) for name in ("w1", "w2")]
        assert (w1[0].numel() + w2[0].numel()) / (2 * dim * hidden) == pytest.approx(1, rel=3e-3)


def test_only_tiny_cases_are_not_built(monkeypatch):
    """At a real size contenders on a CPU are compiled without being asked for."""
    built = []

    def compile_(form, *, backend, **options):
        built.append(backend)
        return form

    monkeypatch.setattr(torch, "compile", compile_)
    for size in ("tiny", "base"):
        problem = sublayer("forward", size=size, split="1:1", tokens=2)
        assert problem.why_not("slices-compiled") is problem.why_not("slices") is None
        problem.work("slices")
        problem.work("slices-compiled")
    assert built == ["eager", "inductor"]


def test_what_is_compiled_has_it_in_its_name(monkeypatch):
    built = []

    def compile_(form, **options):
        built.append(form)
        return form

    monkeypatch.setattr(torch, "compile", compile_)
    for problem in (sublayer(), problem_of_attention()):
        for contender in problem.contenders:
            built.clear()
            if "quack" not in contender and "liger" not in contender and "scatter" not in contender:
                problem.work(contender)
            assert bool(built) == contenders.is_compiled(contender)


def test_the_interpreter_is_not_timed_at_real_sizes(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    reason = sublayer(size="base", split="1:1", tokens=2).why_not("vlmo:triton")
    assert reason.startswith("Triton's interpreter")


# Peers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("contender", "package"),
    [("scattermoe", "scattermoe"), ("liger", "liger-kernel"), ("quack", "quack-kernels")],
)
def test_a_missing_peer_is_a_reason(contender, package, monkeypatch):
    def version(name):
        raise metadata.PackageNotFoundError(name)

    problem = sublayer("forward")
    with monkeypatch.context() as patched:
        patched.setattr(metadata, "version", version)
        assert problem.why_not(contender) == f"{package} is not installed."
    monkeypatch.setattr(metadata, "version", lambda name: "1.0")
    assert problem.why_not(contender) == f"{package} needs an NVIDIA GPU."


def test_reasons_of_a_peer_on_a_gpu(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(metadata, "version", lambda name: "1.0")

    def reason(capability, dtype, module="json"):
        monkeypatch.setattr(peers, "compute_capability", lambda device: capability)
        return peers.why_not("quack-kernels", module, gpu, dtype, capability=(9, 0))

    assert reason((9, 0), torch.bfloat16) is None
    assert reason((12, 0), torch.float16) is None
    assert (
        reason((8, 6), torch.bfloat16) == "quack-kernels needs sm_90 or newer; this GPU is sm_86."
    )
    assert "TF32" in reason((9, 0), torch.float32)
    found = reason((9, 0), torch.float16, "no_such_module_at_all")
    assert found.startswith("quack-kernels cannot be imported: ModuleNotFoundError")


def test_reasons_of_grouped_mm(monkeypatch):
    gpu = torch.device("cuda")

    def reason(capability, dtype=torch.bfloat16):
        monkeypatch.setattr(peers, "compute_capability", lambda device: capability)
        return peers.why_not_grouped_mm(gpu, dtype)

    monkeypatch.setattr(F, "grouped_mm", lambda *operands: None, raising=False)
    assert reason((9, 0)) is None and reason((10, 0)) is None
    for capability, dtype in (((8, 0), torch.bfloat16), ((9, 0), torch.float16)):
        assert "loop" in reason(capability, dtype)
    traced = peers.why_not_traced_grouped_mm(gpu, torch.float16)
    assert traced is not None and traced.startswith("torch.compile")
    monkeypatch.delattr(F, "grouped_mm")
    monkeypatch.delattr(torch, "_grouped_mm", raising=False)
    assert reason((9, 0)).endswith("has no grouped_mm.")


def install(monkeypatch, name, **contents):
    """A module in place of a peer's."""
    module = types.ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


def parallel_linear(
    inputs,
    expert_weights,  # [E, K, N]
    k,
    sorted_expert_idxs,
    sorted_scattered_idxs,
    expert_offsets,
    expert_biases=None,
    gates=None,
    grouped_in=False,
    grouped_out=False,
):
    """ScatterMoE 0.3: what it says of its arguments."""
    assert k == 1 and gates is None and expert_biases is not None
    counts = expert_offsets.diff(prepend=expert_offsets.new_zeros(1))
    assert counts.tolist() == sorted_expert_idxs.bincount().tolist()
    rows = inputs if grouped_in else inputs[sorted_scattered_idxs]
    parts = rows.split(counts.tolist())
    given = zip(parts, expert_weights, expert_biases, strict=True)
    out = torch.cat([part @ weight + bias for part, weight, bias in given])
    return out if grouped_out else torch.empty_like(out).index_copy(0, sorted_scattered_idxs, out)


class FusedMoE:
    """Liger-Kernel: ``LigerFusedMoEFunction``."""

    @staticmethod
    def apply(x, gate_up_proj, down_proj, top_k_index, top_k_weights):
        assert top_k_index.shape == top_k_weights.shape == (len(x), 1)
        assert top_k_index.dtype == torch.int32 and top_k_weights.dtype == x.dtype
        up = torch.einsum("td,tpd->tp", x, gate_up_proj[top_k_index[:, 0].long()])
        gate, value = up.chunk(2, dim=1)
        act = F.silu(gate) * value
        down = torch.einsum("ti,tdi->td", act, down_proj[top_k_index[:, 0].long()])
        return down * top_k_weights


def gemm(a, b, *, bias=None, cu_seqlens_m=None, cu_seqlens_k=None):
    """QuACK: groups of rows of a, each with a matrix of b, or of columns of a with rows of b."""
    starts = cu_seqlens_k if cu_seqlens_m is None else cu_seqlens_m
    assert starts.dtype == torch.int32 and int(starts[0]) == 0
    runs = [slice(*pair) for pair in itertools.pairwise(starts.tolist())]
    if cu_seqlens_m is None:
        assert a.stride(0) == 1, "A is not m-major"
        return torch.stack([a[:, run] @ b[run] for run in runs])
    rows = [a[run] @ matrix for run, matrix in zip(runs, b, strict=True)]
    if bias is not None:
        rows = [part + row for part, row in zip(rows, bias, strict=True)]
    return torch.cat(rows)


def gemm_act(a, b, *, bias, activation, store_preact, cu_seqlens_m):
    assert activation == "gelu_tanh_approx"
    pre = gemm(a, b, bias=bias, cu_seqlens_m=cu_seqlens_m)
    return (pre if store_preact else None), F.gelu(pre, approximate="tanh")


def gemm_dact(a, b, pre, *, activation, cu_seqlens_m):
    assert activation == "gelu_tanh_approx"
    dact = gemm(a, b, cu_seqlens_m=cu_seqlens_m)
    dpre = torch.ops.aten.gelu_backward(dact, pre, approximate="tanh")
    return dpre, F.gelu(pre, approximate="tanh")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("contender", ["scattermoe", "liger", "quack"])
def test_how_peers_are_called(contender, phase, dtype, monkeypatch):
    install(monkeypatch, "scattermoe", parallel_linear=parallel_linear)
    install(monkeypatch, "liger_kernel.ops.fused_moe", LigerFusedMoEFunction=FusedMoE)
    products = dict(gemm=gemm, gemm_act=gemm_act, gemm_dact=gemm_dact)
    install(monkeypatch, "quack.gemm_interface", **products)
    problem = sublayer(phase, dtype=dtype, split="2:1:4")
    assert_exact(problem, contender)
    if phase != "forward":
        shapes = [tuple(gradient.shape) for gradient in problem.work(contender)()]
        hidden = dict(liger=(3, 64, 32)).get(contender, (3, 48, 32))
        assert hidden in shapes  # of the stacked weight


def test_swiglu_has_no_biases():
    problem = sublayer("forward")
    p = problem.entered["liger"].parameters()
    assert len(p.b1) == len(p.b2) == 0
    y = feed_forward(problem.x[:, :3], p, 0, "swiglu")
    assert torch.equal(y, slices((3, 4), "swiglu")(problem.x, p)[:, :3])


# Attention ---------------------------------------------------------------------------------------


def problem_of_attention(
    phase="forward+backward", *, dtype=torch.float32, bias="table", mask="text"
):
    shape = dict(length=30, sequences=3, bias=bias, mask=mask)
    return Attention(Case("attention", "tiny", dtype, phase, shape), CPU)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("bias", ["table", "none"])
@pytest.mark.parametrize("mask", ["none", "text"])
def test_contenders_of_attention(bias, mask, phase, dtype):
    problem = problem_of_attention(phase, dtype=dtype, bias=bias, mask=mask)
    names = ["y", "dx", "dtable[0]"][: 1 if phase == "forward" else 2 + (bias == "table")]
    ran = []
    for contender in problem.contenders:
        if contender in ("vlmo:triton", "vlmo:composed") or problem.why_not(contender) is not None:
            continue
        assert [deviation.name for deviation in assert_exact(problem, contender)] == names
        result = problem.work(contender)()
        if phase == "forward":
            assert result.shape == (3, 30, 2, 64) and not result.requires_grad
        else:
            assert len(result) == len(names) - 1 and result[0].shape == problem.x.shape
        ran.append(contender)
    assert {"vlmo:reference", "eager", "eager-compiled", "sdpa"} <= {*ran}
    assert ("flex-compiled" in ran) == (phase == "forward")


def test_a_wrong_attention_is_found_out():
    problem = problem_of_attention()
    right = attention.eager(problem.inputs)
    unmasked = attention.eager(problem.inputs._replace(key_mask=None))

    def found(make, phase="forward+backward"):
        other = problem_of_attention(phase)
        other.entered["another"] = Contender(make, right, lambda: other.parameters)
        return [deviation.name for deviation in other.check("another") if not deviation.ok]

    def without_bias(chosen):
        return lambda qkv, p: right(chosen)(qkv, attention.Parameters([0 * p.table[0]]))

    def of_another_table(chosen):
        form = right(chosen)
        return lambda qkv, p: form(qkv, attention.Parameters([WrongGradient.apply(p.table[0])]))

    assert "y" in found(unmasked) and "y" in found(without_bias, "forward")
    assert "dtable[0]" in found(of_another_table)


@pytest.mark.slow
@pytest.mark.heavy
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_flex_attention_built_for_this_cpu(dtype):
    """What Inductor builds, in every form; tiny cases are only traced."""
    for bias, mask in (("table", "text"), ("none", "none")):
        shape: dict[str, int | str] = dict(length=40, sequences=3, bias=bias, mask=mask)
        problem = Attention(Case("attention", "base", dtype, "forward", shape), CPU)
        assert problem.why_not("flex-compiled") is None
        assert all(deviation.ok for deviation in problem.check("flex-compiled"))


def test_sdpa_in_a_chosen_kernel():
    problem = problem_of_attention()
    entry = problem.entered["sdpa-efficient"]
    math = attention.sdpa(problem.inputs, [SDPBackend.MATH])
    problem.entered["sdpa-math"] = entry._replace(make=math)
    assert_exact(problem, "sdpa-math")
    cudnn = attention.sdpa(problem.inputs, [SDPBackend.CUDNN_ATTENTION])
    problem.entered["sdpa-cudnn"] = entry._replace(make=cudnn)
    with pytest.raises(RuntimeError, match=r"[Nn]o available kernel|No viable backend"):
        problem.work("sdpa-cudnn")()


@pytest.mark.parametrize("can", [False, True])
def test_reasons_of_sdpa(can, monkeypatch):
    asked = []

    class Params(NamedTuple):
        q: torch.Tensor
        k: torch.Tensor
        v: torch.Tensor
        mask: torch.Tensor | None
        dropout: float
        causal: bool
        grouped: bool

    def answer(params):
        asked.append(params)
        return can

    for name in ("can_use_cudnn_attention", "can_use_efficient_attention"):
        monkeypatch.setattr(torch.backends.cuda, name, answer)
    monkeypatch.setattr(torch.backends.cuda, "SDPAParams", Params)

    both = problem_of_attention(dtype=torch.bfloat16)
    for kernel in ("efficient", "cudnn"):
        assert both.why_not(f"sdpa-{kernel}").endswith("needs an NVIDIA GPU.")
    monkeypatch.setattr(attention, "compute_capability", lambda device: (9, 0))
    assert both.why_not("sdpa-cudnn") == "PyTorch's cuDNN attention has no gradient of a bias."
    assert not asked

    reason = both.why_not("sdpa-efficient")
    assert reason is None if can else reason.endswith("refuses this call.")
    [params] = asked
    assert params.mask.dtype == params.q.dtype == torch.bfloat16 and params.mask.requires_grad
    assert params.mask.shape == (3, 2, 30, 30) and params.q.shape == (3, 2, 30, 64)
    for problem in (problem_of_attention("forward"), problem_of_attention(bias="none")):
        reason = problem.why_not("sdpa-cudnn")
        assert reason is None if can else "cuDNN" in reason
        mask = asked[-1].mask
        assert mask.dtype == torch.bool or not mask.requires_grad


def test_reasons_of_flex_on_a_cpu(monkeypatch):
    def reason(size, phase, vectors):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: vectors)
        return attention.why_not_flex(Case("attention", size, torch.float32, phase), CPU)

    for size, vectors in itertools.product(("tiny", "base"), ("DEFAULT", "AVX2", "AVX512")):
        told = reason(size, "forward+backward", vectors)
        assert told == "FlexAttention has no backward on a CPU."
        told = reason(size, "forward", vectors)
        if (size, vectors) == ("base", "DEFAULT"):
            assert told == "FlexAttention's kernel for CPUs needs AVX2; PyTorch uses DEFAULT here."
        else:
            assert told is None


def test_reasons_of_flex_on_a_gpu(monkeypatch):
    case = Case("attention", "base", torch.float16, "forward+backward")
    for capability, told in (((7, 0), "no tensor cores on sm_70"), ((9, 0), None), (None, "GPUs")):
        monkeypatch.setattr(attention, "compute_capability", lambda device, c=capability: c)
        reason = attention.why_not_flex(case, torch.device("cuda"))
        assert reason is None if told is None else told in str(reason)


def test_cost_and_cases_of_attention():
    forward, both = problem_of_attention("forward"), problem_of_attention()
    assert both.cost.flops == 3 * forward.cost.flops == 3 * 4 * 3 * 2 * 30**2 * 64
    assert problem_of_attention("forward", bias="none").cost.bytes < forward.cost.bytes
    for scale in Scale:
        cases = attention.SUITE.cases(CPU, scale)
        assert len({str(case) for case in cases}) == len(cases)
        assert all(case.labels["suite"] == attention.SUITE.name for case in cases)
    full = attention.SUITE.cases(CPU, Scale.full)
    assert str(full[0]) == "attention-base-bfloat16-forward-237-138-table-none"
    assert {case.shape["length"] for case in full} == {40, 197, 237, 617, 941}
    tokens = [int(case.shape["length"]) * int(case.shape["sequences"]) for case in full]
    assert max(abs(count / 32768 - 1) for count in tokens) < 0.02
    assert set(NOTES) <= {*both.contenders, *sublayer().contenders}


def test_cases_of_attention_on_a_cpu():
    cases = attention.SUITE.cases(CPU, Scale.cpu)
    plain = [
        case for case in cases if (case.shape["bias"], case.shape["mask"]) == ("table", "none")
    ]
    expected = itertools.product((40, 128, 237, 617, 941), DTYPES, PHASES)
    assert {(c.shape["length"], c.dtype, c.phase) for c in plain} == {*expected}
    tokens = [int(case.shape["length"]) * int(case.shape["sequences"]) for case in plain]
    assert min(tokens) >= 1850 and max(tokens) <= 1920
    assert [str(case) for case in cases if case not in plain] == [
        "attention-base-float32-forward-237-8-table-text",
        "attention-base-float32-forward-237-8-none-none",
    ]


@pytest.mark.parametrize("length", attention.LENGTHS)
def test_sequences_of_attention(length):
    shape = dict(length=length, sequences=2, bias="table", mask="text")
    problem = Attention(Case("attention", "tiny", torch.float32, "forward", shape), CPU)
    assert problem.inputs.index.matrix.shape == (length, length)
    _, text = attention.LENGTHS[length]
    mask = problem.inputs.key_mask
    assert mask is not None
    assert mask[:, text:].all() and mask.any(dim=1).all()
    assert bool(mask.all()) == (text == 0)
    assert_exact(problem, "sdpa")


def test_half_precision_below_sm_80_is_float16(monkeypatch):
    for capability, names in (((7, 0), {"float16"}), ((9, 0), {"bfloat16", "float16"})):
        monkeypatch.setattr(contenders, "compute_capability", lambda device, c=capability: c)
        for suite in (moe_ffn.SUITE, attention.SUITE):
            cases = suite.cases(torch.device("cuda"), Scale.full)
            assert {case.labels["dtype"] for case in cases} == names
