"""The operation vlmo::routing_index, which groups token rows by expert, and its CUDA kernel.

The kernel is csrc/routing/routing_index.cu.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from vlmo import _C

from . import target

MAX_EXPERTS = 32  # lanes of the warp that scans the experts; kMaxExperts of the kernel
_MAX_INT32 = 2**31 - 1
_CUBIN = "routing_index"
_KERNEL = "routing_index_kernel"
_WARPS = 32  # of the only CTA, at most
_PARAMETERS = struct.Struct("3q2i")  # ids, rows, offsets; T, E


@torch.library.custom_op("vlmo::routing_index", mutates_args=())
def routing_index(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """rows ``[T]`` and offsets ``[E + 1]`` of a :class:`vlmo.kernels.routing.Grouping`; int32.

    Ids outside ``0..num_experts-1`` come behind all experts and belong to none.
    """
    group = launch if why_not_cuda(ids, num_experts) is None else group_rows
    return group(ids, num_experts)


@routing_index.register_fake
def _(ids: Tensor, num_experts: int):
    sizes = (ids.numel(), num_experts + 1)
    return tuple(ids.new_empty(size, dtype=torch.int32) for size in sizes)


def group_rows(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """:func:`routing_index` in plain PyTorch: any device, no synchronisation with the host."""
    experts = torch.arange(num_experts, device=ids.device)
    valid = (ids >= 0) & (ids < num_experts)
    rows = torch.where(valid, ids, num_experts).argsort(stable=True)
    counts = (ids[None, :] == experts[:, None]).sum(1)  # [E]
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return rows.int(), offsets.int()


def why_not(backend: str, ids: Tensor, num_experts: int) -> str | None:
    """One sentence that says why ``backend`` cannot group these rows, or None."""
    if backend == "reference":
        return None
    if backend == "cuda":
        return why_not_cuda(ids, num_experts)
    return {
        "triton": "the routing index has no Triton kernel.",
        "cpu": "the routing index is made by the reference on a CPU.",
    }[backend]


def why_not_cuda(ids: Tensor, num_experts: int) -> str | None:
    """One sentence that says why :func:`launch` cannot run, or None."""
    if ids.device.type != "cuda":
        return f"ids are on {ids.device}, not on a CUDA device."
    capability = target.compute_capability(ids.device)
    if capability is None:
        return f"{ids.device} is not an NVIDIA GPU."
    if _C.target_for(_CUBIN, *capability) is None:
        built = ", ".join(name for cubin, name in _C.cubins() if cubin == _CUBIN)
        return (
            f"{ids.device} is sm_{capability[0]}{capability[1]}; the kernel is built for {built}."
        )
    if ids.dtype != torch.int32:
        return f"ids are {ids.dtype}; the kernel reads int32."
    if not 1 <= num_experts <= MAX_EXPERTS:
        return f"{num_experts} experts; the kernel takes 1 to {MAX_EXPERTS}."
    if ids.numel() > _MAX_INT32:
        return f"{ids.numel()} tokens; the kernel counts them in int32."
    return _C.why_no_driver()


def launch(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """:func:`routing_index` as one CUDA kernel."""
    ids = ids.contiguous()
    num_tokens = ids.numel()
    rows, offsets = ids.new_empty(num_tokens), ids.new_empty(num_experts + 1)
    pointers = (tensor.data_ptr() for tensor in (ids, rows, offsets))
    _C.launch(
        _CUBIN,
        _KERNEL,
        grid=(1, 1, 1),
        block=(block_threads(num_tokens), 1, 1),
        shared_bytes=0,
        stream=torch.cuda.current_stream(ids.device).cuda_stream,
        device=ids.get_device(),
        args=_PARAMETERS.pack(*pointers, num_tokens, num_experts),
    )
    return rows, offsets


def block_threads(num_tokens: int) -> int:
    """Threads of the CTA: a warp for each 32 tokens, as far as they go."""
    return 32 * min(_WARPS, max(1, -(-num_tokens // 32)))
