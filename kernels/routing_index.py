"""The operation vlmo::routing_index, which groups token rows by expert, and its CUDA kernel.

The kernel is csrc/routing/routing_index.cu.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from vlmo import _C

from ._backends import cuda as cuda_target

MAX_EXPERTS = 32  # lanes of the warp that scans the experts; kMaxExperts of the kernel
_MAX_INT32 = 2**31 - 1
_CUBIN = "routing_index"
_KERNEL = "routing_index_kernel"
_WARPS = 32  # upper bound of the warps of the single CTA


class _Argument(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("ids", "rows", "offsets")),
        *((name, ctypes.c_int32) for name in ("num_tokens", "num_experts")),
    ]


@torch.library.custom_op("vlmo::routing_index", mutates_args=())
def routing_index(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """rows ``[T]`` and offsets ``[E + 1]`` of a :class:`vlmo.kernels.routing.Grouping`; int32.

    Rows with ids outside ``0..num_experts-1`` come after those of all experts.
    """
    group = launch if why_not_cuda(ids, num_experts) is None else group_rows
    return group(ids, num_experts)


@routing_index.register_fake
def _(ids: Tensor, num_experts: int):
    sizes = (ids.numel(), num_experts + 1)
    return tuple(ids.new_empty(size, dtype=torch.int32) for size in sizes)


def group_rows(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """:func:`routing_index` in plain PyTorch, for any device; never synchronises with the host."""
    experts = torch.arange(num_experts, device=ids.device)
    valid = (ids >= 0) & (ids < num_experts)
    rows = torch.where(valid, ids, num_experts).argsort(stable=True)
    counts = (ids[None, :] == experts[:, None]).sum(1)  # [E]
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return rows.int(), offsets.int()


def why_not(backend: str, ids: Tensor, num_experts: int) -> str | None:
    """The reason why ``backend`` cannot group these rows, or None."""
    if backend == "reference":
        return None
    if backend == "cuda":
        return why_not_cuda(ids, num_experts)
    return {
        "triton": "the routing index has no Triton kernel.",
        "composed": "only moe_ffn is composed of PyTorch's products.",
        "cpu": "the routing index is made by the reference on a CPU.",
    }[backend]


def why_not_cuda(ids: Tensor, num_experts: int) -> str | None:
    """The reason why :func:`launch` cannot run, or None."""
    if reason := cuda_target.why_not_built(_CUBIN, ids.device):
        return reason
    if ids.dtype != torch.int32:
        return f"ids are {ids.dtype}; the kernel reads int32."
    if not 1 <= num_experts <= MAX_EXPERTS:
        return f"{num_experts} experts; the kernel takes 1 to {MAX_EXPERTS}."
    if ids.numel() > _MAX_INT32:
        return f"{ids.numel()} tokens; the kernel counts them in int32."
    return _C.why_no_driver()


def launch(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """:func:`routing_index` by the CUDA kernel."""
    ids = ids.contiguous()
    num_tokens = ids.numel()
    rows, offsets = ids.new_empty(num_tokens), ids.new_empty(num_experts + 1)
    tensors = (ids, rows, offsets)
    argument = _Argument(*(tensor.data_ptr() for tensor in tensors), num_tokens, num_experts)
    cuda_target.launch(
        *(_CUBIN, _KERNEL, ids.device, 1, block_threads(num_tokens), 0, argument, tensors)
    )
    return rows, offsets


def block_threads(num_tokens: int) -> int:
    """Threads of the CTA: one warp per 32 tokens, up to a limit."""
    return 32 * min(_WARPS, max(1, -(-num_tokens // 32)))
