"""Host side of csrc/attention/attention_fwd.cu."""

from __future__ import annotations

import ctypes

from torch import Tensor

from ..._backends import cuda as cuda_target
from . import arguments as host

CUBIN = "attention_fwd"


class ForwardArgument(ctypes.Structure):
    """``Forward`` of csrc/attention/attention_fwd.cu."""

    _fields_ = [("call", host.CallArgument), ("out", host.Operand)]


def launch_forward(call: host.Prepared, out: Tensor, lse: Tensor) -> None:
    dim = host.padded_dim(call.q.shape[-1])
    warps = 2 if dim == 64 and call.length <= 64 else 4
    rows = warps * (16 if dim == 128 else 32)
    stage = 2 * host.column_tile_bytes(dim) + host.CODES_BYTES
    shared_bytes = host.KEPT_BYTES + 2 * stage + rows * 2 * host.COLUMNS
    programs = -(-call.length // rows) * call.batch * call.q.shape[-2]
    argument = ForwardArgument(
        host.call_argument(call, lse, shared_bytes, programs),
        host.operand(out),
    )
    if argument.call.bias.in_shared:
        shared_bytes += host.table_bytes(call)
    cuda_target.launch(
        *(CUBIN, f"{CUBIN}_{dim}_{warps}", call.q.device),
        programs,
        warps * host.WARP,
        shared_bytes,
        argument,
        [*call.tensors, out, lse],
    )
