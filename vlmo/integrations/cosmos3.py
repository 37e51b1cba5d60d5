"""Cosmos3: one decoder with a tower for understanding and one for generation (diffusers)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlmo.kernels import ModalityRouting, moe_ffn

from . import gated
from .handle import Handle, find_layers


def apply_to_cosmos3(model: nn.Module, *, backend: str | None = None) -> Handle:
    """Let :func:`vlmo.kernels.moe_ffn` compute norm, SwiGLU and residual of both towers.

    The towers are two tensors, :func:`vlmo.kernels.moe_ffn` takes one: their tokens are
    concatenated in every layer, one copy more. Against that stand the norm, the activation and the
    residual, which are no passes of their own any more. At the published width of 4096 the products
    dominate all of these; whether a layer gains has not been measured.

    Layers whose modules are wrapped or hooked later, as by LoRA, compute as before.

    Args:
        model: a ``Cosmos3OmniTransformer``, or any module with its decoder layers. The squared
            ReLU of Cosmos3 Edge is unsupported.
        backend: as for :func:`vlmo.kernels.moe_ffn`.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: there is no such layer, one is already replaced, or one is unsupported.
    """

    def forward(
        layer: Any,
        und_seq: Tensor,  # [T_und, D]
        gen_seq: Tensor,  # [T_gen, D]
        rotary_emb: tuple[Tensor, Tensor, Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:  # [T_und, D], [T_gen, D]
        if _why_not(layer) is not None:
            return type(layer).forward(layer, und_seq, gen_seq, rotary_emb)
        und_out, gen_out = layer.self_attn(
            layer.input_layernorm(und_seq), layer.input_layernorm_moe_gen(gen_seq), rotary_emb
        )
        lengths = und_seq.shape[0], gen_seq.shape[0]
        x = torch.cat([und_seq + und_out, gen_seq + gen_out])
        routing = ModalityRouting.segments([*enumerate(lengths)])
        parameters = gated.arguments(_networks(layer), _norms(layer))
        y = moe_ffn(x, routing, residual=x, backend=backend, **parameters)
        und, gen = y.split(lengths)
        return und, gen

    return Handle(
        find_layers(model, "Cosmos3VLTextMoTDecoderLayer", _why_not), {"forward": forward}
    )


def _why_not(layer: Any) -> str | None:
    return gated.why_not(_networks(layer), "Cosmos3VLTextMLP", _norms(layer))


def _networks(layer: Any) -> list[nn.Module]:
    return [layer.mlp, layer.mlp_moe_gen]


def _norms(layer: Any) -> list[nn.Module]:
    return [layer.post_attention_layernorm, layer.post_attention_layernorm_moe_gen]
