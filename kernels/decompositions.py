"""Decompositions to plain ATen operations, for exported graphs that run without this library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .attention.op import ATTENTION
from .attention.reference import shared_attention_reference
from .moe_ffn.op import MOE_FFN, MOE_LINEAR
from .moe_ffn.reference import moe_ffn_reference


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Decompositions of the forward of all operations, for ``ExportedProgram.run_decompositions``.

    Only a program that was exported with a kernel backend requested by name needs them: without
    one, or with ``"reference"``, a program contains only plain ATen operations::

        table = torch.export.default_decompositions()
        table.update(vlmo.kernels.decompositions())
        program = torch.export.export(model, inputs).run_decompositions(table)

    The decompositions compute what the backend ``"reference"`` computes, whatever backend was
    requested. The backward has no decomposition: for a graph of plain operations with gradients,
    request ``"reference"``.
    """
    operations = torch.ops.vlmo
    return {
        operations.moe_ffn_fwd.default: MOE_FFN.decompose(moe_ffn_reference),
        operations.moe_linear_fwd.default: MOE_LINEAR.decompose(moe_ffn_reference),
        operations.attention_fwd.default: ATTENTION.decompose(shared_attention_reference),
    }
