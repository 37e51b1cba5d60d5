// Products of bfloat16 pairs by the tiles of AMX: registers of 16 rows of 64 bytes.
#pragma once

#include "simd.h"

namespace vlmo {
namespace {

#if defined(__AMX_BF16__)

constexpr int kTileSide = 16;  // rows, and columns of 32 bits

// Completes all writes to memory: GCC's functions do not tell the compiler what tiles read.
inline void write_all(const void* memory) { asm volatile("" ::"r"(memory) : "memory"); }

// Gives the calling thread its tiles.
inline void begin_tiles() {
  struct alignas(64) {
    std::uint8_t palette, start_row, reserved[14];
    std::uint16_t row_bytes[16];
    std::uint8_t rows[16];
  } config{};
  config.palette = 1;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = 4 * kTileSide, config.rows[tile] = kTileSide;
  }
  write_all(&config);
  _tile_loadconfig(&config);
}

// AddressSanitizer does not see what tiles read and write: its builds also read these bytes.
inline void check_tile([[maybe_unused]] const float* tile, [[maybe_unused]] std::int64_t stride) {
#if defined(__SANITIZE_ADDRESS__)
  for (int i = 0; i < kTileSide * kTileSide; ++i) {
    (void)const_cast<const volatile float*>(tile)[i / kTileSide * stride + i % kTileSide];
  }
#endif
}

// Adds the product of two tiles of rows of a and `wide` tiles of columns of b to tiles 0 to 3. All
// loads of a step come first: between products they take twice as long.
template <int wide>
inline void accumulate_tiles(int depth, const float* a, std::int64_t lda, const float* b,
                             std::int64_t ldb) {
  for (int k = 0; k < depth; k += kTileSide) {
    for (int i = 0; i < 2; ++i) check_tile(a + i * kTileSide * lda + k, lda);
    for (int i = 0; i < wide; ++i) check_tile(b + k * ldb + i * kTileSide, ldb);
    _tile_loadd(4, a + k, 4 * lda);
    _tile_loadd(5, a + kTileSide * lda + k, 4 * lda);
    _tile_loadd(6, b + k * ldb, 4 * ldb);
    if constexpr (wide == 2) _tile_loadd(7, b + k * ldb + kTileSide, 4 * ldb);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (wide == 2) {
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
}

template <int wide>
inline void store_tiles(float* to, std::int64_t stride) {
  for (int i = 0; i < wide; ++i) {
    check_tile(to + i * kTileSide, stride);
    check_tile(to + kTileSide * stride + i * kTileSide, stride);
  }
  _tile_stored(0, to, 4 * stride);
  _tile_stored(2, to + kTileSide * stride, 4 * stride);
  if constexpr (wide == 2) {
    _tile_stored(1, to + kTileSide, 4 * stride);
    _tile_stored(3, to + kTileSide * stride + kTileSide, 4 * stride);
  }
}

template <int wide, class Use>
inline void multiply_columns_of_tiles(int rows, int depth, const float* a, std::int64_t lda,
                                      const float* b, std::int64_t ldb, int column, Use&& use) {
  for (int row = 0; row < rows; row += 2 * kTileSide) {
    constexpr int part = 8;  // rows that the caller uses at a time
    Floats sums[2 * kTileSide / part][part][wide];
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    accumulate_tiles<wide>(depth, a + row * lda, lda, b, ldb);
    store_tiles<wide>(reinterpret_cast<float*>(sums), wide * kTileSide);
    for (int i = 0; i < 2 * kTileSide / part; ++i) use(row + i * part, column, sums[i]);
  }
}

template <int wide>
inline void add_columns_of_tiles(int rows, int depth, const float* a, std::int64_t lda,
                                 const float* b, std::int64_t ldb, float* c, std::int64_t ldc) {
  for (int row = 0; row < rows; row += 2 * kTileSide) {
    float* at = c + row * ldc;
    _tile_loadd(0, at, 4 * ldc);
    _tile_loadd(2, at + kTileSide * ldc, 4 * ldc);
    if constexpr (wide == 2) {
      _tile_loadd(1, at + kTileSide, 4 * ldc);
      _tile_loadd(3, at + kTileSide * ldc + kTileSide, 4 * ldc);
    }
    accumulate_tiles<wide>(depth, a + row * lda, lda, b, ldb);
    store_tiles<wide>(at, ldc);
  }
}

// Calls use(row, column, sums) for blocks of the product of a [rows, depth] and b [depth, columns].
//
// Buffers of a hold a multiple of 32 rows, and both operands end with zeros up to a multiple of 16
// units of the summed dimension. columns is a multiple of 16.
template <class Use>
inline void multiply_tiles(int rows, int columns, int depth, const float* a, std::int64_t lda,
                           const float* b, std::int64_t ldb, Use&& use) {
  write_all(b);
  int column = 0;
  for (; column + 2 * kTileSide <= columns; column += 2 * kTileSide) {
    multiply_columns_of_tiles<2>(rows, depth, a, lda, b + column, ldb, column, use);
  }
  if (column < columns) {
    multiply_columns_of_tiles<1>(rows, depth, a, lda, b + column, ldb, column, use);
  }
}

// Adds the product to c.
inline void add_product_of_tiles(int rows, int columns, int depth, const float* a,
                                 std::int64_t lda, const float* b, std::int64_t ldb, float* c,
                                 std::int64_t ldc) {
  write_all(b);
  int column = 0;
  for (; column + 2 * kTileSide <= columns; column += 2 * kTileSide) {
    add_columns_of_tiles<2>(rows, depth, a, lda, b + column, ldb, c + column, ldc);
  }
  if (column < columns) {
    add_columns_of_tiles<1>(rows, depth, a, lda, b + column, ldb, c + column, ldc);
  }
}

#endif

}  // namespace
}  // namespace vlmo
