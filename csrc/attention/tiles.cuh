// Tiles in shared memory: columns that a CTA walks over, rows of a warp, weights between products.
#pragma once

#include "attention/parts.cuh"
#include "common/memory.cuh"
#include "common/volta_mma.cuh"

// A number that ptxas keeps, and does not compute again wherever it is used.
__device__ inline unsigned keep(unsigned value) {
  return __shfl_sync(kFullWarp, value, lane_index());
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
};

// Weights of a warp's 16 or 32 rows for 32 columns, half precision, between two products: 64 bytes a
// row. A chunk of 8 is put where neither writing nor reading meets a bank conflict.
struct WeightTile {
  static constexpr int kRowBytes = 2 * kColumns;

  __device__ static constexpr unsigned offset(int row, int chunk) {
    return row * kRowBytes + (chunk ^ ((row & 2) / 2 + (row & 8) / 4)) * 16;
  }
};

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
  // Of keys: zeros in the place of those without a bit in `attended`. Their weights are 0, and 0 times
  // what is not finite is not 0.
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
  // Behind the head dim of a tile, where nothing is ever stored.
  __device__ void clear(unsigned tile) const {
    if (inside) return;
#pragma unroll
    for (int i = 0; i < kMoves; ++i) {
      store_shared(place(tile, i), make_uint4(0, 0, 0, 0));
    }
  }
};
