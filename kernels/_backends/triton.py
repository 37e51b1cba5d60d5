"""Hardware checks and PyTorch settings that the Triton kernels of all operations share."""

from __future__ import annotations

from importlib import metadata
from typing import Any, Protocol

import torch

from .. import target

OPERANDS = ("16-bit", "32-bit")  # kinds of operand that have their own rows in tile tables
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_OLDEST_TRITON = (3, 4)  # the first version that accepts a NamedTuple of constants
_DESCRIPTORS = (3, 6)  # the first version whose tensor descriptors are tested here


def _installed_triton() -> str | None:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return None


# Read once at import: Dynamo of torch 2.11 cannot trace the call.
_TRITON = _installed_triton()


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why no Triton kernel can run on ``device`` in ``dtype``, or None."""
    if _TRITON is None:
        return "Triton is not installed."
    if _version(_TRITON) < _OLDEST_TRITON:
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


def _version(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")[:2]))


def has_descriptors() -> bool:
    """Whether the installed Triton is recent enough for tensor descriptors."""
    return _TRITON is not None and _version(_TRITON) >= _DESCRIPTORS


def require_descriptors() -> None:
    """Raise NotImplementedError without a Triton that :func:`has_descriptors`."""
    if not has_descriptors():
        oldest = ".".join(map(str, _DESCRIPTORS))
        raise NotImplementedError(
            f"tiles with descriptors=True need Triton {oldest}, and {_TRITON} is installed."
        )


def operands_of(dtype: torch.dtype) -> str:
    return "32-bit" if dtype == torch.float32 else "16-bit"


class Options(Protocol):
    """The compile options that a tile specifies."""

    @property
    def num_warps(self) -> int: ...

    @property
    def num_stages(self) -> int: ...


def compile_options(tile: Options) -> dict[str, Any]:
    """Compile options for ``tile``: its warps and stages, and fused multiply-adds.

    Triton 3.9 warns unless the last is explicit, because Triton 3.10 changes its default to off.
    """
    return dict(num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True)


def tf32_allowed() -> bool:
    """Whether PyTorch's settings allow float32 matrix products in TF32."""
    matmul = torch.backends.cuda.matmul
    # Since torch 2.9, where reading allow_tf32 may raise.
    precision = getattr(matmul, "fp32_precision", None)
    return matmul.allow_tf32 if precision is None else precision == "tf32"
