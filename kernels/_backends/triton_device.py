"""Device functions that the Triton kernels of every operation share."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .. import target

# Up to Triton 3.9 the interpreter multiplies bfloat16 operands wrongly and float16 ones in float16.
INTERPRETED = tl.constexpr(target.interpreted())


@triton.jit
def dot(a, b, acc, C: tl.constexpr):
    """``a @ b + acc``, or ``a @ b`` if ``acc`` is None; ``C.precision`` applies to float32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=C.precision)


@triton.jit
def term(a, b):
    """``a * b`` as a term of a sum over lanes, rounded before it is added.

    Compilers contract a product and a sum to one fused multiply-add. In a butterfly reduction, each
    of two lanes would then round the other lane's product but not its own. Lanes that should hold
    the same sum would differ in the last bit, and it is undefined which of them is stored.
    """
    return tl.fma(a, b, 0.0)


@triton.jit
def reciprocal(x):
    """1 / x in one instruction, with an error of at most 1 ulp; 0 above 2^126.

    A division takes nine instructions, because it also handles subnormal reciprocals.
    """
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def prefetch(pointers):
    """Ask for the cache lines at valid addresses, so that a later load finds them in L2."""
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
            "=r,l",
            [pointers],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


# Triton specialises a kernel on whether an integer argument is 1 and on whether it is divisible by
# 16, and recompiles it when either changes. `do_not_specialize` prevents this, but not for an
# integer inside a tuple (Triton 3.4 to 3.9). Integers that vary between batches are therefore
# passed as odd numbers above 1.


def odd(number: Any) -> int:
    """Encode a number from 0 to 2^30 - 3 that is passed to a kernel inside a tuple."""
    return 2 * number + 3


@triton.jit
def from_odd(number):
    """Decode a number that :func:`odd` encoded."""
    return (number - 3) >> 1
