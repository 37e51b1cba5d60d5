// Row-wise phases, without products: LayerNorm and RMSNorm. Each task is kNormRows rows.
//
// These phases are bound by latency: that of memory, and that of a warp which is alone on its
// scheduler. A warp therefore owns rows, holds several of them in registers, and has all their
// loads in flight before it uses the first. Rows of more than kSpan columns do not fit: they are
// read again in each pass.
#pragma once

#include "moe_ffn/parts.cuh"

constexpr int kNormRows = 16;
constexpr int kTasksOfRows = kTile / kNormRows;  // tasks per row tile
constexpr int kWarps = kThreads / 32;
constexpr int kRowsOfWarp = kNormRows / kWarps;

// A lane holds eight columns out of each kStride.
constexpr int kOctets = 4;  // per lane
constexpr int kStride = 32 * 8;
constexpr int kSpan = kOctets * kStride;

// The addresses of a task's rows: x and dy are in token order, scratch in grouped order. Rows past
// the end repeat the last one.
struct TaskRows {
  const int* tokens;
  int first, last, count, dim;
  float inverse_dim;

  __device__ TaskRows(const Call& call, const int (&tokens_of_tile)[kTile], const Task& task)
      : tokens(tokens_of_tile + task.part * kNormRows),
        first(task.start + task.part * kNormRows),
        last(task.end - 1),
        count(min(kNormRows, task.end - first)),
        dim(call.dim),
        inverse_dim(1.0f / call.dim) {}
  __device__ long long by_token(int row) const { return static_cast<long long>(tokens[row]) * dim; }
  __device__ long long grouped(int row) const {
    return static_cast<long long>(min(first + row, last)) * dim;
  }
  // The number of octets that this lane has of a row of at most kSpan columns.
  __device__ int octets() const { return (dim - lane_index() * 8 + kStride - 1) / kStride; }
};

// 16 bytes if `inside`, else zeros. Predicated: a branch would keep ptxas from grouping loads.
__device__ inline uint4 load_if(bool inside, const char* at) {
  uint4 v;
  asm volatile(
      "{ .reg .pred p; setp.ne.s32 p, %5, 0;\n"
      "mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;\n"
      "@p ld.global.v4.u32 {%0,%1,%2,%3}, [%4]; }"
      : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
      : "l"(at), "r"(static_cast<int>(inside))
      : "memory");
  return v;
}

__device__ inline void as_floats(const uint4& low, const uint4& high, float (&v)[8]) {
  v[0] = __uint_as_float(low.x), v[1] = __uint_as_float(low.y);
  v[2] = __uint_as_float(low.z), v[3] = __uint_as_float(low.w);
  v[4] = __uint_as_float(high.x), v[5] = __uint_as_float(high.y);
  v[6] = __uint_as_float(high.z), v[7] = __uint_as_float(high.w);
}

// Eight elements before conversion to float, so that loads need not wait for earlier conversions.
struct RawOctet {
  uint4 low, high;  // halves use only low
};

__device__ inline RawOctet load_raw(const void* tensor, bool is_half, long long first,
                                    bool inside = true) {
  const char* const at = static_cast<const char*>(tensor) + first * (is_half ? 2 : 4);
  return {load_if(inside, at), load_if(inside && !is_half, at + 16)};
}

__device__ inline void unpack(const RawOctet& raw, bool is_half, float (&v)[8]) {
  if (is_half) {
    unpack(raw.low, v);
  } else {
    as_floats(raw.low, raw.high, v);
  }
}

// The lane's octets of kRows rows, row i from element first[i] on; zeros past the row's end.
template <int kRows>
__device__ inline void load_rows(const void* tensor, bool is_half, const long long (&first)[kRows],
                                 int octets, float (&v)[kRows][kOctets][8]) {
  const char* at[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    at[i] = static_cast<const char*>(tensor) + first[i] * (is_half ? 2 : 4);
  }
  if (is_half) {
    uint4 raw[kRows][kOctets];
#pragma unroll
    for (int k = 0; k < kOctets; ++k) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) raw[i][k] = load_if(k < octets, at[i] + k * kStride * 2);
    }
#pragma unroll
    for (int k = 0; k < kOctets; ++k) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) unpack(raw[i][k], v[i][k]);
    }
  } else {
#pragma unroll
    for (int k = 0; k < kOctets; ++k) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const uint4 low = load_if(k < octets, at[i] + k * kStride * 4);
        as_floats(low, load_if(k < octets, at[i] + k * kStride * 4 + 16), v[i][k]);
      }
    }
  }
}

// Sums each value over the warp; all lanes get the sums.
template <int kCount>
__device__ inline void sum_over_warp(float (&v)[kCount]) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] += __shfl_xor_sync(kFullWarp, v[i], distance);
  }
}

// Adds each row's values to its sum.
template <int kRows>
__device__ inline void add_values(const float (&x)[kRows][kOctets][8], int dim,
                                  float (&sums)[kRows]) {
#pragma unroll
  for (int k = 0; k < kOctets; ++k) {
    if (k * kStride >= dim) break;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float(&v)[8] = x[i][k];
      sums[i] += ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
    }
  }
}

// The means of rows; 0 for RMSNorm.
template <int kRows>
__device__ inline void find_means(const Call& call, const TaskRows& rows,
                                  const float (&x)[kRows][kOctets][8], float (&means)[kRows]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) means[i] = 0.0f;
  if (call.norm != kLayerNorm) return;
  add_values(x, rows.dim, means);
  sum_over_warp(means);
#pragma unroll
  for (int i = 0; i < kRows; ++i) means[i] *= rows.inverse_dim;
}

// Adds the squares of each row's deviations from its mean to its sum.
template <int kRows>
__device__ inline void add_squares(const float (&x)[kRows][kOctets][8], int dim, int octets,
                                   const float (&means)[kRows], float (&sums)[kRows]) {
#pragma unroll
  for (int k = 0; k < kOctets; ++k) {
    if (k * kStride >= dim) break;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float mean = k < octets ? means[i] : 0.0f;
      float even = 0.0f, odd = 0.0f;
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        const float a = x[i][k][j] - mean, b = x[i][k][j + 1] - mean;
        even = fmaf(a, a, even);
        odd = fmaf(b, b, odd);
      }
      sums[i] += even + odd;
    }
  }
}

// The reciprocal of the norm's divisor.
__device__ inline float inverse_of(const Call& call, float variance) {
  return call.norm == kNoNorm ? 1.0f : rsqrtf(variance + call.norm_eps);
}

// Stores norm(x) of the rows that the warp holds to grouped scratch. The parameters are loaded one
// octet ahead.
__device__ inline void store_normed(const Call& call, const Expert& expert, const TaskRows& rows,
                                    const float (&x)[kRowsOfWarp][kOctets][8],
                                    const float (&means)[kRowsOfWarp],
                                    const float (&inverses)[kRowsOfWarp], int row, __half* normed) {
  const int octets = rows.octets(), column = lane_index() * 8;
  const bool has_weight = expert.norm_weight != nullptr, has_bias = expert.norm_bias != nullptr;
  __half* const to = normed + rows.grouped(row) + column;
  const auto load = [&](const void* tensor, bool exists, int k) {
    return load_raw(tensor, call.norm_is_half, column + k * kStride, exists && k < octets);
  };
  RawOctet next_weight = load(expert.norm_weight, has_weight, 0);
  RawOctet next_bias = load(expert.norm_bias, has_bias, 0);
#pragma unroll
  for (int k = 0; k < kOctets; ++k) {
    if (k * kStride >= rows.dim) break;
    float weight[8], bias[8];
    unpack(next_weight, call.norm_is_half, weight);
    unpack(next_bias, call.norm_is_half, bias);
    if (k + 1 < kOctets) {
      next_weight = load(expert.norm_weight, has_weight, k + 1);
      next_bias = load(expert.norm_bias, has_bias, k + 1);
    }
#pragma unroll
    for (int i = 0; i < kRowsOfWarp; ++i) {
      float v[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float unit = (x[i][k][j] - means[i]) * inverses[i];
        v[j] = fmaf(unit, has_weight ? weight[j] : 1.0f, bias[j]);
      }
      const uint4 packed = pack(v);
      if (row + i < rows.count && k < octets) {
        *reinterpret_cast<uint4*>(to + i * rows.dim + k * kStride) = packed;
      }
    }
  }
}

// norm_e(x) of the warp's rows, which have at most kSpan columns.
__device__ inline void normalise_rows(const Call& call, const Expert& expert, const void* x,
                                      bool x_is_half, __half* normed, const TaskRows& rows,
                                      int row) {
  const int octets = rows.octets();
  long long first[kRowsOfWarp];
  float v[kRowsOfWarp][kOctets][8], means[kRowsOfWarp], inverses[kRowsOfWarp] = {};
#pragma unroll
  for (int i = 0; i < kRowsOfWarp; ++i) first[i] = rows.by_token(row + i) + lane_index() * 8;
  load_rows(x, x_is_half, first, octets, v);
  find_means(call, rows, v, means);
  add_squares(v, rows.dim, octets, means, inverses);
  sum_over_warp(inverses);
#pragma unroll
  for (int i = 0; i < kRowsOfWarp; ++i) {
    inverses[i] = inverse_of(call, inverses[i] * rows.inverse_dim);
  }
  store_normed(call, expert, rows, v, means, inverses, row, normed);
}

// norm_e(x) of one row of any length, which is read again in each pass.
__device__ inline void normalise_long_row(const Call& call, const Expert& expert, const void* x,
                                          bool x_is_half, __half* normed, const TaskRows& rows,
                                          int row) {
  const long long from = rows.by_token(row), to = rows.grouped(row);
  float v[8], mean[1] = {}, inverse[1] = {};
  if (call.norm == kLayerNorm) {
    for (int c = lane_index() * 8; c < rows.dim; c += kStride) {
      load_octet(x, x_is_half, from + c, v);
#pragma unroll
      for (int i = 0; i < 8; ++i) mean[0] += v[i];
    }
    sum_over_warp(mean);
    mean[0] *= rows.inverse_dim;
  }
  for (int c = lane_index() * 8; c < rows.dim; c += kStride) {
    load_octet(x, x_is_half, from + c, v);
#pragma unroll
    for (int i = 0; i < 8; ++i) inverse[0] += (v[i] - mean[0]) * (v[i] - mean[0]);
  }
  sum_over_warp(inverse);
  inverse[0] = inverse_of(call, inverse[0] * rows.inverse_dim);
  for (int c = lane_index() * 8; c < rows.dim; c += kStride) {
    float weight[8] = {1, 1, 1, 1, 1, 1, 1, 1}, bias[8] = {};
    if (expert.norm_weight != nullptr) {
      load_octet(expert.norm_weight, call.norm_is_half, c, weight);
    }
    if (expert.norm_bias != nullptr) load_octet(expert.norm_bias, call.norm_is_half, c, bias);
    load_octet(x, x_is_half, from + c, v);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = fmaf((v[i] - mean[0]) * inverse[0], weight[i], bias[i]);
    store_octet(normed, true, to + c, v);
  }
}

// Stores norm_e(x) of the task's rows to grouped scratch; x itself without a norm.
__device__ inline void normalise(const Call& call, const void* x, bool x_is_half, __half* normed,
                                 const Task& task, const TaskRows& rows) {
  const Expert& expert = call.experts[task.expert];
  const int first = warp_index() * kRowsOfWarp;
  if (rows.dim <= kSpan) {
    normalise_rows(call, expert, x, x_is_half, normed, rows, first);
    return;
  }
  for (int row = first; row < min(first + kRowsOfWarp, rows.count); ++row) {
    normalise_long_row(call, expert, x, x_is_half, normed, rows, row);
  }
}
