// Vectors of 32-bit elements for the instruction set that the including file is compiled for.
//
// The kernels are compiled once per instruction set. Everything here therefore has internal
// linkage: the linker would merge functions of equal names and could keep the version that the CPU
// lacks instructions for. For the same reason these files use no templates of the standard library.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "elements.h"

namespace vlmo {
namespace {

constexpr std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
constexpr std::int64_t round_up(std::int64_t x, std::int64_t step) {
  return (x + step - 1) / step * step;
}

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;  // SSE2, NEON; any compiler can split it
#endif

using Floats = float __attribute__((vector_size(4 * kLanes)));
using Words = std::uint32_t __attribute__((vector_size(4 * kLanes)));
using Halves = std::uint16_t __attribute__((vector_size(2 * kLanes)));
using LooseFloats = float __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
using LooseHalves = std::uint16_t __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));

inline Floats load(const float* from) { return *reinterpret_cast<const LooseFloats*>(from); }
inline void store(float* to, Floats x) { *reinterpret_cast<LooseFloats*>(to) = x; }
inline Words load_halves(const std::uint16_t* from) {
  return __builtin_convertvector(*reinterpret_cast<const LooseHalves*>(from), Words);
}

inline Floats splat(float x) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(x);
#elif defined(__AVX2__)
  return _mm256_set1_ps(x);
#else
  return Floats{x, x, x, x};
#endif
}

// The larger of both; b if a is NaN.
inline Floats maximum(Floats a, Floats b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

inline Floats where(Words chosen, Floats yes, Floats no) {
  return Floats((chosen & Words(yes)) | (~chosen & Words(no)));
}

// 0, 1, 2, ...
inline Words lane_numbers() {
  Words numbers{};
  for (int i = 0; i < kLanes; ++i) numbers[i] = i;
  return numbers;
}

inline float sum(Floats x) {
  float parts[kLanes];
  std::memcpy(parts, &x, sizeof x);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
  }
  return parts[0];
}

// Minimax polynomials of the relative error: of e^r, |r| <= ln(2) / 2, error 2^-28; of 2^f,
// |f| <= 1/2, error 2^-18.
constexpr float kExp[] = {1.f,          1.f,           0.49999993f, 0.16666521f,
                          0.041668390f, 0.0083687100f, 0.0013814600f};
constexpr float kExp2Rough[] = {0.99999928f, 0.69312179f, 0.24024744f, 0.055917859f, 0.0095701022f};

template <int count>
inline Floats polynomial(const float (&coefficients)[count], Floats x) {
  Floats p = splat(coefficients[count - 1]);
#pragma GCC unroll 8
  for (int i = count - 2; i >= 0; --i) p = p * x + splat(coefficients[i]);
  return p;
}

constexpr float kRounding = 0x1.8p23f;  // adding it rounds to an integer in the lowest bits

// p times 2^n, where n is `shifted` less kRounding, -127 to 0; exactly 0 for -127.
inline Floats scaled(Floats p, Floats shifted) {
  return p * Floats((Words(shifted) + 127) << 23);
}

// e^x for x <= 0, with a relative error of 2^-23; NaN for NaN, 0 below 2^-126.
inline Floats exp_nonpositive(Floats x) {
  // The constant comes first because the maximum must keep a NaN.
  x = maximum(splat(-88.f), x);
  const Floats shifted = x * splat(1.44269504f) + splat(kRounding), n = shifted - splat(kRounding);
  // x - n ln(2), with ln(2) as the sum of a number of few bits and a correction.
  const Floats r = (x - n * splat(0.693359375f)) - n * splat(-0.000212194440f);
  return scaled(polynomial(kExp, r), shifted);
}

// 2^x for x <= 0, with a relative error of 2^-18; NaN for NaN, 0 below 2^-126.
inline Floats rough_exp2_nonpositive(Floats x) {
  x = maximum(splat(-127.f), x);
  const Floats shifted = x + splat(kRounding);
  return scaled(polynomial(kExp2Rough, x - (shifted - splat(kRounding))), shifted);
}

// Conversions of 16-bit elements, in both directions of one vector.

inline Floats from_bfloat16(Words bits) { return Floats(bits << 16); }

// Rounds to nearest even; the result is in the lower half of each lane.
inline Words to_bfloat16(Floats x) {
  const Words bits = Words(x);
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words nan = Words((bits & 0x7fffffff) > 0x7f800000);
  return (nan & ((bits >> 16) | 0x40)) | (~nan & rounded);
}

inline Floats from_float16(Words bits) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)bits));
#elif defined(__AVX2__)
  const __m256i sorted = _mm256_permute4x64_epi64(
      _mm256_packus_epi32((__m256i)bits, (__m256i)bits), 0b1000);
  return _mm256_cvtph_ps(_mm256_castsi256_si128(sorted));
#else
  // The exponent is rebased by a product, which also makes a subnormal number normal.
  const Words magnitude = bits & 0x7fff;
  const Floats finite = Floats(magnitude << 13) * splat(0x1p112f);
  const Words special = Words(magnitude >= 0x7c00);  // infinite or NaN
  const Words wide = Words(finite) | (special & 0x7f800000);
  return Floats(wide | ((bits & 0x8000) << 16));
#endif
}

inline Words to_float16(Floats x) {
#if defined(__AVX512F__)
  return (Words)_mm512_cvtepu16_epi32(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  return (Words)_mm256_cvtepu16_epi32(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#else
  const Words bits = Words(x), magnitude = bits & 0x7fffffff;
  // Normal results: rebase the exponent and round to nearest even.
  const Words normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Subnormal results: adding 0.5 moves the 10 bits of the result to the end, rounded.
  const Words small = Words(Floats(magnitude) + splat(0.5f)) - Words(splat(0.5f));
  const Words is_small = Words(magnitude < (113u << 23));
  const Words is_large = Words(magnitude >= 0x477ff000);  // rounds to 65536 or more
  const Words nan = Words(magnitude > 0x7f800000);
  Words result = (is_small & small) | (~is_small & normal);
  result = (is_large & 0x7c00) | (~is_large & result);
  result = (nan & 0x7e00) | (~nan & result);
  return result | ((bits >> 16) & 0x8000);
#endif
}

// The same for either 16-bit type.

inline Floats widen(Type type, Words bits) {
  return type == Type::kBfloat16 ? from_bfloat16(bits) : from_float16(bits);
}

inline Words narrow(Type type, Floats x) {
  return type == Type::kBfloat16 ? to_bfloat16(x) : to_float16(x);
}

// A vector at the end of a row: `count` elements, at most kLanes; a load adds zeros.

inline Floats load_some(const float* from, std::int64_t count) {
  if (count >= kLanes) return load(from);
  float whole[kLanes] = {};
  if (count > 0) std::memcpy(whole, from, 4 * count);
  return load(whole);
}

inline void store_some(float* to, Floats x, std::int64_t count) {
  if (count >= kLanes) {
    store(to, x);
  } else if (count > 0) {
    std::memcpy(to, &x, 4 * count);
  }
}

// 16 bits of each lane.
inline Words load_bits(const std::uint16_t* from, std::int64_t count) {
  if (count >= kLanes) return load_halves(from);
  std::uint16_t whole[kLanes] = {};
  if (count > 0) std::memcpy(whole, from, 2 * count);
  return load_halves(whole);
}

inline void store_bits(std::uint16_t* to, Words bits, std::int64_t count) {
  const Halves narrow = __builtin_convertvector(bits, Halves);
  if (count >= kLanes) {
    std::memcpy(to, &narrow, sizeof narrow);
  } else if (count > 0) {
    std::memcpy(to, &narrow, 2 * count);
  }
}

// Writes an aligned line of 64 bytes past the caches. An ordinary write would first read the line.
inline void stream_line(char* to, const char* from) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
#elif defined(__AVX2__)
  for (int i = 0; i < 64; i += 32) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), half);
  }
#else
  std::memcpy(to, from, 64);
#endif
}

// Makes what this thread has streamed visible to threads that it then synchronizes with.
inline void finish_streams() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// x in the first `count` lanes, and zeros.
inline Floats first_lanes(Floats x, std::int64_t count) {
  if (count >= kLanes) return x;
  return where(Words(lane_numbers() < static_cast<std::uint32_t>(count)), x, Floats{});
}

// Exchanges the blocks of `step` lanes of two rows that a transposition of 2 step lanes exchanges.
template <int step>
inline void exchange(Floats& a, Floats& b) {
  Words first, second;
  for (int i = 0; i < kLanes; ++i) {
    first[i] = i & step ? kLanes + i - step : i;
    second[i] = i & step ? kLanes + i : i + step;
  }
#if defined(__clang__)
  const Floats x = a, y = b;
  for (int i = 0; i < kLanes; ++i) {
    a[i] = first[i] < kLanes ? x[first[i]] : y[first[i] - kLanes];
    b[i] = second[i] < kLanes ? x[second[i]] : y[second[i] - kLanes];
  }
#else
  const Floats low = __builtin_shuffle(a, b, first);
  b = __builtin_shuffle(a, b, second);
  a = low;
#endif
}

template <int step = kLanes / 2>
inline void transpose(Floats (&rows)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    if (!(i & step)) exchange<step>(rows[i], rows[i + step]);
  }
  if constexpr (step > 1) transpose<step / 2>(rows);
}

}  // namespace
}  // namespace vlmo
