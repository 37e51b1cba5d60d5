// Tiles in shared memory: columns that a CTA iterates over, and weights between two products.
#pragma once

#include "attention/parts.cuh"
#include "common/memory.cuh"
#include "common/volta_mma.cuh"

// A value that ptxas keeps in a register instead of rematerialising it at each use.
__device__ inline unsigned keep(unsigned value) {
  return __shfl_sync(kFullWarp, value, lane_index());
}

// 32 tokens of an operand in shared memory. swizzle() permutes a token's 16-byte chunks so that the
// 8 lanes of one phase of an access cover all 8 groups of banks. On a write, these lanes access
// neighbouring chunks of a row; on a read, 8 tokens that differ in bits 0, 2 and 3, or two chunks
// of 4 tokens that differ in bits 0 and 1. A tile begins at a multiple of 128 bytes, so that
// addresses can be combined by exclusive or.
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
};

// Weights of a warp's 16 or 32 rows for 32 columns, in half precision, between two products: 64
// bytes per row. Chunks of 8 are placed so that neither writes nor reads have bank conflicts.
struct WeightTile {
  static constexpr int kRowBytes = 2 * kColumns;

  __device__ static constexpr unsigned offset(int row, int chunk) {
    return row * kRowBytes + (chunk ^ ((row & 2) / 2 + (row & 8) / 4)) * 16;
  }
};

// Moves column tiles from global memory through registers to shared memory, 16 bytes at a time.
template <int kDim, int kThreads>
struct Mover {
  static constexpr int kChunks = kDim / kChunk;
  static constexpr int kTokens = kThreads / kChunks;  // tokens that the CTA moves at once
  static constexpr int kMoves = kColumns / kTokens;
  static_assert(kMoves * kTokens == kColumns, "every thread moves as much");
  int token, column;  // the first ones that this thread moves
  unsigned offset;    // of their address in a tile
  bool inside;        // column is within the head dim; the rest of a tile is zeroed

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
  // Address of this thread's chunk of the first token. Chunks past the head dim are not stored.
  __device__ const char* source(const Sequence& sequence, const Operand& operand) const {
    return reinterpret_cast<const char*>(sequence.pointer(operand, 0) + (inside ? column : 0));
  }
  // Tokens past the last one repeat it.
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
  // Stores keys or values, with zeros for keys without a bit in `attended`: their weights are 0,
  // but 0 times infinity or NaN is NaN.
  __device__ void store_keys(const uint4 (&moved)[kMoves], unsigned tile, unsigned attended) const {
    store(moved, tile);
    if (attended == kFullWarp || !inside) return;
#pragma unroll 1
    for (int i = 0; i < kMoves; ++i) {
      if (!(attended >> (token + i * kTokens) & 1)) {
        store_shared(place(tile, i), make_uint4(0, 0, 0, 0));
      }
    }
  }
  // Zeroes the columns of a tile past the head dim, where nothing is stored later.
  __device__ void clear(unsigned tile) const {
    if (inside) return;
#pragma unroll
    for (int i = 0; i < kMoves; ++i) {
      store_shared(place(tile, i), make_uint4(0, 0, 0, 0));
    }
  }
};
