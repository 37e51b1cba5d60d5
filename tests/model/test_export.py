"""torch.export, torch.jit.trace and ONNX: graphs of plain operations, for batches of any size."""

import subprocess
import sys
import textwrap
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim

from test_step import TINY, batch_of, model_of
from vlmo import VLMo
from vlmo.kernels import ModalityRouting, decompositions, moe_ffn
from vlmo.tasks.losses import compute_losses

pytestmark = pytest.mark.heavy

BATCH = Dim("batch", min=1, max=64)
INPUTS = {
    "image": ("image",),
    "text": ("text_ids", "text_masks"),
    "pair": ("text_ids", "text_masks", "image"),
}


class Encoder(nn.Module):
    """One of the model's encoders as a module of its own."""

    def __init__(self, kind: str, model: VLMo):
        super().__init__()
        self.kind, self.model = kind, model

    def forward(self, *inputs):
        if self.kind == "image":
            return self.model.encode_image(*inputs).embedding
        if self.kind == "text":
            return self.model.encode_text(*inputs).embedding
        return self.model.itm_score(self.model.fuse(*inputs).pooled)


def encoder(kind: str, **changes) -> Encoder:
    return Encoder(kind, model_of(TINY.replace(depth=2, vl_start=1, **changes))).eval()


def inputs(kind: str, rows: int, *, floats: bool = False) -> tuple[torch.Tensor, ...]:
    batch = batch_of(rows, seed=rows)
    if floats:
        batch["image"] = batch["image"] / 127.5 - 1
    return tuple(batch[name] for name in INPUTS[kind])


def dynamic(kind: str) -> tuple[dict, ...]:
    return tuple({0: BATCH} for _ in INPUTS[kind])


def exported(module: Encoder, *, strict: bool = False, floats: bool = False):
    kind = module.kind
    shapes = (dynamic(kind),)  # forward has one argument, a tuple
    return torch.export.export(
        module, inputs(kind, 3, floats=floats), dynamic_shapes=shapes, strict=strict
    )


def ours(program) -> set[str]:
    """Names of our operations in an exported program."""
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    return {name for name in names if name.startswith("vlmo")}


def agree(module: Any, graph, *, floats: bool = False) -> None:
    for rows in (1, 2, 5):
        given = inputs(module.kind, rows, floats=floats)
        torch.testing.assert_close(graph(*given), module(*given))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", INPUTS)
def test_export_of_plain_operations(kind, strict):
    module = encoder(kind)
    program = exported(module, strict=strict, floats=strict)
    assert not ours(program)
    agree(module, program.module(), floats=strict)


@torch.no_grad()
def test_a_named_backend_stays_in_the_program_until_it_is_lowered():
    module = encoder("pair", kernels="cpu")
    program = exported(module)
    assert ours(program) == {"vlmo.attention_fwd.default", "vlmo.moe_ffn_fwd.default"}
    agree(module, program.module())
    table = torch.export.default_decompositions()
    table.update(decompositions())
    lowered = program.run_decompositions(table)
    assert not ours(lowered)
    agree(module, lowered.module())


def test_a_joint_graph_of_the_reference_has_plain_operations():
    """Of forward and backward."""
    from torch.fx.experimental.proxy_tensor import make_fx

    model = encoder("pair", kernels="reference").model
    given = inputs("pair", 2)
    parameters = [p for p in model.transformer.blocks.parameters() if p.requires_grad]

    def gradients(*given):
        loss = model.fuse(*given).pooled.square().sum()
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    graph = make_fx(gradients)(*given)
    assert not [node for node in graph.graph.nodes if "vlmo" in str(node.target)]
    torch.testing.assert_close(graph(*given), gradients(*given))


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*jit:DeprecationWarning")
@torch.no_grad()
def test_trace(kind):
    module = encoder(kind)
    traced = torch.jit.trace(module, inputs(kind, 3))
    assert "vlmo::" not in str(traced.inlined_graph)
    agree(module, traced)


def test_a_program_runs_without_this_library(tmp_path):
    module = encoder("pair")
    with torch.no_grad():
        torch.export.save(exported(module), tmp_path / "pair.pt2")
        traced = torch.jit.trace(module, inputs("pair", 3))
    traced.save(tmp_path / "pair.ts")
    given = inputs("pair", 5)
    torch.save((given, module(*given).detach()), tmp_path / "given.pt")
    program = textwrap.dedent("""
        import sys
        sys.modules["vlmo"] = None  # importing it is an error
        import torch
        given, expected = torch.load("given.pt")
        torch.testing.assert_close(torch.export.load("pair.pt2").module()(*given), expected)
        torch.testing.assert_close(torch.jit.load("pair.ts")(*given), expected)
    """)
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True)
    assert run.returncode == 0, run.stderr.decode()[-2000:]


@pytest.mark.parametrize("kind", ["image", "text"])
@torch.no_grad()
def test_onnx_of_the_dual_encoder(kind, tmp_path):
    import onnxruntime

    module, path = encoder(kind), tmp_path / "encoder.onnx"
    shapes = (dynamic(kind),)
    torch.onnx.export(
        module, inputs(kind, 3), path, dynamo=True, dynamic_shapes=shapes, verbose=False
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [argument.name for argument in session.get_inputs()]
    for rows in (1, 2, 5):
        given = inputs(kind, rows)
        (found,) = session.run(None, dict(zip(names, map(np.asarray, given), strict=True)))
        np.testing.assert_allclose(found, module(*given).numpy(), rtol=1e-4, atol=1e-5)


def test_streams_and_pairs_are_lowered_to_plain_operations():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1 = nn.ParameterList([torch.randn(12, 8) for _ in range(4)])
            self.w2 = nn.ParameterList([torch.randn(8, 12) for _ in range(2)])

        def forward(self, text, image):
            pairs = [(self.w1[0], self.w1[1]), (self.w1[2], self.w1[3])]
            options: dict[str, Any] = dict(
                activation="swiglu", residual=[text, image], backend="cpu"
            )
            return moe_ffn([text, image], None, pairs, [*self.w2], **options)

    layer, inputs = Layer().eval(), (torch.randn(3, 8), torch.randn(2, 5, 8))
    program = torch.export.export(layer, inputs)
    assert ours(program) == {"vlmo.moe_ffn_fwd.default"}
    table = torch.export.default_decompositions()
    table.update(decompositions())
    lowered = program.run_decompositions(table)
    assert not ours(lowered)
    torch.testing.assert_close(lowered.module()(*inputs), layer(*inputs))


def test_ids_are_exported_too():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1 = nn.ParameterList([torch.randn(12, 8) for _ in range(2)])
            self.w2 = nn.ParameterList([torch.randn(8, 12) for _ in range(2)])

        def forward(self, x, ids):
            return moe_ffn(x, ModalityRouting.from_ids(ids, 2), [*self.w1], [*self.w2])

    module = Routed()
    x, ids = torch.randn(5, 8), torch.tensor([0, 1, 1, 0, 1])
    shapes = ({0: Dim.AUTO}, {0: Dim.AUTO})
    program = torch.export.export(module, (x, ids), dynamic_shapes=shapes)
    assert not ours(program)
    for count in (2, 7):
        x, ids = torch.randn(count, 8), torch.arange(count) % 2
        torch.testing.assert_close(program.module()(x, ids), module(x, ids))


class Losses(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model(compute_losses, batch)


@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_the_losses_of_a_task_are_exported_for_texts_of_all_lengths(strict):
    model = model_of(TINY.replace(depth=2, vl_start=1, tasks=("vqa",))).eval()
    names = ("text_ids", "text_masks", "text_lengths", "image", "vqa_targets")
    first, *others = ({name: batch_of(4, seed=seed)[name] for name in names} for seed in range(3))
    losses = Losses(model)
    program = torch.export.export(losses, (first,), strict=strict)
    assert not ours(program)
    for batch in others:
        torch.testing.assert_close(program.module()(batch), losses(batch))
