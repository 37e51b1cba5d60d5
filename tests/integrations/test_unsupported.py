"""Layers that moe_ffn cannot compute, and inputs that do not fit."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tiny_models import CASES, MODELS, TOKENS, WIDTH, bagel, beit3, cosmos3, wall_x
from vlmo.integrations import (
    apply_to_bagel,
    apply_to_cosmos3,
    apply_to_torchscale,
    apply_to_wall_x,
)


def is_untouched(model: nn.Module) -> bool:
    return not any(name.startswith("forward") for m in model.modules() for name in vars(m))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(activation_fn=F.relu), "activation relu, expected gelu"),
        (dict(dropout_module=nn.Dropout(0.25)), "dropout 0.25 in the feed-forward network"),
        (dict(activation_dropout_module=nn.Dropout(0.25)), "dropout 0.25"),
    ],
)
def test_torchscale(change, message):
    model = beit3()
    network = model.get_submodule("encoder.layers.1.ffn.B")
    for name, value in change.items():
        setattr(network, name, value)
    with pytest.raises(ValueError, match=rf"encoder\.layers\.1: {message}"):
        apply_to_torchscale(model)
    assert is_untouched(model)


def test_torchscale_without_experts():
    model = beit3()
    layer = model.encoder.layers[0]
    layer.ffn = layer.ffn.A
    with pytest.raises(ValueError, match="expected a MultiwayNetwork, got FeedForwardNetwork"):
        apply_to_torchscale(model)


def test_torchscale_with_a_wrapped_norm():
    model = beit3()
    layer = model.encoder.layers[0]
    layer.final_layer_norm.B = nn.Identity()
    with pytest.raises(ValueError, match="expected a LayerNorm, got Identity"):
        apply_to_torchscale(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(freeze_und=True), "freeze_und"),
        (dict(hidden_act="gelu"), "activation GELUActivation, expected SiLU"),
    ],
)
def test_bagel(options, message):
    model = bagel(**options)
    with pytest.raises(ValueError, match=f"0: {message}"):
        apply_to_bagel(model)
    assert is_untouched(model)


def test_bagel_with_different_norms():
    model = bagel()
    model[1].post_attention_layernorm.variance_epsilon = 1e-5
    with pytest.raises(ValueError, match="1: norms with different eps: 1e-05, 1e-06"):
        apply_to_bagel(model)
    model[1].post_attention_layernorm = nn.LayerNorm(WIDTH)
    with pytest.raises(ValueError, match="1: norm LayerNorm, expected Qwen2RMSNorm or RMSNorm"):
        apply_to_bagel(model)


def test_bagel_with_too_many_indexes():
    case = MODELS["bagel"]
    model, inputs = case.make(), case.inputs()
    apply_to_bagel(model)
    inputs["und"] = torch.arange(TOKENS)
    with pytest.raises(ValueError, match=f"token indexes: {TOKENS} and 12 for {TOKENS} tokens"):
        case.run(model, inputs)


def test_wall_x_of_different_widths():
    model = wall_x(dim_inputs=(WIDTH, WIDTH, WIDTH // 2))
    with pytest.raises(ValueError, match=r"0\.moe: experts of different widths \[16, 32\]"):
        apply_to_wall_x(model)
    assert is_untouched(model)


def test_wall_x_with_an_unknown_type():
    case = CASES["wall_x"]
    model, inputs = case.make(), case.inputs()
    apply_to_wall_x(model)
    inputs["types"][0, 0] = 3
    with pytest.raises(ValueError, match=r"outside the experts 0\.\.2"):
        case.run(model, inputs)


def test_wall_x_with_biases():
    model = wall_x()
    model[0].moe.experts[1].up_proj = nn.Linear(WIDTH, 24)
    with pytest.raises(ValueError, match=r"0\.moe: a BlockSparseMLP with biases"):
        apply_to_wall_x(model)


def test_cosmos3_edge():
    with pytest.raises(ValueError, match="0: activation NoneType, expected SiLU"):
        apply_to_cosmos3(cosmos3(hidden_act="relu2"))


def test_mixed_models():
    """A model of one kind has no layers of another."""
    with pytest.raises(ValueError, match="no layer of class SparseMoeBlock"):
        apply_to_wall_x(bagel())
