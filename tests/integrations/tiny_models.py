"""Tiny models of the integrations' third-party classes, with random parameters, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import third_party
from official_beit3 import official_beit3
from vlmo.integrations import (
    Handle,
    apply_to_bagel,
    apply_to_cosmos3,
    apply_to_torchscale,
    apply_to_wall_x,
)
from vlmo.model.beit3 import BEiT3Config

WIDTH, HIDDEN, HEADS = 32, 48, 4
LAYERS = 2
STD = 0.2  # of parameters

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A model, its inputs and how it is called with them.

    Attributes:
        apply: the integration.
        make: the model, in float64.
        inputs: tensors in float64, which need gradients, or of integers.
        run: the model's outputs.
        network: name of a feed-forward network's first linear layer.
        unused: part of the names of an expert that gets no tokens and is not called.
    """

    apply: Callable[..., Handle]
    make: Callable[[], Any]
    inputs: Callable[[], Inputs]
    run: Callable[[Any, Inputs], Sequence[Tensor]]
    network: str
    unused: str = ""


def _randomised(model: nn.Module, std: float) -> nn.Module:
    """Random values for every parameter, so that no two tensors agree by being constant."""
    with torch.no_grad():
        for name, parameter in model.double().named_parameters():
            is_norm = parameter.dim() == 1 and name.endswith("weight")
            parameter.normal_(std=std).add_(float(is_norm))
    return model


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


# torchscale: the whole BEiT-3


BEIT3 = BEiT3Config(
    dim=WIDTH,
    depth=LAYERS,
    heads=HEADS,
    image_size=16,
    patch_size=8,
    max_text_length=7,
    text_positions=20,
    vocab_size=50,
    drop_path=0.0,
)


def beit3(config: BEiT3Config = BEIT3, *, std: float = STD, **options: Any) -> Any:
    model: Any = official_beit3(config)
    for layer in model.encoder.layers:
        vars(layer).update(options)
    return _randomised(model, std)


def beit3_inputs(config: BEiT3Config = BEIT3, *, batch: int = 3) -> Inputs:
    length, side = config.max_text_length, config.image_size
    lengths = torch.linspace(length, 1, batch).long()
    return {
        "image": _draw(batch, 3, side, side),
        "text": torch.randint(config.vocab_size, (batch, length)),
        "padding": torch.arange(length) >= lengths[:, None],
    }


def run_beit3(names: Sequence[str]) -> Callable[[Any, Inputs], Sequence[Tensor]]:
    def run(model: Any, inputs: Inputs) -> Sequence[Tensor]:
        text, padding = (inputs[n] if "text" in names else None for n in ("text", "padding"))
        image = inputs["image"] if "image" in names else None
        return [model(text, image, padding)["encoder_out"]]

    return run


# BAGEL: its decoder layers

TOKENS = 23


def bagel(*, layers: int = LAYERS, std: float = STD, **options: Any) -> Any:
    config = SimpleNamespace(
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_theta=1e4,
        rms_norm_eps=1e-6,
        hidden_act="silu",
        attention_dropout=0.0,
        is_causal=True,
        qk_norm=True,
        freeze_und=False,
    )
    vars(config).update(options)
    layer = third_party.bagel().Qwen2MoTDecoderLayer
    return _randomised(nn.ModuleList([layer(config, i) for i in range(layers)]), std)


def bagel_inputs(
    generated: slice,
    listed: int | None = None,
    *,
    tokens: int = TOKENS,
    width: int = WIDTH,
    head: int = WIDTH // HEADS,
) -> Callable[[], Inputs]:
    def inputs() -> Inputs:
        is_generated = torch.zeros(tokens, dtype=torch.bool)
        is_generated[generated] = True
        is_listed = torch.arange(tokens) < (tokens if listed is None else listed)
        return {
            "x": _draw(tokens, width),
            "cos": _draw(tokens, head),
            "sin": _draw(tokens, head),
            "mask": torch.ones(tokens, tokens, dtype=torch.bool).tril(),
            "und": (is_listed & ~is_generated).nonzero()[:, 0],
            "gen": (is_listed & is_generated).nonzero()[:, 0],
        }

    return inputs


def run_bagel(model: Any, inputs: Inputs) -> Sequence[Tensor]:
    """Training; in place of FlexAttention, which has no backward on a CPU, a masked softmax."""

    def attention(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool, block_mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, block_mask, enable_gqa=enable_gqa)

    x = inputs["x"]
    with mock.patch.object(third_party.bagel(), "flex_attention", attention):
        for layer in model:
            x = layer(
                packed_sequence=x,
                sample_lens=[len(x)],
                attention_mask=inputs["mask"],
                packed_position_embeddings=(inputs["cos"], inputs["sin"]),
                packed_und_token_indexes=inputs["und"],
                packed_gen_token_indexes=inputs["gen"],
            )
    return [x]


# Wall-X: its decoder layers


class _Attention(nn.Module):
    """In place of Wall-X's attention, whose rotary embedding transformers 5 does not have."""

    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, **unused: Any) -> tuple[Tensor, None, None]:
        return self.q_proj(hidden_states), None, None


def wall_x(
    hidden: Sequence[int] = (HIDDEN, 24, 16),
    *,
    width: int = WIDTH,
    layers: int = LAYERS,
    std: float = STD,
    **options: Any,
) -> Any:
    experts = [dict(hidden_size=width, intermediate_size=f, hidden_act="silu") for f in hidden]
    config = SimpleNamespace(
        hidden_size=width,
        rms_norm_eps=1e-6,
        use_sliding_window=False,
        mlp_moe=True,
        _attn_implementation="linear",
        experts=experts,
        dim_inputs=(width,) * len(experts),
    )
    vars(config).update(options)
    module = third_party.wall_x()
    with mock.patch.dict(module.QWEN2_5_VL_ATTENTION_CLASSES, linear=_Attention):
        layer = module.Qwen2_5_VLDecoderLayer_with_MoE
        made = [layer(config, i, len(experts)) for i in range(layers)]
    return _randomised(nn.ModuleList(made), std)


def wall_x_inputs(*, batch: int = 2, length: int = 11, width: int = WIDTH) -> Inputs:
    """Tokens of the first two experts; a third gets none."""
    return {"x": _draw(batch, length, width), "types": torch.randint(2, (batch, length))}


def run_wall_x(model: Any, inputs: Inputs) -> Sequence[Tensor]:
    x = inputs["x"]
    for layer in model:
        (x,) = layer(x, token_types=inputs["types"])
    return [x]


# Cosmos3: its decoder layers


def cosmos3(*, layers: int = LAYERS, std: float = STD, **options: Any) -> Any:
    sizes: dict[str, Any] = dict(
        hidden_size=WIDTH,
        head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        intermediate_size=HIDDEN,
        attention_bias=False,
        rms_norm_eps=1e-6,
    )
    sizes |= options
    layer = third_party.cosmos3().Cosmos3VLTextMoTDecoderLayer
    return _randomised(nn.ModuleList([layer(**sizes) for _ in range(layers)]), std)


def cosmos3_inputs(
    understood: int = 7,
    generated: int = 12,
    *,
    width: int = WIDTH,
    head: int = WIDTH // HEADS,
) -> Callable[[], Inputs]:
    def inputs() -> Inputs:
        sizes = dict(und=understood, gen=generated)
        streams = {name: _draw(size, width) for name, size in sizes.items()}
        rotary = {
            f"{part}_{name}": _draw(size, head)
            for name, size in sizes.items()
            for part in ("cos", "sin")
        }
        return streams | rotary

    return inputs


def run_cosmos3(model: Any, inputs: Inputs) -> Sequence[Tensor]:
    und, gen = inputs["und"], inputs["gen"]
    rotary = tuple(inputs[name] for name in ("cos_und", "sin_und", "cos_gen", "sin_gen"))
    for layer in model:
        und, gen = layer(und, gen, rotary)
    return [und, gen]


def _torchscale(*names: str, **options: Any) -> Case:
    run, network = run_beit3(names), "encoder.layers.0.ffn.A.fc1"
    return Case(apply_to_torchscale, lambda: beit3(**options), beit3_inputs, run, network)


def _bagel(generated: slice, **options: Any) -> Case:
    inputs = bagel_inputs(generated, **options)
    return Case(apply_to_bagel, bagel, inputs, run_bagel, "0.mlp.gate_proj")


def _cosmos3(**options: Any) -> Case:
    inputs = cosmos3_inputs(**options)
    return Case(apply_to_cosmos3, cosmos3, inputs, run_cosmos3, "0.mlp.gate_proj")


CASES = {
    "torchscale": _torchscale("image", "text"),
    "torchscale, image": _torchscale("image"),
    "torchscale, norm after": _torchscale("image", "text", normalize_before=False),
    "torchscale, deepnorm": _torchscale("image", "text", alpha=1.7),
    "bagel": _bagel(slice(5, 17)),
    "bagel, scattered": _bagel(slice(0, None, 3)),
    "bagel, padding": _bagel(slice(5, 17), listed=20),
    "bagel, nothing generated": _bagel(slice(0)),
    "wall_x": Case(
        *(apply_to_wall_x, wall_x, wall_x_inputs, run_wall_x),
        network="0.moe.experts.0.gate_proj",
        unused="experts.2.",
    ),
    "cosmos3": _cosmos3(),
    "cosmos3, nothing understood": _cosmos3(understood=0),
}
# One of each model.
MODELS = {name: case for name, case in CASES.items() if "," not in name}
