"""Wall-X: a feed-forward network for each type of token (lerobot, and X-Square-Robot/wall-x).

Its ``SparseMoeBlock`` selects the tokens of each expert with a boolean mask, for which the host
waits for the device twice per expert. The norm before and the residual after it are in the decoder
layer and remain there.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vlmo.kernels import ModalityRouting, moe_ffn

from . import gated
from .handle import Handle, find_layers


def apply_to_wall_x(model: nn.Module, *, backend: str | None = None) -> Handle:
    """Let :func:`vlmo.kernels.moe_ffn` compute every ``SparseMoeBlock`` of a model.

    Experts may differ in hidden width, but not in input width. Every token needs an expert: an
    index outside ``0..num_experts-1`` is an error, where the original output is zero. Blocks whose
    modules are wrapped or hooked later, as by LoRA, compute as before.

    Args:
        model: a Wall-X policy, or any module with such blocks.
        backend: as for :func:`vlmo.kernels.moe_ffn`.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: there is no such block, one is already replaced, or one is unsupported.
    """
    routing_of = gated.Latest(ModalityRouting.from_ids)

    def forward(
        block: Any,
        hidden_states: Tensor,  # [B, L, D]
        experts_indices: Tensor,  # [B, L], integers
    ) -> Tensor:  # [B, L, D]
        if _why_not(block) is not None:
            return type(block).forward(block, hidden_states, experts_indices)
        routing = routing_of(experts_indices, num_experts=len(block.experts))
        return moe_ffn(hidden_states, routing, **gated.arguments(block.experts), backend=backend)

    return Handle(find_layers(model, "SparseMoeBlock", _why_not), {"forward": forward})


def _why_not(block: Any) -> str | None:
    widths = {expert.hidden_size for expert in block.experts} | {*block.dim_inputs}
    if len(widths) > 1:
        return f"experts of different widths {sorted(widths)}: moe_ffn has one width for all tokens"
    return gated.why_not(block.experts, "BlockSparseMLP")
