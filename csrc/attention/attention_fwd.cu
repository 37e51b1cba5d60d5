// The forward of shared_attention: softmax(scale q k^T + bias) v, and the log-sum-exp.
//
// A CTA owns kWarps x 16 kBlocks queries of one head of one sequence and iterates over its keys, 32
// at a time. The accumulators of the scores are initialised with the bias, looked up in its table.
//
// Online softmax with lazy rescaling: the subtracted maximum is that of the first keys, and is
// raised only when a weight would approach the largest value of half precision. The current step is
// then repeated with the new maximum.

#include "attention/lookup.cuh"

struct Forward {
  Call call;
  Operand out;
};

constexpr float kLimit = 1024.0f;  // on a thread's sum of 8 weights
constexpr float kNone = -1e30f;    // the maximum of a query that has not attended yet

template <int kDim, int kBlocks, int kWarps>
struct ForwardKernel {
  static constexpr int kThreads = kWarps * 32, kRows = kWarps * kBlocks * 16;
  static constexpr int kTile = ColumnTile<kDim>::kBytes;
  static constexpr int kStage = 2 * kTile + KeyCodes::kBytes;  // keys, values, codes
  // At most 64 tokens, two steps: the prologue loads all keys and values into shared memory.
  static constexpr bool kShort = kWarps == 2;
  using Move = Mover<kDim, kThreads>;
  using Scores = SquareScores<kBlocks>;
  using Output = SquareOutput<kDim, kBlocks>;
  static constexpr int kThreadRows = Scores::kThreadRows, kWeights = kRows * WeightTile::kRowBytes;

  __device__ static void run(const Forward& f) {
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
    const int last = max(sequence.tokens - 1, 0);
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
    const int first_row = sequence.row_of_warp(Scores::kWarpRows);
    const RegisterRows<kDim, Scores> q(0, call.head_dim, [&](int row) {
      return sequence.pointer(call.q, min(first_row + row, last));
    });
    char* const table = shared + kKept + 2 * kStage + kWeights;
    load_table<kThreads>(call.bias, sequence.head, table);
    const QueryLookup<Scores> lookup(call, sequence, shared_address(table));
    const unsigned weights = stages + 2 * kStage + warp_index() * kWeights / kWarps;
    const WeightWriter<Scores> writer(weights);
#pragma unroll
    for (int i = 0; i < 4; ++i) move.clear(stages + i / 2 * kStage + i % 2 * kTile);
    unsigned attended = codes.all_attended();
    move.store_keys(moved_keys, stages, attended);
    move.store_keys(moved_values, stages + kTile, attended);
    codes.store(call, sequence, stages + 2 * kTile, 0, last);
    if (kShort) {
      move.load(moved_keys, key_source, call.k, kColumns, last);
      move.load(moved_values, value_source, call.v, kColumns, last);
      codes.load(call, sequence, kColumns, last, keys);
      attended = codes.all_attended();
      move.store_keys(moved_keys, stages + kStage, attended);
      move.store_keys(moved_values, stages + kStage + kTile, attended);
      codes.store(call, sequence, stages + kStage + 2 * kTile, kColumns, last);
    }

    const unsigned lane_keys = keep(ColumnReader<kDim, Scores>::lane_offset());
    const unsigned lane_values = keep(Output::column_offset() + kTile);
    const unsigned lane_weights = keep(weights + Output::weight_offset());
    Output output = {};
    float maximum[kThreadRows], sum[kThreadRows];
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) maximum[r] = kNone, sum[r] = 0;
    __syncthreads();

    bool exact = true;
    unsigned stage = stages;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const int next = (step + 1) * kColumns;
      Scores scores;
      while (true) {
        lookup.start(call, *kept, scores, stage + 2 * kTile, step * kColumns);
        multiply_scores<kDim>(scores, q, stage + lane_keys, [&](int octet) {
          if (octet == 0 && !kShort) move.load(moved_keys, key_source, call.k, next, last);
        });
        if (!kShort) {
          move.load(moved_values, value_source, call.v, next, last);
          codes.load(call, *kept, next, last, keys);
        }
        if (exact) raise(call, scores, maximum, sum, output);
        float largest = 0;
        float part[kThreadRows];
#pragma unroll
        for (int r = 0; r < kThreadRows; ++r) {
          part[r] = 0;
#pragma unroll
          for (int e = 0; e < 8; ++e) {
            float& p = scores.at(r, e);
            p = exp2_approx(fmaf(p, call.scale, -maximum[r]));
            part[r] += p;
          }
          largest = fmaxf(largest, part[r]);
        }
        if (exact || !__any_sync(kFullWarp, largest > kLimit)) {
          exact = false;
#pragma unroll
          for (int r = 0; r < kThreadRows; ++r) {
            sum[r] += part[r];
            exact = exact || maximum[r] == kNone;
          }
          exact = __any_sync(kFullWarp, exact);
          break;
        }
        exact = true;
      }
      writer.write(scores);
      __syncwarp();
      const unsigned other = 2 * stages + kStage - stage;
      if (!kShort) {
        attended = codes.all_attended();
        move.store_keys(moved_keys, other, attended);
        move.store_keys(moved_values, other + kTile, attended);
        codes.store(call, *kept, other + 2 * kTile, next, last);
      }
      multiply_output(output, lane_weights, stage + lane_values);
      stage = other;
      if (kShort) {
        __syncwarp();
      } else {
        __syncthreads();
      }
    }
    finish(f, *kept, weights, output, maximum, sum);
  }

  // Raises the maximum to that of all keys so far, and rescales the sums and the output.
  __device__ static void raise(const Call& call, Scores& scores,
                               float (&maximum)[kThreadRows], float (&sum)[kThreadRows],
                               Output& output) {
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      float largest = scores.at(r, 0);
#pragma unroll
      for (int e = 1; e < 8; ++e) largest = fmaxf(largest, scores.at(r, e));
      largest = Scores::max_of_row(largest * call.scale);
      const float raised = fmaxf(maximum[r], largest);
      const float factor = exp2_approx(maximum[r] - raised);
      maximum[r] = raised;
      sum[r] *= factor;
#pragma unroll
      for (int b = 0; b < kDim / 16; ++b) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if ((i & 2) / 2 == r % 2) output.v[r / 2][b][i] *= factor;
        }
      }
    }
  }

  __device__ static void finish(const Forward& f, const Sequence& sequence,
                                unsigned weights, Output& output,
                                float (&maximum)[kThreadRows], float (&sum)[kThreadRows]) {
    const Call& call = f.call;
    const int first_row = sequence.row_of_warp(Scores::kWarpRows);
    float factor[kThreadRows];
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      sum[r] = Scores::sum_of_row(sum[r]);
      factor[r] = sum[r] > 0 ? reciprocal_approx(sum[r]) : (sum[r] == 0 ? 0.0f : sum[r]);
      const int row = first_row + Scores::row(r);
      if (Scores::first_column() == 0 && row < sequence.tokens) {
        const float lse = (maximum[r] + __log2f(sum[r])) * (1 / kLog2e);
        call.lse[sequence.of_head(call, row)] = sum[r] == 0 ? -infinity() : lse;
      }
    }
    store_output(output, factor, weights, sequence, f.out, call.head_dim);
  }
};

#define VLMO_FORWARD(dim, blocks, warps)                                          \
  extern "C" __global__ void __launch_bounds__(32 * warps, 8 / warps)             \
      attention_fwd_##dim##_##warps(const __grid_constant__ Forward arguments) {   \
    ForwardKernel<dim, blocks, warps>::run(arguments);                            \
  }
VLMO_FORWARD(64, 2, 4)
VLMO_FORWARD(64, 2, 2)
VLMO_FORWARD(128, 1, 4)
