// The gradient of the queries, and what every gradient needs: delta = rowsum(dout out).
//
// A CTA owns 64 queries of one head of one sequence and walks over its keys, as the forward does.
// With P = exp(scores - lse): dP = dout v^T, dS = P (dP - delta), dq = scale dS k.

#include "attention/lookup.cuh"
#include "attention/parts.cuh"

struct BackwardQ {
  Call call;
  Operand out, dout, dq;
  float* delta;  // [tokens, H]
};

template <int kDim>
struct BackwardQKernel {
  static constexpr int kWarps = 4, kBlocks = 1;
  static constexpr int kThreads = kWarps * 32, kRows = kWarps * kBlocks * 16;
  static constexpr int kTile = ColumnTile<kDim>::kBytes;
  static constexpr int kStage = 2 * kTile + KeyCodes::kBytes;  // keys, values, codes
  static constexpr int kKept = 128;
  static constexpr bool kShared = kDim > 64;  // whether rows are in shared memory
  using Move = Mover<kDim, kThreads>;
  using Rows = RowHolder<kDim, kBlocks, kShared>;

  __device__ static void run(const BackwardQ& f) {
    extern __shared__ char shared[];
    const Call& call = f.call;
    const int tiles = (call.length + kRows - 1) / kRows;
    const int tile = blockIdx.x % tiles, pair = blockIdx.x / tiles;
    const Sequence sequence(call, pair % call.batch, pair / call.batch, tile * kRows);
    if (sequence.first_row >= sequence.tokens) return;
    stagger(call);

    const unsigned stages = shared_address(shared) + kKept;
    Sequence* const kept = reinterpret_cast<Sequence*>(shared);
    if (threadIdx.x == 0) *kept = sequence;
    const int first_row = sequence.row_of_warp(kBlocks * 16), last = sequence.tokens - 1;
    int keys = sequence.keys;
    if (call.causal) keys = min(keys, sequence.first_row + kRows);
    const int steps = (keys + kColumns - 1) / kColumns;

    const Move move(call.head_dim);
    const char* const key_source = move.source(sequence, call.k);
    const char* const value_source = move.source(sequence, call.v);
    uint4 moved_keys[Move::kMoves], moved_values[Move::kMoves];
    KeyCodes codes;
    move.load(moved_keys, key_source, call.k, 0, last);
    move.load(moved_values, value_source, call.v, 0, last);
    codes.load(call, sequence, 0, last);

    unsigned at = stages + 2 * kStage + warp_index() * WeightTile<kBlocks>::kBytes;
    const WeightTile<kBlocks> weights(at);
    at = stages + 2 * kStage + kWarps * WeightTile<kBlocks>::kBytes;
    const auto row_pointer = [&](const Operand& operand) {
      return [&](int row) { return sequence.pointer(operand, min(first_row + row, last)); };
    };
    Rows q(at + warp_index() * Rows::kBytes, call.head_dim, row_pointer(call.q));
    at += kWarps * Rows::kBytes;
    Rows dout(at + warp_index() * Rows::kBytes, call.head_dim, row_pointer(f.dout));
    at += kWarps * Rows::kBytes;
    float delta[2 * kBlocks], lse[2 * kBlocks];
    find_delta(f, sequence, dout, delta, lse);

    char* const table = shared + (at - shared_address(shared));
    load_table<kThreads>(call.bias, sequence.head, table);
    const QueryLookup<kBlocks> lookup(call, sequence, first_row, last, at);
#pragma unroll
    for (int i = 0; i < 4; ++i) move.clear(stages + i / 2 * kStage + i % 2 * kTile);
    move.store(moved_keys, stages);
    move.store(moved_values, stages + kTile);
    codes.store(call, sequence, stages + 2 * kTile, 0, last);

    const unsigned lane_k = keep(ColumnTile<kDim>::lane_offset_k());
    const unsigned lane_n = keep(ColumnTile<kDim>::lane_offset_n());
    Output<kDim, kBlocks> dq = {};
    __syncthreads();

    unsigned stage = stages;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const int next = (step + 1) * kColumns;
      Scores<kBlocks> p, ds = {};
      lookup.start(call, *kept, p, stage + 2 * kTile, step * kColumns);
      multiply_scores<kDim, kBlocks>(p, q.rows, stage + lane_k, [&](int octet) {
        if (octet == 0) move.load(moved_keys, key_source, call.k, next, last);
      });
      move.load(moved_values, value_source, call.v, next, last);
      codes.load(call, *kept, next, last);
#pragma unroll
      for (int r = 0; r < 2 * kBlocks; ++r) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          float& v = element<kBlocks>(p, r, e);
          v = exp2_approx(fmaf(v, call.scale, -lse[r]));
        }
      }
      multiply_scores<kDim, kBlocks>(ds, dout.rows, stage + kTile + lane_k, [](int) {});
#pragma unroll
      for (int r = 0; r < 2 * kBlocks; ++r) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          float& v = element<kBlocks>(ds, r, e);
          v = element<kBlocks>(p, r, e) * (v - delta[r]);
        }
      }
      write_weights<kBlocks>(weights, ds);
      __syncwarp();
      const unsigned other = 2 * stages + kStage - stage;
      move.store(moved_keys, other);
      move.store(moved_values, other + kTile);
      codes.store(call, *kept, other + 2 * kTile, next, last);
      multiply_output<kDim, kBlocks>(dq, weights, stage + lane_n);
      stage = other;
      __syncthreads();
    }
    float factor[2 * kBlocks];
#pragma unroll
    for (int r = 0; r < 2 * kBlocks; ++r) factor[r] = call.scale * (1 / kLog2e);
    store_output<kDim, kBlocks>(dq, factor, weights, *kept, f.dq,
                                kept->row_of_warp(kBlocks * 16), call.head_dim);
  }

  // delta and log2 of the sum of exponentials of the thread's rows; an infinite sum where a query
  // has no key, so that its weights are 0.
  __device__ static void find_delta(const BackwardQ& f, const Sequence& sequence, const Rows& dout,
                                    float (&delta)[2 * kBlocks], float (&lse)[2 * kBlocks]) {
    const QuadPair at;
    const int first_row = sequence.row_of_warp(kBlocks * 16), last = sequence.tokens - 1;
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
      const int row = first_row + m * 16 + at.m * 8 + at.high * 4 + at.low;
      const __half* const out = sequence.pointer(f.out, min(row, last));
      float sum = 0;
#pragma unroll
      for (int octet = 0; octet < kDim / 8; ++octet) {
        if (octet * 8 >= f.call.head_dim) continue;
        const uint4 left = read_row(dout.rows, m, octet);
        sum += dot(left, *reinterpret_cast<const uint4*>(out + octet * 8));
      }
      if (at.n == 0 && row <= last) f.delta[sequence.of_head(f.call, row)] = sum;
#pragma unroll
      for (int r = 2 * m; r < 2 * m + 2; ++r) {
        const int lane = (lane_index() & ~3) + r % 2 * 2 + (at.low & 1);
        delta[r] = __shfl_sync(kFullWarp, sum, lane);
      }
    }
#pragma unroll
    for (int r = 0; r < 2 * kBlocks; ++r) {
      const int row = min(first_row + row_in_warp(r), last);
      lse[r] = log_sum(f.call, sequence, row);
    }
  }
};

#define VLMO_BACKWARD_Q(dim, ctas)                                                 \
  extern "C" __global__ void __launch_bounds__(128, ctas)                          \
      attention_bwd_q_##dim(const __grid_constant__ BackwardQ arguments) {          \
    BackwardQKernel<dim>::run(arguments);                                          \
  }
VLMO_BACKWARD_Q(64, 2)
VLMO_BACKWARD_Q(128, 1)
