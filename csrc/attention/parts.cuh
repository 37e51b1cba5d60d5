// What the attention kernels share: arguments, sequences, tiles in shared memory.
//
// Each kernel keeps a block of rows and iterates over columns, 32 at a time: the forward and dq
// keep queries and iterate over keys, dk and dv keep keys and iterate over queries. Scores = rows x
// columns^T are computed from the warp's rows and a column tile (tiles.cuh, products.cuh). The
// weights or dS computed from them go through a shared-memory tile of the warp (WeightTile) and are
// the left operand of the next product with a column tile. lookup.cuh adds the bias and the masks.
#pragma once

#include <cuda_fp16.h>

#include "common/warp.cuh"

constexpr int kColumns = 32;  // tokens in a column tile
constexpr int kChunk = 8;     // halves in the 16 bytes that a thread moves at a time
constexpr float kLog2e = 1.4426950408889634f;

__device__ inline float infinity() { return __int_as_float(0x7f800000); }

// q, k, v, an output or a gradient: rows of one head are contiguous, and aligned to 16 bytes.
struct Operand {
  __half* data;
  long long sequence, token, head;  // strides, in elements; sequence is 0 for packed sequences
};

struct Bias {
  const float* table;  // [H, entries], divided by the scale of the scores; null without
  const int* matrix;   // [M, M], indices of table entries
  const unsigned short* narrow;  // [M, pitch], the same in 16 bits; null without
  const int4* affine;  // [M]: offset, factor, column, whether the key is regular
  int size;            // M
  int pitch;
  int entries;
  int in_shared;  // whether a head's table fits into shared memory
};

// Arguments common to all kernels.
struct Call {
  Operand q, k, v;
  Bias bias;
  const int* offsets;             // [B + 1], of packed sequences; null without
  const int* key_lengths;         // [B]; null without
  const unsigned char* key_mask;  // [B, N]; null without
  const int* positions;           // [B, N] or [T], rows of the bias matrix; null without
  float* lse;                     // log-sum-exp of each token and head, natural logarithm
  float scale;                    // of the scores, times log2(e); not negative
  int value_token, value_head;    // strides of lse and delta
  int batch, heads, length, head_dim;
  int causal;
  int stagger;  // CTAs [stagger, 2 stagger) start later, see stagger(); 0: none
};

// The two CTAs of a multiprocessor run in lockstep, so that both need the tensor cores at the same
// time, unless one of them starts later. The CTAs that follow them keep the offset.
__device__ inline void stagger(const Call& call) {
  const int cta = static_cast<int>(blockIdx.x);
  if (call.stagger == 0 || cta < call.stagger || cta >= 2 * call.stagger) return;
  float wait = 1.0f;
#pragma unroll 1
  for (int i = 0; i < 300; ++i) wait = fmaf(wait, 0.5f, 0.5f);
  if (wait == 0) __trap();  // never taken; keeps the compiler from removing the loop
}

// Bytes of shared memory for a CTA's Sequence; the tiles after it are aligned to 128 bytes.
constexpr int kKept = 128;

// One sequence of the batch, and the rows of it that a CTA owns. It is kept in shared memory
// because the products need the registers.
struct Sequence {
  int number, head;
  long long first;        // first token of a packed sequence, else 0
  long long first_value;  // index of a value of its first token, such as a position
  int tokens, keys;
  int first_row;  // first row that the CTA owns

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
  // Index of a per-token, per-head value such as the log-sum-exp.
  __device__ long long of_head(const Call& call, int token) const {
    return (first_value + token) * call.value_token +
           static_cast<long long>(head) * call.value_head;
  }
  __device__ int position(const Call& call, int token) const {
    return call.positions != nullptr ? call.positions[first_value + token] : token;
  }
};

// log2 of a query's sum of exponentials, for the backward; infinite if the query attends to no key,
// so that its weights are 0.
__device__ inline float log_sum(float lse) {
  return lse == -infinity() ? infinity() : lse * kLog2e;
}
