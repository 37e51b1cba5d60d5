"""Device functions that the Triton kernels of every operation share."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .. import target

# The interpreter multiplies 16-bit operands wrongly (bfloat16) or as float16 (both up to 3.9).
INTERPRETED = tl.constexpr(target.interpreted())


@triton.jit
def dot(a, b, acc, C: tl.constexpr):
    """``a @ b + acc``, or without ``acc`` if that is None; ``C.precision`` is that of float32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=C.precision)


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
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


# Triton compiles a kernel anew where an integer that was not 1, or not divisible by 16, now is, or
# the other way round. `do_not_specialize` keeps it from that, but not for an integer inside a tuple
# (Triton 3.4 to 3.9). Those that differ from one batch to the next are passed as odd numbers above
# 1.


def odd(number: Any) -> int:
    """How a number from 0 to 2^30 - 3 is passed to a kernel inside a tuple."""
    return 2 * number + 3


@triton.jit
def from_odd(number):
    """The number that was given to :func:`odd`."""
    return (number - 3) >> 1
