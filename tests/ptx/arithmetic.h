// Register-to-register instructions, by name. Names are those of PTX, except that
//   pack.64.16, unpack.32.16  are mov with a list of registers, from or to narrower ones
//   max3.f32, min3.f32        are max and min of three numbers
//   cvt.integer               is cvt from one integer type to another
#pragma once
#include <cmath>
#include <limits>

#include "memory.h"

template <class T> T as(auto value) {
  static_assert(sizeof(T) == sizeof value);
  T result;
  memcpy(&result, &value, sizeof result);
  return result;
}
inline f32 as_float(u32 bits) { return as<f32>(bits); }
inline f32 from_half(u16 bits) { return (f32)as<_Float16>(bits); }
inline u16 to_half(f32 x) { return as<u16>((_Float16)x); }
inline f32 from_bfloat(u16 bits) { return as_float((u32)bits << 16); }
inline u16 to_bfloat(f32 x) {
  if (std::isnan(x)) return 0x7fff;
  const u32 bits = as<u32>(x);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
// Flushes denormals to zero.
inline f32 ftz(f32 x) { return std::fpclassify(x) == FP_SUBNORMAL ? copysignf(0, x) : x; }

// The maximum; of a NaN and a number, the number.
inline f32 larger(f32 a, f32 b) { return std::isnan(a) ? b : std::isnan(b) ? a : a == b ? (std::signbit(a) ? b : a) : a > b ? a : b; }
inline f32 smaller(f32 a, f32 b) { return -larger(-a, -b); }
template <class T> T quotient(T a, T b) { return b == 0 ? (T)-1 : std::is_signed_v<T> && b == (T)-1 ? (T)(0 - (s64)a) : (T)(a / b); }
template <class T> T remainder_of(T a, T b) { return b == 0 ? a : std::is_signed_v<T> && b == (T)-1 ? (T)0 : (T)(a % b); }
template <class T> T truncated(f32 x) {  // cvt.rzi: saturates out of range
  if (std::isnan(x)) return sizeof(T) == 8 ? std::numeric_limits<T>::min() : 0;
  if (x >= (f32)std::numeric_limits<T>::max()) return std::numeric_limits<T>::max();
  if (x <= (f32)std::numeric_limits<T>::min()) return std::numeric_limits<T>::min();
  return (T)x;
}
inline u32 reversed(u32 x) {
  u32 r = 0;
  for (int k = 0; k < 32; k++) r |= (x >> k & 1) << (31 - k);
  return r;
}
inline u32 permuted(u32 a, u32 b, u32 selector) {
  const u64 bytes = (u64)b << 32 | a;
  u32 r = 0;
  for (int k = 0; k < 4; k++) {
    const u32 s = selector >> 4 * k & 15;
    u8 byte = bytes >> (s & 7) * 8;
    if (s & 8) byte = byte & 0x80 ? 0xff : 0;
    r |= (u32)byte << 8 * k;
  }
  return r;
}
inline u32 bits_of(u32 a, u32 from, u32 count) {  // bfe.u32
  from &= 255, count &= 255;
  if (from > 31 || !count) return 0;
  return count > 31 ? a >> from : a >> from & ((1u << count) - 1);
}
inline s32 signed_bits_of(s32 a, u32 from, u32 count) {  // bfe.s32
  from &= 255, count = std::min(count & 255, 32u);
  if (!count) return 0;
  const s64 shifted = (s64)a >> std::min(from, 31u);
  return (s32)((s64)((u64)shifted << (64 - count)) >> (64 - count));
}
template <class F> u32 in_parts(u32 a, u32 b, u32 c, F f) {  // applies f to both of two packed numbers
  return f(a, b, c) | (u32)f(a >> 16, b >> 16, c >> 16) << 16;
}

using Handler = void (*)(Warp&, const Instruction&);
using Table = std::unordered_map<std::string, Handler>;

// A result of type D from operands a, b and c of types A, B and C.
#define DEFINE(name, D, A, B, C, expression)                                                       \
  t[name] = [](Warp& w, const Instruction& i) {                                                    \
    D* d = w.at<D>(i.operands[0]);                                                                 \
    const A* x = w.at<A>(i.operands[1]);                                                           \
    const B* y = w.at<B>(i.operands[i.size > 2 ? 2 : 1]);                                          \
    const C* z = w.at<C>(i.operands[i.size > 3 ? 3 : 1]);                                          \
    FOR_LANES(w, l) {                                                                              \
      [[maybe_unused]] const A a = x[l];                                                           \
      [[maybe_unused]] const B b = y[l];                                                           \
      [[maybe_unused]] const C c = z[l];                                                           \
      d[l] = (D)(expression);                                                                      \
    }                                                                                              \
  };
#define SAME(name, T, expression) DEFINE(name, T, T, T, T, expression)
// A predicate from two operands of a type.
#define COMPARE(name, T, expression)                                                               \
  t["setp." name] = [](Warp& w, const Instruction& i) {                                            \
    const T *x = w.at<T>(i.operands[1]), *y = w.at<T>(i.operands[2]);                              \
    u32 holds = 0, &d = *w.at<u32>(i.operands[0]);                                                 \
    FOR_LANES(w, l) {                                                                              \
      const T a = x[l], b = y[l];                                                                  \
      holds |= (u32)(bool)(expression) << l;                                                       \
    }                                                                                              \
    d = (d & ~w.active) | holds;                                                                   \
  };
#define PREDICATES(name, expression)                                                               \
  t[name] = [](Warp& w, const Instruction& i) {                                                    \
    const u32 a = *w.at<u32>(i.operands[1]);                                                       \
    [[maybe_unused]] const u32 b = *w.at<u32>(i.operands[i.size > 2 ? 2 : 1]);                     \
    u32& d = *w.at<u32>(i.operands[0]);                                                            \
    d = (d & ~w.active) | ((expression) & w.active);                                               \
  };
#define SELECT(suffix, T)                                                                          \
  t["selp." suffix] = [](Warp& w, const Instruction& i) {                                          \
    T* d = w.at<T>(i.operands[0]);                                                                 \
    const T *a = w.at<T>(i.operands[1]), *b = w.at<T>(i.operands[2]);                              \
    const u32 p = *w.at<u32>(i.operands[3]);                                                       \
    FOR_LANES(w, l) d[l] = p >> l & 1 ? a[l] : b[l];                                               \
  };

#define UNSIGNED_SIZES(op, expression)                                                             \
  SAME(op ".s16", u16, expression) SAME(op ".u16", u16, expression)                                \
  SAME(op ".s32", u32, expression) SAME(op ".u32", u32, expression)                                \
  SAME(op ".s64", u64, expression) SAME(op ".u64", u64, expression)
#define EACH_INTEGER(op, expression)                                                               \
  SAME(op ".s16", s16, expression) SAME(op ".u16", u16, expression)                                \
  SAME(op ".s32", s32, expression) SAME(op ".u32", u32, expression)                                \
  SAME(op ".s64", s64, expression) SAME(op ".u64", u64, expression)
#define BITS(op, expression)                                                                       \
  SAME(op ".b16", u16, expression) SAME(op ".b32", u32, expression) SAME(op ".b64", u64, expression)

inline void integers(Table& t) {
  UNSIGNED_SIZES("add", a + b) UNSIGNED_SIZES("sub", a - b) UNSIGNED_SIZES("mul.lo", (u64)a * b)
  UNSIGNED_SIZES("mad.lo", (u64)a * b + c)
  DEFINE("mul.wide.s16", s32, s16, s16, s16, (s32)a * b) DEFINE("mul.wide.u16", u32, u16, u16, u16, (u32)a * b)
  DEFINE("mul.wide.s32", s64, s32, s32, s32, (s64)a * b) DEFINE("mul.wide.u32", u64, u32, u32, u32, (u64)a * b)
  DEFINE("mad.wide.s32", s64, s32, s32, s64, (s64)a * b + c) DEFINE("mad.wide.u32", u64, u32, u32, u64, (u64)a * b + c)
  SAME("mul.hi.s32", s32, (s64)a * b >> 32) SAME("mul.hi.u32", u32, (u64)a * b >> 32)
  SAME("mul.hi.s64", s64, (__int128)a * b >> 64) SAME("mul.hi.u64", u64, (unsigned __int128)a * b >> 64)
  EACH_INTEGER("div", quotient(a, b)) EACH_INTEGER("rem", remainder_of(a, b))
  EACH_INTEGER("min", std::min(a, b)) EACH_INTEGER("max", std::max(a, b))
  SAME("min.relu.s32", s32, std::max(0, std::min(a, b))) SAME("max.relu.s32", s32, std::max(0, std::max(a, b)))
  SAME("neg.s16", u16, 0 - a) SAME("neg.s32", u32, 0 - a) SAME("neg.s64", u64, 0 - a)
  SAME("abs.s32", s32, a < 0 ? 0 - (u32)a : a) SAME("abs.s64", s64, a < 0 ? 0 - (u64)a : a)
  BITS("and", a & b) BITS("or", a | b) BITS("xor", a ^ b) BITS("not", ~a)
  PREDICATES("and.pred", a & b) PREDICATES("or.pred", a | b) PREDICATES("xor.pred", a ^ b)
  PREDICATES("not.pred", ~a) PREDICATES("mov.pred", a)
  DEFINE("shl.b16", u16, u16, u32, u16, b > 15 ? 0 : a << b) DEFINE("shl.b32", u32, u32, u32, u32, b > 31 ? 0 : a << b)
  DEFINE("shl.b64", u64, u64, u32, u64, b > 63 ? 0 : a << b)
  DEFINE("shr.u16", u16, u16, u32, u16, b > 15 ? 0 : a >> b) DEFINE("shr.u32", u32, u32, u32, u32, b > 31 ? 0 : a >> b)
  DEFINE("shr.u64", u64, u64, u32, u64, b > 63 ? 0 : a >> b)
  t["shr.b16"] = t["shr.u16"], t["shr.b32"] = t["shr.u32"], t["shr.b64"] = t["shr.u64"];
  DEFINE("shr.s16", s16, s16, u32, s16, a >> std::min(b, 15u)) DEFINE("shr.s32", s32, s32, u32, s32, a >> std::min(b, 31u))
  DEFINE("shr.s64", s64, s64, u32, s64, a >> std::min(b, 63u))
  SAME("shf.l.wrap.b32", u32, ((u64)b << 32 | a) << (c & 31) >> 32)
  SAME("shf.r.wrap.b32", u32, ((u64)b << 32 | a) >> (c & 31))
  SAME("bfe.u32", u32, bits_of(a, b, c)) DEFINE("bfe.s32", s32, s32, u32, u32, signed_bits_of(a, b, c))
  SAME("prmt.b32", u32, permuted(a, b, c)) SAME("popc.b32", u32, __builtin_popcount(a))
  SAME("clz.b32", u32, a ? __builtin_clz(a) : 32) SAME("brev.b32", u32, reversed(a))
  for (std::string type : {"b16", "u16", "s16"}) {
    SELECT("b16", u16) SAME("mov.b16", u16, a)
    t["selp." + type] = t["selp.b16"], t["mov." + type] = t["mov.b16"];
  }
  for (std::string type : {"b32", "u32", "s32", "f32"}) {
    SELECT("b32", u32) SAME("mov.b32", u32, a)
    t["selp." + type] = t["selp.b32"], t["mov." + type] = t["mov.b32"];
  }
  for (std::string type : {"b64", "u64", "s64", "f64"}) {
    SELECT("b64", u64) SAME("mov.b64", u64, a)
    t["selp." + type] = t["selp.b64"], t["mov." + type] = t["mov.b64"];
  }
#define COMPARE_INTEGERS(type, T)                                                                  \
  COMPARE("lt." type, T, a < b) COMPARE("le." type, T, a <= b) COMPARE("gt." type, T, a > b)       \
  COMPARE("ge." type, T, a >= b) COMPARE("eq." type, T, a == b) COMPARE("ne." type, T, a != b)
  COMPARE_INTEGERS("s16", s16) COMPARE_INTEGERS("u16", u16) COMPARE_INTEGERS("b16", u16)
  COMPARE_INTEGERS("s32", s32) COMPARE_INTEGERS("u32", u32) COMPARE_INTEGERS("b32", u32)
  COMPARE_INTEGERS("s64", s64) COMPARE_INTEGERS("u64", u64) COMPARE_INTEGERS("b64", u64)
  DEFINE("pack.32.16", u32, u16, u16, u16, a | (u32)b << 16) DEFINE("pack.64.32", u64, u32, u32, u32, a | (u64)b << 32)
  t["pack.64.16"] = [](Warp& w, const Instruction& i) {
    FOR_LANES(w, l) {
      u64 r = 0;
      for (int k = 0; k < 4; k++) r |= (u64)w.at<u16>(i.operands[1 + k])[l] << 16 * k;
      w.at<u64>(i.operands[0])[l] = r;
    }
  };
#define UNPACK(name, WIDE, NARROW)                                                                 \
  t[name] = [](Warp& w, const Instruction& i) {                                                    \
    FOR_LANES(w, l) {                                                                              \
      const WIDE a = w.at<WIDE>(i.operands[2])[l];                                                 \
      w.at<NARROW>(i.operands[0])[l] = (NARROW)a;                                                  \
      w.at<NARROW>(i.operands[1])[l] = (NARROW)(a >> 8 * sizeof(NARROW));                          \
    }                                                                                              \
  };
  UNPACK("unpack.32.16", u32, u16) UNPACK("unpack.64.32", u64, u32)
}

// op.f32, with and without .rn and .ftz
#define FLOATS(op, expression)                                                                     \
  SAME(op ".f32", f32, expression)                                                                 \
  t[op ".rn.f32"] = t[op ".f32"];                                                                  \
  FLUSHED(op ".ftz.f32", expression)                                                               \
  t[op ".rn.ftz.f32"] = t[op ".ftz.f32"];
#define FLUSHED(name, expression)                                                                  \
  t[name] = [](Warp& w, const Instruction& i) {                                                    \
    f32* d = w.at<f32>(i.operands[0]);                                                             \
    const f32* x = w.at<f32>(i.operands[1]);                                                       \
    const f32* y = w.at<f32>(i.operands[i.size > 2 ? 2 : 1]);                                      \
    const f32* z = w.at<f32>(i.operands[i.size > 3 ? 3 : 1]);                                      \
    FOR_LANES(w, l) {                                                                              \
      [[maybe_unused]] const f32 a = ftz(x[l]), b = ftz(y[l]), c = ftz(z[l]);                      \
      d[l] = ftz(expression);                                                                      \
    }                                                                                              \
  };

inline void floats(Table& t) {
  FLOATS("add", a + b) FLOATS("sub", a - b) FLOATS("mul", a * b) FLOATS("fma", fmaf(a, b, c))
  FLOATS("max", larger(a, b)) FLOATS("min", smaller(a, b)) FLOATS("max3", larger(larger(a, b), c))
  FLOATS("min3", smaller(smaller(a, b), c)) FLOATS("div", a / b) FLOATS("div.full", a / b)
  FLOATS("div.approx", a / b) FLOATS("rcp", 1 / a) FLOATS("rcp.approx", 1 / a)
  FLOATS("rsqrt.approx", (f32)(1 / sqrt((f64)a))) FLOATS("sqrt", sqrtf(a)) FLOATS("sqrt.approx", sqrtf(a))
  FLOATS("ex2.approx", exp2f(a)) FLOATS("lg2.approx", log2f(a)) SAME("tanh.approx.f32", f32, tanhf(a))
  SAME("max.NaN.f32", f32, std::isnan(a) || std::isnan(b) ? NAN : larger(a, b))
  SAME("min.NaN.f32", f32, std::isnan(a) || std::isnan(b) ? NAN : smaller(a, b))
  // These change only the sign bit, also of a NaN.
  SAME("neg.f32", u32, a ^ 0x80000000u) SAME("abs.f32", u32, a & 0x7fffffffu)
  FLUSHED("neg.ftz.f32", -a) FLUSHED("abs.ftz.f32", fabsf(a))
  SAME("copysign.f32", u32, (a & 0x80000000u) | (b & 0x7fffffffu))
  SAME("add.f64", f64, a + b) SAME("sub.f64", f64, a - b) SAME("mul.f64", f64, a * b)
  t["add.rn.f64"] = t["add.f64"], t["sub.rn.f64"] = t["sub.f64"], t["mul.rn.f64"] = t["mul.f64"];
  SAME("fma.rn.f64", f64, fma(a, b, c)) SAME("div.rn.f64", f64, a / b)
  SAME("neg.f64", f64, -a) SAME("abs.f64", f64, fabs(a))
// Comparison of 16-bit numbers, and of two packed ones with one predicate each.
#define COMPARE_NARROW(op, type, from, expression)                                                 \
  t["setp." op "." type] = [](Warp& w, const Instruction& i) {                                     \
    const u16 *x = w.at<u16>(i.operands[1]), *y = w.at<u16>(i.operands[2]);                        \
    u32 holds = 0, &d = *w.at<u32>(i.operands[0]);                                                 \
    FOR_LANES(w, l) {                                                                              \
      const f32 a = from(x[l]), b = from(y[l]);                                                    \
      holds |= (u32)(bool)(expression) << l;                                                       \
    }                                                                                              \
    d = (d & ~w.active) | holds;                                                                   \
  };                                                                                               \
  t["setp." op "." type "x2"] = [](Warp& w, const Instruction& i) {                                \
    const u32 *x = w.at<u32>(i.operands[2]), *y = w.at<u32>(i.operands[3]);                        \
    for (int k = 0; k < 2; k++) {                                                                  \
      u32 holds = 0, &d = *w.at<u32>(i.operands[k]);                                               \
      FOR_LANES(w, l) {                                                                            \
        const f32 a = from(x[l] >> 16 * k), b = from(y[l] >> 16 * k);                              \
        holds |= (u32)(bool)(expression) << l;                                                     \
      }                                                                                            \
      d = (d & ~w.active) | holds;                                                                 \
    }                                                                                              \
  };
#define COMPARE_FLOATS(op, expression)                                                             \
  COMPARE(op ".f32", f32, expression) COMPARE(op ".f64", f64, expression)                          \
  COMPARE_NARROW(op, "f16", from_half, expression) COMPARE_NARROW(op, "bf16", from_bfloat, expression) \
  t["setp." op ".ftz.f32"] = [](Warp& w, const Instruction& i) {                                   \
    u32 holds = 0, &d = *w.at<u32>(i.operands[0]);                                                 \
    FOR_LANES(w, l) {                                                                              \
      const f32 a = ftz(w.at<f32>(i.operands[1])[l]), b = ftz(w.at<f32>(i.operands[2])[l]);        \
      holds |= (u32)(expression) << l;                                                             \
    }                                                                                              \
    d = (d & ~w.active) | holds;                                                                   \
  };
  // A comparison with a NaN is false, or true with the suffix u (unordered).
  COMPARE_FLOATS("lt", a < b) COMPARE_FLOATS("le", a <= b) COMPARE_FLOATS("gt", a > b)
  COMPARE_FLOATS("ge", a >= b) COMPARE_FLOATS("eq", a == b) COMPARE_FLOATS("ne", a < b || a > b)
  COMPARE_FLOATS("ltu", !(a >= b)) COMPARE_FLOATS("leu", !(a > b)) COMPARE_FLOATS("gtu", !(a <= b))
  COMPARE_FLOATS("geu", !(a < b)) COMPARE_FLOATS("equ", !(a < b || a > b)) COMPARE_FLOATS("neu", !(a == b))
  COMPARE_FLOATS("num", a == a && b == b) COMPARE_FLOATS("nan", a != a || b != b)
  // 16-bit and packed numbers: each operation is rounded once.
#define NARROW(op, expression)                                                                     \
  NARROW_OF(op, "f16", from_half, to_half, expression)                                             \
  NARROW_OF(op, "bf16", from_bfloat, to_bfloat, expression)
#define NARROW_OF(op, type, from, to, expression)                                                  \
  DEFINE(op "." type, u16, u16, u16, u16, ROUNDED(from, to, expression, a, b, c))                  \
  DEFINE(op "." type "x2", u32, u32, u32, u32, in_parts(a, b, c, [](u16 p, u16 q, u16 r) {         \
    return ROUNDED(from, to, expression, p, q, r);                                                 \
  }))                                                                                              \
  t[op ".rn." type] = t[op "." type], t[op ".rn." type "x2"] = t[op "." type "x2"];
#define ROUNDED(from, to, expression, p, q, r)                                                     \
  [](f32 a, f32 b, [[maybe_unused]] f32 c) { return to(expression); }(from(p), from(q), from(r))
  NARROW("add", a + b) NARROW("sub", a - b) NARROW("mul", a * b) NARROW("fma", fmaf(a, b, c))
  NARROW("max", larger(a, b)) NARROW("min", smaller(a, b))
  SAME("neg.f16", u16, a ^ 0x8000) SAME("neg.f16x2", u32, a ^ 0x80008000u)
  t["neg.bf16"] = t["neg.f16"], t["neg.bf16x2"] = t["neg.f16x2"];
  // A 16-bit operand and a float32 one.
#define MIXED(type, from)                                                                          \
  DEFINE("add.f32." type, f32, u16, f32, f32, from(a) + b) DEFINE("sub.f32." type, f32, u16, f32, f32, from(a) - b)          \
  DEFINE("fma.rn.f32." type, f32, u16, u16, f32, fmaf(from(a), from(b), c))                        \
  t["add.rn.f32." type] = t["add.f32." type], t["sub.rn.f32." type] = t["sub.f32." type];
  MIXED("f16", from_half) MIXED("bf16", from_bfloat)
  // Two float32 numbers in 64 bits.
#define PAIRS(op, expression)                                                                      \
  t[op ".f32x2"] = t[op ".rn.f32x2"] = [](Warp& w, const Instruction& i) {                         \
    const s64* o = i.operands;                                                                     \
    FOR_LANES(w, l) for (int k = 2 * l; k < 2 * l + 2; k++) {                                      \
      const f32 a = w.at<f32>(o[1])[k], b = w.at<f32>(o[2])[k];                                    \
      [[maybe_unused]] const f32 c = w.at<f32>(o[i.size > 3 ? 3 : 1])[k];                          \
      w.at<f32>(o[0])[k] = expression;                                                             \
    }                                                                                              \
  };
  PAIRS("add", a + b) PAIRS("sub", a - b) PAIRS("mul", a * b) PAIRS("fma", fmaf(a, b, c))
}

#define CONVERT(name, D, A, expression) DEFINE("cvt." name, D, A, A, A, expression)
inline void conversions(Table& t) {
  CONVERT("f32.f16", f32, u16, from_half(a)) CONVERT("f32.bf16", f32, u16, from_bfloat(a))
  CONVERT("rn.f16.f32", u16, f32, to_half(a)) CONVERT("rn.bf16.f32", u16, f32, to_bfloat(a))
  CONVERT("rn.f16x2.f32", u32, f32, to_half(b) | (u32)to_half(a) << 16)
  CONVERT("rn.bf16x2.f32", u32, f32, to_bfloat(b) | (u32)to_bfloat(a) << 16)
  CONVERT("rna.tf32.f32", u32, u32, std::isnan(as_float(a)) ? 0x7fffffffu : (a + 0x1000) & 0xffffe000u)
  // result: offset, bytes of its type, whether that is signed, bytes of the register; source: the same
  t["cvt.integer"] = [](Warp& w, const Instruction& i) {
    const s64* o = i.operands;
    FOR_LANES(w, l) {
      u64 value;
      extend((u8*)&value, w.at<u8>(o[4]) + l * o[7], o[5], 8, o[6]);
      extend(w.at<u8>(o[0]) + l * o[3], (u8*)&value, o[1], o[3], o[2]);
    }
  };
  CONVERT("rn.f32.s16", f32, s16, a) CONVERT("rn.f32.u16", f32, u16, a) CONVERT("rn.f32.s32", f32, s32, a)
  CONVERT("rn.f32.u32", f32, u32, a) CONVERT("rn.f32.s64", f32, s64, a) CONVERT("rn.f32.u64", f32, u64, a)
  CONVERT("rzi.s32.f32", s32, f32, truncated<s32>(a)) CONVERT("rzi.s64.f32", s64, f32, truncated<s64>(a))
  CONVERT("f64.f32", f64, f32, a) CONVERT("rn.f32.f64", f32, f64, a)
  CONVERT("rmi.f32.f32", f32, f32, floorf(a)) CONVERT("rpi.f32.f32", f32, f32, ceilf(a))
  CONVERT("rni.f32.f32", f32, f32, nearbyintf(a)) CONVERT("rzi.f32.f32", f32, f32, truncf(a))
  CONVERT("rni.ftz.f32.f32", f32, f32, nearbyintf(ftz(a)))
}

// ---- Warp shuffles and reductions
enum class Shuffle { BUTTERFLY, INDEX, UP, DOWN };
// shfl: result, predicate (or -1), source, b, c, mask of lanes
template <Shuffle MODE> void shuffle(Warp& w, const Instruction& i) {
  if (!whole_warp(w, i)) return;
  const s64* o = i.operands;
  u32 source[LANES], inside = 0;
  memcpy(source, w.at<u32>(o[2]), sizeof source);
  for (int l = 0; l < LANES; l++) {
    const int b = w.at<u32>(o[3])[l] & 31, c = w.at<u32>(o[4])[l];
    const int segment = c >> 8 & 31, clamp = c & 31, first = l & segment, last = first | (clamp & ~segment);
    int j = MODE == Shuffle::BUTTERFLY ? l ^ b : MODE == Shuffle::INDEX ? first | (b & ~segment) : MODE == Shuffle::UP ? l - b : l + b;
    const bool valid = MODE == Shuffle::UP ? j >= last : j <= last;
    if (!valid) j = l;
    w.at<u32>(o[0])[l] = source[j];
    inside |= (u32)valid << l;
  }
  if (o[1] >= 0) *w.at<u32>(o[1]) = inside;
}

template <class T, class F> void reduce(Warp& w, const Instruction& i, F f) {
  if (!whole_warp(w, i)) return;
  T* d = w.at<T>(i.operands[0]);
  const T* a = w.at<T>(i.operands[1]);
  T all = a[0];
  for (int l = 1; l < LANES; l++) all = f(all, a[l]);
  std::fill(d, d + LANES, all);
}
#define REDUCE(name, T, expression)                                                                \
  t["redux.sync." name] = [](Warp& w, const Instruction& i) { reduce<T>(w, i, [](T a, T b) { return (T)(expression); }); };

inline void exchanges(Table& t) {
  t["shfl.bfly"] = shuffle<Shuffle::BUTTERFLY>, t["shfl.idx"] = shuffle<Shuffle::INDEX>;
  t["shfl.up"] = shuffle<Shuffle::UP>, t["shfl.down"] = shuffle<Shuffle::DOWN>;
  REDUCE("min.s32", s32, std::min(a, b)) REDUCE("max.s32", s32, std::max(a, b)) REDUCE("add.s32", s32, a + b)
  REDUCE("min.u32", u32, std::min(a, b)) REDUCE("max.u32", u32, std::max(a, b)) REDUCE("add.u32", u32, a + b)
  REDUCE("and.b32", u32, a & b) REDUCE("or.b32", u32, a | b)
}
