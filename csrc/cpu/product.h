// Matrix products of small operands that lie in cache, by blocks of accumulators in registers.
#pragma once

#include "simd.h"
#include "tiles.h"

namespace vlmo {
namespace {

// How two operands are multiplied: the elements of a "unit" of 32 bits, and the sum of products.
struct SingleProduct {
  static constexpr int kElements = 1;
  static constexpr bool kTiles = false;
  // Calls of a thread before and after its products.
  static void begin() {}
  static void end() {}
  static Floats add(Floats sum, float a, Floats b) { return sum + splat(a) * b; }
};

#if defined(__AVX512BF16__)
// Pairs of bfloat16 that are adjacent in the summed dimension.
struct PairProduct {
  static constexpr int kElements = 2;
  static constexpr bool kTiles = false;
  static void begin() {}
  static void end() {}
  static Floats add(Floats sum, float a, Floats b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)splat(a), (__m512bh)b);
  }

  // Pairs of the elements of two vectors, rounded: `first` in the lower half of each lane.
  static Floats pair(Floats first, Floats second) {
    Words order{};  // 0, 16, 1, 17, ...
    for (int i = 0; i < kLanes; ++i) order[i] = i | (i + kLanes) << 16;
    return (Floats)_mm512_permutexvar_epi16((__m512i)order,
                                            (__m512i)_mm512_cvtne2ps_pbh(second, first));
  }
  static Halves narrow(Floats x) { return (Halves)_mm512_cvtneps_pbh(x); }
};
#endif

#if defined(__AMX_BF16__)
struct TileProduct : PairProduct {
  static constexpr bool kTiles = true;
  static void begin() { begin_tiles(); }
  static void end() { _tile_release(); }
};
#endif

// Accumulators: as many as the registers hold beside one row of b and an element of a.
constexpr int kMaxVectors = kLanes == 16 ? 4 : 3;
template <int vectors>
constexpr int kRows = kLanes == 16 ? (vectors <= 2 ? 12 : vectors == 3 ? 8 : 6)
                                   : (vectors == 1 ? 12 : vectors == 2 ? 6 : 4);
// Buffers of a and of the result have a multiple of this number of rows.
constexpr int kRowPadding = 24;

// Whether the units of a that are summed are adjacent, or those of one sum.
enum class Order { kSummedAdjacent, kRowsAdjacent };

// A function of its own with 16 registers: inlined, some of its sums and pointers lie on the stack.
#if defined(__AVX512F__)
#define VLMO_OWN_FUNCTION inline
#else
#define VLMO_OWN_FUNCTION __attribute__((noinline))
#endif

template <class Product, Order order, int rows, int vectors>
VLMO_OWN_FUNCTION void accumulate(int depth, const float* a, std::int64_t lda, const float* b,
                                  std::int64_t ldb, Floats (&result)[rows][vectors]) {
  Floats sums[rows][vectors] = {};
#pragma GCC unroll 2
  for (int k = 0; k < depth; ++k) {
    Floats row[vectors];
#pragma GCC unroll 16
    for (int n = 0; n < vectors; ++n) row[n] = load(b + n * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < rows; ++m) {
      const float factor = order == Order::kSummedAdjacent ? a[m * lda + k] : a[m];
#pragma GCC unroll 16
      for (int n = 0; n < vectors; ++n) sums[m][n] = Product::add(sums[m][n], factor, row[n]);
    }
    b += ldb;
    if (order == Order::kRowsAdjacent) a += lda;
  }
#pragma GCC unroll 16
  for (int m = 0; m < rows; ++m) {
#pragma GCC unroll 16
    for (int n = 0; n < vectors; ++n) result[m][n] = sums[m][n];
  }
}

template <class Product, Order order, int vectors, class Use>
inline void multiply_columns(int rows, int depth, const float* a, std::int64_t lda, const float* b,
                             std::int64_t ldb, int column, Use&& use) {
  constexpr int step = kRows<vectors>;
  for (int row = 0; row < rows; row += step) {
    Floats sums[step][vectors];
    const float* start = a + (order == Order::kSummedAdjacent ? row * lda : row);
    accumulate<Product, order>(depth, start, lda, b + column, ldb, sums);
    use(row, column, sums);
  }
}

// Calls use(row, column, sums) for blocks of the product of a [rows, depth] and b [depth, columns].
//
// a is transposed in memory if order is kRowsAdjacent. columns is a multiple of kLanes. Blocks may
// exceed `rows`, up to the next multiple of kRowPadding. Tiles need more: see multiply_tiles.
template <class Product, Order order, class Use>
inline void multiply(int rows, int columns, int depth, const float* a, std::int64_t lda,
                     const float* b, std::int64_t ldb, Use&& use) {
#if defined(__AMX_BF16__)
  static_assert(!Product::kTiles || order == Order::kSummedAdjacent);
  if constexpr (Product::kTiles) return multiply_tiles(rows, columns, depth, a, lda, b, ldb, use);
#endif
  const int vectors = columns / kLanes, groups = (vectors + kMaxVectors - 1) / kMaxVectors;
  for (int group = 0; group < groups; ++group) {
    const int first = group * vectors / groups, count = (group + 1) * vectors / groups - first;
    const int column = first * kLanes;
    switch (count) {
      case 1: multiply_columns<Product, order, 1>(rows, depth, a, lda, b, ldb, column, use); break;
      case 2: multiply_columns<Product, order, 2>(rows, depth, a, lda, b, ldb, column, use); break;
      case 3: multiply_columns<Product, order, 3>(rows, depth, a, lda, b, ldb, column, use); break;
      default:
        multiply_columns<Product, order, kMaxVectors>(rows, depth, a, lda, b, ldb, column, use);
    }
  }
}

template <int rows, int vectors>
inline void add_block(Floats (&sums)[rows][vectors], float* c, std::int64_t ldc) {
#pragma GCC unroll 16
  for (int m = 0; m < rows; ++m) {
    float* to = c + m * ldc;
#pragma GCC unroll 16
    for (int n = 0; n < vectors; ++n) store(to + n * kLanes, load(to + n * kLanes) + sums[m][n]);
  }
}

// Adds the product to c, with the sizes of multiply.
template <class Product, Order order>
inline void add_product(int rows, int columns, int depth, const float* a, std::int64_t lda,
                        const float* b, std::int64_t ldb, float* c, std::int64_t ldc) {
#if defined(__AMX_BF16__)
  if constexpr (Product::kTiles) {
    return add_product_of_tiles(rows, columns, depth, a, lda, b, ldb, c, ldc);
  }
#endif
  multiply<Product, order>(rows, columns, depth, a, lda, b, ldb,
                           [&](int row, int column, auto& sums) {
                             add_block(sums, c + row * ldc + column, ldc);
                           });
}

}  // namespace
}  // namespace vlmo
