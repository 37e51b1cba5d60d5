"""Host side of csrc/attention/attention_bwd_q.cu and attention_bwd_kv.cu."""

from __future__ import annotations

import ctypes

from torch import Tensor

from ..._backends import cuda as cuda_target
from . import arguments as host

CUBINS = ("attention_bwd_q", "attention_bwd_kv")
_ROWS = 64  # of a CTA
_WEIGHTS_BYTES = _ROWS * 2 * host.COLUMNS  # of a CTA's WeightTiles
_QUERY_CODES_BYTES = 16 * host.COLUMNS  # QueryCodes::kBytes


class BackwardQArgument(ctypes.Structure):
    """``BackwardQ`` of csrc/attention/attention_bwd_q.cu."""

    _fields_ = [
        ("call", host.CallArgument),
        *((name, host.Operand) for name in ("out", "dout", "dq")),
        ("delta", ctypes.c_void_p),
    ]


class BackwardKVArgument(ctypes.Structure):
    """``BackwardKV`` of csrc/attention/attention_bwd_kv.cu."""

    _fields_ = [
        ("call", host.CallArgument),
        *((name, host.Operand) for name in ("dout", "dk", "dv")),
        ("delta", ctypes.c_void_p),
    ]


def _launch(
    cubin: str,
    call: host.Prepared,
    argument: ctypes.Structure,
    shared_bytes: int,
    tensors: list[Tensor],
) -> None:
    dim = host.padded_dim(call.q.shape[-1])
    cuda_target.launch(
        *(cubin, f"{cubin}_{dim}", call.q.device),
        _programs(call),
        4 * host.WARP,
        shared_bytes + (host.table_bytes(call) if argument.call.bias.in_shared else 0),
        argument,
        [*call.tensors, *tensors],
    )


def _programs(call: host.Prepared) -> int:
    return -(-call.length // _ROWS) * call.batch * call.q.shape[-2]


def _rows_bytes(dim: int) -> int:
    """Shared memory for a CTA's rows of two operands, unless they are in registers."""
    return 2 * _ROWS * 2 * (dim + 8) if dim > 64 else 0


def launch_queries(
    call: host.Prepared, out: Tensor, dout: Tensor, lse: Tensor, dq: Tensor, delta: Tensor
) -> None:
    """dq, and delta in the shape of ``lse``."""
    dim = host.padded_dim(call.q.shape[-1])
    stage = 2 * host.column_tile_bytes(dim) + host.CODES_BYTES
    shared_bytes = host.KEPT_BYTES + 2 * stage + _WEIGHTS_BYTES + _rows_bytes(dim)
    argument = BackwardQArgument(
        host.call_argument(call, lse, shared_bytes, _programs(call)),
        *(host.operand(t) for t in (out, dout, dq)),
        host.pointer(delta),
    )
    _launch(CUBINS[0], call, argument, shared_bytes, [out, dout, lse, dq, delta])


def launch_keys(
    call: host.Prepared, dout: Tensor, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor
) -> None:
    """dk and dv; ``delta`` comes from :func:`launch_queries`."""
    dim = host.padded_dim(call.q.shape[-1])
    stage = 2 * host.column_tile_bytes(dim) + _QUERY_CODES_BYTES
    shared_bytes = host.KEPT_BYTES + 2 * stage + 2 * _WEIGHTS_BYTES + _rows_bytes(dim)
    argument = BackwardKVArgument(
        host.call_argument(call, lse, shared_bytes, _programs(call)),
        *(host.operand(t) for t in (dout, dk, dv)),
        host.pointer(delta),
    )
    _launch(CUBINS[1], call, argument, shared_bytes, [dout, lse, delta, dk, dv])
