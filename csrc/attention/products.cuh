// Products of a warp's rows with column tiles, in two layouts.
//
// The quad pairs of a warp are stacked 2 x 2 (Square), 16 x 16 results per instruction, or placed
// side by side (Line), 8 x 32 results. An element of operand B that is read from shared memory is
// used by half of the quad pairs in the first layout, and by one in the second, which takes half as
// many accesses and twice as many registers for operand A. Line is therefore used where the rows
// fit into registers that way, and for outputs that are not rescaled.
#pragma once

#include "attention/tiles.cuh"
#include "common/activation.cuh"

__device__ inline int quad_pair() { return lane_index() / 4 % 4; }

__device__ inline uint2 half_of(uint4 v, int half) {
  return half == 0 ? make_uint2(v.x, v.y) : make_uint2(v.z, v.w);
}

// Scores of a warp's kWarpRows rows and 32 columns. A thread holds kThreadRows rows, and in each
// row the same kThreadColumns neighbouring columns.
template <int kBlocks>
struct SquareScores {
  static constexpr int kWarpRows = 16 * kBlocks, kThreadRows = 2 * kBlocks, kThreadColumns = 8;
  static constexpr int kOperands = kBlocks;  // A operands for all rows
  float v[kBlocks][2][8];

  __device__ float& at(int r, int e) {
    return v[r / 2][e / 4][(e & 2) * 2 + r % 2 * 2 + (e & 1)];
  }
  __device__ static int row(int r) {
    const QuadPair at;
    return r / 2 * 16 + at.m * 8 + at.high * 4 + r % 2 * 2 + (at.low & 1);
  }
  // The row that a thread holds of operand m.
  __device__ static int operand_row(int m) {
    const QuadPair at;
    return m * 16 + at.m * 8 + at.high * 4 + at.low;
  }
  __device__ static int first_column() {
    const QuadPair at;
    return at.n * 16 + (at.low & 2) * 4;
  }
  // Reductions over the four threads that share a row.
  __device__ static float sum_of_row(float x) {
    x += __shfl_xor_sync(kFullWarp, x, 2);
    return x + __shfl_xor_sync(kFullWarp, x, 8);
  }
  __device__ static float max_of_row(float x) {
    x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, 2));
    return fmaxf(x, __shfl_xor_sync(kFullWarp, x, 8));
  }
};

struct LineScores {
  static constexpr int kWarpRows = 16, kThreadRows = 4, kThreadColumns = 4;
  static constexpr int kOperands = 2;
  float v[2][8];

  __device__ float& at(int r, int e) { return v[r / 2][(e & 2) * 2 + r % 2 * 2 + (e & 1)]; }
  __device__ static int row(int r) {
    const QuadPair at;
    return r / 2 * 8 + at.high * 4 + r % 2 * 2 + (at.low & 1);
  }
  __device__ static int operand_row(int m) {
    const QuadPair at;
    return m * 8 + at.high * 4 + at.low;
  }
  __device__ static int first_column() {
    const QuadPair at;
    return quad_pair() * 8 + (at.low & 2) * 2;
  }
  // Reduction over the eight threads that share a row.
  __device__ static float sum_of_row(float x) {
    for (int distance = 2; distance <= 8; distance *= 2) {
      x += __shfl_xor_sync(kFullWarp, x, distance);
    }
    return x;
  }
};

// A warp's rows as operand A with k contiguous, [block][octet of k], in registers.
template <int kDim, class Scores>
struct RegisterRows {
  static constexpr int kCount = Scores::kOperands, kSharedBytes = 0;
  uint4 v[kCount][kDim / 8];

  // From global memory; zeros where row_pointer(row of the warp) is null.
  template <class RowPointer>
  __device__ RegisterRows(unsigned, int head_dim, RowPointer row_pointer) {
#pragma unroll
    for (int m = 0; m < kCount; ++m) {
      const __half* const row = row_pointer(row_of(m));
#pragma unroll
      for (int octet = 0; octet < kDim / 8; ++octet) {
        v[m][octet] = make_uint4(0, 0, 0, 0);
        if (row != nullptr && octet * 8 < head_dim) {
          v[m][octet] = *reinterpret_cast<const uint4*>(row + octet * 8);
        }
      }
    }
  }
  __device__ static int row_of(int m) { return Scores::operand_row(m); }
  __device__ uint4 read(int m, int octet) const { return v[m][octet]; }
};

// The same in shared memory, for SquareScores<1>, where there are too few registers; padded to
// avoid bank conflicts.
template <int kDim>
struct SharedRows {
  static constexpr int kCount = 1, kPitch = (kDim + kChunk) * 2, kSharedBytes = 16 * kPitch;
  unsigned lane;

  template <class RowPointer>
  __device__ SharedRows(unsigned base, int head_dim, RowPointer row_pointer) {
    constexpr int kChunks = kDim / kChunk;
#pragma unroll 4
    for (int i = lane_index(); i < 16 * kChunks; i += 32) {
      const int row = i / kChunks, chunk = i % kChunks;
      const __half* const from = row_pointer(row);
      uint4 v = make_uint4(0, 0, 0, 0);
      if (from != nullptr && chunk * kChunk < head_dim) {
        v = *reinterpret_cast<const uint4*>(from + chunk * kChunk);
      }
      store_shared(base + row * kPitch + chunk * 16, v);
    }
    __syncwarp();
    lane = base + row_of(0) * kPitch;
  }
  __device__ static int row_of(int m) { return SquareScores<1>::operand_row(m); }
  __device__ uint4 read(int, int octet) const { return load_shared(lane + octet * 16); }
};

// Addresses of a thread's columns in a column tile, as operand B with k contiguous.
template <int kDim, class Scores>
struct ColumnReader;

// Block j of 16 columns takes 4 of every 8 tokens, so that a thread's columns are neighbours.
template <int kDim, int kBlocks>
struct ColumnReader<kDim, SquareScores<kBlocks>> {
  static constexpr int kCount = 2;
  using Tile = ColumnTile<kDim>;
  __device__ static unsigned lane_offset() {
    const QuadPair at;
    return Tile::offset(at.n * 16 + at.low / 2 * 8 + at.high * 2 + at.low % 2, 0);
  }
  __device__ static uint4 read(unsigned lane, int j, int octet) {
    const int chunk = octet % 8 ^ Tile::swizzle(j * 4);
    return load_shared((lane ^ chunk * 16) + octet / 8 * 128 + j * 4 * Tile::kPitch);
  }
};

template <int kDim>
struct ColumnReader<kDim, LineScores> {
  static constexpr int kCount = 1;
  using Tile = ColumnTile<kDim>;
  __device__ static unsigned lane_offset() {
    const QuadPair at;
    return Tile::offset(quad_pair() * 8 + at.low / 2 * 4 + at.high * 2 + at.low % 2, 0);
  }
  __device__ static uint4 read(unsigned lane, int, int octet) {
    return load_shared((lane ^ octet % 8 * 16) + octet / 8 * 128);
  }
};

template <int kBlocks>
__device__ inline float (&block_of(SquareScores<kBlocks>& scores, int m, int j))[8] {
  return scores.v[m][j];
}
__device__ inline float (&block_of(LineScores& scores, int m, int))[8] { return scores.v[m]; }

// scores += rows columns^T; `columns` is the address of the tile plus the reader's lane offset.
// between(octet) is called after the products of each 8 k.
template <int kDim, class Scores, class Rows, class Between>
__device__ inline void multiply_scores(Scores& scores, const Rows& rows, unsigned columns,
                                       Between between) {
  using Reader = ColumnReader<kDim, Scores>;
  uint4 b[2][Reader::kCount];
#pragma unroll
  for (int j = 0; j < Reader::kCount; ++j) b[0][j] = Reader::read(columns, j, 0);
#pragma unroll
  for (int octet = 0; octet < kDim / 8; ++octet) {
    if (octet + 1 < kDim / 8) {
#pragma unroll
      for (int j = 0; j < Reader::kCount; ++j) {
        b[(octet + 1) % 2][j] = Reader::read(columns, j, octet + 1);
      }
    }
    uint4 a[Rows::kCount];
#pragma unroll
    for (int m = 0; m < Rows::kCount; ++m) a[m] = rows.read(m, octet);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int j = 0; j < Reader::kCount; ++j) {
        const uint2 column = half_of(b[octet % 2][j], half);
#pragma unroll
        for (int m = 0; m < Rows::kCount; ++m) {
          mma<Major::kK, Major::kK>(block_of(scores, m, j), half_of(a[m], half), column);
        }
      }
    }
    between(octet);
  }
}

__device__ inline unsigned pack_halves(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&both);
}

// Rounds weights and stores them into a WeightTile, or into one that begins `behind` bytes after
// it. The warp synchronises before it reads them.
template <class Scores>
struct WeightWriter {
  unsigned lane;

  __device__ WeightWriter(unsigned base) {
    const int column = Scores::first_column();
    lane = keep(base + WeightTile::offset(Scores::row(0), column / kChunk) + column % kChunk * 2);
  }
  template <int kBlocks>
  __device__ void write(SquareScores<kBlocks>& scores, int behind = 0) const {
#pragma unroll
    for (int r = 0; r < 2 * kBlocks; ++r) {
      store_shared(place(r % 2 * 2) + r / 2 * 16 * WeightTile::kRowBytes + behind,
                   make_uint4(pack_halves(scores.at(r, 0), scores.at(r, 1)),
                              pack_halves(scores.at(r, 2), scores.at(r, 3)),
                              pack_halves(scores.at(r, 4), scores.at(r, 5)),
                              pack_halves(scores.at(r, 6), scores.at(r, 7))));
    }
  }
  __device__ void write(LineScores& scores, int behind = 0) const {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      asm volatile("st.shared.v2.u32 [%0], {%1,%2};" ::"r"(place(r / 2 * 8 + r % 2 * 2) + behind),
                   "r"(pack_halves(scores.at(r, 0), scores.at(r, 1))),
                   "r"(pack_halves(scores.at(r, 2), scores.at(r, 3)))
                   : "memory");
    }
  }
  // Address of the row that is `rows` after the thread's first row, whose bits 1 and 3 are 0.
  __device__ unsigned place(int rows) const {
    return (lane ^ WeightTile::offset(rows, 0) % WeightTile::kRowBytes) +
           rows * WeightTile::kRowBytes;
  }
};

// Outputs of a warp, [kWarpRows, kDim]: weights times column tiles.
template <int kDim, int kBlocks>
struct SquareOutput {
  static constexpr int kCount = kBlocks, kDims = kDim, kWarpRows = 16 * kBlocks;
  static constexpr int kThreadRows = 2 * kBlocks, kPairs = kDim / 32;
  float v[kBlocks][kDim / 16][8];

  __device__ float (&block(int m, int pair, int e))[8] { return v[m][2 * pair + e]; }
  __device__ static int row(int r) { return SquareScores<kBlocks>::row(r); }
  // The column of register i of block(m, pair, e).
  __device__ static int column(int pair, int e, int i) {
    const QuadPair at;
    return pair * 32 + i / 4 * 16 + at.n * 8 + e * 4 + (at.low & 2) + (i & 1);
  }
  // A thread's addresses of weights, operand A with k contiguous, and of columns, operand B with n
  // contiguous.
  __device__ static unsigned weight_offset() {
    const QuadPair at;
    return WeightTile::offset(at.m * 8 + at.high * 4 + at.low, 0);
  }
  __device__ static uint4 read_weights(unsigned lane, int m, int octet) {
    return load_shared((lane ^ octet * 16) + m * 16 * WeightTile::kRowBytes);
  }
  __device__ static unsigned column_offset() {
    const QuadPair at;
    return ColumnTile<kDim>::offset(at.low, at.high * 2 + at.n);
  }
  __device__ static uint4 read_columns(unsigned lane, int token, int pair) {
    using Tile = ColumnTile<kDim>;
    return load_shared((lane ^ pair % 2 * 64 ^ Tile::swizzle(token) * 16) + pair / 2 * 128 +
                       token * Tile::kPitch);
  }
};

template <int kDim>
struct LineOutput {
  static constexpr int kCount = 2, kDims = kDim, kWarpRows = 16, kThreadRows = 4;
  static constexpr int kPairs = kDim / 64;
  float v[2][kDim / 32][8];

  __device__ float (&block(int m, int pair, int e))[8] { return v[m][2 * pair + e]; }
  __device__ static int row(int r) { return LineScores::row(r); }
  __device__ static int column(int pair, int e, int i) {
    const QuadPair at;
    return pair * 64 + quad_pair() * 16 + i / 4 * 8 + e * 4 + (at.low & 2) + (i & 1);
  }
  __device__ static unsigned weight_offset() {
    const QuadPair at;
    return WeightTile::offset(at.high * 4 + at.low, 0);
  }
  __device__ static uint4 read_weights(unsigned lane, int m, int octet) {
    return load_shared((lane ^ octet * 16 ^ m * 32) + m * 8 * WeightTile::kRowBytes);
  }
  __device__ static unsigned column_offset() {
    const QuadPair at;
    return ColumnTile<kDim>::offset(at.low, quad_pair() * 2 + at.high);
  }
  __device__ static uint4 read_columns(unsigned lane, int token, int pair) {
    using Tile = ColumnTile<kDim>;
    return load_shared((lane ^ Tile::swizzle(token) * 16) + pair * 128 + token * Tile::kPitch);
  }
};

// output += weights columns; both addresses include the output's lane offsets.
template <class Output>
__device__ inline void multiply_output(Output& output, unsigned weights, unsigned columns) {
#pragma unroll
  for (int octet = 0; octet < kColumns / 8; ++octet) {
    uint4 a[Output::kCount];
#pragma unroll
    for (int m = 0; m < Output::kCount; ++m) a[m] = Output::read_weights(weights, m, octet);
#pragma unroll
    for (int quad = 0; quad < 2; ++quad) {
#pragma unroll
      for (int pair = 0; pair < Output::kPairs; ++pair) {
        const uint4 b = Output::read_columns(columns, octet * 8 + quad * 4, pair);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
#pragma unroll
          for (int m = 0; m < Output::kCount; ++m) {
            mma<Major::kK, Major::kMN>(output.block(m, pair, e), half_of(a[m], quad),
                                       half_of(b, e));
          }
        }
      }
    }
  }
}

// Epilogue: stores factor[r] * output, rounded, to the warp's rows, through its weight tile at
// `tile`.
template <class Output>
__device__ inline void store_output(Output& output, const float (&factor)[Output::kThreadRows],
                                    unsigned tile, const Sequence& sequence, const Operand& to,
                                    int head_dim) {
  const int first_row = sequence.row_of_warp(Output::kWarpRows);
#pragma unroll
  for (int part = 0; part < Output::kDims / 32; ++part) {  // as many columns as the tile has
    __syncwarp();
#pragma unroll
    for (int r = 0; r < Output::kThreadRows; ++r) {
#pragma unroll
      for (int quarter = 0; quarter < 4; ++quarter) {
        const int e = quarter % 2, i = quarter / 2 * 4 + r % 2 * 2;
        const int pair = part * Output::kPairs / (Output::kDims / 32);
        const int column = Output::column(pair, e, i) - part * 32;
        const unsigned at = tile + WeightTile::offset(Output::row(r), column / kChunk % 4) +
                            column % kChunk * 2;
        const float(&v)[8] = output.block(r / 2, pair, e);
        const unsigned both = pack_halves(v[i] * factor[r], v[i + 1] * factor[r]);
        if (column < 0 || column >= 32) continue;
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(both) : "memory");
      }
    }
    __syncwarp();
#pragma unroll
    for (int move = 0; move < Output::kWarpRows / 8; ++move) {
      const int row = move * 8 + lane_index() / 4, chunk = lane_index() % 4;
      const int column = part * 32 + chunk * kChunk;
      const uint4 v = load_shared(tile + WeightTile::offset(row, chunk));
      if (first_row + row < sequence.tokens && column < head_dim) {
        __half* const at = const_cast<__half*>(sequence.pointer(to, first_row + row));
        *reinterpret_cast<uint4*>(at + column) = v;
      }
    }
  }
}

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
