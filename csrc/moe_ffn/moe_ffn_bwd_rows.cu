// The backward of moe_ffn by rows, in one launch: everything but what sums over tokens.
//
// Four phases a row tile:
//   0  dbranch = token_scale dy, dh2 = layer_scale dbranch and norm(x), to grouped scratch;
//   1  dpre = act'(pre) (dh2 W2), and the hidden activations again, from the kept pre-activation;
//   2  dnormed = dpre W1, which without a norm is dx;
//   3  dx through the norm.
// The sums over tokens that biases and norm parameters need are left as a line of partial sums for
// each task; the kernel of the weights adds them up in a fixed order. Tickets as in the forward.

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
  float token_scale[kNormRows];
  RowStatistics statistics;
  // Means over a row of d * unit and of d = dnormed * weight: what the norm keeps from x.
  float mean_unit[kNormRows], mean_one[kNormRows];
  Tickets tickets;
  Task task;  // the next one, from the end of the products on
};

// ---- phases 0 and 3: kNormRows rows without products
//
// Statistics of rows are found by warps, the rest by threads that own eight columns of all rows.
// What takes the time is latency: a thread has the loads of kBatch rows in flight.

constexpr int kWarps = kThreads / 32;
constexpr int kBatch = kNormRows / kWarps;

// Eight elements as they lie in memory: loads need not wait for the conversion of earlier ones.
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

// Where the rows of a task begin: x and dy by token, scratch by grouped row. Rows behind the end
// repeat the last.
struct TaskRows {
  const int* tokens;
  int first, last, count, dim;

  __device__ TaskRows(const BackwardRows& b, const Shared& shared, const Task& task)
      : tokens(shared.tokens + task.part * kNormRows),
        first(task.start + task.part * kNormRows),
        last(task.end - 1),
        count(min(kNormRows, task.end - first)),
        dim(b.call.dim) {}
  __device__ long long by_token(int row) const { return static_cast<long long>(tokens[row]) * dim; }
  __device__ long long grouped(int row) const {
    return static_cast<long long>(min(first + row, last)) * dim;
  }
};

// The means of rows of x, kBatch rows a warp; 0 for RMSNorm.
__device__ inline void find_means(const BackwardRows& b, const TaskRows& rows,
                                  float (&means)[kBatch]) {
  float sums[kBatch] = {};
  for (int c = lane_index() * 8; c < rows.dim && b.call.norm == kLayerNorm; c += 256) {
    RawOctet raw[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      raw[i] = load_raw(b.x, b.x_is_half, rows.by_token(warp_index() + i * kWarps) + c);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      float x[8];
      unpack(raw[i], b.x_is_half, x);
#pragma unroll
      for (int j = 0; j < 8; ++j) sums[i] += x[j];
    }
  }
#pragma unroll
  for (int i = 0; i < kBatch; ++i) means[i] = warp_sum(sums[i]) / rows.dim;
}

// The statistics of the task's rows, and for the way back those of d = dnormed * weight too.
template <bool kBack>
__device__ inline void find_statistics(const BackwardRows& b, Shared& shared, const Task& task,
                                       const TaskRows& rows) {
  float means[kBatch], squares[kBatch] = {}, of_unit[kBatch] = {}, of_one[kBatch] = {};
  find_means(b, rows, means);
  for (int c = lane_index() * 8; c < rows.dim; c += 256) {
    RawOctet raw_x[kBatch], raw_d[kBatch];
    float weight[8];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int row = warp_index() + i * kWarps;
      raw_x[i] = load_raw(b.x, b.x_is_half, rows.by_token(row) + c);
      if (kBack) raw_d[i] = load_raw(b.dnormed, true, rows.grouped(row) + c);
    }
    const Expert& expert = b.call.experts[task.expert];
    if (kBack) load_octet(expert.norm_weight, b.call.norm_is_half, c, weight);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      float x[8], d[8];
      unpack(raw_x[i], b.x_is_half, x);
      if (kBack) unpack(raw_d[i], true, d);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        x[j] -= means[i];
        squares[i] = fmaf(x[j], x[j], squares[i]);
        if (!kBack) continue;
        d[j] *= weight[j];
        of_unit[i] = fmaf(d[j], x[j], of_unit[i]);
        of_one[i] += d[j];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    const int row = warp_index() + i * kWarps;
    const float inverse = rsqrtf(warp_sum(squares[i]) / rows.dim + b.call.norm_eps);
    shared.statistics.mean[row] = means[i];
    shared.statistics.inverse[row] = inverse;
    if (!kBack) continue;
    shared.mean_unit[row] = warp_sum(of_unit[i]) * inverse / rows.dim;
    const float mean_one = warp_sum(of_one[i]) / rows.dim;
    shared.mean_one[row] = b.call.norm == kLayerNorm ? mean_one : 0.0f;
  }
}

// dbranch, dh2 and their sums for eight columns.
__device__ inline void scale_columns(const BackwardRows& b, const Shared& shared, const Task& task,
                                     const TaskRows& rows, int column) {
  const Call& call = b.call;
  float of_column[8] = {1, 1, 1, 1, 1, 1, 1, 1}, total[8] = {};
  if (call.layer_scale != nullptr) {
    load_octet(call.layer_scale, call.layer_scale_is_half, column, of_column);
  }
  for (int r = 0; r < rows.count; r += kBatch) {
    RawOctet dy[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      dy[i] = load_raw(b.dy, b.dy_is_half, rows.by_token(r + i) + column);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (r + i >= rows.count) break;
      const float of_token = shared.token_scale[r + i];
      float v[8];
      unpack(dy[i], b.dy_is_half, v);
#pragma unroll
      for (int j = 0; j < 8; ++j) total[j] += v[j] *= of_token;
      if (b.dbranch != nullptr) store_octet(b.dbranch, true, rows.grouped(r + i) + column, v);
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] *= of_column[j];
      store_octet(b.dh2, true, rows.grouped(r + i) + column, v);
    }
  }
  if (b.sum_dbranch != nullptr) {
    const long long line = static_cast<long long>(task.tile) * call.tasks[0] + task.part;
    store_octet(b.sum_dbranch, false, line * call.dim + column, total);
  }
}

// norm(x) for eight columns; without norm x itself.
__device__ inline void normalise_columns(const BackwardRows& b, const Shared& shared,
                                         const Task& task, const TaskRows& rows, int column) {
  const Call& call = b.call;
  const Expert& expert = call.experts[task.expert];
  float weight[8] = {1, 1, 1, 1, 1, 1, 1, 1}, bias[8] = {};
  if (call.norm != kNoNorm) load_octet(expert.norm_weight, call.norm_is_half, column, weight);
  if (expert.norm_bias != nullptr) load_octet(expert.norm_bias, call.norm_is_half, column, bias);
  for (int r = 0; r < rows.count; r += kBatch) {
    RawOctet raw[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      raw[i] = load_raw(b.x, b.x_is_half, rows.by_token(r + i) + column);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (r + i >= rows.count) break;
      const float mean = shared.statistics.mean[r + i];
      const float inverse = shared.statistics.inverse[r + i];
      float v[8];
      unpack(raw[i], b.x_is_half, v);
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] = fmaf((v[j] - mean) * inverse, weight[j], bias[j]);
      store_octet(b.normed, true, rows.grouped(r + i) + column, v);
    }
  }
}

__device__ inline void prepare(const BackwardRows& b, Shared& shared, const Task& task) {
  const Call& call = b.call;
  const TaskRows rows(b, shared, task);
  if (threadIdx.x < kNormRows) {
    float scale = 1.0f;
    if (call.token_scale != nullptr) {
      scale = load_one(call.token_scale, call.token_scale_is_half, rows.tokens[threadIdx.x]);
    }
    shared.token_scale[threadIdx.x] = scale;
    shared.statistics.mean[threadIdx.x] = 0.0f;
    shared.statistics.inverse[threadIdx.x] = 1.0f;
  }
  __syncthreads();
  if (b.normed != nullptr && call.norm != kNoNorm) {
    find_statistics<false>(b, shared, task, rows);
    __syncthreads();
  }
  for (int c = threadIdx.x * 8; c < call.dim; c += kThreads * 8) {
    scale_columns(b, shared, task, rows, c);
    if (b.normed != nullptr) normalise_columns(b, shared, task, rows, c);
  }
}

// dx and the sums for the norm's parameters, for eight columns.
__device__ inline void undo_norm_of_columns(const BackwardRows& b, const Shared& shared,
                                            const Task& task, const TaskRows& rows, int column) {
  const Call& call = b.call;
  float weight[8], dweight[8] = {}, dbias[8] = {};
  load_octet(call.experts[task.expert].norm_weight, call.norm_is_half, column, weight);
  for (int r = 0; r < rows.count; r += kBatch) {
    RawOctet raw_x[kBatch], raw_d[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      raw_x[i] = load_raw(b.x, b.x_is_half, rows.by_token(r + i) + column);
      raw_d[i] = load_raw(b.dnormed, true, rows.grouped(r + i) + column);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (r + i >= rows.count) break;
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
      if (b.dx != nullptr) store_octet(b.dx, b.x_is_half, rows.by_token(r + i) + column, x);
    }
  }
  if (b.sum_norm != nullptr) {
    const long long line = static_cast<long long>(task.tile) * call.tasks[3] + task.part;
    store_octet(b.sum_norm, false, line * 2 * call.dim + column, dweight);
    store_octet(b.sum_norm, false, (line * 2 + 1) * call.dim + column, dbias);
  }
}

__device__ inline void undo_norm(const BackwardRows& b, Shared& shared, const Task& task) {
  const TaskRows rows(b, shared, task);
  find_statistics<true>(b, shared, task, rows);
  __syncthreads();
  for (int c = threadIdx.x * 8; c < b.call.dim; c += kThreads * 8) {
    undo_norm_of_columns(b, shared, task, rows, c);
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

// Puts down what a thread has summed over its rows, for one pair of for_each_octet's columns. The
// stages are free.
template <int kHalves>
__device__ inline void put_sums(Shared& shared, int pair, const float (&sums)[kHalves][8]) {
  const QuadPair at;
  float* const lines = reinterpret_cast<float*>(shared.stages);
  const int line = warp_index() / 2 * 8 + at.high * 4 + at.m * 2 + (at.low & 1);
  const int first = warp_index() % 2 * kWarpTile + (at.low & 2) * 8 + at.n * 8;
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    store_octet(lines, false, (half * kSumLines + line) * kSumPitch + first + pair * 32,
                sums[half]);
  }
}

// Adds up what the threads have put down, in a fixed order.
template <int kHalves>
__device__ inline void sum_over_threads(const BackwardRows& b, const Shared& shared,
                                        const Task& task) {
  const float* const lines = reinterpret_cast<const float*>(shared.stages);
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

// The rows of a thread's accumulators: this one, and in for_each_octet's order 2 more, 14 more, ..
constexpr int kRowsOfThread = 8;

__device__ inline int first_row_of_thread() {
  const QuadPair at;
  return warp_index() / 2 * kWarpTile + at.high * 8 + at.m * 4 + (at.low & 1);
}

// On entry the gate's (or only) pre-activation, the value's and the gradient of the hidden ones; on
// return the hidden activations, dpre of the value and dpre of the gate, also added to the sums.
template <Activation kKind, int kHalves>
__device__ inline void differentiate_octet(float (&hidden)[8], float (&value)[8], float (&dpre)[8],
                                           float (&sum)[kHalves][8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const Activated activated = activate_with_slope<kKind>(hidden[i]);
    hidden[i] = activated.value;
    if constexpr (is_gated(kKind)) {
      const float dvalue = dpre[i] * activated.value;
      dpre[i] *= value[i];
      hidden[i] *= value[i];
      value[i] = dvalue;
      sum[1][i] += dvalue;
    }
    dpre[i] *= activated.slope;
    sum[0][i] += dpre[i];
  }
}

// Phase 1 behind its product: dpre, the hidden activations and the sums of dpre.
template <Activation kKind>
__device__ inline void differentiate(const BackwardRows& b, Shared& shared, const Task& task,
                                     const Accumulators& acc) {
  constexpr bool kGated = is_gated(kKind);
  const int width = static_cast<int>(b.call.experts[task.expert].hidden);
  // The gate is loaded a row ahead, so that the activation of the row before hides its latency; the
  // value has its own row's activation for that. Rows and columns outside repeat others.
  const auto load_pre = [&](int row, int column) {
    const long long grouped = min(task.start + row, task.end - 1);
    return load_global(b.pre + grouped * b.call.max_pre + min(column, width - 8));
  };
  constexpr int kHalves = kGated ? 2 : 1;
  float sums[kHalves][8] = {};
  uint4 ahead;
  int visits = 0;
  for_each_octet<Major::kK, Major::kMN>(acc, [&](int c) {
    if (visits > 0) {
      put_sums(shared, 0, sums);
#pragma unroll
      for (int i = 0; i < kHalves * 8; ++i) sums[i / 8][i % 8] = 0.0f;
    }
    const int column = task.part * kTile + c;
    const int end = column < width ? task.end : 0;
    ahead = load_pre(first_row_of_thread(), column);
    return [=, &b, &sums, &ahead, &visits](int row, float(&dpre)[8]) {
      const uint4 gate = ahead;
      if (++visits % kRowsOfThread != 0) ahead = load_pre(row + (visits % 2 ? 2 : 14), column);
      const long long grouped = task.start + row;
      if (grouped >= end) return;
      const long long at = grouped * b.call.max_pre + column;
      float hidden[8], value[8];
      unpack(gate, hidden);
      if constexpr (kGated) unpack(load_global(b.pre + at + width), value);
      differentiate_octet<kKind>(hidden, value, dpre, sums);
      // The stores in another order make ptxas spill.
      if (b.hidden != nullptr) {
        store_octet(b.hidden, true, grouped * b.call.max_hidden + column, hidden);
      }
      store_octet(b.dpre, true, at, dpre);
      if constexpr (kGated) store_octet(b.dpre, true, at + width, value);
    };
  });
  put_sums(shared, 1, sums);
  if (b.sum_dpre != nullptr) sum_over_threads<kHalves>(b, shared, task);
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

__device__ inline void find_tokens(const Call& call, const Task& task, int (&tokens)[kTile]) {
  const int row = min(task.start + static_cast<int>(threadIdx.x), task.end - 1);
  tokens[threadIdx.x] = static_cast<int>(token_of(call, task.expert, task.begin, row));
}

template <Activation kKind>
__device__ inline void run(const BackwardRows& b) {
  __shared__ Shared shared;
  const Call& call = b.call;
  int* const finished = call.counters + 2;  // [phase][tile]: tasks of phases 0 to 2

  stagger(call, shared.stages);
  if (threadIdx.x == 0) {
    shared.tickets = {count_tiles(call), 0, 0};
    shared.task = take_ticket(call, shared.tickets);
  }
  __syncthreads();
  while (true) {
    const Task task = shared.task;
    if (task.phase < 0) break;
    const int width = static_cast<int>(call.experts[task.expert].hidden);
    const bool beyond = task.phase == 1 && task.part * kTile >= width;
    Accumulators acc = {};
    find_tokens(call, task, shared.tokens);
    if (task.phase > 0 && !beyond) {
      wait(finished + (task.phase - 1) * call.bound + task.tile, call.tasks[task.phase - 1]);
    }
    __syncthreads();
    if (task.phase == 0) {
      prepare(b, shared, task);
    } else if (task.phase == 3) {
      undo_norm(b, shared, task);
    } else if (!beyond) {
      const int depth = task.phase == 1 ? call.dim : is_gated(kKind) ? 2 * width : width;
      multiply(acc, left_operand(b, task, depth), right_operand(b, task, depth), depth,
               shared.stages);
    }
    __syncthreads();  // everybody has read shared.task, and is done with the stages
    // Taken here, the ticket's latency hides behind the epilogue. Not sooner: a ticket held while
    // multiplying waits, and with it all that waits for its tile.
    if (threadIdx.x == 0) shared.task = take_ticket(call, shared.tickets);
    if (task.phase == 1 && !beyond) differentiate<kKind>(b, shared, task, acc);
    if (task.phase == 2) store_dnormed(b, shared, task, acc);
    if (task.phase < 3) {
      signal(finished + task.phase * call.bound + task.tile);
    } else {
      __syncthreads();
    }
  }
  leave(call);
}

#define VLMO_BACKWARD_ROWS(name, kind)                                          \
  extern "C" __global__ void __launch_bounds__(kThreads, 2)                     \
      moe_ffn_bwd_rows_##name(const __grid_constant__ BackwardRows arguments) { \
    run<Activation::kind>(arguments);                                           \
  }
VLMO_BACKWARD_ROWS(gelu, kGelu)
VLMO_BACKWARD_ROWS(gelu_tanh, kGeluTanh)
VLMO_BACKWARD_ROWS(swiglu, kSwiglu)
VLMO_BACKWARD_ROWS(geglu, kGeglu)
