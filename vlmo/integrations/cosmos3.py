"""Cosmos3: one decoder with a tower for understanding and one for generation (diffusers)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vlmo.kernels import moe_ffn

from . import gated
from .handle import Handle, find_layers


def apply_to_cosmos3(model: nn.Module, *, backend: str | None = None) -> Handle:
    """Let :func:`vlmo.kernels.moe_ffn` compute norm, SwiGLU and residual of both towers.

    The towers are two tensors, which are read where they are. The norm, the activation and the
    residual are no passes of their own any more. At the published width of 4096 the products
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
        x = [und_seq + und_out, gen_seq + gen_out]
        parameters = gated.arguments(_networks(layer), _norms(layer))
        und, gen = moe_ffn(x, None, residual=x, backend=backend, **parameters)
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
