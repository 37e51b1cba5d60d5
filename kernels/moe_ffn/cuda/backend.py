"""The CUDA backend of moe_ffn, for the tensor cores of sm_70 and sm_75: host side.

moe_linear has no kernel of its own: PyTorch multiplies the rows of each expert. Gate and value that
are separate tensors are concatenated in every call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._backends import cuda as cuda_target
from ..call import LISTS, Call, Facts, pre_shape, why_not_weight
from ..plan import Gradients
from ..reference import moe_ffn_gradients, moe_ffn_reference
from ..rows import rows_of
from . import arguments as host
from .backward_rows import launch_rows
from .backward_weights import launch_weights
from .forward import CUBIN, launch_forward

_ACTIVATIONS = ("gelu", "gelu_tanh", "swiglu", "geglu")


def why_not(device: torch.device, facts: Facts) -> str | None:
    """The reason why :func:`forward` cannot run, or None."""
    if facts.linear:
        return cuda_target.why_not(CUBIN, device, facts.dtype)
    if facts.activation not in _ACTIVATIONS:
        return f"its kernels have no activation {facts.activation!r}."
    if facts.sub_norm:
        return "its kernels have no sub_norm."
    if facts.streams:
        return "its kernels read all tokens from one tensor."
    if len(facts.hidden) > host.MAX_EXPERTS:
        return f"{len(facts.hidden)} experts; the kernels take at most {host.MAX_EXPERTS}."
    if facts.width % 8:
        return f"model dimension {facts.width} is not a multiple of 8, as loads of 16 bytes need."
    for size in facts.hidden:
        if size % 8:
            return f"hidden width {size} is not a multiple of 8, as loads of 16 bytes need."
    return why_not_weight(facts) or cuda_target.why_not(CUBIN, device, facts.dtype)


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """y [T, O], and the pre-activation in grouped order; one launch."""
    if not call.w1:
        return moe_ffn_reference(call), call.x.new_empty(0, 0)
    if call.split:
        call = _joined(call)
    residual = call.residual
    # A residual that the kernel cannot read is added afterwards.
    fused = residual is None or residual.dtype in (torch.float16, torch.float32)
    y_dtype = torch.float32 if not fused else (call.w2[0] if residual is None else residual).dtype
    y = call.x.new_empty(call.x.shape, dtype=y_dtype)
    pre = call.x.new_empty(pre_shape(call), dtype=torch.float16)
    if call.x.shape[0] > 0:
        launch_forward(call if fused else call._replace(residual=None), y, pre)
    if not fused:
        assert residual is not None
        y = residual + y.to(residual.dtype)
    return y, pre


def backward(dy: Tensor, pre: Tensor, call: Call, needs: Sequence[bool]) -> list[Tensor]:
    """The gradients flagged in ``needs``, in the order of the schema; the others are empty.

    There is one launch for the rows and, if parameters need gradients, one for these. A
    pre-activation that was not saved is recomputed first, by a launch of the forward kernel.
    """
    if not call.w1:
        return moe_ffn_gradients(dy, call, needs)
    if call.split:
        return _backward_of_pairs(dy, pre, call, needs)
    readable = host.readable_call(call)
    gradients = Gradients.empty(readable, needs)
    if len(call.x):
        if pre.numel() == 0:
            kept = readable._replace(save_pre=True, residual=None)
            pre = call.x.new_empty(pre_shape(kept), dtype=torch.float16)
            launch_forward(kept, None, pre)
        rows = rows_of(readable)
        made = launch_rows(dy, pre, readable, rows, gradients)
        if gradients.needed.sums:
            launch_weights(readable, rows, made, gradients)
    return gradients.result(call)


def _joined(call: Call) -> Call:
    """The call with gate and value of each expert in one tensor."""

    def join(tensors: Sequence[Tensor]) -> list[Tensor]:
        pairs = zip(tensors[::2], tensors[1::2], strict=True)
        return [torch.cat(pair) for pair in pairs]

    return call._replace(w1=join(call.w1), b1=join(call.b1))


def _backward_of_pairs(dy: Tensor, pre: Tensor, call: Call, needs: Sequence[bool]) -> list[Tensor]:
    """:func:`backward` of a call whose gates and values are separate tensors."""
    flags = iter(needs)
    of_joined = [next(flags)]
    wanted: dict[int, list[bool]] = {}  # by place in the result: of the gate and of the value
    for name in LISTS:
        parts = 2 if name in ("w1", "b1") else 1
        for _ in range(len(getattr(call, name)) // parts):
            own = [next(flags) for _ in range(parts)]
            if parts == 2:
                wanted[len(of_joined)] = own
            of_joined.append(any(own))
    of_joined += flags
    gradients: list[Tensor] = []
    for place, gradient in enumerate(backward(dy, pre, _joined(call), of_joined)):
        if place not in wanted:
            gradients.append(gradient)
        elif of_joined[place]:
            gradients += gradient.chunk(2)
        else:
            gradients += [gradient, gradient]
    return gradients
