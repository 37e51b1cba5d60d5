"""The suite of the integrations: contenders, their accuracy check, and their arithmetic."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench_integrations as integrations
from bench_cases import float64_only, wrong
from bench_integrations import BACKWARD, FORWARD, LAYERS, PACKAGES, LayersProblem
from harness.contenders import Case, Scale
from harness.models import widened
from vlmo.kernels import moe_ffn

CPU = torch.device("cpu")


def problem_of(
    name: str, phase: str = BACKWARD, dtype: torch.dtype = torch.float32
) -> LayersProblem:
    return LayersProblem(Case("integrations", "tiny", dtype, f"{name} {phase}"), CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("phase", [FORWARD, BACKWARD])
@pytest.mark.parametrize("name", LAYERS)
def test_contenders_of_an_integration(name, phase, dtype, monkeypatch):
    calls = []

    def spy(*arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(arguments)
        return moe_ffn(*arguments, **options)

    module = importlib.import_module(f"vlmo.integrations.{name}")
    monkeypatch.setattr(module, "moe_ffn", spy)
    problem = problem_of(name, phase, dtype)
    for contender, count in (("vlmo:cpu", 2), ("vlmo:reference", 2), ("unpatched", 0)):
        assert problem.why_not(contender) is None
        assert not wrong(problem, contender)
        calls.clear()
        problem.work(contender)()
        assert len(calls) == count  # one for each layer
    assert all(parameter.grad is None for parameter in problem.model.parameters())


@pytest.mark.parametrize("name", LAYERS)
def test_a_backward_has_every_gradient(name):
    problem = problem_of(name)
    names = {name for name, _ in problem.model.named_parameters()}
    # Not those of Wall-X's last expert, which gets no tokens, nor of a token that masks patches.
    unused = {name for name in names if ".experts.2." in name or "mask_token" in name}
    gradients = {name for name in problem.small.exact if not name.startswith("output")}
    assert gradients == names - unused
    tokens = {"bagel": 1, "wall_x": 1, "cosmos3": 2, "torchscale": 0}[name]
    assert len([name for name in gradients if name.startswith("tokens.")]) == tokens


def test_torchscale_has_a_sub_norm_that_cuda_has_not():
    reasons = {name: problem_of(name).why_not("vlmo:cuda") for name in LAYERS}
    assert {name for name, reason in reasons.items() if "sub_norm" in str(reason)} == {"torchscale"}


def test_parameters_are_shared():
    model = problem_of("bagel").model
    theirs = dict(model.patched.named_parameters())
    ours = dict(model.original.named_parameters())
    assert theirs.keys() == ours.keys()
    assert all(theirs[name] is ours[name] for name in ours)


@pytest.mark.parametrize("name", LAYERS)
def test_the_float64_results_are_in_float64(name):
    problem = problem_of(name)
    batch = widened(problem.batch)
    assert problem.library_model  # drawn in float64 and rounded, which is not what is tested
    with float64_only():
        exact = problem.exact(batch)
    assert {tensor.dtype for tensor in exact.values()} == {torch.float64}


def test_a_wrong_network_is_found_out(monkeypatch):
    """A norm, a weight and the order of the experts."""
    module = importlib.import_module("vlmo.integrations.cosmos3")
    problem = problem_of("cosmos3", FORWARD)
    assert problem.small  # what is right, before anything is wrong
    for change in (
        lambda given: given | {"norm_eps": 1e-2},
        lambda given: given | {"w2": [1.001 * w for w in given["w2"]]},
        lambda given: given | {"w1": given["w1"][::-1]},
    ):
        changed = lambda *args, change=change, **options: moe_ffn(*args, **change(options))  # noqa: E731
        monkeypatch.setattr(module, "moe_ffn", changed)
        assert wrong(problem, "vlmo:cpu") == ["output 0", "output 1"]


@pytest.mark.parametrize("name", LAYERS)
def test_flops_are_those_that_are_executed(name):
    """PyTorch's counter knows nothing of padding and, on a CPU, nothing of its fused attention."""
    problem = problem_of(name, FORWARD)
    batch = dict(problem.batch)
    if name == "torchscale":
        batch["padding"] = torch.zeros_like(batch["padding"])
    vars(problem)["batch"] = batch
    attention = 4 * 32 * 2 * problem.layers.scores(batch)
    model = problem.model
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.outputs(batch, patched=False)
    counted = counter.get_total_flops()
    assert problem.cost.flops == counted + (0 if name == "torchscale" else attention)
    assert problem_of(name, BACKWARD).cost.flops == 3 * problem_of(name, FORWARD).cost.flops


def test_cases_on_a_cpu_are_of_published_widths():
    cases = integrations.SUITE.cases(CPU, Scale.cpu)
    assert {case.phase for case in cases} == {
        f"{n} {p}" for n in LAYERS for p in (FORWARD, BACKWARD)
    }
    assert {case.shape["tokens"] for case in cases} == {2048}
    expected = {
        "torchscale": {"encoder.layers.1.ffn.B.fc1.weight": (3072, 768)},
        "bagel": {"0.mlp_moe_gen.up_proj.weight": (18944, 3584)},
        "wall_x": {"1.moe.experts.1.up_proj.weight": (5504, 2048)},
        "cosmos3": {"0.mlp_moe_gen.up_proj.weight": (12288, 4096)},
    }
    for name, shapes in expected.items():
        layers = LAYERS[name](2048)
        with torch.device("meta"):
            parameters = dict(layers.case.make().named_parameters())
        assert {n: tuple(parameters[n].shape) for n in shapes} == shapes
        # Weights in 16 bits, and for the check everything in float64 twice, fit in 24 GB.
        assert sum(p.numel() for p in parameters.values()) * (2 + 2 + 8 + 8) < 12 * 2**30


@pytest.mark.parametrize("name", LAYERS)
def test_inputs_have_about_as_many_tokens(name):
    inputs = LAYERS[name](512).case.inputs()
    counts = {
        "torchscale": lambda: inputs["padding"].numel() + 197 * len(inputs["image"]),
        "bagel": lambda: len(inputs["und"]) + len(inputs["gen"]),
        "wall_x": lambda: inputs["types"].numel(),
        "cosmos3": lambda: len(inputs["und"]) + len(inputs["gen"]),
    }
    assert 512 - 261 < counts[name]() <= 522


@pytest.mark.parametrize("missing", ["torchscale", "lerobot"])
def test_a_library_that_is_not_installed(missing, monkeypatch):
    def reason(package):
        return f"{package} is not installed." if package == missing else None

    monkeypatch.setattr(integrations, "why_not_installed", reason)
    monkeypatch.setattr(integrations, "_tiny", None)  # is not needed to know this
    for name in LAYERS:
        problem = problem_of(name)
        absent = missing in ("torchscale", PACKAGES[name])
        reasons = {problem.why_not(contender) for contender in ("vlmo:cpu", "unpatched")}
        assert reasons == {f"{missing} is not installed." if absent else None}
