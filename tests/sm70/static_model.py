"""Static issue-slot model of SASS loops: no kernel is executed.

For each innermost loop, and for the loop around the tensor instructions: the instruction mix, the
sum of the stall counts, the cycles each unit needs per iteration of all resident warps, and from
those an upper bound of the tensor-pipe utilisation.

    python -m sm70.static_model kernel.cubin --threads 256 --smem 32768
"""

import argparse
import pathlib
from dataclasses import dataclass

from .disasm import disassemble
from .elf import Cubin
from .timing import PIPES, SCHEDULERS, classify, occupancy

L0_INSTRUCTION_CACHE = 12 * 1024  # bytes
SMS, FMA_PER_TENSOR_CYCLE = 80, 128


@dataclass
class Loop:
    """The static summary of one loop."""

    kernel: str
    first_pc: int
    last_pc: int
    instructions: int
    mix: dict  # pipe -> instructions
    stall_sum: int  # cycles of one warp for one iteration if nothing else delays it
    scoreboard_waits: int
    lsu_wavefronts: int  # per warp and iteration, without bank conflicts
    bounds: dict  # unit -> cycles per iteration of all resident warps
    warps_per_scheduler: int

    @property
    def limiter(self):
        return max(self.bounds, key=self.bounds.__getitem__)

    @property
    def tensor_bound(self):
        """Upper bound of the tensor-pipe utilisation, 0 to 1."""
        return self.bounds["tensor pipe"] / max(self.bounds.values())

    @property
    def exceeds_instruction_cache(self):
        return self.instructions * 16 > L0_INSTRUCTION_CACHE

    def tflops_bound(self, ghz=1.53):
        return self.tensor_bound * SMS * SCHEDULERS * FMA_PER_TENSOR_CYCLE * 2 * ghz / 1000


def main_loops(instructions):
    """[(first, last)] of innermost loops, and of loops with tensor instructions outside these."""
    found = set()
    for k, inst in enumerate(instructions):
        if inst.op == "BRA" and inst.target // 16 < k:
            found.add((inst.target // 16, k))

    def tensor(loop):
        return any(inst.op == "HMMA" for inst in instructions[loop[0] : loop[1] + 1])

    def nested(loop):
        return [x for x in found if x != loop and loop[0] <= x[0] and x[1] <= loop[1]]

    return sorted(
        x for x in found if not nested(x) or (tensor(x) and not any(map(tensor, nested(x))))
    )


def analyse_loop(kernel, instructions, first, last, warps):
    """The summary of a loop for `warps` resident warps per scheduler."""
    body = instructions[first : last + 1]
    count, busy = dict.fromkeys(PIPES, 0), dict.fromkeys(PIPES, 0)
    stall_sum = waits = wavefronts = 0
    for inst in body:
        pipe, cycles, _ = classify(inst)
        count[pipe] += 1
        busy[pipe] += cycles
        stall_sum += max(1, inst.control.stall)
        waits += bool(inst.control.wait)
        if pipe in ("SHARED", "GLOBAL"):
            wavefronts += max(1, inst.access_bytes // 4)
        elif pipe == "MISC":
            wavefronts += cycles
    bounds = {
        "tensor pipe": busy["TENSOR"] * warps,
        "issue slots": len(body) * warps,
        **{f"{p} pipe": busy[p] * warps for p in ("FMA", "ALU", "FP16", "XU")},
        "load/store unit": wavefronts * warps * SCHEDULERS,
        "stall counts of one warp": stall_sum,
    }
    return Loop(
        kernel,
        instructions[first].pc,
        instructions[last].pc,
        len(body),
        {k: v for k, v in count.items() if v},
        stall_sum,
        waits,
        wavefronts,
        bounds,
        warps,
    )


def analyse_loops(cubin, threads=256, smem=0, kernel=None):
    """[Loop] of a cubin (bytes, path or compile result); `smem`: dynamic shared memory per CTA."""
    image = getattr(cubin, "image", cubin)
    if not isinstance(image, bytes):
        image = pathlib.Path(image).read_bytes()
    elf, out = Cubin(image), []
    for name, instructions in disassemble(image).items():
        if kernel and name != kernel:
            continue
        resident = occupancy(elf.registers(name), threads, elf.static_shared(name) + smem)
        warps = max(1, resident * -(-threads // 32) // SCHEDULERS)
        out += [analyse_loop(name, instructions, a, b, warps) for a, b in main_loops(instructions)]
    return out


def main():
    parser = argparse.ArgumentParser(
        prog="python -m sm70.static_model", description=__doc__.splitlines()[0]
    )
    parser.add_argument("cubin", type=pathlib.Path)
    parser.add_argument("--kernel")
    parser.add_argument("--threads", type=int, default=256, help="threads per CTA")
    parser.add_argument("--smem", type=int, default=0, help="dynamic shared memory per CTA, bytes")
    parser.add_argument("--ghz", type=float, default=1.53)
    args = parser.parse_args()
    for loop in analyse_loops(args.cubin, args.threads, args.smem, args.kernel):
        mix = " ".join(f"{k}={v}" for k, v in loop.mix.items())
        print(
            f"{loop.kernel} loop 0x{loop.first_pc:x}-0x{loop.last_pc:x}: "
            f"{loop.instructions} instructions"
            f"{' (exceeds the L0 instruction cache)' if loop.exceeds_instruction_cache else ''}, "
            f"{loop.warps_per_scheduler} warps per scheduler"
        )
        print(
            f"  {mix}; stall sum {loop.stall_sum}; scoreboard waits {loop.scoreboard_waits}; "
            f"LSU wavefronts {loop.lsu_wavefronts}"
        )
        for name, cycles in sorted(loop.bounds.items(), key=lambda x: -x[1])[:4]:
            print(f"  {cycles:7d} cycles: {name}")
        if loop.bounds["tensor pipe"]:
            print(
                f"  tensor utilisation at most {loop.tensor_bound:.1%} "
                f"({loop.tflops_bound(args.ghz):.0f} TFLOP/s), limited by: {loop.limiter}"
            )


if __name__ == "__main__":
    main()
