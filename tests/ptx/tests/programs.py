"""Small PTX programs for the tests, and functions that run them."""

import numpy as np

from ptx.machine import Interleaving, Machine, Result

REGISTERS = {"p": "pred", "h": "b16", "r": "b32", "d": "b64"}
ONE_RUN = Interleaving(resident=8, limit=100_000)


def program(body: str, threads: int = 32, parameters: int = 1) -> str:
    """The PTX of a kernel whose parameters are pointers, loaded into %d100 and following.

    Registers: %p predicates, %h of 16 bits, %r of 32, %d of 64. %r99 is the thread index.
    """
    declared = ",\n".join(f"\t.param .u64 .ptr .global k_param_{n}" for n in range(parameters))
    registers = "\n".join(f"\t.reg .{type_} \t%{name}<200>;" for name, type_ in REGISTERS.items())
    loads = "\n".join(f"\tld.param.b64 %d{100 + n}, [k_param_{n}];" for n in range(parameters))
    return f"""
.visible .entry k(
{declared}
)
.reqntid {threads}
{{
{registers}
\tmov.u32 %r99, %tid.x;
{loads}
{body}
\tret;
$L__func_end0:
}}
"""


def run(
    text: str, *arrays: np.ndarray, grid: int = 1, shared: int = 1024, how: Interleaving = ONE_RUN
) -> Result:
    """Launch on arrays, which are changed in place."""
    arguments = [("*", array.ctypes.data) for array in arrays]
    buffers = {(array.ctypes.data, array.nbytes): None for array in arrays}
    return Machine(text, shared).launch(grid, arguments, buffers, how)


def findings(text: str, *arrays: np.ndarray, **options) -> set[str]:
    return {report.finding for report in run(text, *arrays, **options).reports}
