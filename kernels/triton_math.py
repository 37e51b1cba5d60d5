"""Arithmetic of float32 that every Triton kernel shares, in as few instructions as it needs."""

from __future__ import annotations

import triton
import triton.language as tl

from vlmo.kernels import target

_INTERPRETED = tl.constexpr(target.interpreted())


@triton.jit
def term(a, b):
    """``a * b`` as a term of a sum over lanes: rounded before anything is added to it.

    Of a product and a sum compilers make one fused multiply-add. Two lanes that add each other's
    product would both round the other one's but not their own, so that lanes which should hold the
    same sum differ in its last bit, and which of them is stored is left to chance.
    """
    return tl.fma(a, b, 0.0)


@triton.jit
def reciprocal(x):
    """1 / x by one instruction, wrong by one unit in the last place at most; 0 above 2^126.

    A division takes nine, as it also serves numbers whose reciprocals are not normal.
    """
    if _INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
