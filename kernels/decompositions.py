"""The operations as plain ATen operations, for exported graphs that run without this library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .attention.op import ATTENTION
from .attention.reference import shared_attention_reference
from .moe_ffn.op import MOE_FFN
from .moe_ffn.reference import moe_ffn_reference


def decompositions() -> dict[Any, Callable[..., Any]]:
    """What ``ExportedProgram.run_decompositions`` takes, for the forward of all operations.

    Only programs need it that were exported with a kernel backend asked for by name: without one,
    or with ``"reference"``, a program holds plain ATen operations from the start::

        table = torch.export.default_decompositions()
        table.update(vlmo.kernels.decompositions())
        program = torch.export.export(model, inputs).run_decompositions(table)

    The results are those of the backend ``"reference"``, whatever backend was named. A backward has
    no decomposition: for a graph of plain operations with gradients, choose ``"reference"``.
    """
    operations = torch.ops.vlmo
    return {
        operations.moe_ffn_fwd.default: MOE_FFN.decompose(moe_ffn_reference),
        operations.attention_fwd.default: ATTENTION.decompose(shared_attention_reference),
    }
