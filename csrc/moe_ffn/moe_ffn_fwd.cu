// The forward of moe_ffn in one launch: norm, first product and activation, second product.
//
// Three phases per row tile: 0 normalises rows into scratch, 1 computes tiles of the hidden
// activations, 2 computes tiles of y. Persistent kernel: each CTA takes tickets from a work queue,
// in the order of schedule.Banded. A tile waits for the previous phase of the same row tile.

#include "common/activation.cuh"
#include "moe_ffn/norm.cuh"
#include "moe_ffn/parts.cuh"

struct Forward {
  Call call;
  const void* x;         // [T, D]
  const void* residual;  // [T, D] in the dtype of y; null without
  __half* normed;        // [T, D] grouped scratch; null without norm
  __half* pre;           // [T, P] grouped; null if not kept
  __half* hidden;        // [T, max F] grouped scratch
  void* y;               // [T, D]
  int x_is_half, y_is_half;
};

struct Shared {
  alignas(16) char stages[kSharedBytes];
  int tokens[kTile];  // of the tile's rows; rows past the end repeat the last one
  float scales[kTile];  // token scales of these tokens
  Tickets tickets;
  Task task;  // after the products already the next one
};

// The operands of phase 1, for 128 rows and 128 hidden columns (64 if gated), or of phase 2, for
// 128 rows and 128 columns of y.
__device__ inline Source<Major::kK> left_operand(const Forward& f, const Shared& shared,
                                                 const Task& task, int depth) {
  const bool by_token = task.phase == 1 && f.normed == nullptr;
  const __half* const base = task.phase == 2  ? f.hidden
                             : by_token       ? static_cast<const __half*>(f.x)
                                              : f.normed;
  const long long pitch = task.phase == 2 ? f.call.max_hidden : f.call.dim;
  return rows_of_k(
      [&](int s) {
        const int row = by_token ? shared.tokens[s] : min(task.start + s, task.end - 1);
        return base + row * pitch;
      },
      depth);
}

template <bool kGated>
__device__ inline Source<Major::kK> right_operand(const Forward& f, const Task& task, int depth) {
  const Expert& expert = f.call.experts[task.expert];
  const int width = static_cast<int>(expert.hidden);
  const bool interleaved = kGated && task.phase == 1;
  const __half* const base = task.phase == 1 ? expert.w1 : expert.w2;
  const int last = (task.phase == 1 ? width : f.call.dim) - 1;
  const int first = task.part * (interleaved ? kTile / 2 : kTile);
  return rows_of_k(
      [&](int s) {
        // Interleaved: 8 neighbouring columns are 4 of the gate and the same 4 of the value.
        const int c = column_in_row(s);
        const int column = min(first + (interleaved ? c / 8 * 4 + c % 4 : c), last);
        const int row = column + (interleaved && (c & 4) ? width : 0);
        return base + static_cast<long long>(row) * depth;
      },
      depth);
}

template <Activation kKind>
__device__ inline void store_hidden(const Forward& f, const Task& task, const Accumulators& acc) {
  constexpr bool kGated = is_gated(kKind);
  const Call& call = f.call;
  const Expert& expert = call.experts[task.expert];
  const int width = static_cast<int>(expert.hidden);
  for_each_octet<Major::kK, Major::kK>(acc, [&](int c) {
    const int column = task.part * (kGated ? kTile / 2 : kTile) + (kGated ? c / 2 : c);
    const int end = column < width ? task.end : 0;
    uint4 packed = make_uint4(0, 0, 0, 0);
    if (expert.b1 != nullptr && column < width) {
      if constexpr (kGated) {
        const uint2 gate = *reinterpret_cast<const uint2*>(expert.b1 + column);
        const uint2 value = *reinterpret_cast<const uint2*>(expert.b1 + width + column);
        packed = make_uint4(gate.x, gate.y, value.x, value.y);
      } else {
        packed = *reinterpret_cast<const uint4*>(expert.b1 + column);
      }
    }
    float bias[8];
    unpack(packed, bias);
    return [=, &f](int row, float(&v)[8]) {
      const long long grouped = task.start + row;
      const bool inside = grouped < end;
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] += bias[i];
      __half* const hidden = f.hidden + grouped * f.call.max_hidden + column;
      __half* const pre = f.pre + grouped * f.call.max_pre + column;
      if constexpr (kGated) {
        if (f.pre != nullptr && inside) {
          const uint4 both = pack(v);
          *reinterpret_cast<uint2*>(pre) = make_uint2(both.x, both.y);
          *reinterpret_cast<uint2*>(pre + width) = make_uint2(both.z, both.w);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = activate<kKind>(v[i]) * v[4 + i];
        const uint4 packed = pack(v);
        if (inside) *reinterpret_cast<uint2*>(hidden) = make_uint2(packed.x, packed.y);
      } else {
        if (f.pre != nullptr && inside) *reinterpret_cast<uint4*>(pre) = pack(v);
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = activate<kKind>(v[i]);
        const uint4 packed = pack(v);
        if (inside) *reinterpret_cast<uint4*>(hidden) = packed;
      }
    };
  });
}

template <bool kHalf>
__device__ inline void store_output(const Forward& f, const Shared& shared, const Task& task,
                                    const Accumulators& acc) {
  const Call& call = f.call;
  const Expert& expert = call.experts[task.expert];
  for_each_octet<Major::kK, Major::kK>(acc, [&](int c) {
    const int column = task.part * kTile + c;
    const int end = column < call.dim ? task.end - task.start : 0;
    float bias[8] = {}, scale[8] = {1, 1, 1, 1, 1, 1, 1, 1};
    if (end > 0 && expert.b2 != nullptr) load_octet(expert.b2, true, column, bias);
    if (end > 0 && call.layer_scale != nullptr) {
      load_octet(call.layer_scale, call.layer_scale_is_half, column, scale);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) bias[i] *= scale[i];
    return [=, &f, &shared](int row, float(&v)[8]) {
      const bool inside = row < end;
      const long long at = static_cast<long long>(shared.tokens[row]) * f.call.dim + column;
      const float of_token = shared.scales[row];
      float residual[8] = {};
      if (inside && f.residual != nullptr) load_octet(f.residual, kHalf, at, residual);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        v[i] = fmaf(fmaf(v[i], scale[i], bias[i]), of_token, residual[i]);
      }
      if (inside) store_octet(f.y, kHalf, at, v);
    };
  });
}

template <bool kGated>
__device__ inline bool has_columns(const Call& call, const Task& task) {
  const int first = task.part * (kGated ? kTile / 2 : kTile);
  return task.phase != 1 || first < call.experts[task.expert].hidden;
}

// Computes norm(x) for the task's rows.
__device__ inline void norm_rows(const Forward& f, Shared& shared, const Task& task) {
  find_tokens(f.call, task, shared.tokens);
  __syncthreads();
  normalise(f.call, f.x, f.x_is_half, f.normed, task, TaskRows(f.call, shared.tokens, task));
}

// The tokens of the tile's rows and their scales; visible to all threads once the CTA synchronises.
__device__ inline void find_tokens_and_scales(const Call& call, const Task& task, Shared& shared) {
  const long long token = find_tokens(call, task, shared.tokens);
  shared.scales[threadIdx.x] =
      call.token_scale != nullptr ? load_one(call.token_scale, call.token_scale_is_half, token)
                                  : 1.0f;
}

// The products of phases 1 and 2, once the previous phase has finished the tile's rows.
template <bool kGated>
__device__ inline void products(const Forward& f, Shared& shared, const Task& task,
                                Accumulators& acc) {
  const Call& call = f.call;
  find_tokens_and_scales(call, task, shared);
  const int* const ready = call.counters + 2 + (task.phase - 1) * call.bound;
  wait(ready + task.tile, call.tasks[task.phase - 1]);
  __syncthreads();
  const int depth =
      task.phase == 1 ? call.dim : static_cast<int>(call.experts[task.expert].hidden);
  multiply(acc, left_operand(f, shared, task, depth),
           right_operand<kGated>(f, task, depth), depth, shared.stages);
}

template <Activation kKind>
__device__ inline void run(const Forward& f) {
  __shared__ Shared shared;
  constexpr bool kGated = is_gated(kKind);
  const Call& call = f.call;
  stagger(call, shared.stages);
  if (threadIdx.x == 0) {
    shared.tickets = {count_tiles(call), 0, 0};
    shared.task = take_ticket(call, shared.tickets);
  }
  __syncthreads();
  while (shared.task.phase >= 0) {
    if (shared.task.phase == 0) {
      // A path of its own: merged with the other, it would have live accumulators too.
      norm_rows(f, shared, shared.task);
      signal(call.counters + 2 + shared.task.tile);
      if (threadIdx.x == 0) shared.task = take_ticket(call, shared.tickets);
      __syncthreads();
      continue;
    }
    Accumulators acc = {};
    if (has_columns<kGated>(call, shared.task)) products<kGated>(f, shared, shared.task, acc);
    const Task task = shared.task;  // not earlier: the products need the registers
    __syncthreads();
    // Taken here, the latency of the ticket is hidden by the epilogue. Not earlier: a ticket taken
    // before the products would delay its tile, and all tasks that wait for that tile.
    if (threadIdx.x == 0) shared.task = take_ticket(call, shared.tickets);
    if (task.phase == 1 && has_columns<kGated>(call, task)) store_hidden<kKind>(f, task, acc);
    if (task.phase == 2 && f.y_is_half) store_output<true>(f, shared, task, acc);
    if (task.phase == 2 && !f.y_is_half) store_output<false>(f, shared, task, acc);
    if (task.phase == 1) {
      signal(call.counters + 2 + call.bound + task.tile);
    } else {
      __syncthreads();
    }
  }
  leave(call);
}

#define VLMO_FORWARD(name, kind)                                     \
  extern "C" __global__ void __launch_bounds__(kThreads, 2)          \
      moe_ffn_fwd_##name(const __grid_constant__ Forward arguments) { \
    run<Activation::kind>(arguments);                                \
  }
VLMO_FORWARD(gelu, kGelu)
VLMO_FORWARD(gelu_tanh, kGeluTanh)
VLMO_FORWARD(swiglu, kSwiglu)
VLMO_FORWARD(geglu, kGeglu)
