// The row-wise backward of moe_ffn (dgrad), in one launch: all gradients without a sum over tokens.
//
// Four phases per row tile:
//   0  dbranch = token_scale dy, dh2 = layer_scale dbranch and norm(x), to grouped scratch;
//   1  dpre = act'(pre) (dh2 W2), and the hidden activations, recomputed from the saved pre;
//   2  dnormed = dpre W1, which without a norm is dx;
//   3  dx by the backward of the norm.
// The gradients of biases and norm parameters need sums over tokens. Each task writes a line of
// partial sums, which moe_ffn_bwd_weights reduces in a fixed order. Tickets as in the forward.

#include "common/activation.cuh"
#include "moe_ffn/norm.cuh"
#include "moe_ffn/parts.cuh"

struct BackwardRows {
  Call call;
  const void* dy;     // [T, D]
  const void* x;      // [T, D]
  const __half* pre;  // [T, P] grouped: pre-activations of the gate, F columns on of the value
  // Grouped scratch; null where not wanted.
  __half* dbranch;  // [T, D]
  __half* dh2;      // [T, D]; never null
  __half* normed;   // [T, D]; x itself without norm
  __half* hidden;   // [T, max F]
  __half* dpre;     // [T, P]; never null
  __half* dnormed;  // [T, D]; null without norm
  // Partial sums over rows, one line for each task; null where not wanted.
  float* sum_dbranch;  // [tiles * tasks[0], D]
  float* sum_dpre;     // [tiles, P]
  float* sum_norm;     // [tiles * tasks[3], 2 D]: for the norm's weight, then for its bias
  void* dx;            // [T, D] in the dtype of x; null if not wanted
  int dy_is_half, x_is_half;
};

struct Shared {
  alignas(16) char stages[kSharedBytes];
  int tokens[kTile];  // of the tile's rows; rows past the end repeat the last one
  float token_scale[kNormRows];
  // Mean and reciprocal deviation of each row of x. With d = dnormed * weight and the normalised
  // row `unit`: the row means of d * unit and of d, which the backward of the norm subtracts.
  float mean[kNormRows], inverse[kNormRows], mean_unit[kNormRows], mean_one[kNormRows];
  Tickets tickets;
  Task task;  // after the products already the next one
};

// ---- phases 0 and 3: kNormRows rows without products
//
// norm(x) and dx are computed by warps that own rows, the gradients of the branch by threads that
// own eight columns of all rows, as is dx if rows are too long for a warp's registers. These phases
// are latency-bound: a thread has the loads of kBatch rows in flight.

constexpr int kBatch = kRowsOfWarp;

// The means of rows of x, kBatch rows per warp; 0 for RMSNorm.
__device__ inline void find_means_of_long(const BackwardRows& b, const TaskRows& rows,
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
  sum_over_warp(sums);
#pragma unroll
  for (int i = 0; i < kBatch; ++i) means[i] = sums[i] * rows.inverse_dim;
}

// The statistics of the task's rows and of d = dnormed * weight, to shared memory.
__device__ inline void find_statistics(const BackwardRows& b, Shared& shared, const Task& task,
                                       const TaskRows& rows) {
  float means[kBatch], squares[kBatch] = {}, of_unit[kBatch] = {}, of_one[kBatch] = {};
  find_means_of_long(b, rows, means);
  for (int c = lane_index() * 8; c < rows.dim; c += 256) {
    RawOctet raw_x[kBatch], raw_d[kBatch];
    float weight[8];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int row = warp_index() + i * kWarps;
      raw_x[i] = load_raw(b.x, b.x_is_half, rows.by_token(row) + c);
      raw_d[i] = load_raw(b.dnormed, true, rows.grouped(row) + c);
    }
    const Expert& expert = b.call.experts[task.expert];
    load_octet(expert.norm_weight, b.call.norm_is_half, c, weight);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      float x[8], d[8];
      unpack(raw_x[i], b.x_is_half, x);
      unpack(raw_d[i], true, d);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        x[j] -= means[i];
        squares[i] = fmaf(x[j], x[j], squares[i]);
        d[j] *= weight[j];
        of_unit[i] = fmaf(d[j], x[j], of_unit[i]);
        of_one[i] += d[j];
      }
    }
  }
  sum_over_warp(squares);
  sum_over_warp(of_unit);
  sum_over_warp(of_one);
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    const int row = warp_index() + i * kWarps;
    const float inverse = inverse_of(b.call, squares[i] * rows.inverse_dim);
    shared.mean[row] = means[i];
    shared.inverse[row] = inverse;
    shared.mean_unit[row] = of_unit[i] * inverse * rows.inverse_dim;
    shared.mean_one[row] = b.call.norm == kLayerNorm ? of_one[i] * rows.inverse_dim : 0.0f;
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

__device__ inline void prepare(const BackwardRows& b, Shared& shared, const Task& task) {
  const Call& call = b.call;
  const TaskRows rows(b.call, shared.tokens, task);
  if (threadIdx.x < kNormRows) {
    float scale = 1.0f;
    if (call.token_scale != nullptr) {
      scale = load_one(call.token_scale, call.token_scale_is_half, rows.tokens[threadIdx.x]);
    }
    shared.token_scale[threadIdx.x] = scale;
  }
  if (b.normed != nullptr) normalise(call, b.x, b.x_is_half, b.normed, task, rows);
  __syncthreads();
  for (int c = threadIdx.x * 8; c < call.dim; c += kThreads * 8) {
    scale_columns(b, shared, task, rows, c);
  }
}

// dx and the partial sums of the norm's parameters, for eight columns.
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
      const float mean = shared.mean[r + i];
      const float inverse = shared.inverse[r + i];
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

// Rows of at most kSpan columns: a warp holds kHeld of them in registers at once.
constexpr int kHeld = 2;

struct HeldRows {
  float x[kHeld][kOctets][8];
  uint4 d[kHeld][kOctets];
  RawOctet weight[kOctets];
  float mean[kHeld], inverse[kHeld], mean_unit[kHeld], mean_one[kHeld];  // as in Shared
  int row, octets;  // the first row held; octets of this lane
};

// The two sums of phase 3 over the rows of each warp, in shared memory, [2][kWarps][kSpan]: the two
// halves of the octets are stored apart, so that accesses have no bank conflicts.
static_assert(2 * kWarps * kSpan * 4 <= kSharedBytes, "sums run out of the stages");

__device__ inline float4* line_of_sums(Shared& shared, int sum, int warp, int octet, int lane) {
  float* const lines = reinterpret_cast<float*>(shared.stages);
  return reinterpret_cast<float4*>(lines + (sum * kWarps + warp) * kSpan + octet * kStride) + lane;
}

__device__ inline void add_line(const float4* line, float (&v)[8]) {
  const float4 low = line[0], high = line[32];
  v[0] += low.x, v[1] += low.y, v[2] += low.z, v[3] += low.w;
  v[4] += high.x, v[5] += high.y, v[6] += high.z, v[7] += high.w;
}

__device__ inline void load_held(const BackwardRows& b, const Task& task, const TaskRows& rows,
                                 HeldRows& held) {
  const void* const weight = b.call.experts[task.expert].norm_weight;
  const int column = lane_index() * 8;
  long long first[kHeld];
#pragma unroll
  for (int k = 0; k < kOctets; ++k) {
    held.weight[k] =
        load_raw(weight, b.call.norm_is_half, column + k * kStride, k < held.octets);
  }
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int row = held.row + i;
    const __half* const d = b.dnormed + rows.grouped(row) + column;
    first[i] = rows.by_token(row) + column;
#pragma unroll
    for (int k = 0; k < kOctets; ++k) {
      held.d[i][k] = load_if(k < held.octets && row < rows.count,
                             reinterpret_cast<const char*>(d + k * kStride));
    }
  }
  load_rows(b.x, b.x_is_half, first, held.octets, held.x);
}

__device__ inline void find_statistics_of_held(const BackwardRows& b, const TaskRows& rows,
                                               HeldRows& held) {
  float squares[kHeld] = {}, of_unit[kHeld] = {}, of_one[kHeld] = {};
  find_means(b.call, rows, held.x, held.mean);
  add_squares(held.x, rows.dim, held.octets, held.mean, squares);
#pragma unroll
  for (int k = 0; k < kOctets; ++k) {
    if (k * kStride >= rows.dim) break;
    float weight[8], d[8];
    unpack(held.weight[k], b.call.norm_is_half, weight);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      unpack(held.d[i][k], d);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        d[j] *= weight[j];
        of_unit[i] = fmaf(d[j], held.x[i][k][j] - held.mean[i], of_unit[i]);
        of_one[i] += d[j];
      }
    }
  }
  sum_over_warp(squares);
  sum_over_warp(of_unit);
  sum_over_warp(of_one);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    held.inverse[i] = inverse_of(b.call, squares[i] * rows.inverse_dim);
    held.mean_unit[i] = of_unit[i] * held.inverse[i] * rows.inverse_dim;
    held.mean_one[i] = b.call.norm == kLayerNorm ? of_one[i] * rows.inverse_dim : 0.0f;
  }
}

// dx of the rows held, and their contribution to the warp's sums.
__device__ inline void undo_norm_of_held(const BackwardRows& b, Shared& shared,
                                         const TaskRows& rows, HeldRows& held, bool adds) {
  const int column = lane_index() * 8;
#pragma unroll
  for (int k = 0; k < kOctets; ++k) {
    if (k * kStride >= rows.dim) break;
    float4* const to_weight = line_of_sums(shared, 0, warp_index(), k, lane_index());
    float4* const to_bias = line_of_sums(shared, 1, warp_index(), k, lane_index());
    float weight[8], d[8], dweight[8] = {}, dbias[8] = {};
    if (adds) add_line(to_weight, dweight), add_line(to_bias, dbias);
    unpack(held.weight[k], b.call.norm_is_half, weight);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      float (&x)[8] = held.x[i][k];
      unpack(held.d[i][k], d);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float unit = (x[j] - held.mean[i]) * held.inverse[i];
        dweight[j] = fmaf(d[j], unit, dweight[j]);
        dbias[j] += d[j];
        x[j] = fmaf(-unit, held.mean_unit[i], fmaf(d[j], weight[j], -held.mean_one[i])) *
               held.inverse[i];
      }
      const int row = held.row + i;
      if (b.dx != nullptr && row < rows.count && k < held.octets) {
        store_octet(b.dx, b.x_is_half, rows.by_token(row) + column + k * kStride, x);
      }
    }
    to_weight[0] = make_float4(dweight[0], dweight[1], dweight[2], dweight[3]);
    to_weight[32] = make_float4(dweight[4], dweight[5], dweight[6], dweight[7]);
    to_bias[0] = make_float4(dbias[0], dbias[1], dbias[2], dbias[3]);
    to_bias[32] = make_float4(dbias[4], dbias[5], dbias[6], dbias[7]);
  }
}

__device__ inline void undo_norm(const BackwardRows& b, Shared& shared, const Task& task) {
  const TaskRows rows(b.call, shared.tokens, task);
  if (rows.dim > kSpan) {
    find_statistics(b, shared, task, rows);
    __syncthreads();
    for (int c = threadIdx.x * 8; c < rows.dim; c += kThreads * 8) {
      undo_norm_of_columns(b, shared, task, rows, c);
    }
    return;
  }
#pragma unroll 1
  for (int i = 0; i < kRowsOfWarp; i += kHeld) {
    HeldRows held;
    held.row = warp_index() * kRowsOfWarp + i;
    held.octets = rows.octets();
    load_held(b, task, rows, held);
    find_statistics_of_held(b, rows, held);
    undo_norm_of_held(b, shared, rows, held, i > 0);
  }
  const int column = threadIdx.x * 8;
  __syncthreads();
  if (b.sum_norm == nullptr || column >= rows.dim) return;
  const long long line = static_cast<long long>(task.tile) * b.call.tasks[3] + task.part;
#pragma unroll
  for (int sum = 0; sum < 2; ++sum) {
    float total[8] = {};
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      add_line(line_of_sums(shared, sum, warp, warp_index(), lane_index()), total);
    }
    store_octet(b.sum_norm, false, (line * 2 + sum) * rows.dim + column, total);
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

// Lines of partial sums in shared memory, padded so that the 16-byte stores have no bank conflicts.
constexpr int kSumPitch = kTile + 4;
constexpr int kSumLines = 16;  // threads of a CTA that share a column
static_assert(2 * kSumLines * kSumPitch * 4 <= kSharedBytes, "sums run out of the stages");

// Reduces the sums that the threads have over their own rows, in a fixed order: sums[pair][half] of
// for_each_octet's columns. It uses the stages, which are free.
template <int kHalves>
__device__ inline void sum_over_threads(const BackwardRows& b, Shared& shared, const Task& task,
                                        const float (&sums)[2][kHalves][8]) {
  const QuadPair at;
  float* const lines = reinterpret_cast<float*>(shared.stages);
  const int line = warp_index() / 2 * 8 + at.high * 4 + at.m * 2 + (at.low & 1);
  const int first = warp_index() % 2 * kWarpTile + (at.low & 2) * 8 + at.n * 8;
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

// The rows of a thread's accumulators: first_row_of_thread(), and in the order of for_each_octet 2
// further, 14 further, and so on in turn.
constexpr int kRowsOfThread = 8;

__device__ inline int first_row_of_thread() {
  const QuadPair at;
  return warp_index() / 2 * kWarpTile + at.high * 8 + at.m * 4 + (at.low & 1);
}

// On entry: `hidden` is the pre-activation (of the gate, if gated), `value` that of the value,
// `dpre` the gradient of the hidden activations. On return: the hidden activations, dpre of the
// value, and dpre (of the gate). Both dpre are also added to the sums.
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

// The epilogue of phase 1: dpre, the hidden activations and the sums of dpre.
template <Activation kKind>
__device__ inline void differentiate(const BackwardRows& b, Shared& shared, const Task& task,
                                     const Accumulators& acc) {
  constexpr bool kGated = is_gated(kKind);
  const int width = static_cast<int>(b.call.experts[task.expert].hidden);
  // The gate is loaded one row ahead, so that the activation of the previous row hides its latency;
  // that of the value is hidden by the activation of its own row. Addresses outside are clamped.
  const auto load_pre = [&](int row, int column) {
    const long long grouped = min(task.start + row, task.end - 1);
    return load_global(b.pre + grouped * b.call.max_pre + min(column, width - 8));
  };
  float sums[2][kGated ? 2 : 1][8] = {};
  uint4 ahead;
  int visits = 0;
  for_each_octet<Major::kK, Major::kMN>(acc, [&](int c) {
    const int column = task.part * kTile + c;
    const int end = column < width ? task.end : 0;
    ahead = load_pre(first_row_of_thread(), column);
    return [=, &b, &sums, &ahead, &visits](int row, float(&dpre)[8]) {
      auto& sum = sums[visits / kRowsOfThread];
      const uint4 gate = ahead;
      if (++visits % kRowsOfThread != 0) ahead = load_pre(row + (visits % 2 ? 2 : 14), column);
      const long long grouped = task.start + row;
      if (grouped >= end) return;
      const long long at = grouped * b.call.max_pre + column;
      float hidden[8], value[8];
      unpack(gate, hidden);
      if constexpr (kGated) unpack(load_global(b.pre + at + width), value);
      differentiate_octet<kKind>(hidden, value, dpre, sum);
      // With the stores in another order ptxas spills.
      if (b.hidden != nullptr) {
        store_octet(b.hidden, true, grouped * b.call.max_hidden + column, hidden);
      }
      store_octet(b.dpre, true, at, dpre);
      if constexpr (kGated) store_octet(b.dpre, true, at + width, value);
    };
  });
  if (b.sum_dpre != nullptr) sum_over_threads(b, shared, task, sums);
}

// The epilogue of phase 2: dnormed or, without norm, dx.
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

// Waits until the previous phase has finished the tile, and synchronises the CTA's shared memory.
__device__ inline void wait_for_phase_before(const Call& call, const Task& task,
                                             const int* finished) {
  if (task.phase > 0) {
    wait(finished + (task.phase - 1) * call.bound + task.tile, call.tasks[task.phase - 1]);
  }
  __syncthreads();
}

// Executes a task of phase 0 or 3 and takes the next ticket.
__device__ inline void do_rows(const BackwardRows& b, Shared& shared, int* finished) {
  const Task task = shared.task;
  wait_for_phase_before(b.call, task, finished);
  if (task.phase == 0) {
    prepare(b, shared, task);
    signal(finished + task.tile);
  } else {
    undo_norm(b, shared, task);
    __syncthreads();
  }
  if (threadIdx.x == 0) shared.task = take_ticket(b.call, shared.tickets);
  __syncthreads();
}

// Whether the task's part is beyond the expert's columns of hidden activations.
__device__ inline bool is_beyond(const Call& call, const Task& task) {
  return task.phase == 1 && task.part * kTile >= call.experts[task.expert].hidden;
}

// The products of phases 1 and 2.
template <Activation kKind>
__device__ inline void products(const BackwardRows& b, Shared& shared, const Task& task,
                                const int* finished, Accumulators& acc) {
  const int width = static_cast<int>(b.call.experts[task.expert].hidden);
  const int depth = task.phase == 1 ? b.call.dim : is_gated(kKind) ? 2 * width : width;
  wait_for_phase_before(b.call, task, finished);
  multiply(acc, left_operand(b, task, depth), right_operand(b, task, depth), depth,
           shared.stages);
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
  while (shared.task.phase >= 0) {
    find_tokens(call, shared.task, shared.tokens);
    if (shared.task.phase == 0 || shared.task.phase == 3) {
      // A path of its own: merged with the other, it would have live accumulators too.
      do_rows(b, shared, finished);
      continue;
    }
    const bool beyond = is_beyond(call, shared.task);
    Accumulators acc = {};
    if (!beyond) products<kKind>(b, shared, shared.task, finished, acc);
    const Task task = shared.task;  // not earlier: the products need the registers
    __syncthreads();  // all threads have read shared.task, and no longer use the stages
    // Taken here, the latency of the ticket is hidden by the epilogue. Not earlier: a ticket taken
    // before the products would delay its tile, and all tasks that wait for that tile.
    if (threadIdx.x == 0) shared.task = take_ticket(call, shared.tickets);
    if (task.phase == 1 && !beyond) differentiate<kKind>(b, shared, task, acc);
    if (task.phase == 2) store_dnormed(b, shared, task, acc);
    signal(finished + task.phase * call.bound + task.tile);
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
