"""shared_attention on the CPU, by the C++ kernels in ``csrc/cpu``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmo import _C

from .._backends import cpu as cpu_target
from . import packing
from .call import Call

_adjacent = cpu_target.with_adjacent_elements


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int, entries: int) -> str | None:
    """The reason why :func:`forward` cannot run, or None."""
    return cpu_target.why_not(device, dtype)


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """out, in the shape of q, and the log-sum-exp of the scores, ``q.shape[:-1]`` float32."""
    out = torch.empty_like(call.q, memory_format=torch.contiguous_format)
    lse = call.q.new_empty(call.q.shape[:-1], dtype=torch.float32)
    arguments = _Arguments(call)
    _C.attention_forward(*arguments.shared, out.data_ptr(), lse.data_ptr())
    return out, lse


def backward(
    dout: Tensor, out: Tensor, lse: Tensor, call: Call, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of q, k and v, and of the table if there is one (None if not needed).

    If q, k and v are one packed tensor, so are their gradients.
    """
    shape, entries = call.q.shape, 0 if call.table is None else len(call.table)
    joined = packing.packed(call[:3]) is not None
    gradients = packing.empty(call.q) if joined else [dout.new_empty(shape) for _ in range(3)]
    with_table = call.table is not None and needs[3]
    dtable = dout.new_zeros(shape[-2] if with_table else 0, entries, dtype=torch.float64)
    out, dout = _adjacent(out), _adjacent(dout)
    arguments = _Arguments(call)
    _C.attention_backward(
        *arguments.shared,
        *(_strided(t, call) for t in (out, dout)),
        lse.data_ptr(),
        [t.data_ptr() for t in gradients],
        gradients[0].stride(-3),
        dtable.data_ptr() if with_table else 0,
    )
    if call.table is None:
        return [*gradients]
    return [*gradients, _narrowed(dtable, call.table) if with_table else None]


def _narrowed(dtable: Tensor, table: Tensor) -> Tensor:
    """The gradient of the table; contiguous, as compiled graphs expect it."""
    return dtable.t().to(table.dtype, memory_format=torch.contiguous_format)


class _Arguments:
    """The arguments that forward and backward share; keeps the tensors at their addresses alive."""

    def __init__(self, call: Call) -> None:
        qkv = [_adjacent(t) for t in call[:3]]
        packed = call.offsets is not None
        table = None if call.table is None else call.table.t().float().contiguous()
        matrix = None if call.matrix is None else _adjacent(call.matrix)
        inputs = [
            table,
            matrix,
            None if call.key_mask is None else call.key_mask.contiguous(),
            *(
                None if t is None else t.long().contiguous()
                for t in (call.key_lengths, call.offsets, call.positions)
            ),
        ]
        bias_sizes = (0, 0, 0)
        if matrix is not None and table is not None:
            bias_sizes = table.shape[1], len(matrix), matrix.stride(0)
        sizes = (
            len(call.offsets) - 1 if call.offsets is not None else call.q.shape[0],
            min(call.max_length, call.q.shape[0]) if packed else call.q.shape[1],
            *call.q.shape[-2:],
            *bias_sizes,
        )
        self._kept = (qkv, inputs)
        self.shared = (
            cpu_target.instructions(),
            torch.get_num_threads(),
            cpu_target.TYPES[call.q.dtype],
            [_strided(t, call) for t in qkv],
            [0 if t is None else t.data_ptr() for t in inputs],
            sizes,
            call.causal,
            call.scale,
        )


def _strided(t: Tensor, call: Call) -> tuple[int, ...]:
    """Address, and strides of sequences, tokens and heads."""
    strides = t.stride()[:-1] if call.offsets is None else (0, *t.stride()[:-1])
    return t.data_ptr(), *strides
