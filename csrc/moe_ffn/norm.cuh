// Phases of rows, without products: LayerNorm and RMSNorm. Their tasks are kNormRows rows.
#pragma once

#include "moe_ffn/parts.cuh"

constexpr int kNormRows = 16;
constexpr int kTasksOfRows = kTile / kNormRows;  // of a row tile

struct RowStatistics {
  float mean[kNormRows];  // 0 for RMSNorm
  float inverse[kNormRows];
};

__device__ inline float warp_sum(float v) {
  for (int distance = 16; distance > 0; distance /= 2) {
    v += __shfl_xor_sync(kFullWarp, v, distance);
  }
  return v;
}

// The mean and the inverse deviation of rows of x, a warp for each fourth row. Rows behind the end
// repeat the last one.
__device__ inline void find_statistics(const Call& call, const void* x, bool x_is_half,
                                       const Task& task, RowStatistics& found) {
  const int first = task.start + task.part * kNormRows;
  for (int r = warp_index(); r < kNormRows; r += kThreads / 32) {
    const long long token =
        token_of(call, task.expert, task.begin, min(first + r, task.end - 1)) * call.dim;
    float v[8], sum = 0.0f, squares = 0.0f, mean = 0.0f;
    if (call.norm == kLayerNorm) {
      for (int c = lane_index() * 8; c < call.dim; c += 256) {
        load_octet(x, x_is_half, token + c, v);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum += v[i];
      }
      mean = warp_sum(sum) / call.dim;
    }
    for (int c = lane_index() * 8; c < call.dim; c += 256) {
      load_octet(x, x_is_half, token + c, v);
#pragma unroll
      for (int i = 0; i < 8; ++i) squares += (v[i] - mean) * (v[i] - mean);
    }
    const float variance = warp_sum(squares) / call.dim;
    if (lane_index() == 0) {
      found.mean[r] = mean;
      found.inverse[r] = rsqrtf(variance + call.norm_eps);
    }
  }
  __syncthreads();
}

// norm_e(x) of the task's rows, to grouped scratch. A thread owns eight columns.
__device__ inline void normalise(const Call& call, const void* x, bool x_is_half, __half* normed,
                                 const Task& task, RowStatistics& statistics) {
  find_statistics(call, x, x_is_half, task, statistics);
  const Expert& expert = call.experts[task.expert];
  const int first = task.start + task.part * kNormRows;
  const int rows = min(kNormRows, task.end - first);
  for (int c = threadIdx.x * 8; c < call.dim; c += kThreads * 8) {
    float weight[8], bias[8] = {}, v[8];
    load_octet(expert.norm_weight, call.norm_is_half, c, weight);
    if (expert.norm_bias != nullptr) load_octet(expert.norm_bias, call.norm_is_half, c, bias);
    for (int r = 0; r < rows; ++r) {
      const long long token = token_of(call, task.expert, task.begin, first + r);
      load_octet(x, x_is_half, token * call.dim + c, v);
      const float mean = statistics.mean[r], inverse = statistics.inverse[r];
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = fmaf((v[i] - mean) * inverse, weight[i], bias[i]);
      store_octet(normed, true, static_cast<long long>(first + r) * call.dim + c, v);
    }
  }
}
