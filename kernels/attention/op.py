"""The torch.library operations vlmo::attention_fwd and vlmo::attention_bwd, and their backends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._op import Operation
from ..dispatch import Missing
from . import cpu, reference
from .call import Call
from .cuda import backend as cuda
from .triton import backend as triton

# In the order of preference.
BACKENDS: dict[str, Any] = dict(
    cuda=cuda,
    triton=triton,
    composed=Missing("only moe_ffn is composed of PyTorch's products."),
    cpu=cpu,
    reference=reference,
)


def _empty_outputs(call: Call, backend: str) -> tuple[Tensor, Tensor]:
    """out, in the shape of q, and log-sum-exp of the scores, q.shape[:-1], float32 or better."""
    wide = torch.promote_types(call.q.dtype, torch.float32)
    return call.q.new_empty(call.q.shape), call.q.new_empty(call.q.shape[:-1], dtype=wide)


ATTENTION = Operation(
    *("shared_attention", "attention", Call, BACKENDS, _empty_outputs),
    leaves=("q", "k", "v", "table"),
    keeps_output=True,
)
