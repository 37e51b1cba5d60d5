"""torch.compile over the whole forward of every task: one graph for texts of all lengths."""

from typing import Any

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

import test_step
from test_step import batch_of, gradients, model_of
from test_wrappers import Lora
from vlmo import VLMo
from vlmo.tasks.losses import compute_losses

pytestmark = pytest.mark.heavy

TINY = test_step.TINY.replace(depth=2, vl_start=1)  # tracing takes as long as there are blocks
TASKS = [("mlm", "itc", "itm"), ("mlm",), ("textmlm",), ("irtr",), ("vqa",), ("nlvr2",)]
PRETRAINING = TASKS[0]
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
# What older releases do not set with fullgraph=True.
CAPTURE: dict[str, Any] = dict(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True)


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    counters.clear()
    with torch._dynamo.config.patch(**CAPTURE):
        yield
    torch.compiler.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def trained(model: VLMo, forward, batch: dict) -> dict:
    """Everything that ``forward`` returns, and the gradients of its loss."""
    torch.manual_seed(0)
    model.zero_grad()
    output = forward(compute_losses, batch)
    output["loss"].backward()
    return {**output, **gradients(model)}


def check(
    model: VLMo, batches: list[dict], forward=None, backend: str = "aot_eager", **tolerance: Any
) -> None:
    """Compiled training gives what eager training gives, without a break in the graph."""
    forward = model if forward is None else forward
    compiled = torch.compile(forward, fullgraph=True, backend=backend)
    for batch in batches:
        expected, found = trained(model, forward, batch), trained(model, compiled, batch)
        torch.testing.assert_close(found, expected, **tolerance)
    assert not counters["graph_break"]


@pytest.mark.parametrize(
    "tasks",
    # The first one has the path of the second one too.
    [pytest.param(t, marks=[pytest.mark.slow] if t == ("mlm",) else []) for t in TASKS],
    ids="-".join,
)
def test_few_graphs_for_texts_of_all_lengths(tasks):
    """Sizes that change (rows, masked tokens) cost a second graph, or a third; lengths none."""
    model = model_of(TINY.replace(tasks=tasks))
    rows = (4, 4, 5, 3, 7) * 2 if tasks == PRETRAINING else (4, 4)
    check(model, [batch_of(count, seed=seed) for seed, count in enumerate(rows)])
    assert graphs() <= (3 if tasks == PRETRAINING else 2)


@pytest.mark.parametrize(
    "changes",
    [
        dict(checkpointing=True, drop_path=0.3, separate_attention=True),
        *(
            pytest.param(changes, marks=pytest.mark.slow)
            for changes in (
                dict(relative_position_bias=False, absolute_position=True),
                dict(kernels="reference"),
                dict(vl_start=2, tasks=("irtr", "mlm")),
            )
        ),
    ],
    ids="-".join,
)
def test_every_option(changes):
    check(model_of(TINY.replace(**{"tasks": ("itc", "itm"), **changes})), [batch_of(4)])
    assert graphs() == 1


def test_the_operations_stay_in_the_graph():
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    model = model_of(TINY.replace(tasks=("vqa",)))
    torch.compile(model, fullgraph=True, backend=keep)(compute_losses, batch_of(4))
    names = [str(node.target) for node in graphs[0].graph.nodes]
    for operation in ("moe_ffn_fwd", "attention_fwd"):
        assert sum(operation in name for name in names) == TINY.depth


@pytest.mark.skipif(TORCH < (2, 11), reason="cross_entropy of a number of rows found in the graph")
def test_without_what_a_loader_adds():
    """Lengths and masked tokens are then found in the graph."""
    batches = [batch_of(4, seed=seed) for seed in range(2)]
    for batch in batches:
        del batch["text_lengths"], batch["mlm_tokens"]
    check(model_of(TINY.replace(tasks=PRETRAINING)), batches)
    assert graphs() == 1


def test_autocast():
    model = model_of(TINY.replace(tasks=PRETRAINING))

    def forward(function, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return model(function, batch)

    check(model, [batch_of(4)], forward, rtol=0.02, atol=0.02)


def test_wrapped_modules():
    model = model_of(TINY.replace(tasks=PRETRAINING))
    for block in model.transformer.blocks:
        block.attn.qkv = Lora(block.attn.qkv)
        block.mlp_text.fc1 = Lora(block.mlp_text.fc1)
    check(model, [batch_of(4)])
    assert any(name.endswith("fc1.a") for name in gradients(model))


def test_graphs_that_break_are_right_too():
    """Without fullgraph=True, PyTorch ends a graph where a number is read off a tensor."""
    model = model_of(TINY.replace(tasks=("vqa",)))
    batches = [batch_of(4, seed=seed) for seed in (0, 1)]
    with torch._dynamo.config.patch(capture_scalar_outputs=False):
        compiled = torch.compile(model, backend="eager")
        for batch in batches:
            expected, found = trained(model, model, batch), trained(model, compiled, batch)
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("wrong", ["text_lengths", "text_labels_mlm"])
def test_values_are_checked_in_the_graph(wrong):
    model, batch = model_of(TINY.replace(tasks=("mlm",))), batch_of(4)
    if wrong == "text_lengths":
        batch["text_lengths"][2] = 0
    else:
        batch["text_labels_mlm"].fill_(5)
        batch["mlm_tokens"] = torch.arange(batch["text_labels_mlm"].numel())
    complaints = {
        "text_lengths": "text 2 has no token|a text has no token",
        "text_labels_mlm": "a label stands on padding",
    }
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for forward, error in ((model, ValueError), (compiled, RuntimeError)):
        with pytest.raises(error, match=f"{wrong}: ({complaints[wrong]})"):
            forward(compute_losses, batch)


@pytest.mark.slow
def test_inductor():
    model = model_of(TINY.replace(tasks=PRETRAINING, drop_path=0.0))
    check(model, [batch_of(4, seed=seed) for seed in range(3)], backend="inductor")
    assert graphs() <= 2
