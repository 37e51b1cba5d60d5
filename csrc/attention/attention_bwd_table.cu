// The gradient of the bias table: for each entry, the sum of dS over all scores that read it.
//
// The 64 x 64 scores of a query tile and a key tile read the same entries in every sequence, so a
// CTA accumulates their dS over a range of sequences in registers and scatters the sums once. Many
// sums go to the same entry. They are added in fixed point: integer addition does not depend on the
// order, so the gradient is bitwise reproducible without a tensor of N x N terms. Each CTA has its
// own row of partial sums.

#include "attention/lookup.cuh"

struct BackwardTable {
  Call call;
  Operand dout;
  const float* delta;  // laid out as lse
  float* partial;      // [H, parts, entries], zeros on entry
  int parts;           // CTAs per head
  int range;           // sequences that are summed before a scatter; 1 with positions
};

// Scores whose rows are read from column tiles: the rows of a thread are chosen so that reading
// them as operand A has no bank conflicts.
struct TileScores : SquareScores<2> {
  __device__ static int row(int r) {
    const QuadPair at;
    return r / 2 * 16 + at.high * 8 + at.m * 4 + r % 2 * 2 + (at.low & 1);
  }
};

template <int kDim>
struct TileRows {
  static constexpr int kCount = 2;
  unsigned lane;

  __device__ static unsigned lane_offset() {
    const QuadPair at;
    return ColumnTile<kDim>::offset(at.high * 8 + at.m * 4 + at.low, 0);
  }
  __device__ uint4 read(int m, int octet) const {
    return load_shared((lane ^ octet % 8 * 16) + octet / 8 * 128 +
                       m * 16 * ColumnTile<kDim>::kPitch);
  }
};

template <int kDim>
struct BackwardTableKernel {
  static constexpr int kThreads = 128, kSide = 64;  // rows and columns of the score tile
  static constexpr int kBand = 4;  // query tiles
  static constexpr int kTile = ColumnTile<kDim>::kBytes, kOperand = 2 * kTile;
  // Byte offsets of the per-token values of a tile: log sums and deltas of queries, flags of keys.
  static constexpr int kDeltas = kSide * 4, kFlags = 2 * kSide * 4, kTokens = 3 * kSide * 4;
  // Whether tiles are loaded into registers long before they are stored to shared memory. Larger
  // head dims have too few registers for that, and dout and v overwrite q and k.
  static constexpr bool kAhead = kDim <= 64;
  static constexpr int kTiles = (kAhead ? 4 : 2) * kOperand;
  static constexpr int kWindow = kTiles / 4;  // entries that are scattered at a time
  using Move = Mover<kDim, kThreads>;

  // 64 tokens of one operand, in registers.
  struct Moved {
    uint4 chunks[2][Move::kMoves];

    __device__ void load(const Move& move, const Sequence& sequence, const Operand& operand,
                         int first) {
      const char* const source = move.source(sequence, operand);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        move.load(chunks[i], source, operand, first + i * kColumns, sequence.tokens - 1);
      }
    }
    __device__ void store(const Move& move, unsigned at) const {
#pragma unroll
      for (int i = 0; i < 2; ++i) move.store(chunks[i], at + i * kTile);
    }
    // Stores values, with zeros for masked keys: a weight of 0 times infinity or NaN is NaN.
    __device__ void store_values(const Call& call, const Move& move, unsigned at,
                                 unsigned flags) const {
      store(move, at);
      if ((call.key_mask == nullptr && call.key_lengths == nullptr) || !move.inside) return;
#pragma unroll 1
      for (int i = 0; i < 2 * Move::kMoves; ++i) {
        const int tile = i / Move::kMoves, token = move.token + i % Move::kMoves * Move::kTokens;
        if (load_word(flags + (tile * kColumns + token) * 4) != 0) {
          store_shared(move.place(at + tile * kTile, i % Move::kMoves), make_uint4(0, 0, 0, 0));
        }
      }
    }
  };

  // The per-token values of one query or one key for each thread.
  struct Token {
    float lse, delta;
    int attended;

    __device__ void load(const BackwardTable& f, const Sequence& sequence, int query, int key) {
      const int t = threadIdx.x % kSide;
      if (threadIdx.x < kSide) {
        const long long at = sequence.of_head(f.call, min(query + t, sequence.tokens - 1));
        lse = query + t < sequence.tokens ? f.call.lse[at] : -infinity();
        delta = f.delta[at];
      } else {
        attended = key + t < sequence.keys;
        if (f.call.key_mask != nullptr && attended) {
          attended = f.call.key_mask[sequence.first_value + key + t];
        }
      }
    }
    __device__ void store(unsigned at) const {
      const unsigned mine = at + threadIdx.x % kSide * 4;
      if (threadIdx.x < kSide) {
        store_word(mine, __float_as_int(log_sum(lse)));
        store_word(mine + kDeltas, __float_as_int(delta));
      } else {
        store_word(mine + kFlags, attended ? 0 : kMasked);
      }
    }
  };

  // A tile, and the end of its range of sequences.
  struct Item {
    int head, query, key, stop;

    // The first sequence from `number` on that is long enough to reach the tile, or stop.
    __device__ int next(const Call& call, int number) const {
      for (; number < stop; ++number) {
        const Sequence sequence(call, number, head, query);
        if (query < sequence.tokens && key < sequence.keys) break;
      }
      return number;
    }
  };

  __device__ static void run(const BackwardTable& f) {
    extern __shared__ char shared[];
    const Call& call = f.call;
    const int tiles = (call.length + kSide - 1) / kSide;
    const int ranges = (call.batch + f.range - 1) / f.range;
    const Move move(call.head_dim);
    for (int i = blockIdx.x % f.parts; i < tiles * tiles * ranges; i += f.parts) {
      const int range = i / (tiles * tiles), tile = i % (tiles * tiles);
      // Bands of kBand query tiles, key tile by key tile: the tiles that CTAs read at one time are
      // nearly a square, which gives a high L2 hit rate.
      const int band = tile / (kBand * tiles) * kBand, height = min(kBand, tiles - band);
      const int in_band = tile - band * tiles;
      const Item item{static_cast<int>(keep(blockIdx.x / f.parts)),
                      (band + in_band % height) * kSide, in_band / height * kSide,
                      min((range + 1) * f.range, call.batch)};
      const int first = item.next(call, range * f.range);
      if (first == item.stop || (call.causal && item.key >= item.query + kSide)) continue;
      TileScores sums = {};
      __syncthreads();
      sum(f, item, first, move, shared, sums);
      __syncthreads();
      scatter(f, item, first, shared, sums);
    }
  }

  // Sums dS of the tile over the sequences from `number` on.
  __device__ static void sum(const BackwardTable& f, const Item& item, int number,
                             const Move& move, char* tiles, TileScores& sums) {
    const Call& call = f.call;
    const unsigned shared = shared_address(tiles);
    const unsigned queries = shared, keys = shared + kOperand;
    const unsigned douts = shared + kTiles - 2 * kOperand, values = douts + kOperand;
    unsigned tokens = shared + kTiles;
    const int row = warp_index() / 2 * kColumns, column = warp_index() % 2 * kColumns;
    TileScores bias;
    start(call, item, Sequence(call, number, item.head, item.query), tiles, bias);
    const unsigned lane_rows = keep(TileRows<kDim>::lane_offset() + warp_index() / 2 * kTile);
    const unsigned lane_columns =
        keep(ColumnReader<kDim, SquareScores<2>>::lane_offset() + warp_index() % 2 * kTile);

    for (int at = 0; at < kTiles; at += kTile) move.clear(shared + at);
    Moved left, right;
    Token token;
    load_first(f, item, Sequence(call, number, item.head, item.query), move, shared, left, right,
               token);
    __syncthreads();
#pragma unroll 1
    while (number < item.stop) {
      TileScores p = bias, ds = {};
      const int next = item.next(call, number + 1);
      const Sequence following(call, next < item.stop ? next : number, item.head, item.query);
      multiply_scores<kDim>(static_cast<SquareScores<2>&>(p), TileRows<kDim>{queries + lane_rows},
                            keys + lane_columns, [](int) {});
      if (!kAhead) {
        __syncthreads();
        const Sequence sequence(call, number, item.head, item.query);
        left.load(move, sequence, f.dout, item.query);
        right.load(move, sequence, call.v, item.key);
      }
      left.store(move, douts);
      right.store_values(call, move, values, tokens + kFlags);
      if (kAhead) left.load(move, following, call.q, item.query);
      if (kAhead) right.load(move, following, call.k, item.key);
      token.load(f, following, item.query, item.key);
      weigh(call, tokens, row, column, p);
      __syncthreads();
      const unsigned other = 2 * (shared + kTiles) + kTokens - tokens;
      multiply_scores<kDim>(static_cast<SquareScores<2>&>(ds), TileRows<kDim>{douts + lane_rows},
                            values + lane_columns, [&](int octet) {
        if (kAhead && octet == 3) left.store(move, queries);
        if (kAhead && octet == 5) right.store(move, keys);
        if (octet == 5) token.store(other);
      });
      if (kAhead) left.load(move, following, f.dout, item.query);
      if (kAhead) right.load(move, following, call.v, item.key);
      add(tokens, row, p, ds, sums);
      if (!kAhead) {
        __syncthreads();
        left.load(move, following, call.q, item.query);
        right.load(move, following, call.k, item.key);
        left.store(move, queries);
        right.store(move, keys);
      }
      tokens = other;
      number = next;
      __syncthreads();
    }
  }

  // Prologue: q, k and their per-token values to shared memory; dout and v to registers if kAhead.
  __device__ static void load_first(const BackwardTable& f, const Item& item,
                                    const Sequence& sequence, const Move& move, unsigned shared,
                                    Moved& left, Moved& right, Token& token) {
    left.load(move, sequence, f.call.q, item.query);
    right.load(move, sequence, f.call.k, item.key);
    token.load(f, sequence, item.query, item.key);
    left.store(move, shared);
    right.store(move, shared + kOperand);
    token.store(shared + kTiles);
    if (kAhead) left.load(move, sequence, f.dout, item.query);
    if (kAhead) right.load(move, sequence, f.call.v, item.key);
  }

  __device__ static void add(unsigned tokens, int row, TileScores& p, TileScores& ds,
                             TileScores& sums) {
    float delta[TileScores::kThreadRows];
#pragma unroll
    for (int r = 0; r < TileScores::kThreadRows; ++r) {
      delta[r] = load_entry(tokens + kDeltas + (row + TileScores::row(r)) * 4);
    }
    fill(sums, [&](int r, int e) {
      return fmaf(p.at(r, e), ds.at(r, e) - delta[r], sums.at(r, e));
    });
  }

  // The indices of the table entries that the tile reads, as the bits of `entries`. Queries and
  // keys past the end repeat others: their weights are 0.
  __device__ static void find_entries(const Call& call, const Item& item,
                                      const Sequence& sequence, TileScores& entries) {
    const int last = call.positions != nullptr ? sequence.tokens - 1 : call.length - 1;
    const int first_key = item.key + warp_index() % 2 * kColumns + TileScores::first_column();
    int query[TileScores::kThreadRows];
#pragma unroll
    for (int r = 0; r < TileScores::kThreadRows; ++r) {
      const int token = item.query + warp_index() / 2 * kColumns + TileScores::row(r);
      query[r] = sequence.position(call, min(token, last));
    }
    if (call.bias.narrow != nullptr && call.positions == nullptr) {
      load_entries(call.bias, query, first_key, entries);
      return;
    }
    int key[TileScores::kThreadColumns];
#pragma unroll
    for (int e = 0; e < TileScores::kThreadColumns; ++e) {
      key[e] = sequence.position(call, min(first_key + e, last));
    }
    fill(entries,
         [&](int r, int e) { return __int_as_float(entry_at(call.bias, query[r], key[e])); });
  }

  // The bias of the tile, minus infinity above the diagonal if attention is causal.
  __device__ static void start(const Call& call, const Item& item, const Sequence& sequence,
                               char* shared, TileScores& bias) {
    const bool fits = call.bias.entries <= kWindow;
    if (fits) load_table<kThreads>(call.bias, item.head, shared);
    find_entries(call, item, sequence, bias);
    const float* const table =
        call.bias.table + static_cast<long long>(item.head) * call.bias.entries;
    __syncthreads();
    const int below = item.query + warp_index() / 2 * kColumns -
                      (item.key + warp_index() % 2 * kColumns);  // the diagonal
    fill(bias, [&](int r, int e) {
      const int entry = __float_as_int(bias.at(r, e));
      const float value = fits ? load_entry(shared_address(shared) + entry * 4) : table[entry];
      const bool later = TileScores::first_column() + e > TileScores::row(r) + below;
      return call.causal && later ? -infinity() : value;
    });
    __syncthreads();
  }

  // Turns scores into weights, 0 where a key is masked.
  __device__ static void weigh(const Call& call, unsigned tokens, int row, int column,
                               TileScores& p) {
    int flags[TileScores::kThreadColumns];
    load_words(tokens + kFlags + (column + TileScores::first_column()) * 4, flags);
    int any = 0;
#pragma unroll
    for (int e = 0; e < TileScores::kThreadColumns; ++e) any |= flags[e];
    if (__any_sync(kFullWarp, any)) {
      fill(p, [&](int r, int e) { return flags[e] ? -infinity() : p.at(r, e); });
    }
    float lse[TileScores::kThreadRows];
#pragma unroll
    for (int r = 0; r < TileScores::kThreadRows; ++r) {
      lse[r] = load_entry(tokens + (row + TileScores::row(r)) * 4);
    }
    fill(p, [&](int r, int e) { return exp2_approx(fmaf(p.at(r, e), call.scale, -lse[r])); });
  }

  // Adds the sums to the CTA's row of `partial`, in fixed point with a power-of-two scale such that
  // the total of all of them cannot overflow. A sum that is not finite sets its entry to NaN.
  __device__ static void scatter(const BackwardTable& f, const Item& item, int number,
                                 char* shared, TileScores& sums) {
    const Call& call = f.call;
    const Sequence sequence(call, number, item.head, item.query);
    const int entries = call.bias.entries;
    float* const partial = f.partial + static_cast<long long>(blockIdx.x) * entries;
    int* const counts = reinterpret_cast<int*>(shared);
    TileScores places;
    find_entries(call, item, sequence, places);
    remove_infinite(partial, places, sums);
    const int exponent = 17 - exponent_of_sum(shared + kTiles, sums);
    const float up = __int_as_float((127 + min(exponent, 126)) << 23);
    const float down = __int_as_float((127 - min(exponent, 126)) << 23);
#pragma unroll 1
    for (int window = 0; window < entries; window += kWindow) {
      const int size = min(kWindow, entries - window);
      for (int i = threadIdx.x; i < size; i += kThreads) counts[i] = 0;
      __syncthreads();
      count(places, sums, up, window, size, counts);
      __syncthreads();
      for (int i = threadIdx.x; i < size; i += kThreads) {
        if (counts[i] != 0) partial[window + i] += counts[i] * down;
      }
      __syncthreads();
    }
  }

  // Neighbouring scores that read the same entry, as all pairs of a text query and an image key do,
  // are summed first, because atomic additions to one address are serialised.
  __device__ static void count(TileScores& places, TileScores& sums, float up, int window, int size,
                               int* counts) {
    int place = 0, sum = 0;
    const auto add = [&]() {
      const int at = place - window;
      if (sum != 0 && at >= 0 && at < size) atomicAdd(counts + at, sum);
    };
#pragma unroll
    for (int r = 0; r < TileScores::kThreadRows; ++r) {
#pragma unroll
      for (int e = 0; e < TileScores::kThreadColumns; ++e) {
        const int next = __float_as_int(places.at(r, e));
        if (next != place) {
          add();
          place = next;
          sum = 0;
        }
        sum += __float2int_rn(sums.at(r, e) * up);
      }
    }
    add();
  }

  __device__ static void remove_infinite(float* partial, TileScores& places, TileScores& sums) {
    fill(sums, [&](int r, int e) {
      const float v = sums.at(r, e);
      if (fabsf(v) < infinity()) return v;
      partial[__float_as_int(places.at(r, e))] = infinity() - infinity();
      return 0.0f;
    });
  }

  // The exponent of the CTA's mean absolute value. The mean over the 4096 sums, unlike their total,
  // cannot be infinite.
  __device__ static int exponent_of_sum(char* shared, TileScores& sums) {
    float sum = 0;
    fill(sums, [&](int r, int e) {
      sum = fmaf(fabsf(sums.at(r, e)), 1.0f / (kSide * kSide), sum);
      return sums.at(r, e);
    });
    for (int distance = 16; distance > 0; distance /= 2) {
      sum += __shfl_xor_sync(kFullWarp, sum, distance);
    }
    float* const of_warps = reinterpret_cast<float*>(shared);
    if (lane_index() == 0) of_warps[warp_index()] = sum;
    __syncthreads();
    sum = 0;
    for (int i = 0; i < kThreads / 32; ++i) sum += of_warps[i];
    return (__float_as_int(sum) >> 23) - 127;
  }
};

extern "C" __global__ void __launch_bounds__(128, 2)
    attention_bwd_table_64(const __grid_constant__ BackwardTable arguments) {
  BackwardTableKernel<64>::run(arguments);
}

extern "C" __global__ void __launch_bounds__(128, 2)
    attention_bwd_table_128(const __grid_constant__ BackwardTable arguments) {
  BackwardTableKernel<128>::run(arguments);
}
