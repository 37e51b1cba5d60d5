"""The suite of BEiT-3: contenders pass the accuracy check, and "compiled" ones compile."""

from __future__ import annotations

import pytest
import torch

import bench_beit3 as beit3
from bench_beit3 import PHASES, BEiT3Problem
from bench_cases import assert_contenders_run, float64_only, wrong
from harness import models
from harness.contenders import Case, Scale

CPU = torch.device("cpu")


def problem_of(phase: str, dtype: torch.dtype = torch.float32) -> BEiT3Problem:
    return BEiT3Problem(Case("beit3", "tiny", dtype, phase, dict(pairs=3, pixels=32)), CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("phase", PHASES)
def test_contenders_of_beit3(phase, dtype):
    assert_contenders_run(problem_of(phase, dtype), "vlmo:cpu", "vlmo:reference", "torchscale")


@pytest.mark.parametrize("phase", PHASES)
def test_torchscale_computes_the_same(phase):
    """Otherwise its error, and with it the error bound, would be large."""
    _, _, eager, exact = problem_of(phase).small
    assert eager.keys() == exact.keys()
    if phase == beit3.STEP:  # all parameters but the mask token's and those of unused positions
        assert len(exact) == 1 + 2 * 40 + 8 + 8
    for name, target in exact.items():
        # A key's bias changes all scores of a query alike: its gradient is rounding error.
        like = exact[name.replace("k_proj", "q_proj") if name.endswith("bias") else name]
        assert (eager[name] - target).norm() <= 1e-5 * like.norm() + 1e-8, name


def test_parameters_are_shared():
    model = problem_of(beit3.STEP).model
    names = {name.removeprefix("beit3."): p for name, p in model.named_parameters()}
    theirs = dict(model.torchscale.named_parameters())
    assert len(theirs) == len(dict(model.beit3.named_parameters()))
    assert all(names[name] is parameter for name, parameter in theirs.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("contender", ["vlmo:cpu-compiled", "torchscale-compiled"])
def test_what_is_named_compiled_is_one_graph(contender, dtype, monkeypatch):
    ran = []

    def compiler(graph, inputs):
        def called(*arguments):
            ran.append([str(node.target) for node in graph.graph.nodes])
            return graph(*arguments)

        return called

    monkeypatch.setattr(models, "compiler_of", lambda case, device: compiler)
    problem = problem_of(beit3.STEP, dtype)
    assert not wrong(problem, contender)
    ran.clear()
    problem.work(contender)()
    [targets] = ran
    layers = problem.config.depth if contender.startswith("vlmo") else 0
    for operation, count in (("moe_ffn_fwd", 1), ("moe_linear_fwd", 4)):
        assert sum(operation in target for target in targets) == count * layers


def test_16_bit_operands_come_from_autocast():
    problem = problem_of(beit3.ANSWERING, torch.bfloat16)
    assert {parameter.dtype for parameter in problem.model.parameters()} == {torch.float32}
    for contender in ("vlmo:cpu", "torchscale"):
        with torch.no_grad():
            found = problem.form(contender)(problem.phase, problem.model, problem.batch)
        assert found["logits"].dtype == torch.bfloat16


def test_cases_of_beit3_on_a_cpu():
    cases = beit3.SUITE.cases(CPU, Scale.cpu)
    shapes = {(case.phase, case.shape["pairs"], case.shape["pixels"]) for case in cases}
    assert shapes == {(beit3.STEP, 4, 224), (beit3.ANSWERING, 4, 224), (beit3.STEP, 2, 480)}
    assert {case.dtype for case in cases} == {torch.float32, torch.bfloat16}
    assert len(cases) == 2 * len(shapes)
    for case in cases:
        config = beit3.config_of(case.size, int(case.shape["pixels"]))
        assert config.dim == 768 and config.drop_path == 0 and config.max_text_length == 64


def test_without_torchscale_nothing_is_compared(monkeypatch):
    monkeypatch.setattr(beit3, "why_not_installed", lambda package: f"{package} is not installed.")
    problem = problem_of(beit3.STEP)
    reasons = {problem.why_not(contender) for contender in problem.contenders}
    assert reasons == {"torchscale is not installed."}


def test_a_wrong_form_is_found_out(monkeypatch):
    problem = problem_of(beit3.ANSWERING)
    right = beit3._answered
    assert problem.small  # what is right, before anything is wrong

    def swapped(phase, model, batch, image, text):
        return right(phase, model, batch, image.flip(0), text)

    monkeypatch.setattr(beit3, "_answered", swapped)
    assert wrong(problem, "vlmo:cpu") == ["image", "logits"]


@pytest.mark.parametrize("phase", PHASES)
def test_the_float64_results_are_in_float64(phase):
    problem = problem_of(phase)
    with float64_only():
        exact = problem.small.exact
    assert {tensor.dtype for tensor in exact.values()} == {torch.float64}
