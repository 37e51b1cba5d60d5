"""What the Triton kernels of every operation ask of the machine and of PyTorch's settings."""

from __future__ import annotations

from importlib import metadata
from typing import Any, Protocol

import torch

from .. import target

OPERANDS = ("16-bit", "32-bit")  # kinds of operand that tile tables tell apart
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_OLDEST_TRITON = (3, 4)  # the first that takes a NamedTuple of constants


def _installed_triton() -> str | None:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return None


# Read once: Dynamo of torch 2.11 refuses to trace how it is found.
_TRITON = _installed_triton()


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """One sentence that says why no Triton kernel can run on ``device`` in ``dtype``, or None."""
    if _TRITON is None:
        return "Triton is not installed."
    if tuple(map(int, _TRITON.split(".")[:2])) < _OLDEST_TRITON:
        oldest = ".".join(map(str, _OLDEST_TRITON))
        return f"Triton {_TRITON} is older than {oldest}."
    if dtype not in _DTYPES:
        return f"it has no kernel for {str(dtype).removeprefix('torch.')}."
    if target.interpreted():
        return None
    if device.type != "cuda":
        return (
            f"{device.type} tensors need Triton's interpreter (TRITON_INTERPRET=1, for tests only)."
        )
    capability = target.compute_capability(device)
    if capability is None:
        return f"{device} is not an NVIDIA GPU."
    if capability < (8, 0):
        name = "sm_{}{}".format(*capability)
        return f"{device} is {name}; Triton has no tensor cores below sm_80."
    return None


def operands_of(dtype: torch.dtype) -> str:
    return "32-bit" if dtype == torch.float32 else "16-bit"


class Options(Protocol):
    """What a tile says of how its kernel is compiled."""

    @property
    def num_warps(self) -> int: ...

    @property
    def num_stages(self) -> int: ...


def compile_options(tile: Options) -> dict[str, Any]:
    """How a kernel is compiled for ``tile``: its warps and stages, and with fused multiply-adds.

    Triton 3.9 warns where the last is not said, as they will not be the default in Triton 3.10.
    """
    return dict(num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True)


def tf32_allowed() -> bool:
    """Whether PyTorch's own products of float32 may be rounded to TF32."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # since torch 2.9, where reading the other may raise
        return matmul.fp32_precision == "tf32"
    return matmul.allow_tf32
