"""The arguments of a call of shared_attention, in the form that every backend receives."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

LOG2_E = math.log2(math.e)  # kernels keep scores in base 2


class Call(NamedTuple):
    """The arguments of one call, in the order of the operation's schema."""

    q: Tensor  # [B, N, H, K], or [T, H, K] with offsets
    k: Tensor
    v: Tensor
    table: Tensor | None  # [entries, H]
    matrix: Tensor | None  # [M, M] int32, rows of table
    affine: Tensor | None  # [M, 4] int32, the affine form of matrix for regular keys
    short: Tensor | None  # [M, P] int16 copy of matrix; [0, 0] if it does not fit
    key_mask: Tensor | None  # [B, N] bool
    key_lengths: Tensor | None  # [B]
    offsets: Tensor | None  # [B + 1]
    max_length: int
    positions: Tensor | None  # q.shape[:-2]; rows of matrix
    causal: bool
    scale: float
    distinct: bool = False  # no two tokens of a sequence have the same of positions
