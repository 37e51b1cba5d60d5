"""The torch.library operations vlmo::moe_ffn_fwd and vlmo::moe_ffn_bwd, and their backends."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._op import Operation
from . import cpu, reference
from .call import LISTS, Call
from .composed import backend as composed
from .cuda import backend as cuda
from .triton import backend as triton

# In the order of preference.
BACKENDS: dict[str, Any] = dict(
    cuda=cuda, triton=triton, composed=composed, cpu=cpu, reference=reference
)

# Backends that need the number of rows of each expert on the host.
COUNTING = ("composed",)


def _empty_outputs(call: Call, backend: str) -> tuple[Tensor, Tensor]:
    """y [T, D], and the pre-activation saved for the backward, in the backend's pre_shape."""
    y = call.x.new_empty((call.tokens, call.x.shape[1]), dtype=call.result_dtype)
    return y, call.x.new_empty(BACKENDS[backend].pre_shape(call), dtype=call.w1[0].dtype)


# A pre-activation that was not saved is empty, and the backward recomputes it.
MOE_FFN = Operation(
    *("moe_ffn", "moe_ffn", Call, BACKENDS, _empty_outputs),
    leaves=("x", *LISTS, "layer_scale", "streams"),
    added="residual",
    added_parts="residuals",
)
