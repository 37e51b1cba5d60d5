// Tile products alone, in the layouts that the library multiplies: C[rows, columns], of one tile.
#include "common/tile_product.cuh"

template <Major kA, Major kB>
__device__ inline void store(const Accumulators& acc, float* c, int rows, int columns) {
  for_each_octet<kA, kB>(acc, [&](int column) {
    return [=](int row, float(&v)[8]) {
      if (row >= rows || column >= columns) return;
      for (int i = 0; i < 8; ++i) c[row * columns + column + i] = v[i];
    };
  });
}

#define PRODUCT(name)                                                                    \
  extern "C" __global__ void __launch_bounds__(kThreads, 2)                              \
      name(const __half* a, const __half* b, float* c, int rows, int columns, int depth)

// a [rows, depth], b [columns, depth]
PRODUCT(k_by_k) {
  __shared__ __align__(16) char stages[kSharedBytes];
  Accumulators acc = {};
  multiply(acc, rows_of_k([&](int s) { return a + min(s, rows - 1) * depth; }, depth),
           rows_of_k([&](int s) { return b + min(column_in_row(s), columns - 1) * depth; }, depth),
           depth, stages);
  store<Major::kK, Major::kK>(acc, c, rows, columns);
}

// a [rows, depth], b [depth, columns]
PRODUCT(k_by_mn) {
  __shared__ __align__(16) char stages[kSharedBytes];
  Accumulators acc = {};
  multiply(acc, rows_of_k([&](int s) { return a + min(s, rows - 1) * depth; }, depth),
           columns_of_k(b, columns, columns, depth), depth, stages);
  store<Major::kK, Major::kMN>(acc, c, rows, columns);
}

// a [depth, rows], b [depth, columns]
PRODUCT(mn_by_mn) {
  __shared__ __align__(16) char stages[kSharedBytes];
  Accumulators acc = {};
  multiply(acc, columns_of_k(a, rows, rows, depth), columns_of_k(b, columns, columns, depth),
           depth, stages);
  store<Major::kMN, Major::kMN>(acc, c, rows, columns);
}
