// The gradients of keys and values.
//
// A CTA owns 64 keys of one head of one sequence and iterates over its queries, 32 at a time. With
// P = exp(scores - lse): dv = P^T dout, dP = dout v^T, dS = P (dP - delta), dk = scale dS^T q.
// All products are computed transposed, with keys as rows, so that warps exchange no data.

#include "attention/lookup.cuh"

struct BackwardKV {
  Call call;
  Operand dout, dk, dv;
  const float* delta;  // laid out as lse
};

template <int kDim, class Rows>
struct BackwardKVKernel {
  static constexpr bool kShared = Rows::kSharedBytes > 0;  // too few registers for k and v
  using Scores = SquareScores<1>;
  using Output = LineOutput<kDim>;
  using Move = Mover<kDim, 128>;
  static constexpr int kWarps = 4, kThreads = kWarps * 32, kRows = kWarps * Scores::kWarpRows;
  static constexpr int kTile = ColumnTile<kDim>::kBytes;
  static constexpr int kStage = 2 * kTile + QueryCodes::kBytes;  // queries, dout, codes
  static constexpr int kWeights = Scores::kWarpRows * WeightTile::kRowBytes;  // bytes per warp

  __device__ static void run(const BackwardKV& f) {
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
    const int start = call.causal ? sequence.first_row / kColumns * kColumns : 0;

    const Move move(call.head_dim);
    const char* const query_source = move.source(sequence, call.q);
    const char* const dout_source = move.source(sequence, f.dout);
    uint4 moved_queries[Move::kMoves], moved_douts[Move::kMoves];
    QueryCodes codes;
    move.load(moved_queries, query_source, call.q, start, last);
    move.load(moved_douts, dout_source, f.dout, start, last);
    codes.load(call, f.delta, sequence, start, last);

    const unsigned p_tile = stages + 2 * kStage + warp_index() * 2 * kWeights;
    const WeightWriter<Scores> writer(p_tile);  // the tile of dS follows it
    unsigned at = stages + 2 * kStage + kWarps * 2 * kWeights;
    // Masked keys are replaced by zeros: their weights are 0, but 0 times infinity or NaN is NaN.
    const auto row_pointer = [&](const Operand& operand) {
      return [&](int row) {
        const int key = first_row + row;
        return sequence.attended(call, key) ? sequence.pointer(operand, key) : nullptr;
      };
    };
    const Rows k(at + warp_index() * Rows::kSharedBytes, call.head_dim, row_pointer(call.k));
    at += kWarps * Rows::kSharedBytes;
    const Rows v(at + warp_index() * Rows::kSharedBytes, call.head_dim, row_pointer(call.v));
    at += kWarps * Rows::kSharedBytes;
    char* const table = shared + (at - shared_address(shared));
    load_table<kThreads>(call.bias, sequence.head, table);
    const KeyLookup<Scores> lookup(call, sequence, at);
#pragma unroll
    for (int i = 0; i < 4; ++i) move.clear(stages + i / 2 * kStage + i % 2 * kTile);
    move.store(moved_queries, stages);
    move.store(moved_douts, stages + kTile);
    codes.store(call, sequence, stages + 2 * kTile, at, start, last);

    const unsigned lane_scores = keep(ColumnReader<kDim, Scores>::lane_offset());
    const unsigned lane_columns = keep(Output::column_offset());
    const unsigned lane_weights = keep(p_tile + Output::weight_offset());
    Output dk = {}, dv = {};
    __syncthreads();

    unsigned stage = stages;
    // No query attends to keys past the last one: their gradient is 0.
    const int begin = sequence.first_row < sequence.keys ? start : sequence.tokens;
#pragma unroll 1
    for (int first = begin; first < kept->tokens; first += kColumns) {
      const int next = first + kColumns, end = kShared ? kept->tokens - 1 : last;
      const unsigned code_tile = stage + 2 * kTile;
      Scores p, ds = {};
      lookup.start(call, *kept, p, code_tile, first);
      // Where the next step is loaded and stored is the fastest of some twenty variants (modelled).
      multiply_scores<kDim>(p, k, stage + lane_scores, [&](int octet) {
        if (octet == 0) codes.load(call, f.delta, *kept, next, end);
        if (octet == 5 && !kShared) move.load(moved_queries, query_source, call.q, next, end);
      });
      float lse[Scores::kThreadColumns];
      load_words(code_tile + QueryCodes::kLogSums + lookup.lane_codes, lse);
      fill(p, [&](int r, int e) { return exp2_approx(fmaf(p.at(r, e), call.scale, -lse[e])); });
      writer.write(p);
      const unsigned other = 2 * stages + kStage - stage;
      multiply_scores<kDim>(ds, v, stage + kTile + lane_scores, [&](int octet) {
        if (octet == 2 && kShared) move.load(moved_queries, query_source, call.q, next, end);
        if (octet == (kShared ? 2 : 6)) move.store(moved_queries, other);
        if (octet == 1 && !kShared) move.load(moved_douts, dout_source, f.dout, next, end);
      });
      if (kShared) move.load(moved_douts, dout_source, f.dout, next, end);
      float delta[Scores::kThreadColumns];
      load_words(code_tile + QueryCodes::kDeltas + lookup.lane_codes, delta);
      fill(ds, [&](int r, int e) { return p.at(r, e) * (ds.at(r, e) - delta[e]); });
      writer.write(ds, kWeights);
      __syncwarp();
      move.store(moved_douts, other + kTile);
      codes.store(call, *kept, other + 2 * kTile, lookup.table, next, end);
      multiply_output(dv, lane_weights, stage + kTile + lane_columns);
      multiply_output(dk, lane_weights + kWeights, stage + lane_columns);
      stage = other;
      __syncthreads();
    }
    float factor[Output::kThreadRows];
#pragma unroll
    for (int r = 0; r < Output::kThreadRows; ++r) factor[r] = 1;
    store_output(dv, factor, p_tile, *kept, f.dv, call.head_dim);
#pragma unroll
    for (int r = 0; r < Output::kThreadRows; ++r) factor[r] = call.scale * (1 / kLog2e);
    store_output(dk, factor, p_tile, *kept, f.dk, call.head_dim);
  }
};

extern "C" __global__ void __launch_bounds__(128, 2)
    attention_bwd_kv_64(const __grid_constant__ BackwardKV arguments) {
  BackwardKVKernel<64, RegisterRows<64, SquareScores<1>>>::run(arguments);
}

extern "C" __global__ void __launch_bounds__(128, 1)
    attention_bwd_kv_128(const __grid_constant__ BackwardKV arguments) {
  BackwardKVKernel<128, SharedRows<128>>::run(arguments);
}
