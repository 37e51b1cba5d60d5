// What the kernels of attention have in common: arguments, sequences, tiles in shared memory.
//
// Each of them holds rows and walks over columns, 32 at a time: forward and dq hold queries and walk
// over keys, dk and dv hold keys and walk over queries. A warp owns kBlocks blocks of 16 rows.
// Scores = rows x columns^T are made from registers and a column tile; what becomes of them goes
// through a tile of the warp's own and is multiplied with a column tile once more.
#pragma once

#include "common/activation.cuh"
#include "common/memory.cuh"
#include "common/volta_mma.cuh"

constexpr int kColumns = 32;  // of a column tile
constexpr int kChunk = 8;     // halves in 16 bytes, what a thread moves at a time
constexpr float kLog2e = 1.4426950408889634f;

__device__ inline float infinity() { return __int_as_float(0x7f800000); }

// q, k, v, an output or a gradient: rows of one head are contiguous, and aligned to 16 bytes.
struct Operand {
  __half* data;
  long long sequence, token, head;  // strides, in elements; packed sequences: sequence is 0
};

struct Bias {
  const float* table;  // [H, entries], over the scale of the scores; null without
  const int* matrix;   // [M, M], rows of the table
  const unsigned short* narrow;  // [M, pitch], the same; null if it has none
  const int4* affine;  // [M]: offset, factor, column, whether the key is regular
  int size;            // M
  int pitch;
  int entries;
  int in_shared;  // whether a head's table fits into shared memory
};

// Arguments of all kernels.
struct Call {
  Operand q, k, v;
  Bias bias;
  const int* offsets;             // [B + 1], of packed sequences; null
  const int* key_lengths;         // [B]; null
  const unsigned char* key_mask;  // [B, N]; null
  const int* positions;           // [B, N] or [T], rows of the bias' matrix; null
  float* lse;                     // [tokens, H], natural logarithm
  float scale;                    // of the scores, times log2(e); not negative
  int batch, heads, length, head_dim;
  int causal;
  int stagger;  // CTA from which on as many begin later, see stagger()
};

// Both CTAs of a multiprocessor march in step, and do not multiply at the same time, unless one of
// them begins later. Those that follow keep the distance.
__device__ inline void stagger(const Call& call) {
  const int cta = static_cast<int>(blockIdx.x);
  if (call.stagger == 0 || cta < call.stagger || cta >= 2 * call.stagger) return;
  float wait = 1.0f;
#pragma unroll 1
  for (int i = 0; i < 300; ++i) wait = fmaf(wait, 0.5f, 0.5f);
  if (wait == 0) __trap();  // never: so that the loop is not dropped
}

// One sequence of the batch, and the rows of it that a CTA has. It is kept in shared memory: in
// registers it would be in the way of products.
struct Sequence {
  int number, head;
  long long first;  // token at which a packed one begins
  int tokens, keys;
  int first_row;  // of the CTA

  __device__ Sequence(const Call& call, int number, int head, int first_row)
      : number(number), head(head), first_row(first_row) {
    first = 0;
    tokens = keys = call.length;
    if (call.offsets != nullptr) {
      first = call.offsets[number];
      tokens = keys = call.offsets[number + 1] - static_cast<int>(first);
    }
    if (call.key_lengths != nullptr) keys = min(keys, call.key_lengths[number]);
  }
  __device__ int row_of_warp(int rows) const { return first_row + warp_index() * rows; }
  __device__ const __half* pointer(const Operand& operand, int token) const {
    return operand.data + number * operand.sequence + (first + token) * operand.token +
           head * operand.head;
  }
  // Of a value for each token, such as a position.
  __device__ long long at(const Call& call, int token) const {
    return (call.offsets != nullptr ? first : static_cast<long long>(number) * call.length) + token;
  }
  // Of a value for each token and head, such as the log-sum-exp.
  __device__ long long of_head(const Call& call, int token) const {
    return at(call, token) * call.heads + head;
  }
  __device__ int position(const Call& call, int token) const {
    return call.positions != nullptr ? call.positions[at(call, token)] : token;
  }
};

__device__ inline uint2 half_of(uint4 v, int half) {
  return half == 0 ? make_uint2(v.x, v.y) : make_uint2(v.z, v.w);
}

// 32 tokens of an operand in shared memory. A token's chunks of 16 bytes are permuted by swizzle(), so
// that the 8 lanes of a phase of an access take all 8 groups of banks: neighbours of a row when it is
// written; 8 tokens, of bits 0, 2 and 3, or 4 tokens, of bits 0 and 1, and two chunks, when it is
// read. A tile begins at a multiple of 128 bytes: addresses are put together by exclusive or.
template <int kDim>
struct ColumnTile {
  static_assert(kDim % 64 == 0, "swizzle() takes 8 chunks");
  static constexpr int kPitch = kDim * 2;  // bytes
  static constexpr int kBytes = kColumns * kPitch;

  __device__ static constexpr int swizzle(int token) {
    return (token & 1) + (token & 4) / 2 + ((token & 8) / 2 ^ (token & 2) * 2);
  }
  __device__ static constexpr unsigned offset(int token, int chunk) {
    return token * kPitch + (chunk ^ swizzle(token)) * 16;
  }
  // Of the scores each thread has 8 neighbouring columns: block j of 16 has 4 of each 8 tokens.
  __device__ static unsigned lane_offset_k() {
    const QuadPair at;
    return offset(at.n * 16 + at.low / 2 * 8 + at.high * 2 + at.low % 2, 0);
  }
  // Of block j, k = 8 octet..8 octet + 7: B with k contiguous.
  __device__ static uint4 read_k(unsigned lane, int j, int octet) {
    return load_shared((lane ^ octet % 8 * 16 ^ swizzle(j * 4) * 16) + octet / 8 * 128 +
                       j * 4 * kPitch);
  }
  __device__ static unsigned lane_offset_n() {
    const QuadPair at;
    return offset(at.low, at.high * 2 + at.n);
  }
  // k = tokens 8 octet + 4 quad..+ 3, blocks 2 pair and 2 pair + 1 of 16: B with n contiguous.
  __device__ static uint4 read_n(unsigned lane, int octet, int quad, int pair) {
    const int token = octet * 8 + quad * 4;
    return load_shared((lane ^ pair % 2 * 64 ^ swizzle(token) * 16) + pair / 2 * 128 +
                       token * kPitch);
  }
};

// A number that ptxas keeps, and does not compute again wherever it is used.
__device__ inline unsigned keep(unsigned value) {
  return __shfl_sync(kFullWarp, value, lane_index());
}

// The column of an output's register: block b = 2 pair + e, register i.
__device__ inline int output_column(int b, int i) {
  const QuadPair at;
  return b / 2 * 32 + i / 4 * 16 + at.n * 8 + b % 2 * 4 + (at.low & 2) + (i & 1);
}

// Rows of a warp, as operand A with k contiguous: [block][k / 4].
template <int kDim, int kBlocks>
using RowFragments = uint2[kBlocks][kDim / 4];
// Of 32 columns; register i of block (m, j) is row i & 2 and one of 8 columns, see element().
template <int kBlocks>
using Scores = float[kBlocks][2][8];
template <int kDim, int kBlocks>
using Output = float[kBlocks][kDim / 16][8];

// A thread's rows are r = 0..2 kBlocks - 1, its columns e = 0..7.
__device__ inline int row_in_warp(int r) {
  const QuadPair at;
  return r / 2 * 16 + at.m * 8 + at.high * 4 + r % 2 * 2 + (at.low & 1);
}
__device__ inline int first_column() {
  const QuadPair at;
  return at.n * 16 + (at.low & 2) * 4;
}
template <int kBlocks>
__device__ inline float& element(Scores<kBlocks>& scores, int r, int e) {
  return scores[r / 2][e / 4][(e & 2) * 2 + r % 2 * 2 + (e & 1)];
}

// Rows of an operand straight from global memory; row_pointer(row in the warp) is valid for each.
template <int kDim, int kBlocks, class RowPointer>
__device__ inline void load_rows(RowFragments<kDim, kBlocks>& rows, int head_dim,
                                 RowPointer row_pointer) {
  const QuadPair at;
#pragma unroll
  for (int m = 0; m < kBlocks; ++m) {
    const __half* const row = row_pointer(m * 16 + at.m * 8 + at.high * 4 + at.low);
#pragma unroll
    for (int chunk = 0; chunk < kDim / kChunk; ++chunk) {
      uint4 v = make_uint4(0, 0, 0, 0);
      if (chunk * kChunk < head_dim) v = *reinterpret_cast<const uint4*>(row + chunk * kChunk);
      rows[m][2 * chunk] = make_uint2(v.x, v.y);
      rows[m][2 * chunk + 1] = make_uint2(v.z, v.w);
    }
  }
}

// Rows of a warp in shared memory, where registers do not suffice.
template <int kDim>
struct SharedRows {
  static constexpr int kPitch = (kDim + kChunk) * 2;
  unsigned lane;

  __device__ SharedRows(unsigned base) {
    const QuadPair at;
    lane = keep(base + (at.m * 8 + at.high * 4 + at.low) * kPitch);
  }
};

// A warp's rows, in registers or in shared memory: `base` is the warp's own there.
template <int kDim, int kBlocks, bool kShared>
struct RowHolder {
  static constexpr int kBytes = 0;
  RowFragments<kDim, kBlocks> rows;

  template <class RowPointer>
  __device__ RowHolder(unsigned, int head_dim, RowPointer row_pointer) {
    load_rows<kDim, kBlocks>(rows, head_dim, row_pointer);
  }
};

template <int kDim, int kBlocks>
struct RowHolder<kDim, kBlocks, true> {
  static constexpr int kBytes = kBlocks * 16 * SharedRows<kDim>::kPitch;
  SharedRows<kDim> rows;

  template <class RowPointer>
  __device__ RowHolder(unsigned base, int head_dim, RowPointer row_pointer) : rows(base) {
    constexpr int kChunks = kDim / kChunk;
#pragma unroll 4
    for (int i = lane_index(); i < kBlocks * 16 * kChunks; i += 32) {
      const int row = i / kChunks, chunk = i % kChunks;
      uint4 v = make_uint4(0, 0, 0, 0);
      if (chunk * kChunk < head_dim) {
        v = *reinterpret_cast<const uint4*>(row_pointer(row) + chunk * kChunk);
      }
      store_shared(base + row * rows.kPitch + chunk * 16, v);
    }
    __syncwarp();
  }
};

// Eight k of a row of block m.
template <int kBlocks, int kQuads>
__device__ inline uint4 read_row(const uint2 (&rows)[kBlocks][kQuads], int m, int octet) {
  const uint2 low = rows[m][2 * octet], high = rows[m][2 * octet + 1];
  return make_uint4(low.x, low.y, high.x, high.y);
}
template <int kDim>
__device__ inline uint4 read_row(const SharedRows<kDim>& rows, int m, int octet) {
  return load_shared(rows.lane + m * 16 * rows.kPitch + octet * 16);
}

// scores += rows columns^T; between(octet) is called behind the products of 8 k each.
template <int kDim, int kBlocks, class Rows, class Between>
__device__ inline void multiply_scores(Scores<kBlocks>& scores, const Rows& rows, unsigned columns,
                                       Between between) {
  using Tile = ColumnTile<kDim>;
  uint4 b[2][2];
#pragma unroll
  for (int j = 0; j < 2; ++j) b[0][j] = Tile::read_k(columns, j, 0);
#pragma unroll
  for (int octet = 0; octet < kDim / 8; ++octet) {
    if (octet + 1 < kDim / 8) {
#pragma unroll
      for (int j = 0; j < 2; ++j) b[(octet + 1) % 2][j] = Tile::read_k(columns, j, octet + 1);
    }
    uint4 a[kBlocks];
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) a[m] = read_row(rows, m, octet);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint2 column = half_of(b[octet % 2][j], half);
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) {
          mma<Major::kK, Major::kK>(scores[m][j], half_of(a[m], half), column);
        }
      }
    }
    between(octet);
  }
}

// Weights of a warp's rows for 32 columns, between the two products: 64 bytes a row. A chunk of 8 is
// put where neither writing nor reading meets a bank conflict.
template <int kBlocks>
struct WeightTile {
  static constexpr int kBytes = kBlocks * 16 * 64;
  unsigned base, write_at, read_at;

  __device__ WeightTile(unsigned base) : base(base) {
    const QuadPair at;
    write_at = keep(base + offset(row_in_warp(0), first_column() / kChunk));
    read_at = keep(base + offset(at.m * 8 + at.high * 4 + at.low, 0));
  }
  __device__ static unsigned offset(int row, int chunk) {
    return row * 64 + (chunk ^ ((row & 2) / 2 + (row & 8) / 4)) * 16;
  }
  __device__ void write(int r, uint4 v) const {
    store_shared((r % 2 == 0 ? write_at : (write_at ^ 16) + 128) + r / 2 * 1024, v);
  }
  // Operand A with k contiguous.
  __device__ uint4 read(int m, int octet) const {
    return load_shared((read_at ^ octet * 16) + m * 1024);
  }
};

__device__ inline unsigned pack_halves(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&both);
}

// Rounds to half precision; the warp synchronises before it reads.
template <int kBlocks>
__device__ inline void write_weights(const WeightTile<kBlocks>& tile, Scores<kBlocks>& scores) {
#pragma unroll
  for (int r = 0; r < 2 * kBlocks; ++r) {
    uint4 v;
    v.x = pack_halves(element<kBlocks>(scores, r, 0), element<kBlocks>(scores, r, 1));
    v.y = pack_halves(element<kBlocks>(scores, r, 2), element<kBlocks>(scores, r, 3));
    v.z = pack_halves(element<kBlocks>(scores, r, 4), element<kBlocks>(scores, r, 5));
    v.w = pack_halves(element<kBlocks>(scores, r, 6), element<kBlocks>(scores, r, 7));
    tile.write(r, v);
  }
}

// output += weights columns
template <int kDim, int kBlocks>
__device__ inline void multiply_output(Output<kDim, kBlocks>& output,
                                       const WeightTile<kBlocks>& weights, unsigned columns) {
#pragma unroll
  for (int octet = 0; octet < kColumns / 8; ++octet) {
    uint4 a[kBlocks];
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) a[m] = weights.read(m, octet);
#pragma unroll
    for (int quad = 0; quad < 2; ++quad) {
#pragma unroll
      for (int pair = 0; pair < kDim / 32; ++pair) {
        const uint4 v = ColumnTile<kDim>::read_n(columns, octet, quad, pair);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
#pragma unroll
          for (int m = 0; m < kBlocks; ++m) {
            mma<Major::kK, Major::kMN>(output[m][2 * pair + e], half_of(a[m], quad),
                                       half_of(v, e));
          }
        }
      }
    }
  }
}

// How a CTA moves column tiles: global memory to registers to shared memory, 16 bytes at a time.
template <int kDim, int kThreads>
struct Mover {
  static constexpr int kChunks = kDim / kChunk;
  static constexpr int kTokens = kThreads / kChunks;  // that the CTA moves at once
  static constexpr int kMoves = kColumns / kTokens;
  static_assert(kMoves * kTokens == kColumns, "every thread moves as much");
  int token, column;  // the first this thread moves
  unsigned offset;    // of its place in a tile
  bool inside;        // column is within the head dim; tiles are zeroed behind it

  __device__ Mover(int head_dim) {
    token = threadIdx.x / kChunks;
    column = threadIdx.x % kChunks * kChunk;
    inside = column < head_dim;
    offset = keep(ColumnTile<kDim>::offset(token, column / kChunk));
    token = keep(token);
  }
  __device__ unsigned place(unsigned tile, int i) const {
    using Tile = ColumnTile<kDim>;
    static_assert(Tile::swizzle(kTokens) >= 0 && (kTokens & (kTokens - 1)) == 0, "bits do not mix");
    return ((tile + offset) ^ Tile::swizzle(i * kTokens) * 16) + i * kTokens * Tile::kPitch;
  }
  // Of this thread's chunk of the first token. Chunks behind the head dim are not stored.
  __device__ const char* source(const Sequence& sequence, const Operand& operand) const {
    return reinterpret_cast<const char*>(sequence.pointer(operand, 0) + (inside ? column : 0));
  }
  // Tokens behind the last repeat it.
  __device__ void load(uint4 (&moved)[kMoves], const char* source, const Operand& operand,
                       int first, int last) const {
#pragma unroll
    for (int i = 0; i < kMoves; ++i) {
      const unsigned row = min(first + token + i * kTokens, last);
      moved[i] = load_global(source + row * (static_cast<unsigned>(operand.token) * 2));
    }
  }
  __device__ void store(const uint4 (&moved)[kMoves], unsigned tile) const {
    if (!inside) return;
#pragma unroll
    for (int i = 0; i < kMoves; ++i) {
      store_shared(place(tile, i), moved[i]);
    }
  }
  // Behind the head dim of a tile, where nothing is ever stored.
  __device__ void clear(unsigned tile) const {
    if (inside) return;
#pragma unroll
    for (int i = 0; i < kMoves; ++i) {
      store_shared(place(tile, i), make_uint4(0, 0, 0, 0));
    }
  }
};

__device__ inline float dot(uint4 a, uint4 b) {
  const unsigned left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 x = __half22float2(*reinterpret_cast<const __half2*>(&left[i]));
    const float2 y = __half22float2(*reinterpret_cast<const __half2*>(&right[i]));
    sum = fmaf(x.x, y.x, fmaf(x.y, y.y, sum));
  }
  return sum;
}

// log2 of a query's sum of exponentials, for the backward: infinite where it has no key, so that its
// weights are 0.
__device__ inline float log_sum(const Call& call, const Sequence& sequence, int query) {
  const float lse = call.lse[sequence.of_head(call, query)];
  return lse == -infinity() ? infinity() : lse * kLog2e;
}

// Over the four threads that share a row.
__device__ inline float sum_of_row(float v) {
  v += __shfl_xor_sync(kFullWarp, v, 2);
  return v + __shfl_xor_sync(kFullWarp, v, 8);
}
__device__ inline float max_of_row(float v) {
  v = fmaxf(v, __shfl_xor_sync(kFullWarp, v, 2));
  return fmaxf(v, __shfl_xor_sync(kFullWarp, v, 8));
}

// factor[r] * output, rounded, to the rows from first_row on; by way of the warp's own tile.
template <int kDim, int kBlocks>
__device__ inline void store_output(Output<kDim, kBlocks>& output,
                                    const float (&factor)[2 * kBlocks],
                                    const WeightTile<kBlocks>& tile,
                                    const Sequence& sequence, const Operand& to, int first_row,
                                    int head_dim) {
#pragma unroll
  for (int pair = 0; pair < kDim / 32; ++pair) {
    __syncwarp();
#pragma unroll
    for (int r = 0; r < 2 * kBlocks; ++r) {
#pragma unroll
      for (int quarter = 0; quarter < 4; ++quarter) {
        const int b = 2 * pair + quarter % 2, i = quarter / 2 * 4 + r % 2 * 2;
        const int column = output_column(b, i) - pair * 32;
        const unsigned at = tile.base + tile.offset(row_in_warp(r), column / kChunk) +
                            column % kChunk * 2;
        const float(&v)[8] = output[r / 2][b];
        const unsigned both = pack_halves(v[i] * factor[r], v[i + 1] * factor[r]);
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(both) : "memory");
      }
    }
    __syncwarp();
#pragma unroll
    for (int move = 0; move < 2 * kBlocks; ++move) {
      const int row = move * 8 + lane_index() / 4, chunk = lane_index() % 4;
      const int column = pair * 32 + chunk * kChunk;
      const uint4 v = load_shared(tile.base + tile.offset(row, chunk));
      if (first_row + row < sequence.tokens && column < head_dim) {
        __half* const at = const_cast<__half*>(sequence.pointer(to, first_row + row));
        *reinterpret_cast<uint4*>(at + column) = v;
      }
    }
  }
}
