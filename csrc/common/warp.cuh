// Thread and warp indices, and a scan within a warp.
#pragma once

constexpr unsigned kFullWarp = 0xffffffffu;

__device__ inline int lane_index() { return threadIdx.x % 32; }
__device__ inline int warp_index() { return threadIdx.x / 32; }
__device__ inline unsigned lanes_below() { return (1u << lane_index()) - 1; }

// Whether this lane is the lowest of `lanes`; false for no lanes.
__device__ inline bool is_first(unsigned lanes) {
  return lanes != 0 && (lanes & lanes_below()) == 0;
}

// The sum of `value` over this lane and those below it.
__device__ inline int inclusive_scan(int value) {
  for (int distance = 1; distance < 32; distance *= 2) {
    const int below = __shfl_up_sync(kFullWarp, value, distance);
    if (lane_index() >= distance) value += below;
  }
  return value;
}
