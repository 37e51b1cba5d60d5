"""Host side of csrc/moe_ffn/moe_ffn_bwd_rows.cu: dx, and the operands of the sums over tokens."""

from __future__ import annotations

import ctypes

from torch import Tensor

from ..._backends import cuda as cuda_target
from ..call import Call
from ..counters import take_counters
from ..plan import Gradients, Problem, RowsPlan, RowsScratch, plan_rows
from ..rows import Rows
from ..schedule import band_of
from . import arguments as host

_CUBIN = "moe_ffn_bwd_rows"


class BackwardRowsArgument(ctypes.Structure):
    """``BackwardRows`` of csrc/moe_ffn/moe_ffn_bwd_rows.cu."""

    _fields_ = [
        ("call", host.CallArgument),
        ("dy", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("pre", ctypes.c_void_p),
        ("dbranch", ctypes.c_void_p),
        ("dh2", ctypes.c_void_p),
        ("normed", ctypes.c_void_p),
        ("hidden", ctypes.c_void_p),
        ("dpre", ctypes.c_void_p),
        ("dnormed", ctypes.c_void_p),
        ("sum_dbranch", ctypes.c_void_p),
        ("sum_dpre", ctypes.c_void_p),
        ("sum_norm", ctypes.c_void_p),
        ("dx", ctypes.c_void_p),
        ("dy_is_half", ctypes.c_int32),
        ("x_is_half", ctypes.c_int32),
    ]


def launch_rows(
    dy: Tensor, pre: Tensor, call: Call, rows: Rows, gradients: Gradients
) -> tuple[RowsPlan, RowsScratch]:
    """Fill ``gradients.x`` and the scratch of the plan; ``call`` is from `host.readable_call`."""
    needed = gradients.needed
    plan = plan_rows(
        *(Problem.of(call, rows), needed),
        block_t=host.TILE,
        block_f=host.TILE,
        block_n=host.TILE,
        row_tasks=host.ROW_TASKS,
        keeps_normed=needed.wants("w1"),
        keeps_dh2=True,
    )
    scratch = plan.allocate(call)
    readable_dy, dx = host.readable(dy), gradients.x if needed.x else None
    device, tasks, bound = call.x.device, plan.tasks, plan.bound
    workers, num_counters = host.workers_on(device), 2 + 3 * bound
    sizes = (bound, tasks, workers, plan.depths)
    band = band_of(*sizes, step=host.STEP, rows_cost=host.ROWS_COST)
    with take_counters(device, num_counters) as counters:
        argument = BackwardRowsArgument(
            call=host.call_argument(call, rows, counters, num_counters, bound, band, tasks),
            dy=host.pointer(readable_dy),
            x=host.pointer(call.x),
            pre=host.pointer(pre),
            **{name: host.pointer(tensor) for name, tensor in scratch._asdict().items()},
            dx=host.pointer(dx),
            dy_is_half=host.is_half(readable_dy),
            x_is_half=host.is_half(call.x),
        )
        cuda_target.launch(
            *(_CUBIN, f"{_CUBIN}_{call.activation}", device),
            min(workers, bound * sum(tasks)),
            host.THREADS,
            0,
            argument,
            [
                *host.tensors_of(call, rows),
                *(counters, readable_dy, pre, *scratch, dx),
            ],
        )
    return plan, scratch
