"""The Triton backend of moe_ffn: host side of its three kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._backends import triton as triton_target
from ..call import Call, pre_shape, why_not_weight
from ..counters import take_counters
from ..rows import bound_on_tiles, rows_of
from ..schedule import band_of
from . import tiles

_MAX_DIM = 16384  # the phases without products hold a whole row in registers


def why_not(
    device: torch.device, dtype: torch.dtype, width: int, hidden: Sequence[int], activation: str
) -> str | None:
    """The reason why :func:`forward` cannot run, or None."""
    if width > _MAX_DIM:
        return f"model dimension {width} is above {_MAX_DIM}."
    if reason := why_not_weight(width, hidden, activation):
        return reason
    return triton_target.why_not(device, dtype)


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """y [T, D], and the pre-activation in grouped order; one launch."""
    from ..._backends import triton_launch
    from . import launch as host
    from .forward import moe_ffn_fwd_kernel

    half, device = call.w1[0].dtype, call.x.device
    num_tokens, dim = call.x.shape
    y_dtype = call.w2[0].dtype if call.residual is None else call.residual.dtype
    y = call.x.new_empty(num_tokens, dim, dtype=y_dtype)
    pre = call.x.new_empty(pre_shape(call), dtype=half)
    if num_tokens == 0:
        return y, pre

    tile = tiles.choose(device, half).forward
    config, rows = host.config_of(call, tile), rows_of(call)
    config = config._replace(
        tasks=(
            0 if call.norm == "none" else -(-tile.block_t // config.block_r),
            -(-config.max_hidden // config.block_f),
            -(-dim // tile.block_n),
        )
    )
    bound, workers = bound_on_tiles(call, rows, tile.block_t), host.workers_on(device, tile)
    depths = (None, dim, config.max_hidden)
    costs = dict(step=config.block_k, rows_cost=host.ROWS_COST)
    band = band_of(bound, config.tasks, workers, depths, **costs)
    normed = call.x.new_empty(num_tokens, dim, dtype=half) if config.tasks[0] else None
    hidden = call.x.new_empty(num_tokens, config.max_hidden, dtype=half)
    with take_counters(device, 2 + 2 * bound) as counters:
        triton_launch.launch(
            *(moe_ffn_fwd_kernel, device, min(workers, bound * sum(config.tasks)), tile),
            *(call.x.contiguous(), normed, pre if call.save_pre else None, hidden, y),
            *(host.pointers(tensors) for tensors in call[1:7]),
            *(host.contiguous(t) for t in (call.layer_scale, call.token_scale, call.residual)),
            *(host.passed(rows), counters, bound, band, call.norm_eps, config),
        )
    return y, pre


def backward(dy: Tensor, pre: Tensor, call: Call, needs: Sequence[bool]) -> list[Tensor]:
    """The gradients flagged in ``needs``, in the order of the schema; the others are empty."""
    from .backward import Backward

    return Backward(dy, pre, call, needs).compute()
