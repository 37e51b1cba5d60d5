// Products of float32 matrices on the CPU.
#pragma once

#include <cstdint>

namespace vlmo {

// c [rows, columns] = a b + bias. The elements of each row are adjacent, rows are `*_row` apart.
struct MatmulCall {
  const float* a;  // [rows, depth], or [depth, rows] if a_transposed
  const float* b;  // [depth, columns], or [columns, depth] if b_transposed
  float* c;
  const float* bias;  // [columns], or null
  bool a_transposed, b_transposed;
  std::int64_t a_row, b_row, c_row;
  std::int64_t rows, columns, depth;
};

// What one thread computes at a time: a block of c.
struct MatmulItem {
  std::int64_t first_row, last_row, first_column, last_column;
};

// The kernel of one instruction set. The sizes of an item are best multiples of these; scratch
// memory belongs to one thread and is aligned to 64 bytes.
struct MatmulKernels {
  std::int64_t row_step, column_step;
  std::int64_t (*scratch_bytes)(const MatmulCall&, const MatmulItem&);
  void (*compute)(const MatmulCall&, const MatmulItem&, void* scratch);
};

}  // namespace vlmo
