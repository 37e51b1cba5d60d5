"""Every contender computes what it says, a wrong one is found out, and what cannot run says why."""

import itertools
import sys
import types
from importlib import metadata

import pytest
import torch
import torch.nn.functional as F

from vlmo.bench import contest, moe_ffn, peers
from vlmo.bench.contest import Contender, Contest
from vlmo.bench.moe_ffn import Sublayer, feed_forward, slices
from vlmo.bench.suite import Case, Scale
from vlmo.kernels import BACKEND_NAMES

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]
PHASES = ["forward", "forward+backward"]


def sublayer(phase="forward+backward", *, dtype=torch.float32, size="tiny", split="3:4", tokens=70):
    return Sublayer(Case("moe_ffn", size, dtype, phase, dict(tokens=tokens, split=split)), CPU)


def enter(problem: Contest, form, eager) -> str:
    """One more contender, on the parameters of the eager ones."""
    entry = Contender(lambda chosen: form, lambda chosen: eager, lambda: problem.parameters)
    problem.entered["another"] = entry
    return "another"


def assert_exact(problem, contender):
    found = problem.check(contender)
    assert not [deviation for deviation in found if not deviation.ok]
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("split", ["3:4", "2:1:4"])
def test_contenders_of_moe_ffn(split, phase, dtype):
    problem = sublayer(phase, dtype=dtype, split=split)
    ran = []
    for contender in problem.contenders:
        # The interpreter has tests of its own.
        if contender == "vlmo:triton" or problem.why_not(contender) is not None:
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
    for phase, wrong in (("forward", []), ("forward+backward", ["dx"])):
        problem = sublayer(phase)
        another = enter(problem, lambda x, p: right(WrongGradient.apply(x), p), right)
        assert [d.name for d in problem.check(another) if not d.ok] == wrong
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
    assert {case.size for case in moe_ffn.SUITE.cases(CPU, Scale.cpu)} == {"base"}
    assert set(moe_ffn.NOTES) <= set(both.contenders)
    assert both.contenders[: len(BACKEND_NAMES)] == tuple(f"vlmo:{b}" for b in BACKEND_NAMES)


def test_the_swiglu_of_liger_multiplies_as_much():
    for size in ("base", "large"):
        dim, hidden = moe_ffn.SIZES[size]
        problem = sublayer(size=size, split="1:1", tokens=2)
        [w1, w2] = [getattr(problem.entered["liger"].parameters(), name) for name in ("w1", "w2")]
        assert (w1[0].numel() + w2[0].numel()) / (2 * dim * hidden) == pytest.approx(1, rel=3e-3)


def test_compiling_for_a_cpu_is_asked_for(monkeypatch):
    problem = sublayer(size="base", split="1:1", tokens=2)
    monkeypatch.delenv(contest.COMPILE_VARIABLE, raising=False)
    reason = problem.why_not("slices-compiled")
    assert "C++" in reason and contest.COMPILE_VARIABLE in reason
    monkeypatch.setenv(contest.COMPILE_VARIABLE, "1")
    assert problem.why_not("slices-compiled") is None
    assert problem.why_not("slices") is None


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
    assert peers.why_not_traced_grouped_mm(gpu, torch.float16).startswith("torch.compile")
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
