// shared_attention on the CPU: the arguments of a call, and the kernels of one instruction set.
#pragma once

#include <cstdint>

#include "elements.h"

namespace vlmo {

// A tensor with a row of `dim` adjacent elements for each token and head.
struct Rows {
  const void* data;
  std::int64_t sequence, token, head;  // strides in elements
};

// Results, [tokens, heads, dim], with adjacent heads: AttentionCall::result_row is their stride.
using Result = void*;

struct AttentionCall {
  Type type;  // of q, k, v, dout and the results
  Rows q, k, v, out, dout;
  const float* lse;        // [tokens, heads], of the backward
  const float* table;      // [heads, entries]; null without a bias
  std::int64_t entries;
  const std::int32_t* matrix;  // [size, size], rows `matrix_row` apart: indices into the table
  std::int64_t matrix_row, size;
  const bool* key_mask;             // [sequences, length], or null
  const std::int64_t* key_lengths;  // [sequences], or null
  const std::int64_t* offsets;      // [sequences + 1] of packed sequences, or null
  const std::int64_t* positions;    // [tokens], rows and columns of matrix, or null
  std::int64_t sequences, length, heads, dim;  // length: an upper bound if packed
  std::int64_t head_group;  // heads of an item, at most
  bool causal;
  float scale;

  std::int64_t result_row;  // elements between tokens
  bool streams;  // whether rows of results are whole lines of 64 bytes, to write past the caches
  Result out_result;   // of the forward
  float* lse_result;   // [tokens, heads]
  Result dq, dk, dv;   // of the backward
  double* dtable;      // [parts, heads, entries]; null if not needed. Parts: see Item
};

// What one thread does at a time: some heads of some sequences, or a range of their queries.
struct Item {
  std::int64_t first_head, last_head;
  std::int64_t first, last;  // sequences
  std::int64_t part, parts;  // of the queries
  std::int64_t chunk;        // number of the group of sequences
};

constexpr std::int64_t kMaxHeadGroup = 16, kZeroBytes = 64 * kMaxHeadGroup;

// The kernels of one instruction set. Scratch memory belongs to one thread during one call, is
// aligned to 64 bytes and begins with kZeroBytes zeros.
struct AttentionKernels {
  std::int64_t (*scratch_bytes)(const AttentionCall&, bool backward);
  void (*forward)(const AttentionCall&, const Item&, void* scratch);
  void (*backward)(const AttentionCall&, const Item&, void* scratch);
};

}  // namespace vlmo
