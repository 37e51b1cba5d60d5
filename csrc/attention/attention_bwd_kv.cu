// The gradients of keys and values.
//
// A CTA owns 64 keys of one head of one sequence and walks over its queries, 32 at a time. With
// P = exp(scores - lse): dv = P^T dout, dP = dout v^T, dS = P (dP - delta), dk = scale dS^T q.
// Everything is made transposed, keys as rows, so that a warp needs nothing of the others.

#include "attention/lookup.cuh"
#include "attention/parts.cuh"

struct BackwardKV {
  Call call;
  Operand dout, dk, dv;
  const float* delta;  // [tokens, H]
};

template <int kDim>
struct BackwardKVKernel {
  static constexpr int kWarps = 4, kBlocks = 1;
  static constexpr int kThreads = kWarps * 32, kRows = kWarps * kBlocks * 16;
  static constexpr int kTile = ColumnTile<kDim>::kBytes;
  static constexpr int kStage = 2 * kTile + QueryCodes::kBytes;  // queries, dout, codes
  static constexpr int kKept = 128;
  static constexpr bool kShared = kDim > 64;  // whether rows are in shared memory
  using Move = Mover<kDim, kThreads>;
  using Rows = RowHolder<kDim, kBlocks, kShared>;
  using Weights = WeightTile<kBlocks>;

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
    const int first_row = sequence.row_of_warp(kBlocks * 16), last = sequence.tokens - 1;
    const int start = call.causal ? sequence.first_row / kColumns * kColumns : 0;
    // Nobody attends to a key behind the last: its gradient is 0.
    const int stop = sequence.first_row < sequence.keys ? sequence.tokens : start;

    const Move move(call.head_dim);
    const char* const query_source = move.source(sequence, call.q);
    const char* const dout_source = move.source(sequence, f.dout);
    uint4 moved_queries[Move::kMoves], moved_douts[Move::kMoves];
    QueryCodes codes;
    move.load(moved_queries, query_source, call.q, start, last);
    move.load(moved_douts, dout_source, f.dout, start, last);
    codes.load(call, f.delta, sequence, start, last);

    unsigned at = stages + 2 * kStage + warp_index() * 2 * Weights::kBytes;
    const Weights p_tile(at), ds_tile(at + Weights::kBytes);
    at = stages + 2 * kStage + kWarps * 2 * Weights::kBytes;
    const auto row_pointer = [&](const Operand& operand) {
      return [&](int row) { return sequence.pointer(operand, min(first_row + row, last)); };
    };
    const Rows k(at + warp_index() * Rows::kBytes, call.head_dim, row_pointer(call.k));
    at += kWarps * Rows::kBytes;
    const Rows v(at + warp_index() * Rows::kBytes, call.head_dim, row_pointer(call.v));
    at += kWarps * Rows::kBytes;
    char* const table = shared + (at - shared_address(shared));
    load_table<kThreads>(call.bias, sequence.head, table);
    const KeyLookup<kBlocks> lookup(call, sequence, at);
#pragma unroll
    for (int i = 0; i < 4; ++i) move.clear(stages + i / 2 * kStage + i % 2 * kTile);
    move.store(moved_queries, stages);
    move.store(moved_douts, stages + kTile);
    codes.store(call, sequence, stages + 2 * kTile, at, start, last);

    const unsigned lane_k = keep(ColumnTile<kDim>::lane_offset_k());
    const unsigned lane_n = keep(ColumnTile<kDim>::lane_offset_n());
    Output<kDim, kBlocks> dk = {}, dv = {};
    __syncthreads();

    unsigned stage = stages;
#pragma unroll 1
    for (int first = start; first < stop; first += kColumns) {
      const int next = first + kColumns;
      const unsigned code_tile = stage + 2 * kTile;
      Scores<kBlocks> p, ds = {};
      lookup.start(call, *kept, p, code_tile, first);
      multiply_scores<kDim, kBlocks>(p, k.rows, stage + lane_k, [&](int octet) {
        if (octet == 0) move.load(moved_queries, query_source, call.q, next, last);
      });
      move.load(moved_douts, dout_source, f.dout, next, last);
      codes.load(call, f.delta, *kept, next, last);
      float lse[8];
      load_eight(code_tile + QueryCodes::kPart + lookup.lane_codes, lse);
#pragma unroll
      for (int r = 0; r < 2 * kBlocks; ++r) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          float& w = element<kBlocks>(p, r, e);
          w = exp2_approx(fmaf(w, call.scale, -lse[e]));
        }
      }
      write_weights<kBlocks>(p_tile, p);
      multiply_scores<kDim, kBlocks>(ds, v.rows, stage + kTile + lane_k, [](int) {});
      float delta[8];
      load_eight(code_tile + 2 * QueryCodes::kPart + lookup.lane_codes, delta);
#pragma unroll
      for (int r = 0; r < 2 * kBlocks; ++r) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          float& w = element<kBlocks>(ds, r, e);
          w = element<kBlocks>(p, r, e) * (w - delta[e]);
        }
      }
      write_weights<kBlocks>(ds_tile, ds);
      __syncwarp();
      const unsigned other = 2 * stages + kStage - stage;
      move.store(moved_queries, other);
      move.store(moved_douts, other + kTile);
      codes.store(call, *kept, other + 2 * kTile, lookup.table, next, last);
      multiply_output<kDim, kBlocks>(dv, p_tile, stage + kTile + lane_n);
      multiply_output<kDim, kBlocks>(dk, ds_tile, stage + lane_n);
      stage = other;
      __syncthreads();
    }
    float factor[2 * kBlocks];
#pragma unroll
    for (int r = 0; r < 2 * kBlocks; ++r) factor[r] = 1;
    const int row = kept->row_of_warp(kBlocks * 16);
    store_output<kDim, kBlocks>(dv, factor, p_tile, *kept, f.dv, row, call.head_dim);
#pragma unroll
    for (int r = 0; r < 2 * kBlocks; ++r) factor[r] = call.scale * (1 / kLog2e);
    store_output<kDim, kBlocks>(dk, factor, p_tile, *kept, f.dk, row, call.head_dim);
  }
};

#define VLMO_BACKWARD_KV(dim, ctas)                                                \
  extern "C" __global__ void __launch_bounds__(128, ctas)                          \
      attention_bwd_kv_##dim(const __grid_constant__ BackwardKV arguments) {        \
    BackwardKVKernel<dim>::run(arguments);                                         \
  }
VLMO_BACKWARD_KV(64, 2)
VLMO_BACKWARD_KV(128, 1)
