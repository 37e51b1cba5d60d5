// The product of float32 matrices for the instruction set VLMO_INSTRUCTIONS.
//
// An item's columns of b are copied to panels that lie in the L2 cache, for a part of the depth at
// a time. Rows of a are read in place, or, if they are not contiguous, copied as well.
//
// A part is also as long as a chain of additions gets: the error of a single chain grows with the
// depth, and at 3072 it is twice that of libraries that split it.
#include "matmul.h"

#include "product.h"

namespace vlmo {
namespace {

constexpr int kPanelVectors = 3;
constexpr int kPanel = kPanelVectors * kLanes;  // columns
constexpr int kTile = kRows<kPanelVectors>;     // rows
constexpr std::int64_t kDepth = 192;            // of panels at a time
constexpr std::int64_t kCopiedRows = 192;       // of a transposed a; a multiple of kTile
constexpr std::int64_t kAhead = 8;              // rows that are fetched before they are copied

// [depth, kPanel]: columns of b from `first` on, with zeros beyond `last`.
void copy_panel(float* to, const MatmulCall& call, std::int64_t first, std::int64_t last,
                std::int64_t start, std::int64_t depth) {
  const std::int64_t count = smaller(kPanel, last - first);
  if (!call.b_transposed) {
    for (std::int64_t k = 0; k < depth; ++k) {
      const float* from = call.b + (start + k) * call.b_row + first;
      float* row = to + k * kPanel;
      for (int n = 0; n < kPanel; n += 16) __builtin_prefetch(from + kAhead * call.b_row + n);
      if (count == kPanel) {
        for (int n = 0; n < kPanelVectors; ++n) store(row + n * kLanes, load(from + n * kLanes));
      } else {
        std::memcpy(row, from, 4 * count);
        std::memset(row + count, 0, 4 * (kPanel - count));
      }
    }
    return;
  }
  for (std::int64_t n = 0; n < kPanel; n += kLanes) {
    for (std::int64_t k = 0; k < depth; k += kLanes) {
      const std::int64_t width = smaller(kLanes, depth - k);
      Floats square[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        const float* from = call.b + (first + n + lane) * call.b_row + start + k;
        if (n + lane >= count) {
          square[lane] = Floats{};
        } else if (width == kLanes) {
          square[lane] = load(from);
        } else {
          square[lane] = Floats{};
          std::memcpy(&square[lane], from, 4 * width);
        }
      }
      transpose(square);
      for (int lane = 0; lane < width; ++lane) store(to + (k + lane) * kPanel + n, square[lane]);
    }
  }
}

// Computes or completes a tile of c, from rows of a that may be read up to the tile's end.
template <Order order>
void compute_tile(const MatmulCall& call, const float* a, std::int64_t a_row, const float* panel,
                  std::int64_t depth, bool begins, std::int64_t row, std::int64_t rows,
                  std::int64_t column, std::int64_t columns) {
  Floats sums[kTile][kPanelVectors];
  accumulate<SingleProduct, order>(static_cast<int>(depth), a, a_row, panel, kPanel, sums);
  const bool whole = columns >= kPanel;
  float* c = call.c + row * call.c_row + column;
#pragma GCC unroll 16
  for (int m = 0; m < kTile; ++m) {
    if (m >= rows) break;
    float* to = c + m * call.c_row;
    float edge[kPanel] = {};
    const float* before = begins ? call.bias : to;  // what the sums are added to
    if (begins && before != nullptr) before += column;
    if (!whole && before != nullptr) {
      std::memcpy(edge, before, 4 * columns);
      before = edge;
    }
#pragma GCC unroll 4
    for (int n = 0; n < kPanelVectors; ++n) {
      Floats x = sums[m][n];
      if (before != nullptr) x += load(before + n * kLanes);
      store((whole ? to : edge) + n * kLanes, x);
    }
    if (!whole) std::memcpy(to, edge, 4 * columns);
  }
}

std::int64_t panel_floats(const MatmulCall& call, const MatmulItem& item) {
  return smaller(kDepth, call.depth) *
         round_up(item.last_column - item.first_column, kPanel);
}

std::int64_t scratch_bytes(const MatmulCall& call, const MatmulItem& item) {
  return 4 * (panel_floats(call, item) + kDepth * (call.a_transposed ? kCopiedRows : kTile));
}

void compute(const MatmulCall& call, const MatmulItem& item, void* scratch) {
  float* panels = static_cast<float*>(scratch);
  float* copied = panels + panel_floats(call, item);
  for (std::int64_t start = 0; start < call.depth || start == 0; start += kDepth) {
    const std::int64_t depth = smaller(kDepth, call.depth - start);
    for (std::int64_t n = item.first_column; n < item.last_column; n += kPanel) {
      copy_panel(panels + (n - item.first_column) * depth, call, n, item.last_column, start, depth);
    }
    const std::int64_t step = call.a_transposed ? kCopiedRows : kTile;
    for (std::int64_t row = item.first_row; row < item.last_row; row += step) {
      const std::int64_t rows = smaller(step, item.last_row - row);
      const float* a = call.a + row * call.a_row + start;
      std::int64_t a_row = call.a_row;
      if (call.a_transposed) {
        for (std::int64_t k = 0; k < depth; ++k) {
          float* to = copied + k * kCopiedRows;
          const float* from = call.a + (start + k) * call.a_row + row;
          for (std::int64_t m = 0; m < rows; m += 16) {
            __builtin_prefetch(from + kAhead * call.a_row + m);
          }
          std::memcpy(to, from, 4 * rows);
          std::memset(to + rows, 0, 4 * (kCopiedRows - rows));
        }
      } else if (rows < kTile) {
        for (std::int64_t m = 0; m < kTile; ++m) {
          if (m < rows) {
            std::memcpy(copied + m * kDepth, a + m * call.a_row, 4 * depth);
          } else {
            std::memset(copied + m * kDepth, 0, 4 * depth);
          }
        }
        a = copied, a_row = kDepth;
      }
      for (std::int64_t n = item.first_column; n < item.last_column; n += kPanel) {
        const float* panel = panels + (n - item.first_column) * depth;
        for (std::int64_t m = 0; m < rows; m += kTile) {
          if (call.a_transposed) {
            compute_tile<Order::kRowsAdjacent>(call, copied + m, kCopiedRows, panel, depth,
                                               start == 0, row + m, rows - m, n,
                                               item.last_column - n);
          } else {
            compute_tile<Order::kSummedAdjacent>(call, a, a_row, panel, depth, start == 0, row,
                                                 rows, n, item.last_column - n);
          }
        }
      }
    }
  }
}

}  // namespace

namespace VLMO_INSTRUCTIONS {
extern const MatmulKernels matmul;
const MatmulKernels matmul{kTile, kPanel, scratch_bytes, compute};
}  // namespace VLMO_INSTRUCTIONS

}  // namespace vlmo
