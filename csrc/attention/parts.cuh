// What the kernels of attention have in common: arguments, sequences, tiles in shared memory.
//
// Each of them holds rows and walks over columns, 32 at a time: forward and dq hold queries and walk
// over keys, dk and dv hold keys and walk over queries. Scores = rows x columns^T are made from the
// warp's rows and a column tile (tiles.cuh, products.cuh); what becomes of them goes through a tile of
// the warp's own and is multiplied with a column tile once more. lookup.cuh has bias and masks.
#pragma once

#include <cuda_fp16.h>

#include "common/warp.cuh"

constexpr int kColumns = 32;  // of a column tile
constexpr int kChunk = 8;     // halves in 16 bytes, what a thread moves at a time
constexpr float kLog2e = 1.4426950408889634f;

__device__ inline float infinity() { return __int_as_float(0x7f800000); }

// q, k, v, an output or a gradient: rows of one head are contiguous, and aligned to 16 bytes.
struct Operand {
  __half* data;
  long long sequence, token, head;  // strides, in elements; packed sequences: sequence is 0
};

struct Bias {
  const float* table;  // [H, entries], over the scale of the scores; null without
  const int* matrix;   // [M, M], rows of the table
  const unsigned short* narrow;  // [M, pitch], the same; null if it has none
  const int4* affine;  // [M]: offset, factor, column, whether the key is regular
  int size;            // M
  int pitch;
  int entries;
  int in_shared;  // whether a head's table fits into shared memory
};

// Arguments of all kernels.
struct Call {
  Operand q, k, v;
  Bias bias;
  const int* offsets;             // [B + 1], of packed sequences; null
  const int* key_lengths;         // [B]; null
  const unsigned char* key_mask;  // [B, N]; null
  const int* positions;           // [B, N] or [T], rows of the bias' matrix; null
  float* lse;                     // of each token and head, natural logarithm
  float scale;                    // of the scores, times log2(e); not negative
  int value_token, value_head;    // strides of lse and delta
  int batch, heads, length, head_dim;
  int causal;
  int stagger;  // CTA from which on as many begin later, see stagger()
};

// Both CTAs of a multiprocessor march in step, and do not multiply at the same time, unless one of
// them begins later. Those that follow keep the distance.
__device__ inline void stagger(const Call& call) {
  const int cta = static_cast<int>(blockIdx.x);
  if (call.stagger == 0 || cta < call.stagger || cta >= 2 * call.stagger) return;
  float wait = 1.0f;
#pragma unroll 1
  for (int i = 0; i < 300; ++i) wait = fmaf(wait, 0.5f, 0.5f);
  if (wait == 0) __trap();  // never: so that the loop is not dropped
}

// Bytes of shared memory for a CTA's Sequence; the tiles behind it are aligned to 128.
constexpr int kKept = 128;

// One sequence of the batch, and the rows of it that a CTA has. It is kept in shared memory: in
// registers it would be in the way of products.
struct Sequence {
  int number, head;
  long long first;        // token at which a packed one begins, else 0
  long long first_value;  // index of a value of its first token, such as a position
  int tokens, keys;
  int first_row;  // of the CTA

  __device__ Sequence(const Call& call, int number, int head, int first_row)
      : number(number), head(head), first_row(first_row) {
    first = 0;
    first_value = static_cast<long long>(number) * call.length;
    tokens = keys = call.length;
    if (call.offsets != nullptr) {
      first = first_value = call.offsets[number];
      tokens = keys = call.offsets[number + 1] - static_cast<int>(first);
    }
    if (call.key_lengths != nullptr) keys = min(keys, call.key_lengths[number]);
  }
  __device__ int row_of_warp(int rows) const { return first_row + warp_index() * rows; }
  __device__ const __half* pointer(const Operand& operand, int token) const {
    return operand.data + number * operand.sequence + (first + token) * operand.token +
           head * operand.head;
  }
  __device__ bool attended(const Call& call, int key) const {
    return key < keys && (call.key_mask == nullptr || call.key_mask[first_value + key] != 0);
  }
  // Of a value for each token and head, such as the log-sum-exp.
  __device__ long long of_head(const Call& call, int token) const {
    return (first_value + token) * call.value_token +
           static_cast<long long>(head) * call.value_head;
  }
  __device__ int position(const Call& call, int token) const {
    return call.positions != nullptr ? call.positions[first_value + token] : token;
  }
};

// log2 of a query's sum of exponentials, for the backward: infinite where it has no key, so that its
// weights are 0.
__device__ inline float log_sum(float lse) {
  return lse == -infinity() ? infinity() : lse * kLog2e;
}
