"""Each instruction of the machine against NumPy, on edge cases."""

import itertools
import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch

from ptx.machine import names
from ptx.tests.programs import program, run
from ptx.text import WIDTHS

LETTERS = {0: "p", 1: "h", 2: "h", 4: "r", 8: "d"}
INTEGERS = [f"{kind}{bits}" for bits in (16, 32, 64) for kind in "su"]
F32, F64, I32 = np.float32, np.float64, np.int32


def numpy_type(type_: str) -> np.dtype:
    kinds = {"s": "i", "u": "u", "b": "u", "f": "f", "t": "u"}
    if type_.startswith("bf") or type_.endswith("x2"):
        return np.dtype(f"u{WIDTHS[type_]}")
    return np.dtype(f"{kinds[type_[0]]}{WIDTHS[type_]}")


def samples(type_: str, rng: np.random.Generator) -> np.ndarray:
    """32 numbers, including the extremes."""
    if type_ == "pred":
        return rng.integers(0, 2, 32).astype(np.uint32)
    dtype = numpy_type(type_)
    if dtype.kind == "f":
        special = [0.0, -0.0, 1.0, -1.5, 2.5, -0.5, math.inf, -math.inf, math.nan, 1e-42, 6e4]
        values = np.array([*special, *rng.normal(scale=4, size=32 - len(special))])
        return rng.permutation(values).astype(dtype)
    if type_ in ("bf16", "bf16x2", "f16x2"):
        numbers = torch.tensor(rng.normal(size=64), dtype=torch.float32)
        narrow = numbers.to(torch.float16 if type_[0] == "f" else torch.bfloat16)
        return narrow.view(torch.int16).numpy().view(dtype)[:32].copy()
    info = np.iinfo(dtype)
    special = [0, 1, 2, 3, info.max, info.min, info.max - 1, info.min + 1, 7, 31, 16]
    drawn = [int(v) for v in rng.integers(info.min, info.max, 32 - len(special), dtype)]
    return rng.permutation(np.array([*special, *drawn], dtype))


def execute(opcode: str, result: str, operands: list[np.ndarray], types: list[str]) -> np.ndarray:
    """The results of 32 lanes; %p0 guards half of them, and the others keep a marker value."""
    memory = [np.ascontiguousarray(array) for array in operands]
    lines = []
    for n, (array, type_) in enumerate(zip(memory, types, strict=True)):
        size = 4 if type_ == "pred" else WIDTHS[type_]
        assert array.itemsize == size
        register = f"%r{n}" if type_ == "pred" else f"%{LETTERS[size]}{n}"
        lines += [
            f"\tmad.wide.u32 %d50, %r99, {size}, %d{100 + n};",
            f"\tld.global.b{8 * size} {register}, [ %d50 + 0 ];",
        ]
        if type_ == "pred":
            lines.append(f"\tsetp.ne.u32 %p{n + 1}, {register}, 0;")
    width = WIDTHS[result]
    to = "%p50" if not width else f"%{LETTERS[width]}60"
    sources = [
        f"%p{n + 1}" if t == "pred" else f"%{LETTERS[WIDTHS[t]]}{n}" for n, t in enumerate(types)
    ]
    lines += [
        "\tand.b32 %r98, %r99, 1;",
        "\tsetp.eq.u32 %p0, %r98, 0;",
        "\tsetp.ne.u32 %p50, %r98, %r98;" if not width else f"\tmov.b{8 * width} {to}, 77;",
        f"\t@%p0 {opcode} {', '.join([to, *sources])};",
    ]
    if not width:
        lines.append("\tselp.b32 %r60, 1, 0, %p50;")
        to, width = "%r60", 4
    lines += [
        f"\tmad.wide.u32 %d50, %r99, {width}, %d{100 + len(memory)};",
        f"\tst.global.b{8 * width} [ %d50 + 0 ], {to};",
    ]
    out = np.zeros(32, np.uint32 if result == "pred" else numpy_type(result))
    run(program("\n".join(lines), parameters=len(memory) + 1), *memory, out)
    marked = out[1::2]
    mark = 0 if result == "pred" else np.frombuffer((77).to_bytes(width, "little"), out.dtype)[0]
    assert (marked == mark).all(), "a lane that is off has changed something"
    return out[::2]


CASES: list[tuple[str, str, list[str], Callable, float]] = []


def case(opcode: str, result: str, operands: str, function: Callable, rtol: float = 0) -> None:
    CASES.append((opcode, result, operands.split(), function, rtol))


def whole(function: Callable) -> Callable:
    """Lift a function of Python integers to arrays; the result is truncated to the width."""

    def of_arrays(dtype, *arrays):
        bits = 8 * dtype.itemsize
        values = [function(*map(int, row)) % 2**bits for row in zip(*arrays, strict=True)]
        return np.array(values, f"u{dtype.itemsize}").view(dtype)

    return of_arrays


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


for t in INTEGERS:
    bits = int(t[1:])
    case(f"add.{t}", t, f"{t} {t}", whole(lambda a, b: a + b))
    case(f"sub.{t}", t, f"{t} {t}", whole(lambda a, b: a - b))
    case(f"mul.lo.{t}", t, f"{t} {t}", whole(lambda a, b: a * b))
    case(f"mad.lo.{t}", t, f"{t} {t} {t}", whole(lambda a, b, c: a * b + c))
    case(f"min.{t}", t, f"{t} {t}", whole(min))
    case(f"max.{t}", t, f"{t} {t}", whole(max))
    # Division by zero gives all ones, its remainder the dividend, as on the hardware.
    case(f"div.{t}", t, f"{t} {t}", whole(lambda a, b: truncated(a, b) if b else -1))
    case(f"rem.{t}", t, f"{t} {t}", whole(lambda a, b: a - b * truncated(a, b) if b else a))
    if bits < 64:
        wide = f"{t[0]}{2 * bits}"
        case(f"mul.wide.{t}", wide, f"{t} {t}", whole(lambda a, b: a * b))
    if bits > 16:
        case(f"mul.hi.{t}", t, f"{t} {t}", whole(lambda a, b, n=bits: a * b >> n))
for t, wide in (("s32", "s64"), ("u32", "u64")):
    case(f"mad.wide.{t}", wide, f"{t} {t} {wide}", whole(lambda a, b, c: a * b + c))
for t in ("s16", "s32", "s64"):
    case(f"neg.{t}", t, t, whole(lambda a: -a))
for t in ("s32", "s64"):
    case(f"abs.{t}", t, t, whole(abs))
case("min.relu.s32", "s32", "s32 s32", whole(lambda a, b: max(0, min(a, b))))
case("max.relu.s32", "s32", "s32 s32", whole(lambda a, b: max(0, a, b)))
for bits in (16, 32, 64):
    b = f"b{bits}"
    case(f"and.{b}", b, f"{b} {b}", whole(lambda x, y: x & y))
    case(f"or.{b}", b, f"{b} {b}", whole(lambda x, y: x | y))
    case(f"xor.{b}", b, f"{b} {b}", whole(lambda x, y: x ^ y))
    case(f"not.{b}", b, b, whole(lambda x: ~x))
    case(f"shl.{b}", b, f"{b} u32", whole(lambda x, n, w=bits: x << min(n, w)))
    for t in (b, f"u{bits}", f"s{bits}"):
        case(f"shr.{t}", t, f"{t} u32", whole(lambda x, n, w=bits: x >> min(n, w)))
        case(f"mov.{t}", t, t, whole(lambda x: x))
        case(f"selp.{t}", t, f"{t} {t} pred", whole(lambda x, y, p: x if p else y))
for t in ("f32", "f64"):
    case(f"mov.{t}", t, t, lambda dtype, x: x)
    case(f"selp.{t}", t, f"{t} {t} pred", lambda dtype, x, y, p: np.where(p, x, y))
case("and.pred", "pred", "pred pred", whole(lambda a, b: a & b))
case("or.pred", "pred", "pred pred", whole(lambda a, b: a | b))
case("xor.pred", "pred", "pred pred", whole(lambda a, b: a ^ b))
case("not.pred", "pred", "pred", whole(lambda a: 1 - a))
case("mov.pred", "pred", "pred", whole(lambda a: a))
case("popc.b32", "u32", "b32", whole(lambda a: a.bit_count()))
case("clz.b32", "u32", "b32", whole(lambda a: 32 - a.bit_length()))
case("brev.b32", "b32", "b32", whole(lambda a: int(f"{a:032b}"[::-1], 2)))
case("shf.l.wrap.b32", "b32", "b32 b32 u32", whole(lambda a, b, n: (b << 32 | a) << n % 32 >> 32))
case("shf.r.wrap.b32", "b32", "b32 b32 u32", whole(lambda a, b, n: (b << 32 | a) >> n % 32))


def permuted(a: int, b: int, selector: int) -> int:
    data = (b << 32 | a).to_bytes(8, "little")
    out = 0
    for k in range(4):
        nibble = selector >> 4 * k & 15
        byte = data[nibble & 7]
        out |= (255 * (byte >> 7) if nibble & 8 else byte) << 8 * k
    return out


def field(a: int, first: int, count: int, signed: bool) -> int:
    """bfe of a 32-bit number: bits past the last are zeros, or the sign."""
    first, count = first & 255, count & 255
    text = f"{a % 2**32:032b}"[::-1]
    sign = text[-1] if signed else "0"
    taken = "".join(text[k] if k < 32 else sign for k in range(first, first + count))[::-1]
    taken = taken[-32:]
    if not taken:
        return 0
    value = int(taken, 2)
    return value - 2 ** len(taken) if signed and taken[0] == "1" else value


case("prmt.b32", "b32", "b32 b32 b32", whole(permuted))
case("bfe.u32", "u32", "u32 u32 u32", whole(lambda a, n, m: field(a, n, m, False)))
case("bfe.s32", "s32", "s32 u32 u32", whole(lambda a, n, m: field(a, n, m, True)))
ORDERS = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b),
}  # fmt: skip
for name, order in ORDERS.items():
    for t in (*INTEGERS, "b16", "b32", "b64", "f32", "f64"):
        case(f"setp.{name}.{t}", "pred", f"{t} {t}", lambda d, a, b, f=order: f(a, b))
    for t in ("f32", "f64"):
        unordered = lambda d, a, b, f=order: f(a, b) | np.isnan(a) | np.isnan(b)  # noqa: E731
        case(f"setp.{name}u.{t}", "pred", f"{t} {t}", unordered)
for t in ("f32", "f64"):
    case(f"setp.num.{t}", "pred", f"{t} {t}", lambda d, a, b: ~np.isnan(a) & ~np.isnan(b))
    case(f"setp.nan.{t}", "pred", f"{t} {t}", lambda d, a, b: np.isnan(a) | np.isnan(b))


def flushed(x: np.ndarray) -> np.ndarray:
    tiny = np.finfo(F32).tiny
    return np.where(np.abs(x) < tiny, np.copysign(F32(0), x), x).astype(F32)


def through_64(function: Callable) -> Callable:
    """Compute in float64 and round once: exact for sums, products and roots of float32."""
    return lambda dtype, *arrays: function(*(a.astype(F64) for a in arrays)).astype(dtype)


def flushing(function: Callable) -> Callable:
    return lambda dtype, *arrays: flushed(function(dtype, *map(flushed, arrays)))


def no_nan(choose: Callable) -> Callable:
    return lambda a, b: np.where(np.isnan(a), b, np.where(np.isnan(b), a, choose(a, b)))


FLOATS: dict[str, tuple[int, Callable, float]] = {
    "add": (2, lambda a, b: a + b, 0), "sub": (2, lambda a, b: a - b, 0),
    "mul": (2, lambda a, b: a * b, 0), "fma": (3, lambda a, b, c: a * b + c, 2e-7),
    "max": (2, no_nan(np.maximum), 0), "min": (2, no_nan(np.minimum), 0),
    "div": (2, lambda a, b: a / b, 0), "div.full": (2, lambda a, b: a / b, 0),
    "div.approx": (2, lambda a, b: a / b, 0), "rcp": (1, lambda a: 1 / a, 0),
    "rcp.approx": (1, lambda a: 1 / a, 0), "rsqrt.approx": (1, lambda a: 1 / np.sqrt(a), 2e-7),
    "sqrt": (1, np.sqrt, 0), "sqrt.approx": (1, np.sqrt, 0), "ex2.approx": (1, np.exp2, 2e-7),
    "lg2.approx": (1, np.log2, 2e-7),
}  # fmt: skip
for name, (count, function, rtol) in FLOATS.items():
    plain, rounded = f"{name}.f32", f"{name}.rn.f32"
    for opcode in (plain, rounded):
        case(opcode, "f32", "f32 " * count, through_64(function), rtol)
    for opcode in (f"{name}.ftz.f32", f"{name}.rn.ftz.f32"):
        case(opcode, "f32", "f32 " * count, flushing(through_64(function)), rtol)
for name in ("max", "min"):
    choose = FLOATS[name][1]
    three = lambda d, a, b, c, f=choose: f(f(a, b), c)  # noqa: E731
    for rounding in ("", ".rn"):
        case(f"{name}{rounding}.f32", "f32", "f32 f32 f32", three)
        case(f"{name}{rounding}.ftz.f32", "f32", "f32 f32 f32", flushing(three))
    with_nan = np.maximum if name == "max" else np.minimum
    case(f"{name}.NaN.f32", "f32", "f32 f32", lambda d, a, b, f=with_nan: f(a, b))
case("tanh.approx.f32", "f32", "f32", through_64(np.tanh), 2e-7)
case("neg.f32", "f32", "f32", lambda d, a: -a)
case("abs.f32", "f32", "f32", lambda d, a: np.abs(a))
case("neg.ftz.f32", "f32", "f32", lambda d, a: flushed(-a))
case("abs.ftz.f32", "f32", "f32", lambda d, a: flushed(np.abs(a)))
case("copysign.f32", "f32", "f32 f32", lambda d, a, b: np.copysign(b, a))
for name in ORDERS:
    ordered = lambda d, a, b, f=ORDERS[name]: f(flushed(a), flushed(b))  # noqa: E731
    case(f"setp.{name}.ftz.f32", "pred", "f32 f32", ordered)
    unordered = lambda d, a, b, f=ordered: f(d, a, b) | np.isnan(a) | np.isnan(b)  # noqa: E731
    case(f"setp.{name}u.ftz.f32", "pred", "f32 f32", unordered)
case("setp.num.ftz.f32", "pred", "f32 f32", lambda d, a, b: ~np.isnan(a) & ~np.isnan(b))
case("setp.nan.ftz.f32", "pred", "f32 f32", lambda d, a, b: np.isnan(a) | np.isnan(b))
for rounding in ("", ".rn"):
    case(f"add{rounding}.f64", "f64", "f64 f64", lambda d, a, b: a + b)
    case(f"sub{rounding}.f64", "f64", "f64 f64", lambda d, a, b: a - b)
    case(f"mul{rounding}.f64", "f64", "f64 f64", lambda d, a, b: a * b)
case("fma.rn.f64", "f64", "f64 f64 f64", lambda d, a, b, c: a * b + c, 1e-15)
case("div.rn.f64", "f64", "f64 f64", lambda d, a, b: a / b)
case("neg.f64", "f64", "f64", lambda d, a: -a)
case("abs.f64", "f64", "f64", lambda d, a: np.abs(a))

TORCH = {"f16": torch.float16, "bf16": torch.bfloat16}


def widened(bits: np.ndarray, type_: str) -> torch.Tensor:
    """Numbers of a 16-bit type, packed ones side by side, in float64."""
    halves = torch.from_numpy(bits.copy().view(np.int16))
    return halves.view(TORCH[type_.removesuffix("x2")]).double()


def narrowed(values: torch.Tensor, type_: str, dtype: np.dtype) -> np.ndarray:
    narrow = values.float().to(TORCH[type_.removesuffix("x2")])
    return narrow.view(torch.int16).numpy().view(dtype)


UNORDERED = {f"{name}u": order for name, order in ORDERS.items()}
for t, (name, order) in itertools.product(TORCH, (ORDERS | UNORDERED).items()):

    def compared(dtype, *arrays, t=t, order=order, nan=name in UNORDERED):
        a, b = (widened(x, t).numpy() for x in arrays)
        return order(a, b) | (nan & (np.isnan(a) | np.isnan(b)))

    case(f"setp.{name}.{t}", "pred", f"{t} {t}", compared)
for t in TORCH:
    for name, wanted in (("num", False), ("nan", True)):

        def is_nan(dtype, *arrays, t=t, wanted=wanted):
            a, b = (np.isnan(widened(x, t).numpy()) for x in arrays)
            return (a | b) == wanted

        case(f"setp.{name}.{t}", "pred", f"{t} {t}", is_nan)

NARROW: dict[str, Callable] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
    "fma": lambda a, b, c: a * b + c, "max": torch.fmax, "min": torch.fmin,
}  # fmt: skip
for t in ("f16", "bf16"):
    for type_ in (t, f"{t}x2"):
        for name, function in NARROW.items():
            for rounding in ("", ".rn"):
                narrow = lambda d, *a, f=function, t=type_: narrowed(  # noqa: E731
                    f(*(widened(x, t) for x in a)), t, d
                )
                count = 3 if name == "fma" else 2
                case(f"{name}{rounding}.{type_}", type_, f"{type_} " * count, narrow)
        negated = lambda d, a, t=type_: narrowed(-widened(a, t), t, d)  # noqa: E731
        case(f"neg.{type_}", type_, type_, negated)
    for name in ("add", "sub"):
        for rounding in ("", ".rn"):
            mixed = lambda d, a, b, f=NARROW[name], t=t: (  # noqa: E731
                f(widened(a, t), torch.from_numpy(b.copy()).double()).float().numpy()
            )
            case(f"{name}{rounding}.f32.{t}", "f32", f"{t} f32", mixed)
    fused = lambda d, a, b, c, t=t: (  # noqa: E731
        (widened(a, t) * widened(b, t) + torch.from_numpy(c.copy()).double()).float().numpy()
    )
    case(f"fma.rn.f32.{t}", "f32", f"{t} {t} f32", fused, 2e-7)
    case(f"cvt.f32.{t}", "f32", t, lambda d, a, t=t: widened(a, t).float().numpy())
    to_narrow = lambda d, a, t=t: narrowed(torch.from_numpy(a.copy()), t, d)  # noqa: E731
    case(f"cvt.rn.{t}.f32", t, "f32", to_narrow)
    to_pair = lambda d, a, b, t=t: narrowed(  # noqa: E731
        torch.from_numpy(np.stack([b, a], 1)).flatten(), t, d
    )
    case(f"cvt.rn.{t}x2.f32", f"{t}x2", "f32 f32", to_pair)


def in_pairs(function: Callable) -> Callable:
    """Two float32 in 64 bits."""
    return lambda dtype, *arrays: (
        function(*(a.view(F32).astype(F64) for a in arrays)).astype(F32).view(dtype)
    )


for name in ("add", "sub", "mul", "fma"):
    count, function, _ = FLOATS[name]
    for rounding in ("", ".rn"):
        case(f"{name}{rounding}.f32x2", "f32x2", "f32x2 " * count, in_pairs(function), 2e-7)

for source in ("s16", "u16", "s32", "u32", "s64", "u64"):
    case(f"cvt.rn.f32.{source}", "f32", source, lambda d, a: a.astype(F32))


def saturated(dtype, a):
    info = np.iinfo(dtype)
    whole = [0 if math.isnan(x) else x if math.isinf(x) else math.trunc(float(x)) for x in a]
    nan = info.min if dtype.itemsize == 8 else 0
    clipped = [int(max(info.min, min(info.max, x))) for x in whole]
    return np.array([nan if math.isnan(x) else y for x, y in zip(a, clipped, strict=True)], dtype)


case("cvt.rzi.s32.f32", "s32", "f32", saturated)
case("cvt.rzi.s64.f32", "s64", "f32", saturated)
case("cvt.f64.f32", "f64", "f32", lambda d, a: a.astype(F64))
case("cvt.rn.f32.f64", "f32", "f64", lambda d, a: a.astype(F32))
for name, function in (("rmi", np.floor), ("rpi", np.ceil), ("rni", np.rint), ("rzi", np.trunc)):
    case(f"cvt.{name}.f32.f32", "f32", "f32", lambda d, a, f=function: f(a))
case("cvt.rni.ftz.f32.f32", "f32", "f32", lambda d, a: np.rint(flushed(a)))
# TF32 keeps 10 bits of the mantissa; ties go away from zero.
tf32 = lambda d, a: np.where(  # noqa: E731
    np.isnan(a), np.uint32(0x7FFFFFFF), (a.view(np.uint32) + 0x1000) & 0xFFFFE000
).view(d)
case("cvt.rna.tf32.f32", "b32", "f32", tf32)


def same(actual: np.ndarray, expected: np.ndarray, rtol: float) -> bool:
    if actual.dtype.kind != "f":
        return bool((actual == expected).all())
    return np.allclose(actual, expected, rtol=rtol, atol=1e-30 if rtol else 0, equal_nan=True)


@pytest.mark.parametrize(
    ("opcode", "result", "operands", "function", "rtol"),
    CASES,
    ids=[f"{opcode} {len(operands)}" for opcode, _, operands, *_ in CASES],
)
@np.errstate(all="ignore")
def test_arithmetic(opcode, result, operands, function, rtol):
    rng = np.random.default_rng(3)
    arrays = [samples(type_, rng) for type_ in operands]
    if opcode.startswith(("shl", "shr")):
        arrays[1] %= 80  # also greater than the width
    actual = execute(opcode, result, arrays, operands)
    dtype = np.dtype(np.uint32) if result == "pred" else numpy_type(result)
    expected = function(dtype, *arrays)
    expected = np.ascontiguousarray(expected.reshape(32)[::2])
    if result == "f32x2":
        assert same(np.ascontiguousarray(actual).view(F32), expected.view(F32), rtol)
        return
    if result in ("f16", "bf16", "f16x2", "bf16x2"):
        of = widened(actual, result).numpy(), widened(expected.astype(dtype), result).numpy()
        np.testing.assert_array_equal(*of)
        return
    assert same(actual, expected.astype(dtype), rtol), (arrays, actual, expected)


def test_a_parameter_at_a_selected_address():
    body = """
    mov.b64 %d1, k_param_0;
    mov.b64 %d2, k_param_1;
    setp.lt.u32 %p1, %r99, 7;
    selp.b64 %d3, %d1, %d2, %p1;
    ld.param.b64 %d4, [%d3];
    mad.wide.u32 %d5, %r99, 8, %d102;
    st.global.b64 [ %d5 + 0 ], %d4;
    """
    arrays = [np.zeros(1, np.uint64), np.zeros(1, np.uint64), np.zeros(32, np.uint64)]
    run(program(body, parameters=3), *arrays)
    first, second = (array.ctypes.data for array in arrays[:2])
    assert arrays[2].tolist() == [first] * 7 + [second] * 25


def test_a_table_of_branches():
    body = """
    and.b32 %r1, %r99, 3;
    $L_brx_0: .branchtargets
        $L_0,
        $L_1,
        $L_2,
        $L_0;
    brx.idx %r1, $L_brx_0;
$L_0:
    mov.u32 %r2, 10;
    bra.uni $L_end;
$L_1:
    mov.u32 %r2, 11;
    bra.uni $L_end;
$L_2:
    mov.u32 %r2, 12;
$L_end:
    mad.wide.u32 %d1, %r99, 4, %d100;
    st.global.b32 [ %d1 + 0 ], %r2;
    """
    found = np.zeros(32, np.uint32)
    run(program(body), found)
    assert found.tolist() == [10, 11, 12, 10] * 8


# Instructions that have tests of their own, below or in test_memory.py and test_products.py.
ELSEWHERE = {
    *("bra", "bar", "ret", "bar.warp.sync", "ld.param", "ld.global", "ld.shared", "st.global"),
    *("st.shared", "ld.acquire", "ld.relaxed", "atom", "cp.async", "cp.async.commit_group"),
    *("cp.async.wait_group", "ldmatrix", "stmatrix", "fence.proxy.async"),
    *("prefetch", "mma.f16", "mma.bf16", "mma.tf32", "wgmma", "wgmma.commit_group", "nothing"),
    *("cvt.integer", "wgmma.wait_group", "pack.32.16", "pack.64.32", "pack.64.16", "unpack.32.16"),
    *("unpack.64.32", "shfl.bfly", "shfl.idx", "shfl.up", "shfl.down"),
    *(f"redux.sync.{name}" for name in ("min.s32", "max.s32", "add.s32", "min.u32", "max.u32")),
    *("redux.sync.add.u32", "redux.sync.and.b32", "redux.sync.or.b32", "elect.sync"),
    *("mbarrier.init", "mbarrier.inval", "mbarrier.arrive", "mbarrier.try_wait.parity"),
    *("tensormap.replace", "tensormap.cp_fenceproxy", "fence.proxy.tensormap"),
    *("cp.async.bulk.tensor",),
}  # fmt: skip


def test_every_instruction_is_tested():
    tested = {opcode for opcode, *_ in CASES} | ELSEWHERE
    # max and min of three numbers have their own names in the machine.
    tested |= {
        f"{name}3{rest}" for name in ("max", "min") for rest in (".f32", ".rn.f32", ".ftz.f32")
    }
    tested |= {"max3.rn.ftz.f32", "min3.rn.ftz.f32"}
    # test_comparison_of_packed_numbers
    tested |= {f"{name}x2" for name in tested if re.fullmatch(r"setp\.\w+\.b?f16", name)}
    assert names() - tested == set()


@pytest.mark.parametrize("order", [*ORDERS, *UNORDERED, "num", "nan"])
@pytest.mark.parametrize("type_", TORCH)
def test_comparison_of_packed_numbers(type_, order):
    """The same as two comparisons of the halves."""
    body = f"""
    mad.wide.u32 %d0, %r99, 4, %d100;
    ld.global.b32 %r0, [ %d0 + 0 ];
    mad.wide.u32 %d1, %r99, 4, %d101;
    ld.global.b32 %r1, [ %d1 + 0 ];
    setp.{order}.{type_}x2 %p0|%p1, %r0, %r1;
    mov.b32 {{%h0, %h1}}, %r0;
    mov.b32 {{%h2, %h3}}, %r1;
    setp.{order}.{type_} %p2, %h0, %h2;
    setp.{order}.{type_} %p3, %h1, %h3;
    xor.pred %p0, %p0, %p2;
    xor.pred %p1, %p1, %p3;
    or.pred %p0, %p0, %p1;
    selp.b32 %r2, 1, 0, %p0;
    st.global.b32 [ %d0 + 0 ], %r2;
    """
    rng = np.random.default_rng(6)
    a, b = rng.integers(0, 2**32, (2, 32)).astype(np.uint32)
    b[:8] = a[:8]
    a[5:12] = 0x7FFF7FFF  # NaN
    run(program(body, parameters=2), a, b)
    assert not a.any()


TYPES = ["s8", "u8", *INTEGERS]


@pytest.mark.parametrize("source", TYPES)
@pytest.mark.parametrize("result", TYPES)
def test_conversion_of_integers(result, source):
    """Also in registers that are wider than the type: the upper bits are ignored."""
    rooms = [
        (into, of)
        for into, of in itertools.product((2, 4, 8), repeat=2)
        if into >= WIDTHS[result] and of >= WIDTHS[source]
    ]
    rng = np.random.default_rng(4)
    for into, of in rooms:
        body = f"""
        mad.wide.u32 %d0, %r99, {of}, %d100;
        ld.global.b{8 * of} %{LETTERS[of]}0, [ %d0 + 0 ];
        cvt.{result}.{source} %{LETTERS[into]}1, %{LETTERS[of]}0;
        mad.wide.u32 %d0, %r99, {into}, %d101;
        st.global.b{8 * into} [ %d0 + 0 ], %{LETTERS[into]}1;
        """
        data = rng.integers(0, 2**63, 32).astype(f"u{of}")
        out = np.zeros(32, f"{result[0].replace('s', 'i')}{into}")
        run(program(body, parameters=2), data, out)
        narrow, wide = (f"{t[0].replace('s', 'i')}{WIDTHS[t]}" for t in (source, result))
        expected = data.astype(narrow).astype(wide)
        assert (out == expected.astype(out.dtype)).all(), (into, of)


def test_registers_are_packed_and_taken_apart():
    body = """
    mad.wide.u32 %d0, %r99, 8, %d100;
    ld.global.b64 %d1, [ %d0 + 0 ];
    mov.b64 {%r0, %r1}, %d1;
    mov.b32 {%h0, %h1}, %r0;
    mov.b32 {%h2, _}, %r1;
    mov.b32 %r2, {%h1, %h0};
    mov.b64 %d2, {%r1, %r2};
    st.global.b64 [ %d0 + 0 ], %d2;
    mov.b64 %d3, {%h0, %h1, %h2, %h0};
    mad.wide.u32 %d0, %r99, 8, %d101;
    st.global.b64 [ %d0 + 0 ], %d3;
    """
    data = np.random.default_rng(0).integers(0, 2**63, 32).astype(np.uint64)
    halves = data.view(np.uint16).reshape(32, 4).copy()
    other = np.zeros_like(data)
    run(program(body, parameters=2), data, other)
    assert (data.view(np.uint16).reshape(32, 4) == halves[:, [2, 3, 1, 0]]).all()
    assert (other.view(np.uint16).reshape(32, 4) == halves[:, [0, 1, 2, 0]]).all()


SHUFFLES = {  # with b = 3 and the whole warp as a segment: the source of a lane, or itself
    "bfly": (lambda lane: lane ^ 3, 31),
    "idx": (lambda lane: 3, 31),
    "up": (lambda lane: lane - 3 if lane >= 3 else lane, 0),
    "down": (lambda lane: lane + 3 if lane + 3 < 32 else lane, 31),
}


@pytest.mark.parametrize("mode", SHUFFLES)
def test_shuffle(mode):
    source, clamp = SHUFFLES[mode]
    body = f"""
    mad.wide.u32 %d0, %r99, 4, %d100;
    ld.global.b32 %r0, [ %d0 + 0 ];
    shfl.sync.{mode}.b32 %r1|%p0, %r0, 3, {clamp}, -1;
    selp.b32 %r2, 1000, 0, %p0;
    add.u32 %r1, %r1, %r2;
    st.global.b32 [ %d0 + 0 ], %r1;
    """
    data = np.arange(100, 132, dtype=np.uint32)
    run(program(body), data)
    sources = [source(lane) for lane in range(32)]
    valid = [s != lane or mode in ("bfly", "idx") for lane, s in enumerate(sources)]
    assert data.tolist() == [100 + s + 1000 * v for s, v in zip(sources, valid, strict=True)]


@pytest.mark.parametrize(
    ("name", "function"),
    [
        *(("min.s32", min), ("max.s32", max), ("add.s32", lambda a, b: a + b)),
        *(("min.u32", min), ("max.u32", max), ("add.u32", lambda a, b: a + b)),
        *(("and.b32", lambda a, b: a & b), ("or.b32", lambda a, b: a | b)),
    ],
)
def test_reduce(name, function):
    dtype = np.int32 if name.endswith("s32") else np.uint32
    data = np.random.default_rng(5).integers(0, 2**31, 32).astype(np.uint32).view(dtype)
    data[3:9] *= dtype(3)
    expected = data[0]
    for value in data[1:]:
        with np.errstate(over="ignore"):
            expected = dtype(function(expected, value))
    body = f"""
    mad.wide.u32 %d0, %r99, 4, %d100;
    ld.global.b32 %r0, [ %d0 + 0 ];
    redux.sync.{name} %r1, %r0, -1;
    st.global.b32 [ %d0 + 0 ], %r1;
    """
    run(program(body), data)
    assert (data == expected).all()
