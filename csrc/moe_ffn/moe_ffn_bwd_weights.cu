// The weight gradients of moe_ffn (wgrad), in one launch: every gradient that sums over tokens.
//
//   dw1 = dpre^T norm(x)         dw2 = layer_scale * G, G = dbranch^T hidden
//   dlayer_scale = row sums of (w2 * G) + b2 * sum of dbranch
//
// so the layer scale needs no third product. Persistent kernel: each CTA takes tickets in the order
// of Split in benchmarks/modelled/schedule.py: whole tiles; then, as in stream-K, shares of the
// remaining tiles, the last share first; then blocks of columns of the partial sums that
// moe_ffn_bwd_rows wrote. The CTA with a tile's first step owns the tile and adds the partial tiles
// of the others in a fixed order, so the result is bitwise reproducible.

#include "moe_ffn/parts.cuh"

constexpr int kTileOverhead = 3;  // empty positions before a divided tile: schedule.TILE_OVERHEAD
constexpr int kWarps = kThreads / 32;
constexpr int kQuads = kTile * kTile / kThreads / 4;  // float4s of a thread's accumulators

// The structs below are mirrored in kernels/moe_ffn/cuda/backward_weights.py.

// The gradients of one expert; null where not wanted. Half precision, except those of the norm,
// whose dtype is given by dnorm_is_half.
struct Gradient {
  __half* w1;         // [F, D] or, gated, [2 F, D]
  __half* w2;         // [D, F]
  __half* b1;         // [F] or [2 F]
  __half* b2;         // [D]
  void* norm_weight;  // [D]
  void* norm_bias;    // [D]
};

// The kinds of partial sums, which are summed over lines at the end.
enum Sum { kSumDpre, kSumDbranch, kSumNormWeight, kSumNormBias, kSums };

struct BackwardWeights {
  Call call;  // without bound, band and tasks
  Gradient gradients[kMaxExperts];
  const __half* dpre;         // [T, P], grouped as the next three are
  const __half* normed;       // [T, D]
  const __half* dbranch;      // [T, D]: token_scale * dy
  const __half* hidden;       // [T, max F]
  const float* sum_dpre;      // [row tiles, P]
  const float* sum_dbranch;   // [row tiles * dbranch_lines, D]
  const float* sum_norm;      // [row tiles * norm_lines, 2 D]: for the weight, then for the bias
  float* partial;             // one tile for each worker
  float* sum_scale;           // [hidden column blocks, D]; null if dlayer_scale is not wanted
  float* sum_bias;            // [E, D]: b2 * sum of dbranch; null if not needed
  void* dlayer_scale;         // [D]
  int workers;                // shares of the divided tiles
  int sum_blocks[kSums];      // column blocks of each kind of sum, over all experts
  int dbranch_lines;          // lines of partial sums per row tile, over equally many rows
  int norm_lines;             // the same for sum_norm
  int dnorm_is_half, dlayer_scale_is_half;  // else float
};

__device__ inline int blocks_of(int columns) { return (columns + kTile - 1) / kTile; }

// ---- the schedule

// Counters after those of tickets and CTAs that left.
constexpr int kScaleCounter = 2;    // contributions to dlayer_scale
constexpr int kPartialCounter = 3;  // first of one for each share: its partial tile is stored

// One expert's place in the schedule.
struct Portion {
  int begin, count;     // its grouped rows
  int steps;            // of a tile; at least one, so that an expert without rows gets zeros
  int w1_rows;          // F or 2 F
  int w1_tiles, tiles;  // of dw1; of dw1 and dw2
  int whole;            // tiles that are not divided
  int whole_at;         // number of whole tiles of the experts before it
  int rest_at;          // number of positions of their other tiles
  int first_line;       // its first line of sum_scale, one for each block of hidden columns
  int first_row_tile;   // its first row tile in the partial sums
};

struct Plan {
  Portion portions[kMaxExperts];
  int whole, rest;    // number of whole tiles; of positions of the other tiles
  int share;          // positions per worker
  int scale_lines;    // lines of sum_scale
  int scale_signals;  // contributions that dlayer_scale needs
};

enum Work { kNothing, kProduct, kColumns };

// Steps [first, last) of a tile, or a block of columns of a sum; uniform over the CTA.
struct Piece {
  Work work;
  int expert;
  bool is_w1;
  int row, column;    // first ones of the tile; for a block of columns only the column
  int rows, columns;  // of the gradient
  int first, last;
  int number;  // of the share; -1 for a whole tile
  Sum sum;
};

struct Shared {
  alignas(16) char stages[kSharedBytes];
  alignas(16) float sums[kWarps][kTile];
  float factors[kTile];  // layer scale of the rows of a tile of dw2, else 1
  Plan plan;
  Piece piece;
  int position, stop, number;  // what is left of this CTA's share, and its number
  bool completes;              // this CTA makes the last contribution to dlayer_scale
};

// Executed by the first warp, with one lane for each expert.
__device__ inline void make_plan(const BackwardWeights& w, Plan& plan) {
  static_assert(kMaxExperts == 32, "a lane for each expert");
  const Call& call = w.call;
  const int e = lane_index();
  Portion mine = {};
  int lines = 0, row_tiles = 0;
  if (e < call.num_experts) {
    const int hidden = static_cast<int>(call.experts[e].hidden);
    mine.begin = expert_offset(call, e);
    mine.count = expert_offset(call, e + 1) - mine.begin;
    mine.steps = max((mine.count + kStepK - 1) / kStepK, 1);
    mine.w1_rows = hidden * (call.max_pre / call.max_hidden);
    if (w.gradients[e].w1 != nullptr) mine.w1_tiles = blocks_of(mine.w1_rows) * blocks_of(call.dim);
    mine.tiles = mine.w1_tiles;
    lines = blocks_of(hidden);
    if (w.gradients[e].w2 != nullptr || w.sum_scale != nullptr) {
      mine.tiles += blocks_of(call.dim) * lines;
    }
    mine.whole = mine.tiles / w.workers * w.workers;
    row_tiles = blocks_of(mine.count);
  }
  const int positions = (mine.tiles - mine.whole) * (mine.steps + kTileOverhead);
  const int whole_end = inclusive_scan(mine.whole), rest_end = inclusive_scan(positions);
  const int lines_end = inclusive_scan(lines), row_tiles_end = inclusive_scan(row_tiles);
  const int signals = inclusive_scan(mine.tiles - mine.w1_tiles);
  mine.whole_at = whole_end - mine.whole;
  mine.rest_at = rest_end - positions;
  mine.first_line = lines_end - lines;
  mine.first_row_tile = row_tiles_end - row_tiles;
  plan.portions[e] = mine;
  if (e == kMaxExperts - 1) {
    plan.whole = whole_end;
    plan.rest = rest_end;
    plan.share = max((rest_end + w.workers - 1) / w.workers, 1);
    plan.scale_lines = lines_end;
    plan.scale_signals = signals + (w.sum_bias != nullptr ? w.sum_blocks[kSumDbranch] : 0);
  }
}

// The lowest lane for which `mine` holds; called by a whole warp.
__device__ inline int find_lane(bool mine) { return __ffs(__ballot_sync(kFullWarp, mine)) - 1; }

__device__ inline Piece product_piece(const BackwardWeights& w, const Plan& plan, int expert,
                                      int tile, int first, int last, int number) {
  const Portion& portion = plan.portions[expert];
  const int hidden = static_cast<int>(w.call.experts[expert].hidden);
  Piece piece = {kProduct, expert};
  piece.is_w1 = tile < portion.w1_tiles;
  piece.rows = piece.is_w1 ? portion.w1_rows : w.call.dim;
  piece.columns = piece.is_w1 ? w.call.dim : hidden;
  const int local = tile - (piece.is_w1 ? 0 : portion.w1_tiles), across = blocks_of(piece.columns);
  piece.row = local / across * kTile;
  piece.column = local % across * kTile;
  piece.first = first;
  piece.last = last;
  piece.number = number;
  return piece;
}

// The steps before `stop` of the tile at `position`; none if `stop` precedes its first step. Moves
// `position` to the end of the tile.
__device__ inline Piece divided_piece(const BackwardWeights& w, const Plan& plan, int& position,
                                      int stop, int number) {
  const Portion& mine = plan.portions[lane_index()];
  const int positions = (mine.tiles - mine.whole) * (mine.steps + kTileOverhead);
  const int expert =
      find_lane(position >= mine.rest_at && position < mine.rest_at + positions);
  const Portion& portion = plan.portions[expert];
  const int length = portion.steps + kTileOverhead;
  const int tile = (position - portion.rest_at) / length;
  const int end = portion.rest_at + (tile + 1) * length;
  const int first = max(position - (end - portion.steps), 0);
  const int last = max(portion.steps - max(end - stop, 0), first);
  position = end;
  return product_piece(w, plan, expert, portion.whole + tile, first, last, number);
}

__device__ inline Piece whole_piece(const BackwardWeights& w, const Plan& plan, int ticket) {
  const Portion& mine = plan.portions[lane_index()];
  const int expert = find_lane(ticket >= mine.whole_at && ticket < mine.whole_at + mine.whole);
  const Portion& portion = plan.portions[expert];
  return product_piece(w, plan, expert, ticket - portion.whole_at, 0, portion.steps, -1);
}

__device__ inline Piece columns_piece(const BackwardWeights& w, int block) {
  Piece piece = {kNothing};
  for (int sum = 0; sum < kSums && piece.work == kNothing; ++sum) {
    const int blocks = w.sum_blocks[sum];
    if (block < blocks) {
      const int each = blocks / w.call.num_experts;
      piece.work = kColumns;
      piece.sum = static_cast<Sum>(sum);
      piece.expert = block / each;
      piece.column = block % each * kTile;
    }
    block -= blocks;
  }
  return piece;
}

// Executed by the first warp: the next piece of this CTA's share or, at its end, of a new ticket.
__device__ inline Piece next_piece(const BackwardWeights& w, Shared& shared) {
  const Plan& plan = shared.plan;
  int position = shared.position, stop = shared.stop, number = shared.number;
  Piece piece = {kNothing};
  while (true) {
    while (position < stop && piece.first == piece.last) {
      piece = divided_piece(w, plan, position, stop, number);
    }
    if (piece.first < piece.last) break;
    int ticket = 0;
    if (lane_index() == 0) ticket = atomicAdd(w.call.counters, 1);
    ticket = __shfl_sync(kFullWarp, ticket, 0);
    if (ticket < plan.whole) {
      piece = whole_piece(w, plan, ticket);
      break;
    }
    // An owner waits for shares after its own, which therefore have earlier tickets.
    number = w.workers - 1 - (ticket - plan.whole);
    if (number < 0) {
      piece = columns_piece(w, -1 - number);
      break;
    }
    position = min(number * plan.share, plan.rest);
    stop = min(position + plan.share, plan.rest);
  }
  shared.position = position;
  shared.stop = stop;
  shared.number = number;
  return piece;
}

// ---- products

// A block of columns of `depth` grouped rows from `first_row` on.
__device__ inline Source<Major::kMN> operand(const __half* grouped, int pitch, int first_row,
                                             int column, int columns, int depth) {
  return columns_of_k(grouped + static_cast<long long>(first_row) * pitch + column, pitch,
                      columns - column, depth);
}

// dpre^T norm(x), or dbranch^T hidden, over the tokens of the piece's steps.
__device__ inline void multiply_piece(const BackwardWeights& w, Shared& shared,
                                      Accumulators& acc) {
  const Piece& piece = shared.piece;
  const Portion& portion = shared.plan.portions[piece.expert];
  const int first = piece.first * kStepK, depth = min(piece.last * kStepK, portion.count) - first;
  if (depth <= 0) return;  // an expert without rows
  const Call& call = w.call;
  const bool is_w1 = piece.is_w1;
  multiply(acc,
           operand(is_w1 ? w.dpre : w.dbranch, is_w1 ? call.max_pre : call.dim,
                   portion.begin + first, piece.row, piece.rows, depth),
           operand(is_w1 ? w.normed : w.hidden, is_w1 ? call.dim : call.max_hidden,
                   portion.begin + first, piece.column, piece.columns, depth),
           depth, shared.stages);
}

// This thread's first float4 of a share's partial tile; its float4s are kThreads apart.
__device__ inline float4* partial_of(const BackwardWeights& w, int number) {
  return reinterpret_cast<float4*>(w.partial) + static_cast<long long>(number) * kQuads * kThreads +
         threadIdx.x;
}

__device__ inline void save_partial(const BackwardWeights& w, int number, const Accumulators& acc) {
  float4* const to = partial_of(w, number);
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    const float* const v = acc[i / 8][i / 2 % 4] + i % 2 * 4;
    to[i * kThreads] = make_float4(v[0], v[1], v[2], v[3]);
  }
}

__device__ inline void add_partial(const BackwardWeights& w, int number, Accumulators& acc) {
  const float4* const from = partial_of(w, number);
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    const float4 other = from[i * kThreads];
    float* const v = acc[i / 8][i / 2 % 4] + i % 2 * 4;
    v[0] += other.x, v[1] += other.y, v[2] += other.z, v[3] += other.w;
  }
}

// Adds the partial tiles of the shares that have the tile's later steps. These are the first steps
// of the shares after this one.
__device__ inline void add_peers(const BackwardWeights& w, const Shared& shared,
                                 Accumulators& acc) {
  const Piece& piece = shared.piece;
  const int missing = shared.plan.portions[piece.expert].steps - piece.last;
  const int peers = (missing + shared.plan.share - 1) / shared.plan.share;
#pragma unroll 1
  for (int peer = piece.number + 1; peer <= piece.number + peers; ++peer) {
    wait(w.call.counters + kPartialCounter + peer, 1);
    add_partial(w, peer, acc);
  }
}

// The tile of w2 that a tile of dw2 is multiplied with goes through shared memory: if each visit of
// store_tile read it from global memory, that latency would be paid sixteen times.
constexpr int kW2Pitch = (kTile + kChunk) * 2;  // bytes of a row of the w2 in the stages
static_assert(kTile * kW2Pitch <= kSharedBytes, "w2 does not fit into the stages");

// Copies a tile of w2; columns past the last one are zero, rows past the last one repeat it. All
// zeros for an expert without rows: its G is 0, but 0 times infinity or NaN is NaN.
__device__ inline void stage_w2(const BackwardWeights& w, const Shared& shared, unsigned stages) {
  const Piece& piece = shared.piece;
  const int columns = shared.plan.portions[piece.expert].count > 0 ? piece.columns : 0;
  constexpr int kChunks = kTile / kChunk, kRows = kThreads / kChunks;
  const int c = threadIdx.x % kChunks * kChunk, r = threadIdx.x / kChunks;
  const int column = piece.column + c;
  const __half* const w2 = w.call.experts[piece.expert].w2 + column;
#pragma unroll
  for (int i = 0; i < kTile; i += kRows) {
    const int row = min(piece.row + r + i, piece.rows - 1);
    uint4 chunk = make_uint4(0, 0, 0, 0);
    if (column < columns) {
      chunk = *reinterpret_cast<const uint4*>(w2 + static_cast<long long>(row) * piece.columns);
    }
    store_shared(stages + (r + i) * kW2Pitch + c * 2, chunk);
  }
}

__device__ inline void stage_factors(const BackwardWeights& w, Shared& shared) {
  const Piece& piece = shared.piece;
  const int row = piece.row + threadIdx.x;
  const bool scaled = !piece.is_w1 && w.call.layer_scale != nullptr && row < piece.rows;
  shared.factors[threadIdx.x] =
      scaled ? load_one(w.call.layer_scale, w.call.layer_scale_is_half, row) : 1.0f;
}

__device__ inline float dot(const float (&v)[8], unsigned with) {
  float u[8], sum = 0.0f;
  unpack(load_shared(with), u);
#pragma unroll
  for (int i = 0; i < 8; ++i) sum = fmaf(v[i], u[i], sum);
  return sum;
}

// The sum over the lanes that hold the same row of a tile: they differ in two bits.
__device__ inline float sum_over_row(float v) {
  v += __shfl_xor_sync(kFullWarp, v, 2);
  return v + __shfl_xor_sync(kFullWarp, v, 8);
}

// Epilogue: stores a tile of dw1 or dw2, and leaves in shared memory the row sums of w2 * G over
// each 32 columns. It uses the stages, which are free.
__device__ inline void store_tile(const BackwardWeights& w, Shared& shared,
                                  const Accumulators& acc) {
  const Piece piece = shared.piece;
  const Gradient& gradient = w.gradients[piece.expert];
  __half* const out = piece.is_w1 ? gradient.w1 : gradient.w2;
  const bool of_scale = !piece.is_w1 && w.sum_scale != nullptr;
  const unsigned w2 = shared_address(shared.stages);
  if (of_scale) stage_w2(w, shared, w2);
  stage_factors(w, shared);
  __syncthreads();
  for_each_octet<Major::kMN, Major::kMN>(acc, [&](int c) {
    const int column = piece.column + c;
    const int end = column < piece.columns ? piece.rows : 0;
    return [=, &shared](int r, float(&v)[8]) {
      const int row = piece.row + r;
      if (of_scale) {
        const float product = dot(v, w2 + r * kW2Pitch + c * 2);
        const float sum = sum_over_row(row < end ? product : 0.0f);
        if ((lane_index() & (2 + 8)) == 0) shared.sums[c / 32][r] = sum;
      }
      if (row >= end || out == nullptr) return;
      const float factor = shared.factors[r];
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] *= factor;
      store_octet(out, true, static_cast<long long>(row) * piece.columns + column, v);
    };
  });
}

// ---- sums over lines

// The sum over the lines [first, last) of this thread's column, in the block of kTile columns from
// `column` on; always in the same order. A warp reads every fourth line, a lane four columns.
__device__ inline float sum_lines(const float* source, int first, int last, int pitch, int column,
                                  int columns, Shared& shared) {
  float4 sum = make_float4(0, 0, 0, 0);
  const int mine = column + lane_index() * 4;
  if (mine < columns) {
#pragma unroll 8
    for (int line = first + warp_index(); line < last; line += kWarps) {
      const float4 v =
          *reinterpret_cast<const float4*>(source + static_cast<long long>(line) * pitch + mine);
      sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
  }
  __syncthreads();  // the previous sums have been read
  *reinterpret_cast<float4*>(&shared.sums[warp_index()][lane_index() * 4]) = sum;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) total += shared.sums[i][threadIdx.x];
  return total;
}

__device__ inline void store_one(void* tensor, bool is_half, int at, float v) {
  if (is_half) {
    static_cast<__half*>(tensor)[at] = __float2half_rn(v);
  } else {
    static_cast<float*>(tensor)[at] = v;
  }
}

// Counts a contribution to dlayer_scale; the CTA with the last one reduces all of them.
__device__ inline void contribute(const BackwardWeights& w, Shared& shared) {
  const Call& call = w.call;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    shared.completes =
        atomicAdd(call.counters + kScaleCounter, 1) == shared.plan.scale_signals - 1;
    __threadfence();
  }
  __syncthreads();
  if (!shared.completes) return;
#pragma unroll 1
  for (int first = 0; first < call.dim; first += kTile) {
    const int column = first + threadIdx.x;
    float total = 0.0f;
#pragma unroll 1
    for (int of_bias = 0; of_bias < (w.sum_bias != nullptr ? 2 : 1); ++of_bias) {
      total += sum_lines(of_bias ? w.sum_bias : w.sum_scale, 0,
                         of_bias ? call.num_experts : shared.plan.scale_lines, call.dim, first,
                         call.dim, shared);
    }
    if (column < call.dim) store_one(w.dlayer_scale, w.dlayer_scale_is_half, column, total);
  }
}

// Completes the row sums of w2 * G that store_tile left: a tile's contribution to dlayer_scale.
__device__ inline void contribute_rows(const BackwardWeights& w, Shared& shared) {
  __syncthreads();
  const Piece& piece = shared.piece;
  const int line = shared.plan.portions[piece.expert].first_line + piece.column / kTile;
  const int row = piece.row + threadIdx.x;
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) total += shared.sums[i][threadIdx.x];
  if (row < w.call.dim) w.sum_scale[static_cast<long long>(line) * w.call.dim + row] = total;
  contribute(w, shared);
}

__device__ inline void finish_bias(const BackwardWeights& w, int expert, int column, float total) {
  const Call& call = w.call;
  if (w.sum_bias != nullptr) {
    const float b2 = total == 0.0f ? 0.0f : __half2float(call.experts[expert].b2[column]);
    w.sum_bias[expert * call.dim + column] = total * b2;
  }
  if (call.layer_scale != nullptr) {
    total *= load_one(call.layer_scale, call.layer_scale_is_half, column);
  }
  __half* const out = w.gradients[expert].b2;
  if (out != nullptr) store_one(out, true, column, total);
}

// Reduces one block of columns of one kind of partial sums of one expert.
__device__ inline void add_up(const BackwardWeights& w, Shared& shared) {
  const Call& call = w.call;
  const Piece piece = shared.piece;
  const Portion& portion = shared.plan.portions[piece.expert];
  const Gradient& gradient = w.gradients[piece.expert];
  const bool of_dpre = piece.sum == kSumDpre, of_dbranch = piece.sum == kSumDbranch;
  const bool of_norm_bias = piece.sum == kSumNormBias;
  const float* const source = of_dpre      ? w.sum_dpre
                              : of_dbranch ? w.sum_dbranch
                                           : w.sum_norm + (of_norm_bias ? call.dim : 0);
  const int pitch = of_dpre ? call.max_pre : of_dbranch ? call.dim : 2 * call.dim;
  const int per_tile = of_dpre ? 1 : of_dbranch ? w.dbranch_lines : w.norm_lines;
  const int columns = of_dpre ? portion.w1_rows : call.dim;
  // Lines past the last row do not exist, or hold zeros.
  const int rows_per_line = kTile / per_tile;
  const int first = portion.first_row_tile * per_tile;
  const int lines = (portion.count + rows_per_line - 1) / rows_per_line;
  const float total =
      sum_lines(source, first, first + lines, pitch, piece.column, columns, shared);

  const int column = piece.column + threadIdx.x;
  if (column < columns) {
    void* const of_norm = of_norm_bias ? gradient.norm_bias : gradient.norm_weight;
    if (of_dbranch) {
      finish_bias(w, piece.expert, column, total);
    } else if (of_dpre) {
      if (gradient.b1 != nullptr) store_one(gradient.b1, true, column, total);
    } else if (of_norm != nullptr) {
      store_one(of_norm, w.dnorm_is_half, column, total);
    }
  }
  if (of_dbranch && w.sum_bias != nullptr) contribute(w, shared);
}

// Pieces are read from shared memory wherever they are needed: the products need all registers.
extern "C" __global__ void __launch_bounds__(kThreads, 2)
    moe_ffn_bwd_weights(const __grid_constant__ BackwardWeights w) {
  __shared__ Shared shared;
  if (warp_index() == 0) {
    make_plan(w, shared.plan);
    shared.position = shared.stop = 0;
    __syncwarp();
  }
  while (true) {
    __syncthreads();  // the last piece no longer uses shared memory
    if (warp_index() == 0) {
      const Piece piece = next_piece(w, shared);
      if (lane_index() == 0) shared.piece = piece;
    }
    __syncthreads();
    if (shared.piece.work == kNothing) break;
    if (shared.piece.work == kColumns) {
      add_up(w, shared);
      continue;
    }
    Accumulators acc = {};
    multiply_piece(w, shared, acc);
    if (shared.piece.first > 0) {
      save_partial(w, shared.piece.number, acc);
      signal(w.call.counters + kPartialCounter + shared.piece.number);
      continue;
    }
    add_peers(w, shared, acc);
    __syncthreads();  // the product no longer uses the stages
    store_tile(w, shared, acc);
    if (!shared.piece.is_w1 && w.sum_scale != nullptr) contribute_rows(w, shared);
  }
  leave(w.call);
}
