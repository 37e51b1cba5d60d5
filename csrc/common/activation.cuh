// Activations of an FFN and their derivatives, in float.
#pragma once

enum class Activation { kGelu, kGeluTanh, kSwiglu, kGeglu };

constexpr bool is_gated(Activation kind) {
  return kind == Activation::kSwiglu || kind == Activation::kGeglu;
}

__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float sigmoid(float x) {
  return reciprocal_approx(1.0f + exp2_approx(-1.4426950408889634f * x));
}

// The tail probability of the standard normal distribution below -a, a >= 0, and exp(-a^2 / 2).
struct NormalTail {
  float tail, bell;
};

// tail = bell q(t), t = 1 / (1 + 0.36 a). The polynomial q minimises the maximum relative error for
// a <= 8, which is 1.8e-5, or 2.0e-5 with float rounding: one twenty-fourth of the largest error of
// rounding to half precision. It takes half of the instructions of erff. Infinite a gives NaN.
__device__ inline NormalTail normal_tail(float a) {
  const float t = reciprocal_approx(fmaf(0.36f, a, 1.0f));
  float q = fmaf(t, -0.09412777934009552f, 0.24151058098923406f);
  q = fmaf(t, q, 0.049573229817512846f);
  q = fmaf(t, q, 0.16095662590775353f);
  q = fmaf(t, q, 0.14209608922113928f);
  const float bell = exp2_approx(a * a * -0.7213475204444817f);
  return {bell * t * q, bell};
}

constexpr float kTanhScale = 1.5957691216057308f;  // 2 sqrt(2 / pi): x (1 + tanh u) / 2 = x s(2 u)

// The activation; for a gated one, that of the gate, the factor of the value.
template <Activation kKind>
__device__ inline float activate(float x) {
  if constexpr (kKind == Activation::kSwiglu) return x * sigmoid(x);
  if constexpr (kKind == Activation::kGeluTanh) {
    return x * sigmoid(kTanhScale * fmaf(0.044715f * x, x * x, x));
  }
  const float a = fabsf(x);
  return fmaf(-a, normal_tail(a).tail, fmaxf(x, 0.0f));
}

struct Activated {
  float value, slope;
};

template <Activation kKind>
__device__ inline Activated activate_with_slope(float x) {
  if constexpr (kKind == Activation::kSwiglu) {
    const float s = sigmoid(x);
    return {x * s, s * fmaf(x, 1.0f - s, 1.0f)};
  }
  if constexpr (kKind == Activation::kGeluTanh) {
    const float s = sigmoid(kTanhScale * fmaf(0.044715f * x, x * x, x));
    const float inner = kTanhScale * fmaf(0.134145f * x, x, 1.0f);
    return {x * s, s * fmaf(x * (1.0f - s), inner, 1.0f)};
  }
  const float a = fabsf(x);
  const NormalTail normal = normal_tail(a);
  const float below = x > 0.0f ? 1.0f - normal.tail : normal.tail;
  return {fmaf(-a, normal.tail, fmaxf(x, 0.0f)), fmaf(x * 0.3989422804014327f, normal.bell, below)};
}
