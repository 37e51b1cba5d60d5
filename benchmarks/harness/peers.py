"""Peers: other libraries' products for routed layers, with their requirements.

The parts that these products lack (norm, scale and residual) are eager PyTorch around them. What
users prepare once is not timed: stacked weights, and the order of the tokens by expert, which all
layers share.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmo.kernels.target import compute_capability

HALVES = (torch.float16, torch.bfloat16)


class Rows(NamedTuple):
    """The tokens of all sequences by expert, in the forms that routed layers need."""

    ids: Tensor  # [T] int64, the expert of each token
    experts: Tensor  # [T] int64, sorted
    order: Tensor  # [T] int64, the token at each position of the sorted order
    ends: Tensor  # [E] int64, first position after each expert
    counts: list[int]  # number of tokens per expert

    @classmethod
    def of(cls, sequences: int, split: Sequence[int], device: torch.device) -> Rows:
        counts = [sequences * length for length in split]
        ids = torch.arange(len(split)).repeat_interleave(torch.tensor(split)).repeat(sequences)
        experts, order = ids.sort(stable=True)
        ends = torch.tensor(counts).cumsum(0)
        ids, experts, order, ends = (t.to(device) for t in (ids, experts, order, ends))
        return cls(ids, experts, order, ends, counts)


def why_not_installed(package: str) -> str | None:
    """The reason if pip has not installed a package, else None."""
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return f"{package} is not installed."
    return None


def why_not(
    package: str,
    module: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    capability: tuple[int, int],
) -> str | None:
    """The reason if an optional peer with 16-bit products cannot run here, else None.

    Args:
        package: its name in pip.
        module: the module to import.
        device: device on which it would run.
        dtype: dtype of its operands.
        capability: lowest compute capability that it has kernels for.
    """
    reason = why_not_installed(package)
    if reason is not None:
        return reason
    found = compute_capability(device)
    if found is None:
        return f"{package} needs an NVIDIA GPU."
    if found < capability:
        names = ("sm_{}{}".format(*pair) for pair in (capability, found))
        return "{} needs {} or newer; this GPU is {}.".format(package, *names)
    if dtype not in HALVES:
        name = str(dtype).removeprefix("torch.")
        return f"{package} computes in float16 and bfloat16; it may round {name} to TF32."
    try:
        importlib.import_module(module)
    except Exception as error:  # any error of a broken or older installation
        return f"{package} cannot be imported: {type(error).__name__}: {error}"
    return None


def why_not_grouped_mm(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason if PyTorch has no grouped product for this device and dtype, else None."""
    version = torch.__version__.split("+")[0]
    if grouped_mm() is None:
        return f"torch {version} has no grouped_mm."
    if device.type == "cpu":
        return None if hasattr(F, "grouped_mm") else f"torch {version} has it for GPUs only."
    capability = compute_capability(device)
    if capability is None or capability[0] not in (9, 10) or dtype != torch.bfloat16:
        return (
            "PyTorch's grouped_mm has a kernel for bfloat16 on sm_90 and sm_100 only; elsewhere it "
            "is a loop that waits for the GPU."
        )
    return None


def why_not_traced_grouped_mm(device: torch.device, dtype: torch.dtype) -> str | None:
    """The same for ``torch.compile``, which only supports bfloat16 grouped products."""
    if dtype != torch.bfloat16:
        return "torch.compile takes grouped_mm in bfloat16 only."
    return why_not_grouped_mm(device, dtype)


def grouped_mm() -> Any:
    """``torch.nn.functional.grouped_mm``, or its name before torch 2.10, or None."""
    return getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def scattermoe(rows: Rows) -> Callable[..., Tensor]:
    """``(x [T, D], w1 [E, F, D], b1 [E, F], w2 [E, D, F], b2 [E, D]) -> [T, D]`` by ScatterMoE.

    The first product gathers the tokens and leaves them sorted; the second scatters.
    """
    parallel_linear = importlib.import_module("scattermoe").parallel_linear
    routed = (1, rows.experts, rows.order, rows.ends)

    def feed_forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        h = parallel_linear(x, w1.mT, *routed, expert_biases=b1, grouped_out=True)
        return parallel_linear(F.gelu(h), w2.mT, *routed, expert_biases=b2, grouped_in=True)

    return feed_forward


def liger(rows: Rows, dtype: torch.dtype) -> Callable[..., Tensor]:
    """``(x [T, D], w1 [E, 2 I, D], w2 [E, D, I]) -> [T, D]``: SwiGLU by Liger's fused MoE.

    It sorts the tokens itself in every call, and synchronises with the GPU to get the number of
    tiles.
    """
    function = importlib.import_module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction
    index = rows.ids[:, None].to(torch.int32)
    weights = torch.ones(index.shape, dtype=dtype, device=index.device)

    def feed_forward(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        return function.apply(x, w1, w2, index, weights)

    return feed_forward


def quack(rows: Rows) -> Callable[..., Tensor]:
    """``(x [T, D], w1 [E, F, D], b1 [E, F], w2 [E, D, F], b2 [E, D]) -> [T, D]`` by QuACK.

    Tokens are sorted. GELU (tanh) is fused into the epilogue of the first product, and its gradient
    into the epilogue of the product with w2.
    """
    products = importlib.import_module("quack.gemm_interface")
    starts = F.pad(rows.ends, (1, 0)).to(torch.int32)

    def feed_forward(*operands: Tensor) -> Tensor:
        # Read here, because gradients are never recorded inside a Function.
        keeps = torch.is_grad_enabled()
        return _Quack.apply(products, starts, rows.counts, keeps, *operands)

    return feed_forward


class _Quack(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        products: Any,
        starts: Tensor,
        counts: list[int],
        keeps: bool,
        *operands: Tensor,
    ) -> Tensor:
        x, w1, b1, w2, b2 = operands
        pre, act = products.gemm_act(
            *(x, w1.mT),
            bias=b1,
            activation="gelu_tanh_approx",
            store_preact=keeps,
            cu_seqlens_m=starts,
        )
        if keeps:
            ctx.save_for_backward(x, w1, w2, pre)
        ctx.products, ctx.starts, ctx.counts = products, starts, counts
        return products.gemm(act, w2.mT, bias=b2, cu_seqlens_m=starts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        dy = gradients[0].contiguous()
        x, w1, w2, pre = ctx.saved_tensors
        gemm, starts = ctx.products.gemm, ctx.starts
        dpre, act = ctx.products.gemm_dact(
            dy, w2, pre, activation="gelu_tanh_approx", cu_seqlens_m=starts
        )
        dx = gemm(dpre, w1, cu_seqlens_m=starts)
        dw1 = gemm(dpre.T, x, cu_seqlens_k=starts)
        dw2 = gemm(dy.T, act, cu_seqlens_k=starts)
        db1, db2 = (torch.stack([part.sum(0) for part in t.split(ctx.counts)]) for t in (dpre, dy))
        return None, None, None, None, dx, dw1, db1, dw2, db2


why_not_scattermoe = functools.partial(why_not, "scattermoe", "scattermoe", capability=(8, 0))
why_not_liger = functools.partial(
    why_not, "liger-kernel", "liger_kernel.ops.fused_moe", capability=(8, 0)
)
why_not_quack = functools.partial(
    why_not, "quack-kernels", "quack.gemm_interface", capability=(9, 0)
)
