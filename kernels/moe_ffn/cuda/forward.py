"""Host side of csrc/moe_ffn/moe_ffn_fwd.cu."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..._backends import cuda as cuda_target
from ..call import Call
from ..counters import take_counters
from ..rows import bound_on_tiles, rows_of
from ..schedule import band_of
from . import arguments as host

CUBIN = "moe_ffn_fwd"


class ForwardArgument(ctypes.Structure):
    """``Forward`` of csrc/moe_ffn/moe_ffn_fwd.cu."""

    _fields_ = [
        ("call", host.CallArgument),
        *((name, ctypes.c_void_p) for name in ("x", "residual", "normed", "pre", "hidden", "y")),
        ("x_is_half", ctypes.c_int32),
        ("y_is_half", ctypes.c_int32),
    ]


def launch_forward(call: Call, y: Tensor | None, pre: Tensor | None) -> None:
    """Launch the forward; if y is None, only its first product, into ``pre``."""
    call, device = host.readable_call(call), call.x.device
    num_tokens, dim = call.x.shape
    rows = rows_of(call)
    bound, workers = bound_on_tiles(call, rows, host.TILE), host.workers_on(device)
    max_hidden = host.max_hidden(call)
    tasks = (
        0 if call.norm == "none" else host.ROW_TASKS,
        -(-max_hidden // host.hidden_columns(call)),
        0 if y is None else -(-dim // host.TILE),
        0,
    )
    depths = (None, dim, max_hidden, None)
    if pre is not None and pre.numel() == 0:
        pre = None
    residual = None if call.residual is None else call.residual.contiguous()
    normed = call.x.new_empty(num_tokens, dim, dtype=torch.float16) if tasks[0] else None
    hidden = call.x.new_empty(num_tokens, max_hidden, dtype=torch.float16)
    num_counters = 2 + 2 * bound
    band = band_of(bound, tasks, workers, depths, step=host.STEP, rows_cost=host.ROWS_COST)
    with take_counters(device, num_counters) as counters:
        argument = ForwardArgument(
            call=host.call_argument(call, rows, counters, num_counters, bound, band, tasks),
            x=host.pointer(call.x),
            residual=host.pointer(residual),
            normed=host.pointer(normed),
            pre=host.pointer(pre),
            hidden=host.pointer(hidden),
            y=host.pointer(y),
            x_is_half=host.is_half(call.x),
            y_is_half=host.is_half(y),
        )
        cuda_target.launch(
            *(CUBIN, f"moe_ffn_fwd_{call.activation}", device),
            min(workers, bound * sum(tasks)),
            host.THREADS,
            0,
            argument,
            [*host.tensors_of(call, rows), counters, residual, normed, pre, hidden, y],
        )
