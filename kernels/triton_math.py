"""Arithmetic of float32 that every Triton kernel shares."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def term(a, b):
    """``a * b`` as a term of a sum over lanes: rounded before anything is added to it.

    Of a product and a sum compilers make one fused multiply-add. Two lanes that add each other's
    product would both round the other one's but not their own, so that lanes which should hold the
    same sum differ in its last bit, and which of them is stored is left to chance.
    """
    return tl.fma(a, b, 0.0)
