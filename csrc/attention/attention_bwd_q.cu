// The gradient of the queries, and delta = rowsum(dout out), which every gradient needs.
//
// A CTA owns 64 queries of one head of one sequence and iterates over its keys, as the forward
// does. With P = exp(scores - lse): dP = dout v^T, dS = P (dP - delta), dq = scale dS k.

#include "attention/lookup.cuh"

struct BackwardQ {
  Call call;
  Operand out, dout, dq;
  float* delta;  // laid out as lse
};

template <int kDim, class Scores, class Output, class Rows>
struct BackwardQKernel {
  static constexpr int kWarps = 4, kThreads = kWarps * 32, kRows = kWarps * Scores::kWarpRows;
  static constexpr int kTile = ColumnTile<kDim>::kBytes;
  static constexpr int kStage = 2 * kTile + KeyCodes::kBytes;  // keys, values, codes
  static constexpr int kThreadRows = Scores::kThreadRows, kWeights = kRows * WeightTile::kRowBytes;
  using Move = Mover<kDim, kThreads>;

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
    const int first_row = sequence.row_of_warp(Scores::kWarpRows), last = sequence.tokens - 1;
    const int keys = call.causal ? min(sequence.keys, sequence.first_row + kRows) : sequence.keys;
    const int steps = (keys + kColumns - 1) / kColumns;

    const Move move(call.head_dim);
    const char* const key_source = move.source(sequence, call.k);
    const char* const value_source = move.source(sequence, call.v);
    uint4 moved_keys[Move::kMoves], moved_values[Move::kMoves];
    KeyCodes codes;
    move.load(moved_keys, key_source, call.k, 0, last);
    move.load(moved_values, value_source, call.v, 0, last);
    codes.load(call, sequence, 0, last, keys);

    const unsigned weights = stages + 2 * kStage + warp_index() * kWeights / kWarps;
    const WeightWriter<Scores> writer(weights);
    unsigned at = stages + 2 * kStage + kWeights;
    const auto row_pointer = [&](const Operand& operand) {
      return [&](int row) { return sequence.pointer(operand, min(first_row + row, last)); };
    };
    const Rows q(at + warp_index() * Rows::kSharedBytes, call.head_dim, row_pointer(call.q));
    at += kWarps * Rows::kSharedBytes;
    const Rows dout(at + warp_index() * Rows::kSharedBytes, call.head_dim, row_pointer(f.dout));
    at += kWarps * Rows::kSharedBytes;
    float delta[kThreadRows], lse[kThreadRows];
    find_delta(f, sequence, dout, delta, lse);

    char* const table = shared + (at - shared_address(shared));
    load_table<kThreads>(call.bias, sequence.head, table);
    const QueryLookup<Scores> lookup(call, sequence, at);
#pragma unroll
    for (int i = 0; i < 4; ++i) move.clear(stages + i / 2 * kStage + i % 2 * kTile);
    unsigned attended = codes.all_attended();
    move.store_keys(moved_keys, stages, attended);
    move.store_keys(moved_values, stages + kTile, attended);
    codes.store(call, sequence, stages + 2 * kTile, 0, last);

    const unsigned lane_scores = keep(ColumnReader<kDim, Scores>::lane_offset());
    const unsigned lane_keys = keep(Output::column_offset());
    const unsigned lane_weights = keep(weights + Output::weight_offset());
    Output dq = {};
    float rest[kThreadRows] = {};  // row sums of dS, which would be 0 if delta were exact
    __syncthreads();

    unsigned stage = stages;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const int next = (step + 1) * kColumns;
      Scores p, ds = {};
      lookup.start(call, *kept, p, stage + 2 * kTile, step * kColumns);
      // Where the next step is loaded is the fastest of some twenty variants without spills
      // (modelled).
      multiply_scores<kDim>(p, q, stage + lane_scores, [&](int octet) {
        if (octet == 0) codes.load(call, *kept, next, last, keys);
        if (octet == 7) move.load(moved_values, value_source, call.v, next, last);
      });
      move.load(moved_keys, key_source, call.k, next, last);
      fill(p, [&](int r, int e) { return exp2_approx(fmaf(p.at(r, e), call.scale, -lse[r])); });
      multiply_scores<kDim>(ds, dout, stage + kTile + lane_scores, [](int) {});
      fill(ds, [&](int r, int e) { return p.at(r, e) * (ds.at(r, e) - delta[r]); });
#pragma unroll
      for (int r = 0; r < kThreadRows; ++r) {
#pragma unroll
        for (int e = 0; e < Scores::kThreadColumns; ++e) rest[r] += ds.at(r, e);
      }
      writer.write(ds);
      __syncwarp();
      const unsigned other = 2 * stages + kStage - stage;
      attended = codes.all_attended();
      move.store_keys(moved_keys, other, attended);
      move.store_keys(moved_values, other + kTile, attended);
      codes.store(call, *kept, other + 2 * kTile, next, last);
      multiply_output(dq, lane_weights, stage + lane_keys);
      stage = other;
      __syncthreads();
    }
    store_delta(f, *kept, delta, rest);
    float factor[Output::kThreadRows];
#pragma unroll
    for (int r = 0; r < Output::kThreadRows; ++r) factor[r] = call.scale * (1 / kLog2e);
    store_output(dq, factor, weights, *kept, f.dq, call.head_dim);
  }

  // Delta computed from the rounded output is accurate enough for dq, but in the gradient of the
  // bias table its error accumulates over all queries that read an entry. The delta stored for the
  // other kernels is therefore corrected by the row sum of dS, which would be 0 in exact
  // arithmetic.
  __device__ static void store_delta(const BackwardQ& f, const Sequence& sequence,
                                     const float (&delta)[kThreadRows],
                                     const float (&rest)[kThreadRows]) {
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      const float exact = delta[r] + Scores::sum_of_row(rest[r]);
      const int row = sequence.row_of_warp(Scores::kWarpRows) + Scores::row(r);
      if (Scores::first_column() == 0 && row < sequence.tokens) {
        f.delta[sequence.of_head(f.call, row)] = exact;
      }
    }
  }

  // delta, and log2 of the sum of exponentials, of the thread's rows.
  __device__ static void find_delta(const BackwardQ& f, const Sequence& sequence, const Rows& dout,
                                    float (&delta)[kThreadRows], float (&lse)[kThreadRows]) {
    const QuadPair at;
    const int first_row = sequence.row_of_warp(Scores::kWarpRows), last = sequence.tokens - 1;
#pragma unroll
    for (int m = 0; m < Rows::kCount; ++m) {
      const int row = first_row + Rows::row_of(m);
      const __half* const out = sequence.pointer(f.out, min(row, last));
      float sum = 0;
#pragma unroll
      for (int octet = 0; octet < kDim / 8; ++octet) {
        if (octet * 8 >= f.call.head_dim) continue;
        sum += dot(dout.read(m, octet), *reinterpret_cast<const uint4*>(out + octet * 8));
      }
      // From the lane of the quad pair that has the row as operand A.
#pragma unroll
      for (int r = 2 * m; r < 2 * m + 2; ++r) {
        const int lane = (lane_index() & ~3) + r % 2 * 2 + (at.low & 1);
        delta[r] = __shfl_sync(kFullWarp, sum, lane);
      }
    }
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      lse[r] = log_sum(f.call.lse[sequence.of_head(f.call, token_of<Scores>(sequence, r))]);
    }
  }
};

extern "C" __global__ void __launch_bounds__(128, 2)
    attention_bwd_q_64(const __grid_constant__ BackwardQ arguments) {
  BackwardQKernel<64, LineScores, LineOutput<64>, RegisterRows<64, LineScores>>::run(arguments);
}

extern "C" __global__ void __launch_bounds__(128, 1)
    attention_bwd_q_128(const __grid_constant__ BackwardQ arguments) {
  BackwardQKernel<128, SquareScores<1>, LineOutput<128>, SharedRows<128>>::run(arguments);
}
