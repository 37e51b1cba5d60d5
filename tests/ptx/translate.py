"""Translate PTX to the tables that the machine (machine.cpp) runs.

A register becomes an offset in a warp's register file, a constant the offset of a slot that holds
it, and an opcode with its modifiers the name of one of the machine's instructions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import numpy as np

from .flow import joins_of
from .text import WIDTHS, Kernel, Statement, Unsupported, in_braces, split

NEXT, BRANCH, BARRIER, EXIT = range(4)
SPECIALS = ("%tid.x", "%ctaid.x", "%nctaid.x", "%laneid")  # set by a launch
FIXED = dict.fromkeys(("%tid.y", "%tid.z", "%ctaid.y", "%ctaid.z"), 0)
FIXED |= {"%nctaid.y": 1, "%nctaid.z": 1}
SYMBOLS = {"global_smem": 0}  # addresses in shared memory
NONE = -1

ONE_OPERAND = "neg abs not ex2 lg2 rcp rsqrt sqrt tanh popc clz brev".split()
THREE_OPERANDS = "mad fma bfe prmt shf".split()
# Modifiers of a load or store without an effect in this emulator.
HINTS = {"v2", "v4", "v8", "cta", "shared", "L1::evict_last", "L1::evict_first", "L2::evict_first"}
MMA = {
    "m16n8k16.f32.f16.f16.f32": "mma.f16",
    "m16n8k16.f32.bf16.bf16.f32": "mma.bf16",
    "m16n8k8.f32.tf32.tf32.f32": "mma.tf32",
}
WGMMA_TYPES = ("f16", "bf16", "tf32")
ATOMIC_OPERATIONS = {("add", "u32"): 0, ("add", "s32"): 0, ("add", "u64"): 0, ("add", "f32"): 1}
ATOMIC_OPERATIONS |= {("exch", "b32"): 2, ("exch", "b64"): 2}
# Fields of a tensor's descriptor, in the order of the enumeration Field in tensor_copies.h
FIELDS = [
    *("global_address", "rank", "box_dim", "global_dim", "global_stride", "element_stride"),
    *("elemtype", "interleave_layout", "swizzle_mode", "fill_mode"),
]
# Whether a fence orders accesses to shared memory (1), to global memory (2) or to both.
PROXY_FENCES = {"fence.proxy.async": 3, "fence.proxy.async.global": 2}
PROXY_FENCES |= {f"fence.proxy.async.shared::c{scope}": 1 for scope in ("ta", "luster")}
ORDERS = ("relaxed", "acquire", "release", "acq_rel")


class Program:
    """A kernel as the machine's tables.

    Attributes:
        names: the names of the instructions.
        codes: per instruction: control flow, offset of the guard, whether it is negated, target,
            join, number of operands and their first index in ``pool``, number of registers that it
            accesses and their first index in ``pool``.
        pool: operands and registers of all instructions.
        registers: the initial contents of a warp's register file.
    """

    def __init__(self, kernel: Kernel, knows: Callable[[str], bool]) -> None:
        """Translate.

        Args:
            knows: whether the machine implements an instruction of a name.

        Raises:
            Unsupported: the machine lacks instructions; the message has every such line.
        """
        self.kernel = kernel
        self._knows = knows
        self._places: dict[str, int] = {}
        self._width_at: dict[int, int] = {}
        self._constants: dict[tuple[int, int], int] = {}
        self._values: list[tuple[int, int, int]] = []  # offset, value, width
        self._top = 0
        self._touched: list[int] = []  # registers of the current instruction
        self._prefixes = sorted(kernel.registers, key=len, reverse=True)
        self._joins = joins_of(kernel)
        self._offsets = {p.name: p.offset for p in kernel.parameters}
        self._nowhere = self._new(8)  # for results that are discarded
        for name in (*SPECIALS, *FIXED):
            self._places[name] = self._new(4)
        for name, value in FIXED.items():
            self._values.append((self._places[name], value, 4))
        self.names: list[str] = []
        self.pool: list[int] = []
        self._unsupported: dict[str, str] = {}
        codes = [self._checked_code(number) for number in range(len(kernel.statements))]
        if self._unsupported:
            found = self._unsupported.items()
            raise Unsupported("\n".join(f"{what} in {where}" for what, where in found))
        self.codes = np.array(codes, np.int32)
        self.registers = self._initial()
        self.specials = [self._places[name] for name in SPECIALS]

    # ---- offsets in the register file

    def _new(self, width: int) -> int:
        place = -(-self._top // 64) * 64
        self._top = place + (32 * width or 4)
        self._width_at[place] = width
        return place

    def _register(self, name: str) -> int:
        if name not in self._places:
            for prefix in self._prefixes:
                if re.fullmatch(re.escape(prefix) + r"\d*", name):
                    self._places[name] = self._new(self.kernel.registers[prefix])
                    break
            else:
                raise Unsupported(f"register {name}")
        self._touched.append(self._places[name])
        return self._places[name]

    def _width(self, register: str) -> int:
        return self._width_at[self._register(register)]

    def _value(self, text: str, width: int) -> int:
        """The offset of a register, or of a constant of ``width`` bytes (0: of a predicate)."""
        if text == "_":
            return self._nowhere
        if text.startswith("%"):
            if self._width(text) != width:
                raise Unsupported(f"register of {self._width(text)} bytes for one of {width}")
            return self._register(text)
        if text.startswith(("0f", "0d")):
            value = int(text[2:], 16)
        else:
            named = self._offsets.get(text, SYMBOLS.get(text))
            value = int(text.removesuffix("U"), 0) if named is None else named
        key = value % 2 ** (8 * max(width, 4)), width
        if key not in self._constants:
            self._constants[key] = place = self._new(width)
            self._values.append((place, value, width))
        return self._constants[key]

    def _values_of(self, texts: Iterable[str], width: int) -> list[int]:
        return [self._value(text, width) for text in texts]

    def _address(self, text: str, shared: bool) -> list[int]:
        """The register of an address in shared or global memory, or NONE, and the byte offset."""
        found = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if found is None:
            raise Unsupported(f"address {text}")
        base, offset = found[1], int(found[2] or "0", 0)
        if base in SYMBOLS and shared:
            return [NONE, SYMBOLS[base] + offset]
        return [self._value(base, 4 if shared else 8), offset]

    def _initial(self) -> np.ndarray:
        # Uninitialised registers hold a conspicuous value.
        registers = np.full(-(-self._top // 64) * 64 + 64, 0xA5, np.uint8)
        for place, value, width in self._values:
            if width == 0:
                registers[place : place + 4] = 255 if value else 0
            else:
                number = (value % 2 ** (8 * width)).to_bytes(width, "little")
                registers[place : place + 32 * width] = np.frombuffer(number * 32, np.uint8)
        return registers

    # ---- instructions

    def _checked_code(self, number: int) -> list[int]:
        statement = self.kernel.statements[number]
        try:
            return self._code(number, statement)
        except Unsupported as error:
            what = str(error)
        except (AssertionError, AttributeError, LookupError, TypeError, ValueError):
            what = f"operands or type of {statement.opcode}"
        self._unsupported.setdefault(what, f"line {statement.line}: {statement.text}")
        return []

    def _code(self, number: int, s: Statement) -> list[int]:
        self._touched.clear()
        flow, target, join = NEXT, NONE, NONE
        operands: list[int]
        if s.parts[0] == "bra":
            name, operands, flow = "bra", [], BRANCH
            target, join = self.kernel.labels[s.operands[0]], self._joins[number]
        elif s.parts[0] in ("ret", "exit"):
            name, operands, flow = "ret", [], EXIT
        elif s.opcode in ("bar.sync", "barrier.sync"):
            barrier, *threads = map(int, s.operands)
            name, operands, flow = "bar", [barrier, *(threads or [0])], BARRIER
        else:
            name, operands = self._plain(s)
        if not self._knows(name):
            raise Unsupported(f"instruction {name}")
        guard = NONE if s.guard is None else self._register(s.guard)
        begin = len(self.pool)
        self.names.append(name)
        self.pool += [*operands, *self._touched]
        counts = [len(operands), begin, len(self._touched), begin + len(operands)]
        return [flow, guard, s.negated, target, join, *counts]

    def _plain(self, s: Statement) -> tuple[str, list[int]]:
        family = getattr(self, f"_{s.parts[0]}", None)
        return family(s) if family else self._arithmetic(s)

    def _ld(self, s: Statement) -> tuple[str, list[int]]:
        if s.parts[1] == "param":
            return self._parameter(s)
        return self._access(s, memory=s.operands[1], registers=s.operands[0])

    def _st(self, s: Statement) -> tuple[str, list[int]]:
        return self._access(s, memory=s.operands[0], registers=s.operands[1])

    def _parameter(self, s: Statement) -> tuple[str, list[int]]:
        found = re.fullmatch(r"\[([%\w]+)(?:\+(\d+))?\]", s.operands[1])
        if found is None:
            raise Unsupported("address of a parameter")
        base, offset = found[1], int(found[2] or 0)
        if base.startswith("%"):  # LLVM may select one of two addresses
            address = [self._value(base, 8), offset]
        else:
            address = [NONE, self._offsets[base] + offset]
        to, type_ = s.operands[0], s.parts[-1]
        signed = int(type_.startswith("s"))
        place = self._register(to)
        return "ld.param", [*address, WIDTHS[type_], self._width(to), signed, place]

    def _access(self, s: Statement, memory: str, registers: str) -> tuple[str, list[int]]:
        what, space, *modifiers, type_ = s.parts
        space = space.removesuffix("::cta")
        if space not in ("global", "shared"):
            raise Unsupported(f"{space} memory")
        if re.search(r"evict", s.opcode) and len(s.operands) > 2:
            raise Unsupported("a cache policy")
        texts = in_braces(registers)
        # A register may be wider than the memory operand.
        width = self._width(texts[0]) if texts[0].startswith("%") else WIDTHS[type_]
        places = self._values_of(texts, width)
        operands = [*self._address(memory, space == "shared"), WIDTHS[type_], width]
        operands += [int(type_.startswith("s")), len(places), *places]
        order = sorted(m for m in modifiers if m not in HINTS and "::" not in m)
        if not order:
            return f"{what}.{space}", operands
        names: dict[tuple[str, ...], str] = {
            ("acquire", "gpu"): "ld.acquire",
            ("gpu", "relaxed"): "ld.relaxed",
        }
        if what != "ld" or tuple(order) not in names:
            raise Unsupported(f"{what} with {order}")
        return names[tuple(order)], operands

    def _atom(self, s: Statement) -> tuple[str, list[int]]:
        if "cta" in s.parts or any(part.startswith("shared") for part in s.parts):
            raise Unsupported("atomic operation within a CTA")
        order = next((part for part in s.parts if part in ORDERS), "relaxed")
        operation = ATOMIC_OPERATIONS.get((s.parts[-2], s.parts[-1]))
        if operation is None:
            raise Unsupported("operation")
        width = WIDTHS[s.parts[-1]]
        to, memory, value = s.operands
        return "atom", [
            *(*self._address(memory, shared=False), width, operation),
            *(int(order in ("acquire", "acq_rel")), int(order in ("release", "acq_rel"))),
            *(NONE if to == "_" else self._register(to), self._value(value, width)),
        ]

    def _red(self, s: Statement) -> tuple[str, list[int]]:
        return self._atom(s._replace(operands=("_", *s.operands)))

    def _cp(self, s: Statement) -> tuple[str, list[int]]:
        if s.opcode == "cp.async.commit_group":
            return s.opcode, []
        if s.opcode == "cp.async.wait_group":
            return s.opcode, [int(s.operands[0])]
        if s.parts[2] == "bulk":
            return self._bulk_copy(s)
        if not re.match(r"cp\.async\.c[ag]\.shared(::cta)?\.global", s.opcode):
            raise Unsupported("copy")
        to, source, size, *read = s.operands
        registers = self._values_of(read, 4) or [NONE]
        places = [*self._address(to, shared=True), *self._address(source, shared=False)]
        return "cp.async", [*places, int(size, 0), *registers]

    def _bulk_copy(self, s: Statement) -> tuple[str, list[int]]:
        # Copies to global memory are not implemented, so that there is nothing to wait for.
        if s.opcode in ("cp.async.bulk.commit_group", "cp.async.bulk.wait_group.read"):
            return "nothing", []
        form = r"cp\.async\.bulk\.tensor\.([1-5])d\.shared::c(ta|luster)\.global"
        found = re.fullmatch(form + r"\.mbarrier::complete_tx::bytes", s.opcode)
        if found is None or len(s.operands) != 3:
            raise Unsupported("copy")
        to, source, mbarrier = s.operands
        descriptor, coordinates = split(source.removeprefix("[").removesuffix("]"))
        registers = self._values_of(in_braces(coordinates), 4)
        assert len(registers) == int(found[1])
        places = [*self._address(to, shared=True), *self._address(mbarrier, shared=True)]
        return "cp.async.bulk.tensor", [
            *(*places, self._value(descriptor, 8), len(registers), *registers),
        ]

    def _mbarrier(self, s: Statement) -> tuple[str, list[int]]:
        name = re.sub(r"\.shared(::cta)?\.b64$", "", s.opcode)
        operands = list(s.operands)
        if name in ("mbarrier.arrive", "mbarrier.arrive.expect_tx"):
            if operands.pop(0) != "_":
                raise Unsupported("state of an mbarrier")
            memory, *values = operands
            registers = self._values_of(values, 4)
            expected = [registers.pop(0)] if name.endswith("expect_tx") else [NONE]
            places = [*self._address(memory, shared=True), *expected, *(registers or [NONE])]
            return "mbarrier.arrive", places
        if name == "mbarrier.try_wait.parity":  # a time limit has no effect
            complete, memory, parity, *_ = operands
            places = [*self._address(memory, shared=True), self._value(parity, 4)]
            return name, [*places, self._register(complete)]
        memory, *values = operands  # init, inval
        return name, [*self._address(memory, shared=True), *self._values_of(values, 4)]

    def _tensormap(self, s: Statement) -> tuple[str, list[int]]:
        if s.parts[1] == "cp_fenceproxy":
            to, source, size = s.operands
            spaces = s.parts[2:5]
            if spaces != ["global", "shared::cta", "tensormap::generic"] or int(size, 0) != 128:
                raise Unsupported("copy of a descriptor")
            return "tensormap.cp_fenceproxy", [
                *(*self._address(to, shared=False), *self._address(source, shared=False)),
            ]
        what, kind, field, space, *_, type_ = s.parts[1:]
        if (what, kind, space) != ("replace", "tile", "shared::cta"):
            raise Unsupported("change of a descriptor")
        memory, *index, value = s.operands
        return "tensormap.replace", [
            *(*self._address(memory, shared=False), FIELDS.index(field)),
            *(*(int(text, 0) for text in index or ["0"]), self._value(value, WIDTHS[type_])),
        ]

    def _elect(self, s: Statement) -> tuple[str, list[int]]:
        if s.opcode != "elect.sync" or int(s.operands[1], 0) not in (-1, 0xFFFFFFFF):
            raise Unsupported("choice of a lane")
        return s.opcode, [self._register(name) for name in s.operands[0].split("|")]

    def _setmaxnreg(self, s: Statement) -> tuple[str, list[int]]:
        return "nothing", []

    def _ldmatrix(self, s: Statement, memory: int = 1) -> tuple[str, list[int]]:
        count = int(next(part for part in s.parts if re.fullmatch(r"x[124]", part))[1:])
        if s.parts[-1] != "b16":
            raise Unsupported("matrices of other numbers than of 16 bits")
        registers = self._values_of(in_braces(s.operands[1 - memory]), 4)
        address = self._address(s.operands[memory], shared=True)
        return s.parts[0], [*address, count, int("trans" in s.parts), *registers]

    def _stmatrix(self, s: Statement) -> tuple[str, list[int]]:
        return self._ldmatrix(s, memory=0)

    def _mma(self, s: Statement) -> tuple[str, list[int]]:
        kind = ".".join([s.parts[3], *s.parts[6:]])
        if kind not in MMA:
            raise Unsupported(f"product {kind}")
        operands = [place for o in s.operands for place in self._values_of(in_braces(o), 4)]
        return MMA[kind], operands

    def _wgmma(self, s: Statement) -> tuple[str, list[int]]:
        if s.parts[1] == "wait_group":
            return "wgmma.wait_group", [int(s.operands[0])]
        if s.parts[1] == "fence":
            return "nothing", []
        if s.parts[1] == "commit_group":
            return "wgmma.commit_group", []
        shape, result, type_ = s.parts[4:7]
        columns = int(re.fullmatch(r"m64n(\d+)k\d+", shape)[1])  # type: ignore[index]
        sums, left, right, add, sign_left, sign_right, *across = s.operands
        if result != "f32" or (sign_left, sign_right) != ("1", "1"):
            raise Unsupported("product")
        in_registers = left.startswith("{")
        lie_across = [int(text) for text in across] or [0, 0]
        if in_registers and len(lie_across) == 1:
            lie_across = [0, *lie_across]
        by_register = add.startswith("%")
        places = self._values_of(in_braces(sums), 4)
        assert len(places) == columns // 2
        return "wgmma", [
            *(WGMMA_TYPES.index(type_), columns, int(in_registers), *lie_across),
            *((self._register(add), 1) if by_register else (NONE, int(add))),
            *self._values_of(in_braces(left), 4 if in_registers else 8),
            *(self._register(right), *places),
        ]

    def _prefetch(self, s: Statement) -> tuple[str, list[int]]:
        if s.opcode != "prefetch.global.L2":
            raise Unsupported("prefetch")
        return "prefetch", self._address(s.operands[0], shared=False)

    def _fence(self, s: Statement) -> tuple[str, list[int]]:
        if s.opcode in PROXY_FENCES:
            return "fence.proxy.async", [PROXY_FENCES[s.opcode]]
        if s.opcode == "fence.proxy.tensormap::generic.acquire.gpu":
            if int(s.operands[1], 0) != 128:
                raise Unsupported("fence of another size than that of a descriptor")
            return "fence.proxy.tensormap", self._address(s.operands[0], shared=False)
        if s.opcode.startswith("fence.mbarrier_init"):
            return "nothing", []
        raise Unsupported("fence")

    def _bar(self, s: Statement) -> tuple[str, list[int]]:
        if s.opcode == "bar.warp.sync" and int(s.operands[0], 0) in (-1, 0xFFFFFFFF):
            return s.opcode, []
        raise Unsupported("barrier")

    def _shfl(self, s: Statement) -> tuple[str, list[int]]:
        results = s.operands[0].split("|")
        valid = self._register(results[1]) if len(results) > 1 else NONE
        sources = self._values_of(s.operands[1:], 4)
        return f"shfl.{s.parts[2]}", [self._register(results[0]), valid, *sources]

    def _redux(self, s: Statement) -> tuple[str, list[int]]:
        return s.opcode, [self._register(s.operands[0]), self._value(s.operands[1], 4)]

    def _mov(self, s: Statement) -> tuple[str, list[int]]:
        to, source = s.operands
        if to.startswith("{"):
            parts, width = in_braces(to), self._width(source)
            each = width // len(parts)
            places = self._values_of(parts, each)
            return f"unpack.{8 * width}.{8 * each}", [*places, self._register(source)]
        width = WIDTHS[s.parts[1]]
        if source.startswith("{"):
            parts = in_braces(source)
            each = width // len(parts)
            places = self._values_of(parts, each)
            return f"pack.{8 * width}.{8 * each}", [self._register(to), *places]
        return s.opcode, [self._register(to), self._value(source, width)]

    def _cvta(self, s: Statement) -> tuple[str, list[int]]:
        if s.opcode not in ("cvta.global.u64", "cvta.to.global.u64"):
            raise Unsupported("address")
        return "mov.b64", [self._register(s.operands[0]), self._value(s.operands[1], 8)]

    def _cvt(self, s: Statement) -> tuple[str, list[int]]:
        to, *sources = s.operands
        into, source = s.parts[-2:]
        if re.fullmatch(r"[su]\d+", into) and re.fullmatch(r"[su]\d+", source):
            # Both registers may be wider than their types.
            return "cvt.integer", [
                *(self._register(to), WIDTHS[into], int(into[0] == "s"), self._width(to)),
                *(self._register(sources[0]), WIDTHS[source], int(source[0] == "s")),
                self._width(sources[0]),
            ]
        places = self._values_of(sources, WIDTHS[source])
        return s.opcode, [self._value(to, WIDTHS[into]), *places]

    def _setp(self, s: Statement) -> tuple[str, list[int]]:
        to, *sources = s.operands
        results = to.split("|")
        # Two results only for packed numbers, one for each; else the second is the complement.
        if len(results) != 1 + s.opcode.endswith("x2") or len(sources) != 2:
            raise Unsupported("comparison")
        places = self._values_of(sources, WIDTHS[s.parts[-1]])
        return s.opcode, [*self._values_of(results, 0), *places]

    def _selp(self, s: Statement) -> tuple[str, list[int]]:
        to, first, second, predicate = s.operands
        places = self._values_of((first, second), WIDTHS[s.parts[-1]])
        return s.opcode, [self._register(to), *places, self._register(predicate)]

    def _arithmetic(self, s: Statement) -> tuple[str, list[int]]:
        what, *modifiers, type_ = s.parts
        if type_ not in WIDTHS:
            raise Unsupported(f"instruction {s.opcode}")
        name, width, (to, *sources) = s.opcode, WIDTHS[type_], s.operands
        count = 1 if what in ONE_OPERAND else 3 if what in THREE_OPERANDS else 2
        if what in ("max", "min") and len(sources) == 3:  # since sm_100
            name, count = name.replace(what, what + "3", 1), 3
        if len(sources) != count:
            raise Unsupported(f"{s.opcode} with {len(sources)} operands")
        widths = [width] * count
        if what in ("shl", "shr"):
            widths[1] = 4
        elif what == "bfe":
            widths[1:] = [4, 4]
        elif what == "mad" and modifiers[:1] == ["wide"]:
            widths[2] = 2 * width
        elif modifiers[-1:] == ["f32"] and width == 2:  # the last operand is float32
            widths[-1] = 4
        places = [self._value(text, w) for text, w in zip(sources, widths, strict=True)]
        return name, [self._register(to), *places]
