"""The suite of the whole model: contenders pass the accuracy check, and "compiled" ones compile."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import bench_model as model
from bench_cases import assert_contenders_run, float64_only, wrong
from bench_model import PHASES, ModelProblem
from harness import contenders, models, official
from harness.contenders import Case, Scale

CPU = torch.device("cpu")


def problem_of(phase: str, dtype: torch.dtype = torch.float32, pairs: int = 3) -> ModelProblem:
    return ModelProblem(Case("model", "tiny", dtype, phase, dict(pairs=pairs, pixels=32)), CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("phase", PHASES)
def test_contenders_of_the_model(phase, dtype):
    assert_contenders_run(
        problem_of(phase, dtype), "vlmo:cpu", "vlmo:cpu-compiled", "vlmo:reference", "official"
    )


@pytest.mark.parametrize("phase", [model.PRETRAINING, model.RERANKING])
def test_what_is_named_compiled_is(phase, monkeypatch):
    """Every block in the timed call runs in a graph, whatever was compiled for the check."""
    ran, passes = [], []

    def compiler(graph, inputs, **options):
        def called(*arguments):
            ran.append(graph)
            return graph(*arguments)

        return called

    real = official.SwitchedVLMo._spread

    def spread(vlmo, layout):
        passes.append(layout)
        return real(vlmo, layout)

    monkeypatch.setattr(models, "compiler_of", lambda case, device: compiler)
    monkeypatch.setattr(official.SwitchedVLMo, "_spread", spread)
    problem = problem_of(phase)
    assert not wrong(problem, "official-compiled")
    ran.clear()
    passes.clear()
    problem.work("official-compiled")()
    tails = 2 if phase == model.PRETRAINING else 0  # the VL block after texts and images alone
    assert len(passes) == {model.PRETRAINING: 6, model.RERANKING: 1}[phase]
    assert len(ran) == 3 * len(passes) + tails


@pytest.mark.parametrize("phase", [model.PRETRAINING, model.RERANKING])
def test_every_operation_of_our_compiled_model_is_in_a_graph(phase, monkeypatch):
    """Graphs are interrupted where numbers of tokens are read, but nowhere within the blocks."""
    compiled: list[str] = []
    eager: list[str] = []

    def compiler(graph, inputs):
        names = [str(node.target) for node in graph.graph.nodes]

        def called(*arguments):
            compiled.extend(name for name in names if "vlmo" in name)
            return graph(*arguments)

        return called

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, arguments=(), options=None):
            if operation.namespace == "vlmo" and "_bwd" not in str(operation):
                eager.append(str(operation))
            return operation(*arguments, **(options or {}))

    monkeypatch.setattr(models, "compiler_of", lambda case, device: compiler)
    problem = problem_of(phase)
    problem.work("vlmo:cpu-compiled")()
    compiled.clear()
    problem.work("vlmo:cpu-compiled")()
    with Counting():
        problem.work("vlmo:cpu")()
    assert sorted(compiled) == sorted(eager) and "vlmo.moe_ffn_fwd.default" in compiled


def test_contenders_that_take_turns_do_not_compile_again(monkeypatch):
    built = []

    def compiler(graph, inputs):
        built.append(graph)
        return graph

    monkeypatch.setattr(models, "compiler_of", lambda case, device: compiler)
    problem = problem_of(model.MATCHING)
    names = ("vlmo:cpu-compiled", "official", "official-compiled", "vlmo:cpu")
    works = [problem.work(name) for name in names]
    counts = []
    for _ in range(2):
        for work in works:
            work()
        counts.append(len(built))
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("contender", ["official-compiled", "vlmo:cpu-compiled"])
def test_what_would_not_be_compiled_is_an_error(contender, monkeypatch):
    monkeypatch.setattr(contenders, "_GRAPHS", 1)
    problem = problem_of(model.PRETRAINING)
    with pytest.raises(Exception, match="recompile_limit"):
        problem.check(contender)


def test_cases_of_the_model_on_a_cpu():
    cases = model.SUITE.cases(CPU, Scale.cpu)
    both = {torch.float32, torch.bfloat16}
    assert {phase: {c.dtype for c in cases if c.phase == phase} for phase in PHASES} == (
        dict.fromkeys(PHASES, both)
    )
    pixels = {case.phase: case.shape["pixels"] for case in cases}
    assert pixels == dict.fromkeys(PHASES, 224) | {model.VQA: 480}
    for case in cases:
        config = model.config_of(case.size, case.phase, int(case.shape["pixels"]))
        assert config.image_size == pixels[case.phase] and config.dim == 768


def test_wrong_forms_are_found_out(monkeypatch):
    problem = problem_of(model.RERANKING)
    right = model._candidates

    def swapped(phase, batch):
        images, pairs = right(phase, batch)
        return images, pairs[::-1]

    assert problem.small  # what is right, before anything is wrong
    monkeypatch.setattr(model, "_candidates", swapped)
    assert wrong(problem, "vlmo:cpu") == ["logits"]


@pytest.mark.parametrize("phase", PHASES)
def test_the_float64_results_are_in_float64(phase):
    problem = problem_of(phase)
    with float64_only():
        exact = problem.small.exact
    assert {tensor.dtype for tensor in exact.values()} == {torch.float64}
