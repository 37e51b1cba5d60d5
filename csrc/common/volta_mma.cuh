// mma.m8n8k4, the instruction of the V100's tensor cores, and its fragment layouts.
//
// One instruction of a warp computes four products of 8 x 8 x 4, one in each quad pair: quad pair q
// is lanes 4q..4q+3 and 16+4q..16+4q+3. The four are stacked 2 x 2 here, into 16 x 16 x 4. With
// low = lane % 4 and high = lane / 16 a lane holds, of the fragments of its quad pair,
//
//   A, k contiguous:  row 4 high + low, four k;    A, m contiguous:  k = low, rows 4 high + 0..3
//   B, k contiguous:  column 4 high + low, four k; B, n contiguous:  k = low, columns 4 high + 0..3
//   C, register i:    row 4 high + (i & 2) + (low & 1), column (i & 4) + (low & 2) + (i & 1)
//
// (PTX ISA, "Matrix fragments for mma.m8n8k4 with .f16 floating point type".)
#pragma once

#include <cuda_fp16.h>

#include "common/warp.cuh"

// Which index of an operand is contiguous in memory: k, which is summed over, or m or n.
enum class Major { kK, kMN };

struct QuadPair {
  int low, high;  // the lane's place in its quad pair
  int m, n;       // the quad pair's place in the 2 x 2 stack

  __device__ QuadPair() {
    const int lane = lane_index();
    low = lane % 4;
    high = lane / 16;
    m = lane / 4 % 2;
    n = lane / 8 % 2;
  }
};

#define VLMO_MMA(layouts)                                                               \
  asm("mma.sync.aligned.m8n8k4." layouts ".f32.f16.f16.f32 "                            \
      "{%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9}, {%10,%11}, {%0,%1,%2,%3,%4,%5,%6,%7};"        \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]),          \
        "+f"(d[6]), "+f"(d[7])                                                          \
      : "r"(a.x), "r"(a.y), "r"(b.x), "r"(b.y))

// d += a b in each quad pair.
template <Major kA, Major kB>
__device__ inline void mma(float (&d)[8], uint2 a, uint2 b) {
  if constexpr (kA == Major::kK && kB == Major::kK) VLMO_MMA("row.col");
  if constexpr (kA == Major::kK && kB == Major::kMN) VLMO_MMA("row.row");
  if constexpr (kA == Major::kMN && kB == Major::kK) VLMO_MMA("col.col");
  if constexpr (kA == Major::kMN && kB == Major::kMN) VLMO_MMA("col.row");
}

#undef VLMO_MMA
