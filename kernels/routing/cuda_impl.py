"""The routing index as one CUDA kernel (csrc/routing/routing_index.cu)."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from vlmo import _C
from vlmo.kernels import target

MAX_EXPERTS = 32  # lanes of the warp that scans the experts; kMaxExperts of the kernel
_MAX_INT32 = 2**31 - 1
_CUBIN = "routing_index"
_KERNEL = "routing_index_kernel"
_WARPS = 32  # of the only CTA, at most
_PARAMETERS = struct.Struct("5q3i")  # ids, rows, offsets, tiles, num_tiles; T, E, tile


def why_not(ids: Tensor, num_experts: int, tile: int) -> str | None:
    """One sentence that says why :func:`index` cannot run, or None."""
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
    if not 0 < tile <= _MAX_INT32:
        return f"tiles of {tile} rows; the kernel takes 1 to {_MAX_INT32}."
    if ids.numel() > _MAX_INT32:
        return f"{ids.numel()} tokens; the kernel counts them in int32."
    return _C.why_no_driver()


def index(ids: Tensor, num_experts: int, tile: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """rows [T], offsets [E + 1], tiles [ceil(T / tile) + E, 2], num_tiles [1]; all int32.

    Ids outside ``0..num_experts-1`` come behind all experts and belong to no tile.
    """
    ids = ids.contiguous()
    num_tokens = ids.numel()
    max_tiles = -(-num_tokens // tile) + num_experts

    rows, offsets, tiles, num_tiles = (
        ids.new_empty(shape) for shape in (num_tokens, num_experts + 1, (max_tiles, 2), 1)
    )
    pointers = (tensor.data_ptr() for tensor in (ids, rows, offsets, tiles, num_tiles))
    _C.launch(
        _CUBIN,
        _KERNEL,
        grid=(1, 1, 1),
        block=(block_threads(num_tokens), 1, 1),
        shared_bytes=0,
        stream=torch.cuda.current_stream(ids.device).cuda_stream,
        device=ids.get_device(),
        args=_PARAMETERS.pack(*pointers, num_tokens, num_experts, tile),
    )
    return rows, offsets, tiles, num_tiles


def block_threads(num_tokens: int) -> int:
    """Threads of the CTA: a warp for each 32 tokens, as far as they go."""
    return 32 * min(_WARPS, max(1, -(-num_tokens // 32)))
