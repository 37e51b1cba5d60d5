"""BAGEL: a mixture of transformers on packed sequences (ByteDance-Seed/Bagel, lmms-engine).

Tokens of text and of images that are understood have one set of modules, those of images that are
generated another; two lists of indices say which tokens these are. The original code gathers the
tokens of each list and scatters the results.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from vlmo.kernels import ModalityRouting, moe_ffn

from . import gated
from .handle import Handle, find_layers


def apply_to_bagel(model: nn.Module, *, backend: str | None = None) -> Handle:
    """Let :func:`vlmo.kernels.moe_ffn` compute norm, SwiGLU and residual of BAGEL's layers.

    It does in training, and in inference for ``mode="gen"`` without TaylorSeer. Otherwise there is
    one expert or a cache, and the layers compute as before; so do layers whose modules are wrapped
    or hooked later, as by LoRA. Attention stays as it is.

    As in the original, tokens in neither list keep their values. The lists must be disjoint.

    Args:
        model: a ``Bagel``, its language model, or any module with ``Qwen2MoTDecoderLayer``.
        backend: as for :func:`vlmo.kernels.moe_ffn`.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: there is no such layer, one is already replaced, or one is unsupported.
    """
    routing_of = gated.Latest(_route)

    def feed_forward(layer: Any, x: Tensor, und: Tensor, gen: Tensor) -> Tensor:
        routing, listed = routing_of(und, gen, tokens=x.shape[0])
        return moe_ffn(
            *(x, routing),
            token_scale=None if listed is None else listed.to(x.dtype),
            residual=x,
            backend=backend,
            **gated.arguments(_networks(layer), _norms(layer)),
        )

    # The arguments of BAGEL's layer, by the same names.
    def forward_train(
        layer: Any,
        packed_sequence: Tensor,  # [T, D]
        sample_lens: list[int],
        attention_mask: Any,
        packed_position_embeddings: tuple[Tensor, Tensor],
        packed_und_token_indexes: Tensor,  # [T_und]
        packed_gen_token_indexes: Tensor,  # [T_gen]
    ) -> Tensor:  # [T, D]
        x, und, gen = packed_sequence, packed_und_token_indexes, packed_gen_token_indexes
        given = sample_lens, attention_mask, packed_position_embeddings, und, gen
        if _why_not(layer) is not None:
            return type(layer).forward_train(layer, x, *given)
        x = x + layer.self_attn(_first_norm(layer, x, und, gen), *given)
        return feed_forward(layer, x, und, gen)

    def forward_inference(
        layer: Any, packed_query_sequence: Tensor, *args: Any, mode: str = "und", **options: Any
    ) -> tuple[Tensor, Any]:
        cached = getattr(layer, "enable_taylorseer", False)
        if mode != "gen" or cached or _why_not(layer) is not None:
            call = type(layer).forward_inference
            return call(layer, packed_query_sequence, *args, mode=mode, **options)
        und, gen = options["packed_text_indexes"], options["packed_vae_token_indexes"]
        h = _first_norm(layer, packed_query_sequence, und, gen)
        h, past = layer.self_attn(h, *args, mode=mode, **options)
        return feed_forward(layer, packed_query_sequence + h, und, gen), past

    layers = find_layers(model, "Qwen2MoTDecoderLayer", _why_not)
    return Handle(layers, dict(forward_train=forward_train, forward_inference=forward_inference))


def _first_norm(layer: Any, x: Tensor, und: Tensor, gen: Tensor) -> Tensor:
    """The norm before attention, as in BAGEL's layer."""
    h = torch.zeros_like(x)
    h[und] = layer.input_layernorm(x[und])
    h[gen] = layer.input_layernorm_moe_gen(x[gen])
    return h


def _route(und: Tensor, gen: Tensor, *, tokens: int) -> tuple[ModalityRouting, Tensor | None]:
    """The routing of all tokens, and ``[T]`` which ones are listed; None if all are."""
    listed = len(und) + len(gen)
    if listed > tokens:
        raise ValueError(f"token indexes: {len(und)} and {len(gen)} for {tokens} tokens")
    ids = torch.zeros(tokens, dtype=torch.int32, device=und.device).index_fill(0, gen, 1)
    # The counts are known from the shapes, without waiting for the device.
    counts = tokens - len(gen), len(gen)
    routing = dataclasses.replace(ModalityRouting.from_ids(ids, 2), counts=counts)
    if listed == tokens:
        return routing, None
    return routing, torch.zeros_like(ids).index_fill(0, torch.cat([und, gen]), 1)


def _why_not(layer: Any) -> str | None:
    if layer.freeze_und:
        return "freeze_und stops gradients inside the feed-forward network"
    return gated.why_not(_networks(layer), "Qwen2MLP", _norms(layer))


def _networks(layer: Any) -> list[nn.Module]:
    return [layer.mlp, layer.mlp_moe_gen]


def _norms(layer: Any) -> list[nn.Module]:
    return [layer.post_attention_layernorm, layer.post_attention_layernorm_moe_gen]
