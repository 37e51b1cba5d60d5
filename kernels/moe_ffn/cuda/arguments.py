"""Arguments of the CUDA kernels, which mirror the structures of csrc field by field."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from ... import target
from ..call import GATED, WITHOUT_SUB_NORM, Call
from ..rows import Rows

TILE = 128  # rows and columns of a tile, kTile
STEP = 32  # depth (k) of a step of the main loop, kStepK
NORM_ROWS = 16  # rows of a task without products, kNormRows
ROW_TASKS = TILE // NORM_ROWS  # tasks of a row tile in a phase without products
MAX_EXPERTS = 32
MAX_PHASES = 4
PROGRAMS = 2  # resident CTAs per multiprocessor
THREADS = 128

# Cost of a task without products, in steps of a main loop; rounded from the model of a V100
# (benchmarks/modelled/volta.py), as is TILE_OVERHEAD of schedule.py.
ROWS_COST = 3

# Start delay of the second CTA of a multiprocessor, in multiplications, and the number of tasks of
# a launch from which on the delay pays off: a few per CTA of a V100.
STAGGER = 300
STAGGERED = 640


class Expert(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in WITHOUT_SUB_NORM),
        ("hidden", ctypes.c_int64),
    ]


class RowsArgument(ctypes.Structure):
    _fields_ = [
        ("tokens", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("starts", ctypes.c_int32 * MAX_EXPERTS),
        ("lengths", ctypes.c_int32 * MAX_EXPERTS),
        ("sequences", ctypes.c_int32),
        ("length", ctypes.c_int32),
    ]


class CallArgument(ctypes.Structure):
    """``Call`` of csrc/moe_ffn/parts.cuh."""

    _fields_ = [
        ("experts", Expert * MAX_EXPERTS),
        ("rows", RowsArgument),
        ("layer_scale", ctypes.c_void_p),
        ("token_scale", ctypes.c_void_p),
        ("counters", ctypes.c_void_p),
        ("num_experts", ctypes.c_int32),
        ("dim", ctypes.c_int32),
        ("max_hidden", ctypes.c_int32),
        ("max_pre", ctypes.c_int32),
        ("norm", ctypes.c_int32),
        ("norm_eps", ctypes.c_float),
        ("norm_is_half", ctypes.c_int32),
        ("layer_scale_is_half", ctypes.c_int32),
        ("token_scale_is_half", ctypes.c_int32),
        ("bound", ctypes.c_int32),
        ("band", ctypes.c_int32),
        ("tasks", ctypes.c_int32 * MAX_PHASES),
        ("num_counters", ctypes.c_int32),
        ("stagger", ctypes.c_int32),
    ]


def pointer(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def is_half(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.dtype == torch.float16


def readable(tensor: Tensor | None) -> Tensor | None:
    """The tensor, contiguous and in float16 or float32, for tensors other than matrix operands."""
    if tensor is None:
        return None
    if tensor.dtype not in (torch.float16, torch.float32):
        tensor = tensor.float()
    return tensor.contiguous()


def readable_call(call: Call) -> Call:
    """The call with every tensor as the kernels read it; norm parameters have one dtype."""
    w1, w2, b1, b2 = ([t.contiguous() for t in tensors] for tensors in call[1:5])
    norms = [*call.norm_weight, *call.norm_bias]
    if len({t.dtype for t in norms}) > 1:
        norms = [t.float() for t in norms]
    norms = [t for t in map(readable, norms) if t is not None]
    experts = len(call.norm_weight)
    x = readable(call.x)
    assert x is not None
    return call._replace(
        x=x,
        w1=w1,
        w2=w2,
        b1=b1,
        b2=b2,
        norm_weight=norms[:experts],
        norm_bias=norms[experts:],
        layer_scale=readable(call.layer_scale),
        token_scale=readable(call.token_scale),
    )


def call_argument(
    call: Call,
    rows: Rows,
    counters: Tensor,
    num_counters: int,
    bound: int,
    band: int,
    tasks: Sequence[int],
) -> CallArgument:
    """Arguments common to all kernels; ``call`` is the result of :func:`readable_call`."""
    argument = CallArgument(
        layer_scale=pointer(call.layer_scale),
        token_scale=pointer(call.token_scale),
        counters=pointer(counters),
        num_experts=len(call.w1),
        dim=call.x.shape[1],
        max_hidden=max_hidden(call),
        max_pre=max_pre(call),
        norm=("none", "layer", "rms").index(call.norm),
        norm_eps=call.norm_eps,
        norm_is_half=is_half(call.norm_weight[0] if call.norm_weight else None),
        layer_scale_is_half=is_half(call.layer_scale),
        token_scale_is_half=is_half(call.token_scale),
        bound=bound,
        band=band,
        tasks=(ctypes.c_int32 * MAX_PHASES)(*tasks),
        num_counters=num_counters,
        stagger=STAGGER if bound * sum(tasks) >= STAGGERED else 0,
    )
    for e, expert in enumerate(argument.experts[: len(call.w1)]):
        for name in WITHOUT_SUB_NORM:
            tensors = getattr(call, name)
            setattr(expert, name, pointer(tensors[e]) if tensors else None)
        expert.hidden = call.w2[e].shape[1]
    argument.rows.tokens, argument.rows.offsets = pointer(rows.tokens), pointer(rows.offsets)
    argument.rows.sequences, argument.rows.length = rows.sequences, rows.length
    for e, (start, length) in enumerate(zip(rows.starts or (), rows.lengths or (), strict=True)):
        argument.rows.starts[e], argument.rows.lengths[e] = start, length
    return argument


def tensors_of(call: Call, rows: Rows) -> list[Tensor | None]:
    """The tensors that :func:`call_argument` points into, and x."""
    lists = [tensor for tensors in call[1:7] for tensor in tensors]
    return [call.x, *lists, call.layer_scale, call.token_scale, rows.tokens, rows.offsets]


def max_hidden(call: Call) -> int:
    return max(weight.shape[1] for weight in call.w2)


def max_pre(call: Call) -> int:
    """Columns of the pre-activation of the widest expert; its gradient has as many."""
    return max(weight.shape[0] for weight in call.w1)


def hidden_columns(call: Call) -> int:
    """Hidden columns of a tile of the first product."""
    return TILE // 2 if call.activation in GATED else TILE


def workers_on(device: torch.device) -> int:
    """Number of resident CTAs."""
    return target.multiprocessors(device) * PROGRAMS
