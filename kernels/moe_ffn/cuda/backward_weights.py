"""Host side of csrc/moe_ffn/moe_ffn_bwd_weights.cu: the gradients that are sums over tokens."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..._backends import cuda as cuda_target
from ..call import WITHOUT_SUB_NORM, Call
from ..counters import take_counters
from ..plan import Gradients, Problem, RowsPlan, RowsScratch, plan_weights
from ..rows import Rows
from . import arguments as host

CUBIN = "moe_ffn_bwd_weights"
_COUNTERS = 3  # next ticket, finished CTAs, contributions to dlayer_scale; then one per share


class GradientArgument(ctypes.Structure):
    """``Gradient`` of moe_ffn_bwd_weights.cu."""

    _fields_ = [(name, ctypes.c_void_p) for name in WITHOUT_SUB_NORM]


class BackwardWeightsArgument(ctypes.Structure):
    """``BackwardWeights`` of moe_ffn_bwd_weights.cu."""

    _fields_ = [
        ("call", host.CallArgument),
        ("gradients", GradientArgument * host.MAX_EXPERTS),
        ("dpre", ctypes.c_void_p),
        ("normed", ctypes.c_void_p),
        ("dbranch", ctypes.c_void_p),
        ("hidden", ctypes.c_void_p),
        ("sum_dpre", ctypes.c_void_p),
        ("sum_dbranch", ctypes.c_void_p),
        ("sum_norm", ctypes.c_void_p),
        ("partial", ctypes.c_void_p),
        ("sum_scale", ctypes.c_void_p),
        ("sum_bias", ctypes.c_void_p),
        ("dlayer_scale", ctypes.c_void_p),
        ("workers", ctypes.c_int32),
        ("sum_blocks", ctypes.c_int32 * 4),
        ("dbranch_lines", ctypes.c_int32),
        ("norm_lines", ctypes.c_int32),
        ("dnorm_is_half", ctypes.c_int32),
        ("dlayer_scale_is_half", ctypes.c_int32),
    ]


def launch_weights(
    call: Call, rows: Rows, of_rows: tuple[RowsPlan, RowsScratch], gradients: Gradients
) -> None:
    """Fill the gradients of parameters that are needed from the results of the launch of the rows.

    ``of_rows`` is what that launch returned, and ``call`` is from :func:`host.readable_call`. The
    gradients of w1, w2, b1 and b2 are float16; those of the norm are all float16 or all float32,
    and that of the layer scale is either.
    """
    device, workers, scale = call.x.device, host.workers_on(call.x.device), gradients.scale
    plan_of_rows, made = of_rows
    plan = plan_weights(
        *(Problem.of(call, rows), gradients.needed, plan_of_rows),
        block_t=host.TILE,
        block_n=host.TILE,
        workers=workers,
    )
    scratch = plan.allocate(call)
    operands = {
        "dpre": made.dpre,
        "normed": made.normed,
        "dbranch": made.dh2 if call.layer_scale is None else made.dbranch,
        "hidden": made.hidden,
        "sum_dpre": made.sum_dpre,
        "sum_dbranch": made.sum_dbranch,
        "sum_norm": made.sum_norm,
        "partial": scratch.partial,
        "sum_scale": scratch.sum_scale,
        "sum_bias": scratch.sum_bias,
    }
    num_counters = _COUNTERS + workers
    with take_counters(device, num_counters) as counters:
        argument = BackwardWeightsArgument(
            call=host.call_argument(call, rows, counters, num_counters, bound=0, band=0, tasks=()),
            gradients=_gradient_arguments(gradients.lists),
            **{name: host.pointer(tensor) for name, tensor in operands.items()},
            dlayer_scale=host.pointer(scale),
            workers=workers,
            sum_blocks=(ctypes.c_int32 * 4)(*plan.sum_blocks),
            dbranch_lines=host.ROW_TASKS,
            norm_lines=host.ROW_TASKS,
            dnorm_is_half=_norm_is_half(gradients.lists),
            dlayer_scale_is_half=host.is_half(scale),
        )
        cuda_target.launch(
            *(CUBIN, CUBIN, device),
            min(workers, plan.tickets),
            host.THREADS,
            0,
            argument,
            [*host.tensors_of(call, rows), counters, *operands.values(), *gradients.flat[1:]],
        )


def _gradient_arguments(lists: dict[str, list[Tensor]]) -> ctypes.Array[GradientArgument]:
    arguments = (GradientArgument * host.MAX_EXPERTS)()
    for name in WITHOUT_SUB_NORM:
        for argument, gradient in zip(arguments, lists[name], strict=False):
            setattr(argument, name, host.pointer(gradient) if gradient.numel() else None)
    return arguments


def _norm_is_half(lists: dict[str, list[Tensor]]) -> bool:
    dtypes = {t.dtype for name in WITHOUT_SUB_NORM[4:] for t in lists[name] if t.numel()}
    assert len(dtypes) <= 1, dtypes
    return dtypes == {torch.float16}
