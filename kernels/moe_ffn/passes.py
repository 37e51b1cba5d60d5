"""The passes over an expert's rows between the products of moe_ffn on the CPU.

Each function reads and writes every row once, by a C++ kernel (``csrc/cpu/rows.h``), computes in
float32 and rounds its results once. A tensor ``[T, D]`` has a row for every token; the kernels find
those of the expert, so that no tensor is gathered or scattered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmo import _C

from .._backends import cpu as cpu_target


@dataclass(frozen=True)
class ExpertRows:
    """The rows of one expert: the same run of every sequence, or arbitrary rows.

    Attributes:
        first: number of rows of all previous experts.
        count: number of rows of this expert.
        run: length of a sequence, start and length of the run; zeros with an index.
        index: ``[count]`` int32, the tokens; None with a run.
    """

    first: int
    count: int
    run: tuple[int, int, int]
    index: Tensor | None = None

    @classmethod
    def every(cls, count: int) -> ExpertRows:
        """All rows of a tensor that has only those of the expert."""
        return cls(0, count, (1, 0, 1))

    def of(self, t: Tensor) -> Tensor:
        """Read ``[count, ...]`` from ``[T, ...]``; a view if the rows are contiguous."""
        if self.index is not None:
            return t.index_select(0, self.index)
        period, start, length = self.run
        return t.unflatten(0, (-1, period))[:, start : start + length].flatten(0, 1)


def norm(
    rows: ExpertRows,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kind: str,
    eps: float,
    out: Tensor,
) -> tuple[Tensor | None, Tensor]:
    """Write LayerNorm or RMSNorm of x ``[T, D]`` to ``out [count, D]``.

    Returns:
        The mean (None for RMSNorm) and 1 / deviation of each row.
    """
    mean = _floats(x, rows.count) if kind == "layer" else None
    deviation = _floats(x, rows.count)
    matrices, vectors = dict(x=x, normed=out), dict(weight=weight, bias=bias)
    _run("norm", rows, matrices, vectors | dict(mean=mean, deviation=deviation), eps=eps)
    return mean, deviation


def norm_backward(
    rows: ExpertRows,
    d: Tensor,  # [count, D], the gradient of norm(x)
    x: Tensor,  # [T, D]
    statistics: tuple[Tensor | None, Tensor],  # of norm
    weight: Tensor,
    dx: Tensor | None,  # [T, D], written unless None
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias, ``[D]`` float32."""
    dweight, dbias = _floats(d, d.shape[1]), _floats(d, d.shape[1])
    mean, deviation = statistics
    vectors = dict(weight=weight, mean=mean, deviation=deviation)
    _run("norm_backward", rows, dict(d=d, x=x, dx=dx), vectors, sums=(dweight, dbias))
    return dweight, dbias


def add_branch(
    rows: ExpertRows,
    y: Tensor,  # [T, D], written
    branch: Tensor,  # [count, D]
    residual: Tensor | None,  # [T, D]
    scale: Tensor | None,  # [D]
    token_scale: Tensor | None,  # [T]
    bias: Tensor | None = None,  # [D]
) -> None:
    """Write residual + token_scale * scale * (branch + bias)."""
    matrices = dict(y=y, branch=branch, residual=residual)
    _run("branch", rows, matrices, dict(bias=bias, scale=scale, token_scale=token_scale))


def branch_backward(
    rows: ExpertRows,
    dy: Tensor,  # [T, D]
    branch: Tensor | None,  # [count, D], for the gradient of scale
    scale: Tensor | None,
    token_scale: Tensor | None,
    out: Tensor,  # [count, D], the gradient of branch, written
) -> tuple[Tensor, Tensor]:
    """The sum of ``out`` over the rows, and the gradient of scale (zeros without branch)."""
    total, dscale = _floats(out, out.shape[1]), _floats(out, out.shape[1])
    vectors = dict(scale=scale, token_scale=token_scale)
    _run("branch_backward", rows, dict(dy=dy, branch=branch, d=out), vectors, sums=(total, dscale))
    return total, dscale


def column_sums(d: Tensor) -> Tensor:
    """``d.sum(0)`` in float32."""
    total = _floats(d, d.shape[1])
    _run("column_sums", ExpertRows.every(len(d)), dict(d=d), {}, sums=(total,))
    return total


def _floats(like: Tensor, count: int) -> Tensor:
    """An uninitialised vector, whatever the default dtype and device are."""
    return like.new_empty(count, dtype=torch.float32)


_MATRICES = ("x", "residual", "y", "dy", "dx", "normed", "branch", "d")
_VECTORS = ("weight", "bias", "scale", "token_scale", "mean", "deviation")


def _run(
    kernel: str,
    rows: ExpertRows,
    matrices: Mapping[str, Tensor | None],
    vectors: Mapping[str, Tensor | None],
    eps: float = 0.0,
    sums: tuple[Tensor, ...] = (),
) -> None:
    if not rows.count:
        for t in sums:
            t.zero_()
        return
    columns = next(iter(t.shape[1] for t in matrices.values() if t is not None))
    if rows.index is None:
        tokens = (0, *rows.run)
    else:
        tokens = (rows.index.data_ptr(), 0, 0, 0)
    _C.rows(
        kernel,
        cpu_target.instructions(),
        torch.get_num_threads(),
        (rows.count, columns),
        tokens,
        [_matrix(matrices.get(name)) for name in _MATRICES],
        [_address(vectors.get(name)) for name in _VECTORS],
        eps,
        [sums[i].data_ptr() if i < len(sums) else 0 for i in range(2)],
    )


def _matrix(t: Tensor | None) -> tuple[int, int, int]:
    """Address, type and stride of the rows of a matrix with adjacent columns."""
    if t is None:
        return 0, 0, 0
    assert t.stride(1) == 1 or t.shape[1] == 1
    return t.data_ptr(), cpu_target.TYPES[t.dtype], t.stride(0)


def _address(t: Tensor | None) -> int:
    """The address of a contiguous float32 vector."""
    if t is None:
        return 0
    assert t.dtype == torch.float32 and t.is_contiguous()
    return t.data_ptr()
