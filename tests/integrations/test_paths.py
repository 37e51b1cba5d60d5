"""Stochastic depth, inference, the routing of all layers, one graph, sharded parameters."""

import copy
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import third_party
from test_integrations import calls  # noqa: F401  # a fixture
from tiny_models import CASES, HEADS, LAYERS, MODELS, TOKENS, WIDTH
from vlmo.integrations import apply_to_bagel, apply_to_torchscale
from vlmo.kernels import ModalityRouting


class HalfOf(nn.Module):
    """In place of stochastic depth: the branch of every second sample."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(torch.arange(len(x))[:, None, None] % 2 == 0, 2 * x, 0.0)


@pytest.mark.parametrize("training", [True, False])
def test_torchscale_with_drop_path(calls, training):  # noqa: F811
    case = CASES["torchscale, deepnorm"]
    model, inputs = case.make().train(training), case.inputs()
    for layer in model.encoder.layers:
        layer.drop_path = HalfOf() if training else nn.Identity()
    (wanted,) = case.run(model, inputs)
    apply_to_torchscale(model)
    (found,) = case.run(model, inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert [options["residual"] is None for options in calls] == [training] * LAYERS


def test_torchscale_sets_the_split_position():
    case = MODELS["torchscale"]
    model = case.make()
    x = torch.randn(2, 9, WIDTH, dtype=torch.float64)
    layer: Any = model.get_submodule("encoder.layers.0")
    mask = torch.ones(9, 9).triu(1)
    wanted, _ = layer(x, None, mask, multiway_split_position=4)
    layer.ffn.split_position = -1
    apply_to_torchscale(model)
    found, _ = layer(x, None, mask, multiway_split_position=4)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert layer.self_attn.q_proj.split_position == layer.ffn.split_position == 4


@pytest.fixture
def routings(monkeypatch) -> list[ModalityRouting]:
    """The routings that are made from ids."""
    made: list[ModalityRouting] = []
    from_ids = ModalityRouting.from_ids

    def spy(*args: Any, **options: Any) -> ModalityRouting:
        made.append(from_ids(*args, **options))
        return made[-1]

    monkeypatch.setattr(ModalityRouting, "from_ids", spy)
    return made


@pytest.mark.parametrize(("name", "ids"), [("bagel", "gen"), ("wall_x", "types")])
def test_layers_share_a_routing(name, ids, routings):
    case = MODELS[name]
    model, inputs = case.make(), case.inputs()
    case.apply(model)
    case.run(model, inputs)
    case.run(model, inputs)
    assert len(routings) == 1
    inputs[ids].copy_(inputs[ids].flip(0))
    case.run(model, inputs)
    assert len(routings) == 2
    case.run(model, inputs | {ids: inputs[ids].clone()})
    assert len(routings) == 3
    with torch.inference_mode():
        case.run(model, inputs | {ids: inputs[ids].clone()})
    assert len(routings) == 3 + LAYERS


def test_bagel_counts_tokens_without_asking_the_device(routings):
    case = CASES["bagel, padding"]
    model, inputs = case.make(), case.inputs()
    with mock.patch("vlmo.integrations.bagel.moe_ffn", side_effect=RuntimeError) as operation:
        case.apply(model)
        with pytest.raises(RuntimeError):
            case.run(model, inputs)
    routing = operation.call_args.args[1]
    assert routing.counts == (11, 12) == tuple(torch.bincount(routing.ids).tolist())


def _flash_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, **lengths: Any
) -> Tensor:  # [T, H, K]
    """In place of FlashAttention, for one sequence without a cache."""
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    return out[0].transpose(0, 1)


@pytest.mark.parametrize("taylorseer", [False, True])
@pytest.mark.parametrize("mode", ["und", "gen"])
def test_bagel_in_inference(mode, taylorseer, calls):  # noqa: F811
    model = MODELS["bagel"].make().bfloat16().eval()
    if taylorseer:
        # Of a step that takes the branch from the cache, here as it came.
        for layer in model:
            layer.enable_taylorseer, layer.cache_dic, layer.current = True, {}, {"type": "other"}
    x = torch.randn(TOKENS, WIDTH).bfloat16()
    cos, sin = torch.randn(2, TOKENS, WIDTH // HEADS).bfloat16()
    given = dict(
        query_lens=torch.tensor([TOKENS]),
        packed_query_position_embeddings=(cos, sin),
        packed_query_indexes=torch.arange(TOKENS),
        update_past_key_values=False,
        is_causal=mode == "und",
        mode=mode,
    )
    if mode == "gen":
        given |= dict(
            packed_text_indexes=torch.tensor([0, TOKENS - 1]),
            packed_vae_token_indexes=torch.arange(1, TOKENS - 1),
        )

    def run(model: Any) -> Tensor:
        y = x.to(next(model.parameters()).dtype)
        for layer in model:
            y, past = layer(packed_query_sequence=y, **given)
            assert past is None
        return y

    other = copy.deepcopy(model)
    with mock.patch.object(third_party.bagel(), "flash_attn_varlen_func", _flash_attention):
        apply_to_bagel(model)
        actual, baseline = run(model), run(other)
    expected = LAYERS if mode == "gen" and not taylorseer else 0
    assert len(calls) == expected
    if not expected:
        assert torch.equal(actual, baseline)
    difference = (actual.double() - baseline.double()).norm() / baseline.double().norm()
    assert difference <= 4 * torch.finfo(torch.bfloat16).eps


@pytest.mark.heavy
@pytest.mark.parametrize("name", MODELS)
def test_one_graph_per_layer(name, calls):  # noqa: F811
    case = MODELS[name]
    model, inputs = case.make(), case.inputs()
    case.apply(model)
    wanted = case.run(model, inputs)
    replaced = [m for m in model.modules() if {"forward", "forward_train"} & {*vars(m)}]
    assert len(replaced) == len(calls) == LAYERS
    for layer in replaced:
        layer.compile(fullgraph=True, backend="eager")
    found = case.run(model, inputs)
    for actual, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """One process, on the CPU."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


# The streams of Cosmos3 are views of one tensor.
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
@pytest.mark.heavy
@pytest.mark.parametrize("order", ["sharded first", "applied first"])
@pytest.mark.parametrize("name", MODELS)
def test_fully_sharded_layers(name, order, mesh, calls):  # noqa: F811
    case = MODELS[name]
    original, inputs = case.make(), case.inputs()
    model = copy.deepcopy(original)
    layers = model.encoder.layers if name == "torchscale" else model
    if order == "applied first":
        case.apply(model)
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    if order == "sharded first":
        case.apply(model)
    wanted, found = case.run(original, inputs), case.run(model, inputs)
    assert len(calls) == LAYERS
    for outputs in (wanted, found):
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    for actual, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    gradients = {name: p.grad for name, p in original.named_parameters() if p.grad is not None}
    sharded = {name: p.grad for name, p in model.named_parameters() if name in gradients}
    for name, wanted_gradient in gradients.items():
        gradient = sharded[name]
        if isinstance(gradient, DTensor):
            gradient = gradient.full_tensor()
        torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-4, atol=1e-4)
