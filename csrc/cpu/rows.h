// What moe_ffn does on the CPU beside matrix products, for one expert: normalisation, layer scale
// and residual, and their gradients, each in one pass over the rows.
#pragma once

#include <cstdint>

#include "elements.h"

namespace vlmo {

// [rows, columns] with adjacent columns; absent if data is null.
struct Matrix {
  void* data;
  Type type;
  std::int64_t row;  // stride in elements
};

// Which token each row of an expert is: index[row], or a run of each sequence.
struct Tokens {
  const std::int32_t* index;  // null for a run
  std::int64_t period, start, length;
};

// Vectors of `columns` are float32, or null. Matrices with "tokens" in their comment have a row for
// every token, the others one for each row of the expert.
struct RowsCall {
  std::int64_t rows, columns;
  Tokens tokens;
  Matrix x, residual, y, dy, dx;             // tokens
  Matrix normed, branch, d;                  // normed = norm(x); branch; a gradient
  const float *weight, *bias, *scale;        // [columns]
  const float* token_scale;                  // tokens
  float *mean, *deviation;                   // [rows]: mean (null for RMSNorm), 1 / deviation
  float eps;
};

// Rows `first` to `last`. The sums of gradients over these rows are added to two vectors.
using RowsKernel = void (*)(const RowsCall&, std::int64_t first, std::int64_t last, float* sums,
                            float* more_sums);

// The kernels of one instruction set.
struct RowsKernels {
  RowsKernel norm;             // normed, mean and deviation, from x
  RowsKernel norm_backward;    // dx, from d = dnormed and x; sums: dweight, dbias
  RowsKernel branch;           // y = residual + token_scale scale (branch + bias)
  RowsKernel branch_backward;  // d = dbranch, from dy; sums: of d, dscale
  RowsKernel column_sums;      // sums: of d
};

}  // namespace vlmo
