// The backward of moe_ffn by rows, in one launch: everything but what sums over tokens.
//
// Four phases a row tile:
//   0  dbranch = token_scale dy, dh2 = layer_scale dbranch and norm(x), to grouped scratch;
//   1  dpre = act'(pre) (dh2 W2), and the hidden activations again, from the kept pre-activation;
//   2  dnormed = dpre W1, which without a norm is dx;
//   3  dx through the norm.
// The sums over tokens that biases and norm parameters need are left as one line of partial sums per
// task; the kernel of the weights adds them up in a fixed order. Tickets and waits as in the forward.

#include "common/activation.cuh"
#include "moe_ffn/norm.cuh"
#include "moe_ffn/parts.cuh"

struct BackwardRows {
  Call call;
  const void* dy;     // [T, D]
  const void* x;      // [T, D]
  const __half* pre;  // [T, P] grouped: of the gate, then, F columns on, of the value
  // Grouped scratch; null where not wanted.
  __half* dbranch;  // [T, D]
  __half* dh2;      // [T, D]; never null
  __half* normed;   // [T, D]; without norm x itself
  __half* hidden;   // [T, max F]
  __half* dpre;     // [T, P]; never null
  __half* dnormed;  // [T, D]; null without norm
  // Partial sums over rows, a line for each task; null where not wanted.
  float* sum_dbranch;  // [tiles * tasks[0], D]
  float* sum_dpre;     // [tiles, P]
  float* sum_norm;     // [tiles * tasks[3], 2 D]: of the norm's weight, then of its bias
  void* dx;            // [T, D] in the dtype of x; null if not wanted
  int dy_is_half, x_is_half;
};

struct Shared {
  alignas(16) char stages[kSharedBytes];
  int tokens[kTile];  // of the tile's rows; those behind the end repeat the last
  RowStatistics statistics;
  // Means over a row of gradient times unit and of gradient, what the norm subtracts again.
  float mean_unit[kNormRows], mean_one[kNormRows];
  Task task;
};

// ---- phases 0 and 3: kNormRows rows without products

constexpr int kBatch = 4;  // rows that a thread has in flight

// Eight elements as they lie in memory, so that loads need not wait for the conversion of earlier
// ones.
struct RawOctet {
  uint4 low, high;  // of halves only low
};

__device__ inline RawOctet load_raw(const void* tensor, bool is_half, long long first) {
  const char* const at = static_cast<const char*>(tensor) + first * (is_half ? 2 : 4);
  RawOctet raw = {*reinterpret_cast<const uint4*>(at), make_uint4(0, 0, 0, 0)};
  if (!is_half) raw.high = *reinterpret_cast<const uint4*>(at + 16);
  return raw;
}

__device__ inline void unpack(const RawOctet& raw, bool is_half, float (&v)[8]) {
  if (is_half) {
    unpack(raw.low, v);
    return;
  }
  v[0] = __uint_as_float(raw.low.x), v[1] = __uint_as_float(raw.low.y);
  v[2] = __uint_as_float(raw.low.z), v[3] = __uint_as_float(raw.low.w);
  v[4] = __uint_as_float(raw.high.x), v[5] = __uint_as_float(raw.high.y);
  v[6] = __uint_as_float(raw.high.z), v[7] = __uint_as_float(raw.high.w);
}

// dbranch, dh2 and their sums for eight columns of the task's rows.
__device__ inline void scale_columns(const BackwardRows& b, const Shared& shared, const Task& task,
                                     int column) {
  const Call& call = b.call;
  const int local = task.part * kNormRows, first = task.start + local;
  const int rows = min(kNormRows, task.end - first);
  float of_column[8] = {1, 1, 1, 1, 1, 1, 1, 1}, total[8] = {};
  if (call.layer_scale != nullptr) {
    load_octet(call.layer_scale, call.layer_scale_is_half, column, of_column);
  }
  for (int r = 0; r < rows; r += kBatch) {
    RawOctet dy[kBatch];
    float of_token[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const long long token = shared.tokens[local + r + i];
      dy[i] = load_raw(b.dy, b.dy_is_half, token * call.dim + column);
      of_token[i] = 1.0f;
      if (call.token_scale != nullptr) {
        of_token[i] = load_one(call.token_scale, call.token_scale_is_half, token);
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (r + i >= rows) break;
      const long long at = static_cast<long long>(first + r + i) * call.dim + column;
      float v[8];
      unpack(dy[i], b.dy_is_half, v);
#pragma unroll
      for (int j = 0; j < 8; ++j) total[j] += v[j] *= of_token[i];
      if (b.dbranch != nullptr) store_octet(b.dbranch, true, at, v);
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] *= of_column[j];
      store_octet(b.dh2, true, at, v);
    }
  }
  if (b.sum_dbranch != nullptr) {
    const long long line = static_cast<long long>(task.tile) * call.tasks[0] + task.part;
    store_octet(b.sum_dbranch, false, line * call.dim + column, total);
  }
}

// x in grouped order, in half precision.
__device__ inline void copy_rows(const BackwardRows& b, const Shared& shared, const Task& task) {
  const int dim = b.call.dim, local = task.part * kNormRows, first = task.start + local;
  const int rows = min(kNormRows, task.end - first);
  for (int c = threadIdx.x * 8; c < dim; c += kThreads * 8) {
#pragma unroll 4
    for (int r = 0; r < rows; ++r) {
      float v[8];
      const long long token = shared.tokens[local + r];
      load_octet(b.x, b.x_is_half, token * dim + c, v);
      store_octet(b.normed, true, static_cast<long long>(first + r) * dim + c, v);
    }
  }
}

__device__ inline void prepare(const BackwardRows& b, Shared& shared, const Task& task) {
  for (int c = threadIdx.x * 8; c < b.call.dim; c += kThreads * 8) {
    scale_columns(b, shared, task, c);
  }
  if (b.normed == nullptr) return;
  if (b.call.norm == kNoNorm) {
    copy_rows(b, shared, task);
  } else {
    normalise(b.call, b.x, b.x_is_half, b.normed, task, shared.statistics);
  }
}

// The means over rows that dx needs, a warp for each fourth row.
__device__ inline void find_means(const BackwardRows& b, Shared& shared, const Task& task) {
  const Call& call = b.call;
  const int local = task.part * kNormRows, first = task.start + local;
  for (int r = warp_index(); r < kNormRows; r += kThreads / 32) {
    const long long token = shared.tokens[local + r], grouped = min(first + r, task.end - 1);
    const float mean = shared.statistics.mean[r], inverse = shared.statistics.inverse[r];
    float of_unit = 0.0f, of_one = 0.0f;
    for (int c = lane_index() * 8; c < call.dim; c += 256) {
      float x[8], d[8], weight[8];
      load_octet(b.x, b.x_is_half, token * call.dim + c, x);
      load_octet(b.dnormed, true, grouped * call.dim + c, d);
      load_octet(call.experts[task.expert].norm_weight, call.norm_is_half, c, weight);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        d[i] *= weight[i];
        of_unit = fmaf(d[i], (x[i] - mean) * inverse, of_unit);
        of_one += d[i];
      }
    }
    of_unit = warp_sum(of_unit) / call.dim;
    of_one = call.norm == kLayerNorm ? warp_sum(of_one) / call.dim : 0.0f;
    if (lane_index() == 0) {
      shared.mean_unit[r] = of_unit;
      shared.mean_one[r] = of_one;
    }
  }
  __syncthreads();
}

// dx and the sums for the norm's parameters, for eight columns of the task's rows.
__device__ inline void undo_norm_of_columns(const BackwardRows& b, const Shared& shared,
                                            const Task& task, int column) {
  const Call& call = b.call;
  const int local = task.part * kNormRows, first = task.start + local;
  const int rows = min(kNormRows, task.end - first);
  float weight[8], dweight[8] = {}, dbias[8] = {};
  load_octet(call.experts[task.expert].norm_weight, call.norm_is_half, column, weight);
  for (int r = 0; r < rows; r += kBatch) {
    RawOctet raw_x[kBatch], raw_d[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const long long token = shared.tokens[local + r + i];
      const long long grouped = min(first + r + i, task.end - 1);
      raw_x[i] = load_raw(b.x, b.x_is_half, token * call.dim + column);
      raw_d[i] = load_raw(b.dnormed, true, grouped * call.dim + column);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (r + i >= rows) break;
      const float mean = shared.statistics.mean[r + i];
      const float inverse = shared.statistics.inverse[r + i];
      const float mean_unit = shared.mean_unit[r + i], mean_one = shared.mean_one[r + i];
      float x[8], d[8];
      unpack(raw_x[i], b.x_is_half, x);
      unpack(raw_d[i], true, d);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float unit = (x[j] - mean) * inverse;
        dweight[j] = fmaf(d[j], unit, dweight[j]);
        dbias[j] += d[j];
        x[j] = (fmaf(d[j], weight[j], -mean_one) - unit * mean_unit) * inverse;
      }
      if (b.dx != nullptr) {
        const long long token = shared.tokens[local + r + i];
        store_octet(b.dx, b.x_is_half, token * call.dim + column, x);
      }
    }
  }
  if (b.sum_norm != nullptr) {
    const long long line = static_cast<long long>(task.tile) * call.tasks[3] + task.part;
    store_octet(b.sum_norm, false, line * 2 * call.dim + column, dweight);
    store_octet(b.sum_norm, false, (line * 2 + 1) * call.dim + column, dbias);
  }
}

__device__ inline void undo_norm(const BackwardRows& b, Shared& shared, const Task& task) {
  find_statistics(b.call, b.x, b.x_is_half, task, shared.statistics);
  find_means(b, shared, task);
  for (int c = threadIdx.x * 8; c < b.call.dim; c += kThreads * 8) {
    undo_norm_of_columns(b, shared, task, c);
  }
}

// ---- phases 1 and 2: products of 128 rows and 128 columns

__device__ inline Source<Major::kK> left_operand(const BackwardRows& b, const Task& task,
                                                 int depth) {
  const __half* const base = task.phase == 1 ? b.dh2 : b.dpre;
  const long long pitch = task.phase == 1 ? b.call.dim : b.call.max_pre;
  return rows_of_k([&](int s) { return base + min(task.start + s, task.end - 1) * pitch; }, depth);
}

__device__ inline Source<Major::kMN> right_operand(const BackwardRows& b, const Task& task,
                                                   int depth) {
  const Expert& expert = b.call.experts[task.expert];
  const __half* const base = task.phase == 1 ? expert.w2 : expert.w1;
  const int columns = task.phase == 1 ? static_cast<int>(expert.hidden) : b.call.dim;
  const int first = task.part * kTile;
  return columns_of_k(base + first, columns, columns - first, depth);
}

// Lines of sums in shared memory, padded so that the 16-byte stores have no bank conflicts.
constexpr int kSumPitch = kTile + 4;
constexpr int kSumLines = 16;  // threads of a CTA that share a column
static_assert(2 * kSumLines * kSumPitch * 4 <= kSharedBytes, "sums run out of the stages");

// Adds up what the threads have summed over their own rows, in a fixed order: sums[pair][half] of
// for_each_octet's columns.
template <int kHalves>
__device__ inline void sum_over_threads(const BackwardRows& b, Shared& shared, const Task& task,
                                        const float (&sums)[2][kHalves][8]) {
  const QuadPair at;
  float* const lines = reinterpret_cast<float*>(shared.stages);
  const int line = warp_index() / 2 * 8 + at.high * 4 + at.m * 2 + (at.low & 1);
  const int first = warp_index() % 2 * kWarpTile + (at.low & 2) * 8 + at.n * 8;
  __syncthreads();  // the product is done with shared memory
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      store_octet(lines, false, (half * kSumLines + line) * kSumPitch + first + pair * 32,
                  sums[pair][half]);
    }
  }
  __syncthreads();
  const int width = static_cast<int>(b.call.experts[task.expert].hidden);
  const int column = task.part * kTile + threadIdx.x;
  if (column >= width) return;
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kSumLines; ++i) {
      total += lines[(half * kSumLines + i) * kSumPitch + threadIdx.x];
    }
    b.sum_dpre[static_cast<long long>(task.tile) * b.call.max_pre + half * width + column] = total;
  }
}

// Phase 1 behind its product: dpre, the hidden activations and the sums of dpre.
template <Activation kKind>
__device__ inline void differentiate(const BackwardRows& b, Shared& shared, const Task& task,
                                     const Accumulators& acc) {
  constexpr bool kGated = is_gated(kKind);
  const int width = static_cast<int>(b.call.experts[task.expert].hidden);
  float sums[2][kGated ? 2 : 1][8] = {};
  int pair = 0;
  for_each_octet<Major::kK, Major::kMN>(acc, [&](int c) {
    const int column = task.part * kTile + c;
    const int end = column < width ? task.end : 0;
    auto& sum = sums[pair++];
    return [=, &b, &sum](int row, float(&dpre)[8]) {
      const long long grouped = task.start + row;
      if (grouped >= end) return;
      const long long at = grouped * b.call.max_pre + column;
      float hidden[8], value[8];
      load_octet(b.pre, true, at, hidden);
      if constexpr (kGated) load_octet(b.pre, true, at + width, value);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const Activated activated = activate_with_slope<kKind>(hidden[i]);
        hidden[i] = activated.value;
        if constexpr (kGated) {
          const float dvalue = dpre[i] * activated.value;
          dpre[i] *= value[i];
          hidden[i] *= value[i];
          value[i] = dvalue;
          sum[1][i] += dvalue;
        }
        dpre[i] *= activated.slope;
        sum[0][i] += dpre[i];
      }
      store_octet(b.dpre, true, at, dpre);
      if constexpr (kGated) store_octet(b.dpre, true, at + width, value);
      if (b.hidden != nullptr) {
        store_octet(b.hidden, true, grouped * b.call.max_hidden + column, hidden);
      }
    };
  });
  if (b.sum_dpre != nullptr) sum_over_threads(b, shared, task, sums);
}

// Phase 2 behind its product: dnormed or, without norm, dx.
__device__ inline void store_dnormed(const BackwardRows& b, const Shared& shared, const Task& task,
                                     const Accumulators& acc) {
  for_each_octet<Major::kK, Major::kMN>(acc, [&](int c) {
    const int column = task.part * kTile + c;
    const int end = column < b.call.dim ? task.end : 0;
    return [=, &b, &shared](int row, float(&v)[8]) {
      const long long grouped = task.start + row;
      if (grouped >= end) return;
      if (b.dnormed != nullptr) {
        store_octet(b.dnormed, true, grouped * b.call.dim + column, v);
      } else {
        const long long token = shared.tokens[row];
        store_octet(b.dx, b.x_is_half, token * b.call.dim + column, v);
      }
    };
  });
}

template <Activation kKind>
__device__ inline void multiply_rows(const BackwardRows& b, Shared& shared, const Task& task) {
  const int width = static_cast<int>(b.call.experts[task.expert].hidden);
  if (task.phase == 1 && task.part * kTile >= width) return;
  const int depth = task.phase == 1 ? b.call.dim : is_gated(kKind) ? 2 * width : width;
  Accumulators acc = {};
  multiply(acc, left_operand(b, task, depth), right_operand(b, task, depth), depth, shared.stages);
  if (task.phase == 1) {
    differentiate<kKind>(b, shared, task, acc);
  } else {
    store_dnormed(b, shared, task, acc);
  }
}

template <Activation kKind>
__device__ inline void run(const BackwardRows& b) {
  __shared__ Shared shared;
  const Call& call = b.call;
  int* const finished = call.counters + 2;  // [phase][tile]: tasks of phases 0 to 2

  while (true) {
    __syncthreads();  // the last task is done with shared memory
    if (threadIdx.x == 0) shared.task = locate(call, atomicAdd(call.counters, 1));
    __syncthreads();
    const Task task = shared.task;
    if (task.phase < 0) break;
    const int row = min(task.start + static_cast<int>(threadIdx.x), task.end - 1);
    shared.tokens[threadIdx.x] = static_cast<int>(token_of(call, task.expert, task.begin, row));
    if (task.phase == 0) {
      __syncthreads();
      prepare(b, shared, task);
    } else {
      wait(finished + (task.phase - 1) * call.bound + task.tile, call.tasks[task.phase - 1]);
      if (task.phase < 3) {
        multiply_rows<kKind>(b, shared, task);
      } else {
        undo_norm(b, shared, task);
      }
    }
    if (task.phase < 3) signal(finished + task.phase * call.bound + task.tile);
  }
  leave(call);
}

#define VLMO_BACKWARD_ROWS(name, kind)                                     \
  extern "C" __global__ void __launch_bounds__(kThreads, 2)                \
      moe_ffn_bwd_rows_##name(const __grid_constant__ BackwardRows arguments) { \
    run<Activation::kind>(arguments);                                      \
  }
VLMO_BACKWARD_ROWS(gelu, kGelu)
VLMO_BACKWARD_ROWS(gelu_tanh, kGeluTanh)
VLMO_BACKWARD_ROWS(swiglu, kSwiglu)
VLMO_BACKWARD_ROWS(geglu, kGeglu)
