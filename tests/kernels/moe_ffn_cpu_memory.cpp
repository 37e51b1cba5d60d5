// Calls the CPU kernels of moe_ffn with every matrix in an allocation of its exact size.
//
// Built with AddressSanitizer, it shows reads and writes outside of the matrices. Products are also
// compared with plain sums, and memory that is to be written is filled with NaN before.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "cpu/matmul.h"
#include "cpu/rows.h"

namespace vlmo::VLMO_INSTRUCTIONS {
extern const MatmulKernels matmul;
extern const RowsKernels rows;
}  // namespace vlmo::VLMO_INSTRUCTIONS

namespace {

using vlmo::Type;
using Integer = std::int64_t;

constexpr float kUnwritten = std::numeric_limits<float>::quiet_NaN();
std::mt19937 generator;

std::vector<float> numbers(Integer count) {
  std::vector<float> result(count);
  result.reserve(1);  // an address even without elements, as tensors of no depth may have
  for (float& x : result) x = std::uniform_real_distribution<float>(-1, 1)(generator);
  return result;
}

// Elements of a matrix whose rows are apart, without one after the last.
Integer extent(Integer rows, Integer columns, Integer stride) {
  return rows == 0 ? 0 : (rows - 1) * stride + columns;
}

struct Freed {
  void* memory;
  ~Freed() { std::free(memory); }
};

// ---- products ----

bool check_product(Integer rows, Integer columns, Integer depth, bool a_transposed,
                   bool b_transposed, bool with_bias, Integer gap) {
  const Integer a_columns = a_transposed ? rows : depth, a_rows = a_transposed ? depth : rows;
  const Integer b_columns = b_transposed ? depth : columns, b_rows = b_transposed ? columns : depth;
  const auto a = numbers(extent(a_rows, a_columns, a_columns + gap)),
             b = numbers(extent(b_rows, b_columns, b_columns + gap)), bias = numbers(columns);
  std::vector<float> c(extent(rows, columns, columns + gap), kUnwritten);
  vlmo::MatmulCall call{a.data(), b.data(), c.data(), with_bias ? bias.data() : nullptr,
                        a_transposed, b_transposed,
                        a_columns + gap, b_columns + gap, columns + gap,
                        rows, columns, depth};
  const auto& kernels = vlmo::VLMO_INSTRUCTIONS::matmul;
  const Integer height = 2 * kernels.row_step, width = 2 * kernels.column_step;
  for (Integer row = 0; row < rows; row += height) {
    for (Integer column = 0; column < columns; column += width) {
      const vlmo::MatmulItem item{row, std::min(row + height, rows), column,
                                  std::min(column + width, columns)};
      const Integer bytes = kernels.scratch_bytes(call, item);
      const Freed scratch{std::aligned_alloc(64, (bytes + 63) / 64 * 64)};
      std::memset(scratch.memory, 0xff, bytes);
      kernels.compute(call, item, scratch.memory);
    }
  }
  for (Integer i = 0; i < rows; ++i) {
    for (Integer j = 0; j < columns; ++j) {
      double sum = with_bias ? bias[j] : 0;
      for (Integer k = 0; k < depth; ++k) {
        sum += double(a[a_transposed ? k * call.a_row + i : i * call.a_row + k]) *
               b[b_transposed ? j * call.b_row + k : k * call.b_row + j];
      }
      const float found = c[i * call.c_row + j];
      if (!(std::fabs(found - sum) <= 1e-5 * (1 + depth))) return false;
    }
  }
  return true;
}

// ---- passes over rows ----

// A matrix of any type; its numbers are near 1, so that no pass meets a division by 0.
struct Owned {
  std::vector<float> wide;
  std::vector<std::uint16_t> narrow;
  vlmo::Matrix matrix;

  Owned(Type type, Integer rows, Integer columns) {
    const Integer stride = columns + 3, count = extent(rows, columns, stride);
    if (type == Type::kFloat32) {
      wide = numbers(count);
    } else {
      narrow.resize(count);
      const int one = type == Type::kBfloat16 ? 0x3f80 : 0x3c00;
      for (auto& x : narrow) x = static_cast<std::uint16_t>(one + generator() % 64);
    }
    matrix = {type == Type::kFloat32 ? static_cast<void*>(wide.data()) : narrow.data(), type,
              stride};
  }
};

void run_rows(Type type, Integer columns, bool run, bool all_given) {
  const Integer count = 70, tokens = 150;
  std::vector<std::int32_t> index(count);
  for (Integer i = 0; i < count; ++i) index[i] = static_cast<std::int32_t>((i * 7 + 3) % tokens);
  Owned x(type, tokens, columns), residual(type, tokens, columns), y(type, tokens, columns),
      dy(type, tokens, columns), dx(type, tokens, columns), normed(type, count, columns),
      branch(type, count, columns), d(type, count, columns);
  const auto weight = numbers(columns), bias = numbers(columns), scale = numbers(columns),
             token_scale = numbers(tokens);
  std::vector<float> mean(count), deviation(count), sums(columns), more_sums(columns);
  vlmo::RowsCall call{};
  call.rows = count, call.columns = columns, call.eps = 1e-5f;
  if (run) {
    call.tokens = {nullptr, 15, 8, 7};  // 10 sequences of 15 tokens, the last 7 of each
  } else {
    call.tokens = {index.data(), 0, 0, 0};
  }
  call.x = x.matrix, call.y = y.matrix, call.dy = dy.matrix;
  call.normed = normed.matrix, call.d = d.matrix, call.weight = weight.data();
  call.deviation = deviation.data();
  if (all_given) {
    call.residual = residual.matrix, call.dx = dx.matrix, call.branch = branch.matrix;
    call.bias = bias.data(), call.scale = scale.data(), call.token_scale = token_scale.data();
    call.mean = mean.data();
  }
  const auto& kernels = vlmo::VLMO_INSTRUCTIONS::rows;
  for (Integer first = 0; first < count; first += 64) {
    const Integer last = std::min<Integer>(first + 64, count);
    kernels.norm(call, first, last, nullptr, nullptr);
    kernels.norm_backward(call, first, last, sums.data(), more_sums.data());
    kernels.branch_backward(call, first, last, sums.data(), more_sums.data());
    kernels.column_sums(call, first, last, sums.data(), nullptr);
    vlmo::RowsCall forward = call;
    forward.branch = branch.matrix;
    kernels.branch(forward, first, last, nullptr, nullptr);
  }
}

}  // namespace

int main() {
  int wrong = 0;
  const Integer sizes[][3] = {{1, 1, 1},    {5, 3, 0},     {7, 17, 5},    {13, 49, 193},
                              {24, 96, 64}, {33, 31, 400}, {100, 65, 17}, {2, 145, 192}};
  for (const auto& [rows, columns, depth] : sizes) {
    for (int bits = 0; bits < 16; ++bits) {
      const bool right = check_product(rows, columns, depth, bits & 1, bits & 2, bits & 4,
                                       bits & 8 ? 5 : 0);
      if (right) continue;
      std::printf("a product of %d x %d x %d is wrong (%d)\n", static_cast<int>(rows),
                  static_cast<int>(columns), static_cast<int>(depth), bits);
      ++wrong;
    }
  }
  for (const Type type : {Type::kFloat32, Type::kBfloat16, Type::kFloat16}) {
    for (const Integer columns : {1, 5, 16, 31, 67}) {
      for (int bits = 0; bits < 4; ++bits) run_rows(type, columns, bits & 1, bits & 2);
    }
  }
  return wrong;
}
