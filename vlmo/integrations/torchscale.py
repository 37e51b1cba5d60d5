"""torchscale: the encoder layers of BEiT-3, whose modules A and B each take some of the tokens."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vlmo.kernels import ModalityRouting, moe_ffn

from .handle import Handle, find_layers, why_not_plain


def apply_to_torchscale(model: nn.Module, *, backend: str | None = None) -> Handle:
    """Let :func:`vlmo.kernels.moe_ffn` compute the feed-forward half of every ``EncoderLayer``.

    That is the norm (with ``encoder_normalize_before``), both linear layers with their GELU, the
    sub-norm, and the residual if there is no drop path in training. Attention stays as it is.
    Layers whose modules are wrapped or hooked later, as by LoRA, compute as before.

    Args:
        model: torchscale's ``BEiT3``, ``Encoder`` or any module with multiway encoder layers.
        backend: as for :func:`vlmo.kernels.moe_ffn`.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: there is no such layer, one is already replaced, or one is unsupported: with
            one network for all tokens, another activation than GELU, or dropout between the layers.
    """

    # The arguments of torchscale's layer, by the same names.
    def forward(
        layer: Any,
        x: Tensor,  # [B, N, D]
        encoder_padding_mask: Tensor | None,  # [B, N]
        attn_mask: Tensor | None = None,  # [N, N]
        rel_pos: Tensor | None = None,
        multiway_split_position: int | None = None,
        incremental_state: Any = None,
    ) -> tuple[Tensor, None]:
        if _why_not(layer) is not None:
            given = encoder_padding_mask, attn_mask, rel_pos, multiway_split_position
            return type(layer).forward(layer, x, *given, incremental_state)
        for module in layer.modules() if multiway_split_position is not None else ():
            if hasattr(module, "split_position"):
                module.split_position = multiway_split_position
        options = dict(rel_pos=rel_pos, incremental_state=incremental_state)
        x = _attend(layer, x, attn_mask, key_padding_mask=encoder_padding_mask, **options)
        if layer.drop_path is None or not layer.training:
            residual = x if layer.alpha == 1 else x * layer.alpha
            x = _feed_forward(layer, x, residual=residual, backend=backend)
        else:
            branch = _feed_forward(layer, x, residual=None, backend=backend)
            x = layer.residual_connection(layer.drop_path(branch), x)
        return x if layer.normalize_before else layer.final_layer_norm(x), None

    return Handle(find_layers(model, "EncoderLayer", _why_not), {"forward": forward})


def _attend(layer: Any, x: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    """The first half of torchscale's layer, unchanged."""
    if mask is not None:
        mask = mask.masked_fill(mask.bool(), -1e8)
    h = layer.self_attn_layer_norm(x) if layer.normalize_before else x
    h, _ = layer.self_attn(query=h, key=h, value=h, attn_mask=mask, **options)
    h = layer.dropout_module(h)
    if layer.drop_path is not None:
        h = layer.drop_path(h)
    x = layer.residual_connection(h, x)
    return x if layer.normalize_before else layer.self_attn_layer_norm(x)


def _feed_forward(layer: Any, x: Tensor, residual: Tensor | None, backend: str | None) -> Tensor:
    # Position -1: all tokens are for A; 0: all for B. The other module gets no gradient.
    position, length = layer.ffn.split_position, x.shape[1]
    names = {-1: "A", 0: "B"}.get(position, "AB")
    pieces = [length] if len(names) == 1 else [position, length - position]

    def each(path: str) -> list[Any]:
        return [attrgetter(path.format(name))(layer) for name in names]

    norms = {"norm": "final_layer_norm.{}."} if layer.normalize_before else {}
    options: dict[str, Any] = dict(norm="layer" if norms else "none", residual=residual)
    if layer.ffn.A.ffn_layernorm is not None:
        norms["sub_norm"] = "ffn.{}.ffn_layernorm."
    for name, path in norms.items():
        options |= {f"{name}_{part}": each(path + part) for part in ("weight", "bias")}
        options[f"{name}_eps"] = each(path + "eps")[0]
    w1, w2 = each("ffn.{}.fc1.weight"), each("ffn.{}.fc2.weight")
    routing = ModalityRouting.segments([*enumerate(pieces)])
    b1, b2 = each("ffn.{}.fc1.bias"), each("ffn.{}.fc2.bias")
    return moe_ffn(x, routing, w1, w2, b1=b1, b2=b2, backend=backend, **options)


def _why_not(layer: Any) -> str | None:
    if reason := why_not_plain(_parts(layer)):
        return reason
    for network in (layer.ffn.A, layer.ffn.B):
        if network.activation_fn is not F.gelu:
            return f"activation {network.activation_fn.__name__}, expected gelu"
        if dropout := max(network.dropout_module.p, network.activation_dropout_module.p):
            return f"dropout {dropout} in the feed-forward network, which moe_ffn does not have"
    return None


def _parts(layer: Any) -> Iterator[tuple[Any, str | type[nn.Module]]]:
    """The modules whose parameters are read, and their classes, from the outside inwards."""
    yield getattr(layer, "ffn", None), "MultiwayNetwork"  # the mixtures of experts have none
    for network in (layer.ffn.A, layer.ffn.B):
        yield network, "FeedForwardNetwork"
        yield from ((network.fc1, nn.Linear), (network.fc2, nn.Linear))
        if network.ffn_layernorm is not None:
            yield network.ffn_layernorm, nn.LayerNorm
    if layer.normalize_before:
        yield layer.final_layer_norm, "MultiwayNetwork"
        for norm in (layer.final_layer_norm.A, layer.final_layer_norm.B):
            yield norm, nn.LayerNorm
