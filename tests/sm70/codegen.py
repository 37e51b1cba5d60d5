"""Translate sm_70 SASS to C++.

Every instruction becomes a call of a C++ function with its registers and constants as arguments.
The interpreter loop is in runtime.cpp. Three tables define the opcodes:

  EXPRESSIONS  one 32-bit result per lane, given as a C++ expression with operand placeholders
  HANDLERS     functions, registered with @opcode, that return a C++ statement
  IGNORED      instructions with no effect in this model

Placeholders name an operand by position: {u1} unsigned, {s1} signed, {f1} float, {d1} double,
{p3} predicate.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from .disasm import PT, Instruction

RZ = 255

IGNORED = {"NOP", "ERRBAR", "CCTL", "CCTLL", "DEPBAR", "PREEXIT", "BPT"}

EXPRESSIONS = {
    "MOV": "{u1}",
    "MOV32I": "{u1}",
    "SEL": "{p3} ? {u1} : {u2}",
    "FSEL": "FB({p3} ? {f1} : {f2})",
    "PRMT": "prmt({u1}, {u2}, {u3})",
    "POPC": "__builtin_popcount({u1})",
    "BREV": "bit_reverse({u1})",
    "IABS": "std::abs({s1})",
}

COMPARE = {"LT": "<", "EQ": "==", "LE": "<=", "GT": ">", "NE": "!=", "GE": ">="}
ROUNDING = {"RZ": "FE_TOWARDZERO", "RM": "FE_DOWNWARD", "RP": "FE_UPWARD"}
ROUND_FUNCTION = {"TRUNC": "trunc", "FLOOR": "floor", "CEIL": "ceil"}
C_TYPE = {
    "U8": "u8",
    "S8": "s8",
    "U16": "u16",
    "S16": "s16",
    "U32": "u32",
    "S32": "s32",
    "U64": "u64",
    "S64": "s64",
}

SPECIAL_REGISTERS = {
    "SRZ": "0u",
    "SR_TID.X": "w.tid[0][l]",
    "SR_TID.Y": "w.tid[1][l]",
    "SR_TID.Z": "w.tid[2][l]",
    "SR_CTAID.X": "c.ctaid[0]",
    "SR_CTAID.Y": "c.ctaid[1]",
    "SR_CTAID.Z": "c.ctaid[2]",
    "SR_LANEID": "(u32)l",
    "SR_WARPID": "(u32)w.id",
    "SR_VIRTID": "0u",
    "SR_SMID": "0u",
    "SR_VIRTUALSMID": "0u",
    "SR_CLOCKLO": "(u32)w.count",
    "SR_CLOCKHI": "(u32)(w.count >> 32)",
    "SR_GLOBALTIMERLO": "(u32)w.count",
    "SR_GLOBALTIMERHI": "(u32)(w.count >> 32)",
    "SR_EQMASK": "1u << l",
    "SR_LTMASK": "(1u << l) - 1",
    "SR_LEMASK": "(2u << l) - 1",
    "SR_GTMASK": "~((2u << l) - 1)",
    "SR_GEMASK": "~((1u << l) - 1)",
}

HANDLERS: dict[str, Callable] = {}


class Unsupported(Exception):
    """A form of an instruction that has no translation."""


@dataclass
class Unimplemented:
    """An instruction the emulator cannot execute."""

    opcode: str
    pc: int
    text: str
    reason: str = ""

    def __str__(self):
        return f"{self.opcode} at pc 0x{self.pc:x}: {self.text}" + (
            f"  ({self.reason})" if self.reason else ""
        )


@dataclass
class Translation:
    """Generated C++ and the instructions that could not be translated."""

    source: str
    unimplemented: list = field(default_factory=list)


def opcode(*names):
    """Register a handler for opcodes."""

    def register(function):
        HANDLERS.update(dict.fromkeys(names, function))
        return function

    return register


# ------------------------------------------------------------------------------------ operands


def is_register(text):
    return re.match(r"^[-~|]*R(\d+|Z)\b", text) is not None


def is_predicate(text):
    return re.match(r"^!?P(\d|T)$", text) is not None


def is_float_literal(text):
    return re.match(r"^[+-]?(\d|INF|QNAN|SNAN)", text) is not None and not re.match(
        r"^[+-]?0x", text
    )


def register_number(text):
    m = re.search(r"R(\d+|Z)", text)
    if not m:
        raise Unsupported(f"register expected, got {text}")
    return RZ if m.group(1) == "Z" else int(m.group(1))


def predicate_number(text):
    m = re.match(r"^!?P(\d|T)$", text)
    if not m:
        raise Unsupported(f"predicate expected, got {text}")
    return PT if m.group(1) == "T" else int(m.group(1))


@dataclass
class Address:
    """[register * scale + offset]"""

    register: int = RZ
    offset: int = 0
    scale: int = 1


def parse_address(text):
    m = re.match(r"^\[(.*)\]$", text)
    if not m:
        raise Unsupported(f"address expected, got {text}")
    out = Address()
    for token in re.findall(r"[+-]?[^+-]+", m.group(1)):
        sign, token = (-1 if token.startswith("-") else 1), token.lstrip("+-")
        if token.startswith("R"):
            out.register = register_number(token)
            if m := re.search(r"\.(.+)$", token):
                if m.group(1) not in ("X4", "X8", "X16"):
                    raise Unsupported(f"address {text}")
                out.scale = int(m.group(1)[1:])
        else:
            out.offset += sign * int(token, 16)
    return out


class Translator:
    """Operand access and code fragments for one instruction."""

    def __init__(self, inst: Instruction, previous=None):
        self.inst = inst
        self.previous = previous  # preceding instruction, if it is the only predecessor
        self.op, self.mods = inst.op, inst.mods
        self.ops = (
            self._merge_half_literals(inst.operands)
            if inst.op.startswith("H")
            else list(inst.operands)
        )

    @staticmethod
    def _merge_half_literals(operands):
        """A packed half2 immediate is printed as two literals; keep one of them."""
        out, skip = [], False
        for text in operands:
            if skip:
                skip = False
            else:
                out.append(text)
                skip = is_float_literal(text)
        return out

    def has(self, *mods):
        return any(m in self.mods for m in mods)

    def first(self, table, default=None):
        """First modifier that is a key of `table`."""
        return next((m for m in self.mods if m in table), default)

    def text(self, operand):
        """The text of an operand that is given by position or as text."""
        if isinstance(operand, str):
            return operand
        if operand >= len(self.ops):
            raise Unsupported(f"operand {operand} missing")
        return self.ops[operand]

    # --- sources

    def word(self, operand, part=0):
        """32-bit source without its sign modifier; part 1 is the upper register of a pair."""
        text = self.text(operand).strip("-~|")
        if text.startswith("R"):
            if not re.match(r"R(\d+|Z)$", text):
                raise Unsupported(f"operand selector of {text}")
            n = register_number(text)
            return "0u" if n == RZ else f"R[{n + part}][l]"
        if m := re.match(r"c\[0x([0-9a-f]+)\]\[0x([0-9a-f]+)\]$", text):
            return f"constant({int(m.group(1), 16)}, {int(m.group(2), 16) + 4 * part}u)"
        if re.match(r"^0x[0-9a-f]+$", text):
            return f"{int(text, 16) >> 32 * part & 0xFFFFFFFF}u"
        if is_float_literal(text):
            return "0u" if part else f"{self.inst.immediate}u"
        raise Unsupported(f"operand {text}")

    def u32(self, operand, part=0):
        """32-bit integer source as u32."""
        text = self.text(operand)
        if re.match(r"^-0x", text):
            return f"{(-int(text[1:], 16) >> 32 * part) & 0xFFFFFFFF}u"
        out = self.word(text, part)
        if "|" in text:
            out = f"(u32)std::abs((s32){out})"
        if text.startswith("-"):
            out = f"(0u - {out})"
        if text.startswith("~"):
            out = f"(~{out})"
        return out

    def s32(self, operand):
        return f"(s32)({self.u32(operand)})"

    def u64(self, operand):
        text = self.text(operand)
        if text.strip("-") == "RZ":
            return "0ull"
        out = f"pair({self.word(text)}, {self.word(text, 1)})"
        return f"(0ull - {out})" if text.startswith("-") else out

    def predicate(self, operand):
        text = self.text(operand)
        p = f"P[{predicate_number(text)}][l]"
        return f"({p} ^ 1u)" if text.startswith("!") else p

    def _signed(self, text, value, absolute):
        if "|" in text:
            value = f"{absolute}({value})"
        return f"(-{value})" if text.startswith("-") else value

    def f32(self, operand):
        """Float source; denormals are flushed with .FTZ."""
        text = self.text(operand)
        value = f"BF({self.word(text)})"
        if not is_float_literal(text):
            value = self._signed(text, value, "fabsf")
        return f"flush({value})" if self.has("FTZ") else value

    def f64(self, operand):
        text = self.text(operand)
        if is_float_literal(text):
            return f"BD((u64){self.inst.immediate}u << 32)"
        return self._signed(text, f"BD({self.u64(text.strip('-|'))})", "fabs")

    def half(self, operand, which):
        """Half `which` of a packed source, as float."""
        text = self.text(operand)
        if is_float_literal(text):
            return f"HF({self.inst.immediate >> 16 * which & 0xFFFF}u)"
        if m := re.search(r"\.H(\d)_H\d", text):
            which = int(m.group(1))
        if ".F32" in text:  # a float32 register, converted to half precision
            value = f"HF(round_half(BF({self.word(text.replace('.F32', ''))}), FE_TOWARDZERO))"
            return self._signed(text, value, "fabsf")
        word = self.word(re.sub(r"\.H\d_H\d", "", text))
        return self._signed(text, f"HF(({word} >> {16 * which}) & 0xffffu)", "fabsf")

    def expand(self, template):
        """Fill the operand placeholders of an expression."""
        kinds = {"u": self.u32, "s": self.s32, "f": self.f32, "d": self.f64, "p": self.predicate}
        return re.sub(r"\{([usfdp])(\d)\}", lambda m: kinds[m.group(1)](int(m.group(2))), template)

    # --- results

    def put(self, operand, value, before=""):
        """Write a 32-bit result in all active lanes."""
        n = register_number(self.text(operand))
        return "" if n == RZ else f"LANES {{ {before} SETR({n}, {value}); }}"

    def put64(self, operand, value, before=""):
        """Write a 64-bit result to a register pair."""
        n = register_number(self.text(operand))
        if n == RZ:
            return ""
        return (
            f"ACTIVE {{ {before} u64 v64 = {value}; R[{n}][l] = (u32)v64;"
            f" R[{n + 1}][l] = (u32)(v64 >> 32); }}"
        )

    def assign(self, operand, value):
        """Assignment to a register, for use inside an ACTIVE loop."""
        n = register_number(self.text(operand))
        return "" if n == RZ else f"R[{n}][l] = {value};"

    def assign_predicate(self, operand, value):
        n = predicate_number(self.text(operand))
        return "" if n == PT else f"P[{n}][l] = {value};"

    def float_result(self, value):
        if self.has("SAT"):
            value = f"saturate({value})"
        return f"FB(flush({value}))" if self.has("FTZ") else f"FB({value})"

    def split_predicates(self, start):
        """(carry-out predicates that follow the destination, remaining operands)."""
        k = start
        while k < len(self.ops) and is_predicate(self.ops[k]):
            k += 1
        return self.ops[start:k], self.ops[k:]

    def combine(self, value, predicate):
        """Combine a comparison with the predicate operand (.AND, .OR, .XOR)."""
        operator = "|" if self.has("OR") else "^" if self.has("XOR") else "&"
        return f"(({value}) {operator} {predicate})"

    def set_predicates(self, first, second, value, inverse, combined_with, before=""):
        """The two predicate results of a comparison."""
        return (
            f"ACTIVE {{ {before} u32 q = {self.predicate(combined_with)}, t = {value},"
            f" n = {inverse};"
            f" {self.assign_predicate(first, self.combine('t', 'q'))}"
            f" {self.assign_predicate(second, self.combine('n', 'q'))} }}"
        )


# ----------------------------------------------------------------------------- integer arithmetic


@opcode("IMAD")
def imad(t):
    carries, ops = t.split_predicates(1)
    a, b, c = ops[:3]
    carry = f" + {t.predicate(ops[3])}" if len(ops) > 3 and t.has("X") else ""
    extend = "(u64)(u32)" if t.has("U32") else "(u64)(s64)(s32)"
    product = f"{extend}({t.u32(a)}) * {extend}({t.u32(b)})"
    if t.has("WIDE"):
        out = f"ACTIVE {{ u64 product = {product}; u64 v = product + {t.u64(c)}{carry};"
        n = register_number(t.ops[0])
        if n != RZ:
            out += f" R[{n}][l] = (u32)v; R[{n + 1}][l] = (u32)(v >> 32);"
        return out + "".join(t.assign_predicate(p, "v < product") for p in carries[:1]) + " }"
    if t.has("HI"):
        return t.put(0, f"(u32)(({product}) >> 32) + {t.u32(c)}{carry}")
    return t.put(0, f"({t.u32(a)}) * ({t.u32(b)}) + ({t.u32(c)}){carry}")


@opcode("IADD3")
def iadd3(t):
    carries, ops = t.split_predicates(1)

    def term(text):
        """A 33-bit addend: subtraction adds the complement plus one, to get the carry right."""
        if text.startswith("-") and not text.startswith("-0x"):
            return f"((u64)(u32)~{t.word(text)} + 1)"
        return f"(u64)(u32)({t.u32(text)})"

    terms = [term(x) for x in ops[:3]]
    if t.has("X"):
        terms += [t.predicate(p) for p in ops[3:]]
    out = f"ACTIVE {{ u64 v = {' + '.join(terms)}; {t.assign(0, '(u32)v')}"
    for k, p in enumerate(carries):
        out += t.assign_predicate(p, f"(v >> 32) > {k}")
    return out + " }"


@opcode("LEA")
def lea(t):
    carries, ops = t.split_predicates(1)
    carry_in = ops.pop() if is_predicate(ops[-1]) else None
    shift, ops = int(ops[-1], 16), ops[:-1]
    a, b, c = ops[0], ops[1], ops[2] if len(ops) > 2 else "RZ"
    wide = f"(u64)(s64)({t.s32(a)})" if t.has("SX32") else f"pair({t.u32(a)}, {t.u32(c)})"
    shifted = f"({wide} << {shift})" + (" >> 32" if t.has("HI") else "")
    carry = f" + {t.predicate(carry_in)}" if carry_in and t.has("X") else ""
    out = (
        f"ACTIVE {{ u64 v = (u64)(u32)({shifted}) + (u64)(u32)({t.u32(b)}){carry};"
        f" {t.assign(0, '(u32)v')}"
    )
    return out + "".join(t.assign_predicate(p, "(v >> 32) & 1") for p in carries[:1]) + " }"


@opcode("IMNMX")
def imnmx(t):
    kind = "u32" if t.has("U32") else "s32"
    return t.put(
        0,
        f"{t.predicate(3)} ? std::min(x, y) : std::max(x, y)",
        f"{kind} x = ({kind})({t.u32(1)}), y = ({kind})({t.u32(2)});",
    )


@opcode("ISETP")
def isetp(t):
    kind, name = "u32" if t.has("U32") else "s32", t.first({*COMPARE, "F", "T"})
    before = f"{kind} x = ({kind})({t.u32(2)}), y = ({kind})({t.u32(3)});"
    if name in ("F", "T"):
        value = str(int(name == "T"))
    elif t.has(
        "EX"
    ):  # upper half of a 64-bit comparison; the last operand is the result of the lower half
        low = t.predicate(5)
        if name == "EQ":
            value = f"(x == y) & {low}"
        elif name == "NE":
            value = f"(x != y) | {low}"
        else:
            value = f"(x {COMPARE[name][0]} y) | ((x == y) & {low})"
    else:
        value = f"x {COMPARE[name]} y"
    return t.set_predicates(0, 1, f"(u32)({value})", "t ^ 1u", 4, before)


def lut_expression(lut):
    """A three-input truth table as an expression in A, B, C."""
    common = {
        0xC0: "A & B",
        0xFC: "A | B",
        0x3C: "A ^ B",
        0x96: "A ^ B ^ C",
        0xFE: "A | B | C",
        0x80: "A & B & C",
        0xF8: "A | (B & C)",
        0xEA: "(A & B) | C",
        0x30: "A & ~B",
        0x0F: "~A",
        0x33: "~B",
        0x55: "~C",
    }
    if lut in common:
        return common[lut]
    terms = [
        " & ".join(x if k & bit else f"~{x}" for x, bit in (("A", 4), ("B", 2), ("C", 1)))
        for k in range(8)
        if lut >> k & 1
    ]
    return " | ".join(f"({x})" for x in terms) or "0u"


@opcode("LOP3")
def lop3(t):
    predicates, ops = t.split_predicates(0)
    d, a, b, c, lut = ops[:5]
    out = (
        f"ACTIVE {{ u32 A = {t.u32(a)}, B = {t.u32(b)}, C = {t.u32(c)}; (void)A; (void)B; (void)C;"
        f" u32 v = {lut_expression(int(lut, 16))}; {t.assign(d, 'v')}"
    )
    if predicates:
        other = t.predicate(ops[5]) if len(ops) > 5 else "0u"
        out += t.assign_predicate(
            predicates[0], f"(v != 0) {'&' if t.has('PAND') else '|'} {other}"
        )
    return out + " }"


@opcode("PLOP3")
def plop3(t):
    out = f"ACTIVE {{ u32 k = ({t.predicate(2)} << 2) | ({t.predicate(3)} << 1) | {t.predicate(4)};"
    for result, lut in ((0, 5), (1, 6)):
        out += t.assign_predicate(result, f"({int(t.ops[lut], 16)}u >> k) & 1")
    return out + " }"


@opcode("SHF")
def shf(t):
    kind = t.first(C_TYPE, "U32")
    width = 63 if "64" in kind else 31
    clamp = f"sh &= {width};" if t.has("W") else f"sh = sh > {width + 1} ? {width + 1} : sh;"
    before = f"u32 sh = {t.u32(2)}; {clamp} u64 x = pair({t.u32(1)}, {t.u32(3)});"
    if t.mods[0] == "L":
        before += " u64 y = sh > 63 ? 0 : x << sh;"
    elif kind.startswith("S"):
        before += " u64 y = (u64)((s64)x >> (sh > 63 ? 63 : sh));"
    else:
        before += " u64 y = sh > 63 ? 0 : x >> sh;"
    return t.put(0, "(u32)(y >> 32)" if t.has("HI") else "(u32)y", before)


@opcode("FLO")
def flo(t):
    fold = "" if t.has("U32") else "if ((s32)x < 0) x = ~x;"
    return t.put(0, f"find_leading(x, {int(t.has('SH'))})", f"u32 x = {t.u32(1)}; {fold}")


@opcode("SGXT")
def sgxt(t):
    return t.put(0, f"sign_extend({t.u32(1)}, {t.u32(2)}, {int(t.has('U32'))})")


@opcode("BMSK")
def bmsk(t):
    return t.put(
        0,
        "(u32)((b >= 32 ? 0xffffffffull : (1ull << b) - 1) << (a & 31))",
        f"u32 a = {t.u32(1)}, b = {t.u32(2)};",
    )


@opcode("IDP")
def idp(t):
    if not t.has("4A"):
        raise Unsupported("only IDP.4A")
    a_signed, b_signed = [int(m[0] == "S") for m in t.mods if m in ("S8", "U8")]
    return t.put(0, f"dot4({t.u32(1)}, {t.u32(2)}, {t.u32(3)}, {a_signed}, {b_signed})")


@opcode("VABSDIFF")
def vabsdiff(t):
    kind = "u32" if t.has("U32") else "s32"
    return t.put(
        0,
        f"(u32)std::llabs(x - y) + {t.u32(3)}",
        f"s64 x = ({kind})({t.u32(1)}), y = ({kind})({t.u32(2)});",
    )


@opcode("P2R")
def p2r(t):
    packed = " | ".join(f"(P[{k}][l] << {k})" for k in range(7))
    return t.put(
        0,
        f"(packed & m) | ({t.u32(2)} & ~m)",
        f"u32 packed = {packed}, m = {t.u32(len(t.ops) - 1)};",
    )


@opcode("R2P")
def r2p(t):
    writes = " ".join(f"if (m >> {k} & 1) P[{k}][l] = v >> {k} & 1;" for k in range(7))
    return f"ACTIVE {{ u32 v = {t.u32(1)}, m = {t.u32(2)}; {writes} }}"


# ----------------------------------------------------------------------------- floating point


def arithmetic(t, kind, operands):
    """Add, multiply or fused multiply-add, with the rounding mode of the instruction."""
    mode = t.first(ROUNDING)
    if mode:
        function = {"ADD": "round_add", "MUL": "round_mul", "FMA": "round_fma"}[kind]
        return f"{function}({', '.join(operands)}, {ROUNDING[mode]})"
    if kind == "FMA":
        return f"std::fma({', '.join(operands)})"
    return f"({operands[0]}) {'+' if kind == 'ADD' else '*'} ({operands[1]})"


@opcode("FADD", "FMUL", "FFMA", "FADD32I", "FMUL32I", "FFMA32I")
def float_arithmetic(t):
    if t.op == "FMUL" and any(re.match(r"[DM]\d$", m) for m in t.mods):
        raise Unsupported("scaled multiply")
    kind = {"A": "ADD", "M": "MUL", "F": "FMA"}[t.op[1]]
    return t.put(0, t.float_result(arithmetic(t, kind, [t.f32(k) for k in range(1, len(t.ops))])))


@opcode("DADD", "DMUL", "DFMA")
def double_arithmetic(t):
    return t.put64(0, f"DB({arithmetic(t, t.op[1:], [t.f64(k) for k in range(1, len(t.ops))])})")


@opcode("FMNMX")
def fmnmx(t):
    return t.put(
        0,
        f"FB({t.predicate(3)} ? fminf(x, y) : fmaxf(x, y))",
        f"float x = {t.f32(1)}, y = {t.f32(2)};",
    )


def compare_floats(t, x="x", y="y"):
    """Ordered or unordered (U) comparison of x and y."""
    names = {*COMPARE, *(f"{c}U" for c in COMPARE), "NUM", "NAN", "F", "T"}
    name = t.first(names)
    unordered = f"(std::isnan({x}) || std::isnan({y}))"
    if name in ("F", "T"):
        return str(int(name == "T"))
    if name in ("NUM", "NAN"):
        return f"!{unordered}" if name == "NUM" else unordered
    if name.endswith("U"):
        return f"({unordered} || {x} {COMPARE[name[:-1]]} {y})"
    if name is None:
        raise Unsupported("comparison")
    return f"(!{unordered} && {x} {COMPARE[name]} {y})"


@opcode("FSETP", "DSETP")
def float_setp(t):
    kind, read = ("float", t.f32) if t.op == "FSETP" else ("double", t.f64)
    before = f"{kind} x = {read(2)}, y = {read(3)};"
    if t.has("MIN", "MAX"):  # first result: choose x; second: both are NaN
        order = "<" if t.has("MIN") else ">"
        return t.set_predicates(
            0,
            1,
            f"!std::isnan(x) && (std::isnan(y) || x {order} y)",
            "std::isnan(x) && std::isnan(y)",
            4,
            before,
        )
    return t.set_predicates(0, 1, f"(u32)({compare_floats(t)})", "t ^ 1u", 4, before)


@opcode("FSET")
def fset(t):
    true = "0x3f800000u" if t.has("BF") else "0xffffffffu"
    return t.put(
        0,
        f"{t.combine(compare_floats(t), t.predicate(3))} ? {true} : 0u",
        f"float x = {t.f32(1)}, y = {t.f32(2)};",
    )


@opcode("FCHK")
def fchk(t):
    return f"ACTIVE {{ {t.assign_predicate(0, f'division_check({t.f32(1)}, {t.f32(2)})')} }}"


@opcode("MUFU")
def mufu(t):
    functions = {
        "EX2": "exp2f(x)",
        "LG2": "log2f(x)",
        "RCP": "1.0f / x",
        "RSQ": "1.0f / sqrtf(x)",
        "SQRT": "sqrtf(x)",
        "SIN": "sinf(TWO_PI * x)",
        "COS": "cosf(TWO_PI * x)",
    }
    name = t.mods[0]
    if name in ("RCP64H", "RSQ64H"):
        return t.put(0, f"{name.lower()}({t.u32(1)})")
    if name not in functions:
        raise Unsupported(f"MUFU.{name}")
    return t.put(0, t.float_result(functions[name]), f"float x = {t.f32(1)};")


def float_types(t):
    """(destination, source) formats of a conversion; F32 when not printed."""
    found = [m for m in t.mods if m in ("F16", "F32", "F64")]
    return (found + ["F32", "F32"])[:2] if len(found) != 1 else (found[0], found[0])


def read_float(t, operand, kind):
    return {
        "F16": lambda: t.half(operand, 0),
        "F32": lambda: t.f32(operand),
        "F64": lambda: t.f64(operand),
    }[kind]()


@opcode("F2F")
def f2f(t):
    target, source = float_types(t)
    value, mode = read_float(t, 1, source), ROUNDING.get(t.first(ROUNDING))
    if target == "F64":
        return t.put64(0, f"DB((double)({value}))")
    if target == "F16":
        if source == "F64":
            value = f"(float)({value})"
        return t.put(0, f"round_half({value}, {mode})" if mode else f"FH({value})")
    return t.put(
        0, t.float_result(f"round_to<float>({value}, {mode})" if mode else f"(float)({value})")
    )


@opcode("FRND")
def frnd(t):
    kind = t.first(("F16", "F64"), "F32")
    function = ROUND_FUNCTION.get(t.first(ROUND_FUNCTION), "nearbyint")
    value = f"std::{function}({read_float(t, 1, kind)})"
    if kind == "F64":
        return t.put64(0, f"DB({value})")
    return t.put(0, f"FH({value})" if kind == "F16" else f"FB({value})")


@opcode("I2F")
def i2f(t):
    source, target, text = t.first(C_TYPE, "S32"), t.first(("F16", "F64"), "F32"), t.text(1)
    shift = 0
    if m := re.search(r"\.([BH])(\d)(_H\d)?", text):
        shift = int(m.group(2)) * (8 if m.group(1) == "B" else 16)
        text = text.replace(m.group(0), "")
    kind = C_TYPE[source]
    value = (
        f"({kind}){t.u64(text)}"
        if source.endswith("64")
        else f"({kind})(({t.u32(text)}) >> {shift})"
    )
    mode = ROUNDING.get(t.first(ROUNDING))
    if target == "F64":
        return t.put64(
            0, f"DB(round_to<double>({value}, {mode}))" if mode else f"DB((double)({value}))"
        )
    if target == "F16":
        return t.put(
            0, f"round_half((float)({value}), {mode})" if mode else f"FH((float)({value}))"
        )
    return t.put(0, f"FB(round_to<float>({value}, {mode}))" if mode else f"FB((float)({value}))")


@opcode("F2I")
def f2i(t):
    kind, source = C_TYPE[t.first(C_TYPE, "S32")], t.first(("F16", "F64"), "F32")
    function = ROUND_FUNCTION.get(t.first(ROUND_FUNCTION), "nearbyint")
    value = f"to_integer<{kind}>(std::{function}((double)({read_float(t, 1, source)})))"
    return t.put64(0, f"(u64){value}") if kind.endswith("64") else t.put(0, f"(u32){value}")


# ----------------------------------------------------------------------------- half precision


@opcode("HADD2", "HMUL2", "HFMA2", "HADD2_32I", "HMUL2_32I", "HFMA2_32I")
def half2_arithmetic(t):
    kind = t.op[1:4]

    def value(which):
        x = [t.half(k, which) for k in range(1, len(t.ops))]
        if kind == "FMA":
            out = f"(float)((double){x[0]} * (double){x[1]} + (double){x[2]})"
        else:
            out = f"{x[0]} {'+' if kind == 'ADD' else '*'} {x[1]}"
        if t.has("RELU"):
            out = f"fmaxf({out}, 0.f)"
        return f"saturate({out})" if t.has("SAT") else out

    if t.has("F32"):
        return t.put(0, f"FB({value(0)})")
    if re.search(r"\.H\d_H\d", t.ops[0]):
        raise Unsupported("partial half2 destination")
    return t.put(0, f"pack_half2({value(0)}, {value(1)})")


@opcode("HSETP2")
def hsetp2(t):
    before = " ".join(f"float x{k} = {t.half(2, k)}, y{k} = {t.half(3, k)};" for k in (0, 1))
    low, high = (f"(u32)({compare_floats(t, f'x{k}', f'y{k}')})" for k in (0, 1))
    if t.has("H_AND"):
        return t.set_predicates(0, 1, f"{low} & {high}", "t ^ 1u", 4, before)
    return t.set_predicates(0, 1, low, high, 4, before)


@opcode("HSET2")
def hset2(t):
    true = "0x3c00u" if t.has("BF") else "0xffffu"
    before = " ".join(f"float x{k} = {t.half(1, k)}, y{k} = {t.half(2, k)};" for k in (0, 1))
    half = [
        f"({t.combine(compare_floats(t, f'x{k}', f'y{k}'), t.predicate(3))} ? {true} : 0u)"
        for k in (0, 1)
    ]
    return t.put(0, f"{half[0]} | ({half[1]} << 16)", before)


@opcode("HMMA")
def hmma(t):
    if t.mods[0] != "884" or len(t.mods) != 4:
        raise Unsupported("only HMMA.884 without saturation")
    target, accumulator, step = t.mods[1], t.mods[2], int(t.mods[3][len("STEP") :])
    d, a, b, c = (register_number(x) for x in t.ops[:4])
    return (
        f"hmma884(w, {d}u, {a}u, {b}u, {c}u, {step}, "
        f"{int('ROW' in t.ops[1])}, {int('COL' in t.ops[2])}, "
        f"{int(target == 'F32')}, {int(accumulator == 'F32')}, {int(reuses_operands(t))});"
    )


def reuses_operands(t):
    """Is the previous instruction an earlier step of the same HMMA, with A and B unpacked?"""
    p = t.previous
    if p is None or p.op != "HMMA" or p.mods[:3] != t.mods[:3] or p.guard != PT:
        return False
    if list(p.operands[1:3]) != t.ops[1:3]:
        return False
    written = {register_number(p.operands[0]) + k for k in (0, 1)}
    read = {register_number(x) + k for x in t.ops[1:3] for k in (0, 1)}
    return not written & read


# ----------------------------------------------------------------------------- memory

SPACES = {"G": "GLOBAL", "S": "SHARED", "L": "LOCAL", "": "GENERIC"}


def address_code(t, text, space):
    """Declaration of the address `a` of a lane."""
    address = parse_address(text)
    n = address.register
    if space in ("SHARED", "LOCAL"):
        base = "0u" if n == RZ else f"R[{n}][l] * {address.scale}u"
        return f"u32 a = {base} + {address.offset & 0xFFFFFFFF}u;"
    if n == RZ:
        base = "0ull"
    else:
        base = f"pair(R[{n}][l], R[{n + 1}][l])" if t.has("E") else f"(u64)R[{n}][l]"
    return f"u64 a = {base} + (u64)(s64)(s32){address.offset & 0xFFFFFFFF}u;"


def is_global(space):
    return int(space in ("GLOBAL", "GENERIC"))


@opcode("LD", "LDG", "LDS", "LDL")
def load(t):
    space, size, d = SPACES[t.op[2:]], t.inst.access_bytes, register_number(t.ops[0])
    out = (
        f"TRACE_ACCESS; ACTIVE {{ {address_code(t, t.ops[1], space)} TRACE_ADDRESS(a);"
        f" char* p = {space}(a, {size}, LOAD);"
    )
    if size < 4:
        kind = C_TYPE[f"{'S' if t.has('S8', 'S16') else 'U'}{8 * size}"]
        write = "" if d == RZ else f"R[{d}][l] = (u32)v;"
        return out + f" {kind} v; load_bytes(&v, p, {size}, {is_global(space)}, w, c); {write} }}"
    words = size // 4
    writes = "" if d == RZ else " ".join(f"R[{d + k}][l] = v[{k}];" for k in range(words))
    return out + f" u32 v[{words}]; load_bytes(v, p, {size}, {is_global(space)}, w, c); {writes} }}"


@opcode("ST", "STG", "STS", "STL")
def store(t):
    space, size, s = SPACES[t.op[2:]], t.inst.access_bytes, register_number(t.ops[1])
    words = max(1, size // 4)
    values = ", ".join("0u" if s == RZ else f"R[{s + k}][l]" for k in range(words))
    return (
        f"TRACE_ACCESS; ACTIVE {{ {address_code(t, t.ops[0], space)} TRACE_ADDRESS(a);"
        f" char* p = {space}(a, {size}, STORE); u32 v[{words}] = {{{values}}};"
        f" store_bytes(p, v, {size}, {is_global(space)}, w, c); }}"
    )


@opcode("LDC")
def ldc(t):
    m = re.match(r"c\[0x([0-9a-f]+)\]\s*(\[.*\])$", t.ops[1])
    if not m:
        raise Unsupported("constant address")
    bank, address, size = int(m.group(1), 16), parse_address(m.group(2)), t.inst.access_bytes
    n = address.register
    offset = f"u32 o = {'0u' if n == RZ else f'R[{n}][l]'} + {address.offset & 0xFFFFFFFF}u;"
    if size < 4:
        kind = C_TYPE[f"{'S' if t.has('S8', 'S16') else 'U'}{8 * size}"]
        return t.put(0, f"(u32)({kind})(constant({bank}, o & ~3u) >> (8 * (o & 3)))", offset)
    if size == 8:
        return t.put64(0, f"pair(constant({bank}, o), constant({bank}, o + 4))", offset)
    return t.put(0, f"constant({bank}, o)", offset)


def atomic_expression(t, kind, old, value):
    """New memory value of an atomic operation on `old`."""
    name = t.first(("ADD", "MIN", "MAX", "AND", "OR", "XOR", "EXCH", "INC", "DEC"))
    if name == "ADD" and t.has("F32"):
        return f"FB(BF({old}) + BF({value}))"
    if name == "ADD" and t.has("F64"):
        return f"DB(BD({old}) + BD({value}))"
    if name == "ADD" and t.has("F16x2"):
        return f"half2_add({old}, {value})"
    if t.has("F32", "F64", "F16x2"):
        raise Unsupported("floating-point atomic")
    signed = "s" + kind[1:] if t.has("S32", "S64") else kind
    table = {
        "ADD": f"{old} + {value}",
        "MIN": f"({kind})std::min(({signed}){old}, ({signed}){value})",
        "MAX": f"({kind})std::max(({signed}){old}, ({signed}){value})",
        "AND": f"{old} & {value}",
        "OR": f"{old} | {value}",
        "XOR": f"{old} ^ {value}",
        "EXCH": value,
        "INC": f"({old} >= {value} ? 0 : {old} + 1)",
        "DEC": f"({old} == 0 || {old} > {value} ? {value} : {old} - 1)",
    }
    if name not in table:
        raise Unsupported("atomic operation")
    return table[name]


@opcode("RED", "ATOM", "ATOMG", "ATOMS")
def atomic(t):
    ops, done, target = list(t.ops), None, "RZ"
    if t.op != "RED":
        if is_predicate(ops[0]):
            done = ops.pop(0)
        target = ops.pop(0)
    size = t.inst.access_bytes
    kind = "u64" if size == 8 else "u32"
    read = t.u64 if size == 8 else t.u32
    space = {"ATOMS": "SHARED", "ATOM": "GENERIC"}.get(t.op, "GLOBAL")
    counting = t.op == "ATOMS" and t.has("POPC")  # ATOMS.POPC.INC: adds one per lane
    value = "1u" if counting else read(ops[1])
    setup, result = f"{kind} x = {value};", "old"
    if t.has("CAS", "CAST"):
        if len(ops) > 2:
            swap = read(ops[2])
        else:
            swap = read(f"R{register_number(ops[1]) + size // 4}")
        setup += f" {kind} swap = {swap};"
        new = "(o == x ? swap : o)"
        if t.has("CAST"):  # compare-and-swap-and-test: the result is whether it swapped
            result = f"({kind})(old == x)"
    else:
        new = "o + x" if counting else atomic_expression(t, kind, "o", "x")
    write = ""
    n = register_number(target)
    if n != RZ:
        write = f"{kind} r = {result}; R[{n}][l] = (u32)r;"
        if size == 8:
            write += f" R[{n + 1}][l] = (u32)(r >> 32);"
    # An operation without a shared-memory form reports by its predicate that it did not execute.
    skip = ""
    if done and predicate_number(done) != PT and space == "GENERIC":
        flag = f"P[{predicate_number(done)}][l]"
        skip = (
            f"{flag} = !in_window(a, SHARED_WINDOW) && !in_window(a, LOCAL_WINDOW);"
            f" if (!{flag}) continue;"
        )
    elif done and predicate_number(done) != PT:
        write += f" P[{predicate_number(done)}][l] = 1;"
    return (
        f"TRACE_ACCESS; ACTIVE {{ {address_code(t, ops[0], space)} TRACE_ADDRESS(a); {skip}"
        f" char* p = {space}(a, {size}, ATOMIC); {setup}"
        f" {kind} old = atomic<{kind}>(p, w, c, [&]({kind} o) -> {kind} {{ return {new}; }});"
        f" (void)old; {write} }}"
    )


@opcode("QSPC")
def qspc(t):
    window = next(
        (w for m, w in (("S", "SHARED_WINDOW"), ("L", "LOCAL_WINDOW")) if m in t.mods), None
    )
    if window is None:
        raise Unsupported("address space query")
    inside = t.assign_predicate(0, f"in_window(a, {window})")
    return f"ACTIVE {{ {address_code(t, t.ops[2], 'GENERIC')} {inside} }}"


@opcode("MEMBAR")
def membar(t):
    return f"fence(c, {int(t.has('CTA'))});"


# ----------------------------------------------------------------------------- warp-wide operations


@opcode("S2R", "CS2R")
def s2r(t):
    name = t.ops[1]
    if name not in SPECIAL_REGISTERS:
        raise Unsupported(f"special register {name}")
    if t.op == "CS2R" and not t.has("32"):
        high = SPECIAL_REGISTERS["SR_CLOCKHI"] if name == "SR_CLOCKLO" else "0u"
        return t.put64(0, f"pair({SPECIAL_REGISTERS[name]}, {high})")
    return t.put(0, SPECIAL_REGISTERS[name])


@opcode("SHFL")
def shfl(t):
    done, d, a, b, bounds = t.ops
    source = {
        "UP": "j = l - (s32)b; in = j >= (s32)max_lane;",
        "DOWN": "j = l + (s32)b; in = j <= (s32)max_lane;",
        "BFLY": "j = l ^ (s32)b; in = j <= (s32)max_lane;",
        "IDX": "j = (s32)(min_lane | (b & ~segment)); in = j <= (s32)max_lane;",
    }[t.mods[0]]
    return (
        f"u32 value[32], from[32], inside[32]; LANES {{ value[l] = {t.u32(a)};"
        f" u32 b = ({t.u32(b)}) & 31u, bounds = {t.u32(bounds)};"
        f" u32 segment = (bounds >> 8) & 31u, clamp = bounds & 31u;"
        f" u32 max_lane = ((u32)l & segment) | (clamp & ~segment);"
        f" u32 min_lane = (u32)l & segment; (void)min_lane;"
        f" s32 j; bool in; {source} from[l] = in ? (u32)j : (u32)l; inside[l] = in; }}"
        f" ACTIVE {{ {t.assign(d, 'value[from[l]]')} {t.assign_predicate(done, 'inside[l]')} }}"
    )


@opcode("VOTE")
def vote(t):
    ops = list(t.ops)
    d = ops.pop(0) if is_register(ops[0]) else "RZ"
    result, source = ops[0], ops[1]
    test = {"ALL": "ballot == em", "ANY": "ballot != 0", "EQ": "ballot == em || ballot == 0"}[
        t.mods[0]
    ]
    return (
        f"u32 ballot = lanes_where("
        f"M, P[{predicate_number(source)}], {int(source.startswith('!'))});"
        f" ACTIVE {{ {t.assign(d, 'ballot')} {t.assign_predicate(result, test)} }}"
    )


@opcode("MATCH")
def match(t):
    predicates = [x for x in t.ops if is_predicate(x)]
    d, source = [x for x in t.ops if not is_predicate(x)]
    n, wide = register_number(source), t.has("U64")
    values = f"R[{n}], {f'R[{n + 1}]' if wide else 'nullptr'}"
    out = f"u32 same[32]; LANES same[l] = match_any({values}, em, l); ACTIVE {{ "
    if t.has("ALL"):
        out += t.assign(d, "same[l] == em ? em : 0u")
        out += "".join(t.assign_predicate(p, "same[l] == em") for p in predicates[:1])
        return out + " }"
    return out + t.assign(d, "same[l]") + " }"


# ----------------------------------------------------------------------------- control flow


def jump(condition, target):
    """Continue at `target` in the lanes of em; the warp splits when only some lanes jump."""
    return (
        f"{condition} if (em == mask) npc = {target}u; else if (em) {{ set_pc(w, mask & ~em, npc);"
        f" set_pc(w, em, {target}u); repick = true; }}"
    )


@opcode("BRA")
def bra(t):
    condition = ""
    if len(t.ops) > 1 and is_predicate(t.ops[0]):
        p = t.ops[0]
        condition = f"em = lanes_where(M, P[{predicate_number(p)}], {int(p.startswith('!'))});"
    return jump(condition, t.inst.target)


@opcode("CALL")
def call(t):
    if t.has("ABS"):
        raise Unsupported("absolute call")
    return jump("", t.inst.target)


def indirect_jump(register, offset):
    """Per-lane jump to R[register] + offset."""
    return (
        f"LANES if (mask >> l & 1)"
        f" w.pc[l] = (em >> l & 1) ? R[{register}][l] + (u32)({offset}) : npc;"
        f" repick = true;"
    )


@opcode("RET")
def ret(t):
    return indirect_jump(register_number(t.ops[0]), int(t.ops[1], 16) if len(t.ops) > 1 else 0)


@opcode("BRX")
def brx(t):
    offset = int(t.ops[1], 16) if len(t.ops) > 1 else 0
    return indirect_jump(register_number(t.ops[0]), offset + t.inst.pc + 16)


@opcode("EXIT", "KILL")
def exit_(t):
    condition = ""
    if t.ops and is_predicate(t.ops[0]):
        p = t.ops[0]
        condition = f"em = lanes_where(M, P[{predicate_number(p)}], {int(p.startswith('!'))});"
    return f"{condition} w.live &= ~em; set_pc(w, mask, npc); repick = true;"


def convergence_register(text):
    m = re.match(r"^B(\d+)$", text)
    if not m:
        raise Unsupported(f"convergence barrier expected, got {text}")
    return int(m.group(1))


@opcode("BSSY")
def bssy(t):
    return f"ACTIVE B[{convergence_register(t.ops[0])}][l] = em;"


@opcode("BSYNC")
def bsync(t):
    n = convergence_register(t.ops[-1])
    return f"if (em && wait_converged(w, mask, em, B[{n}], {n + 1}, npc)) repick = true;"


@opcode("BREAK")
def break_(t):
    return f"break_convergence(w, {convergence_register(t.ops[-1])}, em);"


@opcode("BMOV")
def bmov(t):
    d, s = t.ops
    if re.match(r"^B\d+$", s):
        n = convergence_register(s)
        clear = f" B[{n}][l] = 0;" if t.has("CLEAR") else ""
        return f"ACTIVE {{ {t.assign(d, f'B[{n}][l]')}{clear} }}"
    return f"ACTIVE B[{convergence_register(d)}][l] = {t.u32(s)};"


@opcode("WARPSYNC")
def warpsync(t):
    return (
        f"u32 expected[32]; LANES expected[l] = {t.u32(t.ops[-1])};"
        f" if (em && wait_converged(w, mask, em, expected, SYNC_WARP, npc)) repick = true;"
    )


@opcode("YIELD", "NANOSLEEP")
def yield_(t):
    return "budget = std::min<s64>(budget, 0);" if t.op == "NANOSLEEP" else ""


@opcode("BAR")
def bar(t):
    mode, ops = t.mods[0], [x for x in t.ops if not is_predicate(x)]

    def lane(text):
        return t.u32(text).replace("[l]", "[FIRST]")

    barrier = lane(ops[0]) if ops else "0"
    threads = lane(ops[1]) if len(ops) > 1 else "0"
    wait = f"enter_barrier(w, c, mask, em, (int)({barrier}), (int)({threads}), pc); repick = true;"
    if mode == "SYNC":
        return f"if (em) {{ {wait} }}"
    if mode == "ARV":
        return f"if (em) arrive_barrier(w, c, em, (int)({barrier}), (int)({threads}));"
    if mode == "RED":
        kind = {"POPC": 0, "AND": 1, "OR": 2}[next(m for m in t.mods if m in ("POPC", "AND", "OR"))]
        p = next(x for x in t.ops if is_predicate(x))
        true = f"lanes_where(M, P[{predicate_number(p)}], {int(p.startswith('!'))})"
        return f"if (em) {{ reduce_barrier(c, (int)({barrier}), {kind}, em, {true}); {wait} }}"
    raise Unsupported(f"BAR.{mode}")


@opcode("B2R")
def b2r(t):
    if not t.has("RESULT"):
        raise Unsupported("barrier register read")
    out = f"ACTIVE {{ {t.assign(0, 'w.barrier_result')}"
    if len(t.ops) > 1:
        out += t.assign_predicate(1, "w.barrier_result != 0")
    return out + " }"


# ----------------------------------------------------------------------------- whole kernels


def translate_instruction(inst, previous=None):
    """C++ statements for one instruction; raises Unsupported."""
    if inst.op in IGNORED:
        return ""
    t = Translator(inst, previous)
    if inst.op in HANDLERS:
        return HANDLERS[inst.op](t)
    if inst.op in EXPRESSIONS:
        return t.put(0, t.expand(EXPRESSIONS[inst.op]))
    raise Unsupported("unknown opcode")


def branch_targets(instructions):
    """Addresses that control can reach other than by falling through."""
    out = set()
    for inst in instructions:
        if inst.op in ("BRA", "CALL", "BSSY") and re.search(
            r"0x[0-9a-f]+", inst.operands[-1] if inst.operands else ""
        ):
            out.add(inst.target)
    return out


# The parameters by which instructions of one shape differ: register numbers and constants.
_PARAMETER = re.compile(r"(?<=\bR\[)\d+(?=\])|(?<=\b[PB]\[)\d+(?=\])|(?<=\bSET[RP]\()\d+|\b\d+u\b")


def shape_of(body):
    """C++ with registers and constants replaced by ``arg[i]``, and the list of their values."""
    values = []

    def parameter(match):
        values.append(match[0].removesuffix("u"))
        return f"arg[{len(values) - 1}]"

    return _PARAMETER.sub(parameter, body), values


def translate(instructions) -> Translation:
    """C++ for a whole kernel, to be included by runtime.cpp.

    Instructions that differ only in registers and constants share a function: a kernel of ten
    thousand instructions has less than a thousand shapes, and g++ would take minutes to compile one
    function for each instruction.
    """
    missing, entries = [], []
    shapes: dict[str, tuple[int, str]] = {}
    parameters: list[str] = []
    targets = branch_targets(instructions)
    for k, inst in enumerate(instructions):
        previous = instructions[k - 1] if k and inst.pc not in targets else None
        try:
            body = translate_instruction(inst, previous)
        except (Unsupported, KeyError, ValueError, IndexError, TypeError) as error:
            missing.append(
                Unimplemented(".".join([inst.op, *inst.mods]), inst.pc, inst.text, str(error))
            )
            body = "if (em) { report(UNIMPLEMENTED, pc, 0, w, c, pc); w.live = 0; repick = true; }"
        shape, values = shape_of(body)
        number, _ = shapes.setdefault(shape, (len(shapes), inst.text.replace("\\", "")))
        entries.append(f"{{shape_{number}, {len(parameters)}}}")
        parameters += values
    guards = ", ".join(str(x.guard) for x in instructions)
    negated = ", ".join(str(int(x.guard_negated)) for x in instructions)
    functions = [
        f"static void shape_{number}(Step& s, const u32* arg) {{ SM70_LOCALS {body} }}  // {text}"
        for body, (number, text) in shapes.items()
    ]
    source = (
        f"#ifdef SM70_TABLES\n"
        f"enum {{ NUM_INSTRUCTIONS = {len(instructions)} }};\n"
        f"static const unsigned char GUARD[] = {{{guards}}};\n"
        f"static const unsigned char GUARD_NEG[] = {{{negated}}};\n"
        f"static const u32 PARAMETERS[] = {{{'u, '.join([*parameters, '0'])}u}};\n"
        f"#endif\n#ifdef SM70_SHAPES\n"
        + "\n".join(functions)
        + f"\nstatic const Instruction CODE[] = {{{', '.join(entries)}}};\n#endif\n"
    )
    return Translation(source, missing)
