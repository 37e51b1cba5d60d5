"""Integers that Triton does not compile into a kernel.

Triton compiles a kernel anew where an integer that was not 1, or not divisible by 16, now is, or
the other way round. ``do_not_specialize`` keeps it from that, but not for an integer inside a tuple
(Triton 3.4 to 3.9). Those that differ from one batch to the next are passed as odd numbers above 1.
"""

from __future__ import annotations

import triton


def odd(number: int) -> int:
    """How a number from 0 to 2^30 - 3 is passed to a kernel inside a tuple."""
    return 2 * number + 3


@triton.jit
def from_odd(number):
    """The number that was given to :func:`odd`."""
    return (number - 3) >> 1
