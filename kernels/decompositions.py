"""The operations as plain ATen operations, for exported graphs that run without this library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .attention import reference as attention
from .moe_ffn import reference as moe_ffn


def decompositions() -> dict[Any, Callable[..., Any]]:
    """What ``ExportedProgram.run_decompositions`` takes, for all operations of this package.

    Only programs need it that were exported with a backend asked for by name: without one, a
    program holds plain ATen operations from the start::

        table = torch.export.default_decompositions()
        table.update(vlmo.kernels.decompositions())
        program = torch.export.export(model, inputs).run_decompositions(table)

    The results are those of the backend ``"reference"``, whatever backend was named.
    """
    operations = torch.ops.vlmo
    return {
        operations.moe_ffn_fwd.default: _moe_ffn_forward,
        operations.moe_ffn_bwd.default: _moe_ffn_backward,
        operations.attention_fwd.default: _attention_forward,
        operations.attention_bwd.default: _attention_backward,
    }


def _moe_ffn_forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    return moe_ffn.forward(moe_ffn.Call(*inputs[:-1]))


def _moe_ffn_backward(dy: Tensor, pre: Tensor, *inputs: Any) -> list[Tensor]:
    *arguments, needs, _ = inputs
    # The residual is not among them; the last one of a call is whether ``pre`` was kept.
    call = moe_ffn.Call._make([*arguments[:9], None, *arguments[9:], pre.numel() > 0])
    return moe_ffn.backward(dy, pre, call, needs)


def _attention_forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    return attention.forward(attention.Call(*inputs[:-1]))


def _attention_backward(dout: Tensor, out: Tensor, lse: Tensor, *inputs: Any) -> list[Tensor]:
    *arguments, needs_table, _ = inputs
    return attention.backward(dout, out, lse, attention.Call(*arguments), needs_table)
