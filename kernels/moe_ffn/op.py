"""The torch.library operations vlmo::moe_ffn_* and vlmo::moe_linear_*, and their backends."""

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
    """y [T, O], and the pre-activation saved for the backward, in the backend's pre_shape."""
    y = call.x.new_empty(call.out, dtype=call.result_dtype)
    return y, call.x.new_empty(BACKENDS[backend].pre_shape(call), dtype=call.w2[0].dtype)


# A pre-activation that was not saved is empty, and the backward recomputes it.
MOE_FFN, MOE_LINEAR = (
    Operation(
        *(name, name, Call, BACKENDS, _empty_outputs),
        leaves=("x", *LISTS, "layer_scale", "streams"),
        added="residual",
        added_parts="residuals",
    )
    for name in ("moe_ffn", "moe_linear")
)
