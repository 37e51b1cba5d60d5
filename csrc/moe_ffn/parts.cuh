// What the moe_ffn kernels share: arguments, rows, tickets, counters, vector accesses.
//
// Rows have two numberings. A *token* is a row of x and y. *Grouped* rows number the tokens expert
// by expert: expert e owns the grouped rows [offset_e, offset_e + count_e), in token order, and a
// row tile never spans two experts. Scratch tensors are in grouped order.
#pragma once

#include "common/tile_product.cuh"

constexpr int kMaxExperts = 32;
constexpr int kMaxPhases = 4;

enum Norm { kNoNorm, kLayerNorm, kRmsNorm };

// The structs below are mirrored in kernels/moe_ffn/cuda/arguments.py.

struct Expert {
  const __half* w1;         // [F, D] or, gated, [2 F, D]
  const __half* w2;         // [D, F]
  const __half* b1;         // [F] or [2 F]; null without
  const __half* b2;         // [D]; null without
  const void* norm_weight;  // [D]
  const void* norm_bias;    // [D]; null without
  long long hidden;         // F
};

// How a kernel finds its rows: by arithmetic if all sequences are divided into the same pieces,
// else with an index.
struct Rows {
  const int* tokens;        // [T], token of each grouped row; null without an index
  const int* offsets;       // [E + 1]
  int starts[kMaxExperts];  // first token of each expert's piece in a sequence
  int lengths[kMaxExperts];
  int sequences;
  int length;  // tokens of a sequence
};

struct Call {
  Expert experts[kMaxExperts];
  Rows rows;
  const void* layer_scale;  // [D]; null without
  const void* token_scale;  // [T]; null without
  int* counters;            // tickets, CTAs that left, then `bound` per phase waited for
  int num_experts;
  int dim;         // D
  int max_hidden;  // columns of scratch for hidden activations
  int max_pre;     // columns of pre-activations
  int norm;
  float norm_eps;
  int norm_is_half, layer_scale_is_half, token_scale_is_half;  // else float
  int bound;                                                   // on the number of row tiles
  int band;                                                    // row tiles per band
  int tasks[kMaxPhases];                                       // tasks per row tile, by phase
  int num_counters;
  int stagger;  // see stagger()
};

// ---- rows

// The first grouped row of expert e; T for e = E.
__device__ inline int expert_offset(const Call& call, int e) {
  if (call.rows.offsets != nullptr) return call.rows.offsets[e];
  int before = 0;
  for (int i = 0; i < e; ++i) before += call.rows.lengths[i];
  return before * call.rows.sequences;
}

// One past the last grouped row of expert e, which begins at `begin`.
__device__ inline int expert_end(const Call& call, int e, int begin) {
  const Rows& rows = call.rows;
  return rows.offsets != nullptr ? rows.offsets[e + 1] : begin + rows.lengths[e] * rows.sequences;
}

__device__ inline int tiles_of(int begin, int end) { return (end - begin + kTile - 1) / kTile; }

__device__ inline int count_tiles(const Call& call) {
  int tiles = 0;
  for (int e = 0, begin = 0; e < call.num_experts; ++e) {
    const int end = expert_end(call, e, begin);
    tiles += tiles_of(begin, end);
    begin = end;
  }
  return tiles;
}

__device__ inline long long token_of(const Call& call, int expert, int begin, int grouped) {
  if (call.rows.tokens != nullptr) return call.rows.tokens[grouped];
  const int length = call.rows.lengths[expert], local = grouped - begin;
  return static_cast<long long>(local / length) * call.rows.length + call.rows.starts[expert] +
         local % length;
}

// ---- tickets, in the order of schedule.Banded

// One part of one row tile in one phase; phase -1 after the last task.
struct Task {
  int phase, tile, part;
  int expert, start, begin, end;  // grouped rows: the tile's first, the expert's first and end
};

// Each thread finds and returns the token of one row of the task's tile; rows past the end repeat
// the last one. The CTA synchronises before it reads the tokens of other threads.
__device__ inline long long find_tokens(const Call& call, const Task& task, int (&tokens)[kTile]) {
  const int row = min(task.start + static_cast<int>(threadIdx.x), task.end - 1);
  const long long token = token_of(call, task.expert, task.begin, row);
  tokens[threadIdx.x] = static_cast<int>(token);
  return token;
}

// The state that the thread taking tickets keeps between them.
struct Tickets {
  int tiles, step, first;  // step of the last ticket, first ticket of that step
};

__device__ inline int first_of_band(const Call& call, int band, int tiles) {
  return min(max(band, 0) * call.band, tiles);
}

// Takes a ticket and finds its task; called by one thread. The tickets of a CTA increase, so the
// search for the step starts at the step of the last ticket.
__device__ inline Task take_ticket(const Call& call, Tickets& last) {
  Task task = {-1, 0, 0, 0, 0, 0, 0};
  const int ticket = atomicAdd(call.counters, 1);
  int offset = 0;
  while (task.phase < 0) {
    offset = ticket - last.first;
    int bands = 0;
    for (int p = 0; p < kMaxPhases && task.phase < 0; ++p) {
      const int first = first_of_band(call, last.step - p, last.tiles);
      const int size = first_of_band(call, last.step - p + 1, last.tiles) - first;
      bands += size;
      if (offset < size * call.tasks[p]) {
        task.phase = p;
        task.part = offset / size;
        task.tile = first + offset - task.part * size;
      }
      offset -= size * call.tasks[p];
    }
    if (task.phase >= 0) break;
    if (bands == 0) return task;  // past the last step
    last.first = ticket - offset;
    ++last.step;
  }

  int end = 0, before = 0;
  for (int e = 0; e < call.num_experts; ++e) {
    const int begin = end;
    end = expert_end(call, e, begin);
    const int of_expert = tiles_of(begin, end);
    if (task.tile >= before && task.tile < before + of_expert) {
      task.expert = e;
      task.start = begin + (task.tile - before) * kTile;
      task.begin = begin;
      task.end = end;
      break;
    }
    before += of_expert;
  }
  return task;
}

// ---- the stagger of the two CTAs of a multiprocessor
//
// If both started together, with tiles of equal length, their prologues and epilogues would
// coincide and leave the tensor cores idle: as modelled, these are busy 0.78 of the time instead of
// 0.84 (fc1, D 768). The second half of the grid, which is placed once each multiprocessor has a
// CTA, therefore starts later by `call.stagger` dependent multiplications.
__device__ inline void stagger(const Call& call, char* unused) {
  if (blockIdx.x * 2 < gridDim.x) return;
  int v = threadIdx.x;
#pragma unroll 1
  for (int i = 0; i < call.stagger; ++i) v = v * v + 1;
  reinterpret_cast<volatile int*>(unused)[threadIdx.x] = v;  // keeps the loop
}

// ---- counters
//
// A waiting CTA holds a later ticket than every task that it waits for, so the CTA with the
// earliest unfinished ticket never waits: with any number of resident CTAs there is no deadlock.

// Release: makes this CTA's stores visible to CTAs that wait on the counter.
__device__ inline void signal(int* counter) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(counter, 1);
  }
}

// Acquire: waits until the counter has received `expected` signals.
__device__ inline void wait(const int* counter, int expected) {
  if (expected == 0) return;
  if (threadIdx.x == 0) {
    while (*static_cast<const volatile int*>(counter) < expected) {
    }
    __threadfence();  // also invalidates this multiprocessor's L1
  }
  __syncthreads();
}

// The last CTA to leave clears all counters for the next launch.
__device__ inline void leave(const Call& call) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(&call.counters[1], 1) == static_cast<int>(gridDim.x) - 1;
  }
  __syncthreads();
  if (!last) return;
  for (int i = threadIdx.x; i < call.num_counters; i += kThreads) call.counters[i] = 0;
}

// ---- eight neighbouring elements

__device__ inline void unpack(uint4 chunk, float (&v)[8]) {
  const __half2* const pairs = reinterpret_cast<const __half2*>(&chunk);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = __half22float2(pairs[i]);
    v[2 * i] = pair.x;
    v[2 * i + 1] = pair.y;
  }
}

__device__ inline uint4 pack(const float (&v)[8]) {
  uint4 chunk;
  __half2* const pairs = reinterpret_cast<__half2*>(&chunk);
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = __floats2half2_rn(v[2 * i], v[2 * i + 1]);
  return chunk;
}

// Elements first..first + 7 of a tensor of halves or floats; `first` is a multiple of 8.
__device__ inline void load_octet(const void* tensor, bool is_half, long long first,
                                  float (&v)[8]) {
  if (is_half) {
    unpack(*reinterpret_cast<const uint4*>(static_cast<const __half*>(tensor) + first), v);
    return;
  }
  const float4* const quads =
      reinterpret_cast<const float4*>(static_cast<const float*>(tensor) + first);
  const float4 a = quads[0], b = quads[1];
  v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
  v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}

__device__ inline void store_octet(void* tensor, bool is_half, long long first,
                                   const float (&v)[8]) {
  if (is_half) {
    *reinterpret_cast<uint4*>(static_cast<__half*>(tensor) + first) = pack(v);
    return;
  }
  float4* const quads = reinterpret_cast<float4*>(static_cast<float*>(tensor) + first);
  quads[0] = make_float4(v[0], v[1], v[2], v[3]);
  quads[1] = make_float4(v[4], v[5], v[6], v[7]);
}

__device__ inline float load_one(const void* tensor, bool is_half, long long at) {
  return is_half ? __half2float(static_cast<const __half*>(tensor)[at])
                 : static_cast<const float*>(tensor)[at];
}
