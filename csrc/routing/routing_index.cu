// The index of a routed operation: token numbers grouped by expert, a stable counting sort.
//
// One CTA and no atomics: the result is deterministic. Each warp owns a contiguous span of tokens:
//   1. it counts its tokens per bucket (experts 0..E-1, then one bucket for ids out of range);
//   2. the counts of each bucket are scanned over the warps, and the totals over the buckets, which
//      gives every warp its first entry in every bucket;
//   3. it reads its tokens again and writes each one to its entry.
//
// Lower bound of the traffic: read 4 T bytes, write 4 T + 4 (E + 1). The ids are read twice; the
// second read hits L2, or L1 up to some 30k tokens.

#include "common/warp.cuh"

constexpr int kMaxExperts = 32;
constexpr int kMaxWarps = 32;
constexpr int kMaxBuckets = kMaxExperts + 1;

struct Shared {
  // entry[w][b] of warp w and bucket b: first the count, then the next free entry of `rows`. The
  // odd row length keeps the scan over the warps free of bank conflicts.
  int entry[kMaxWarps][kMaxBuckets];
  int count[kMaxBuckets];
  int first[kMaxBuckets];
};
static_assert(kMaxBuckets % 2 == 1, "bank conflicts in the scan over warps");

// Ids out of range share the bucket after those of the experts.
__device__ int bucket_of(int id, int num_experts) {
  return 0 <= id && id < num_experts ? id : num_experts;
}

// The lanes of `active` with the same bucket as this lane; one ballot per bit.
__device__ unsigned same_bucket(unsigned active, int bucket, int num_bits) {
  unsigned peers = active;
  for (int bit = 0; bit < num_bits; ++bit) {
    const bool mine = bucket >> bit & 1;
    const unsigned ones = __ballot_sync(kFullWarp, mine);
    peers &= mine ? ones : ~ones;
  }
  return peers;
}

// Calls visit(token, bucket, peers) for the tokens of [begin, end), 32 at a time; lanes past the
// end get no peers. The next ids are prefetched while the current ones are processed.
template <typename Visit>
__device__ void for_each_token(const int* __restrict__ ids, long long begin, long long end,
                               int num_experts, Visit visit) {
  const int num_bits = 32 - __clz(num_experts);
  const int lane = lane_index();
  int id = begin + lane < end ? ids[begin + lane] : -1;
  for (long long base = begin; base < end; base += 32) {
    const long long token = base + lane;
    const int bucket = bucket_of(id, num_experts);
    id = token + 32 < end ? ids[token + 32] : -1;
    const unsigned active = __ballot_sync(kFullWarp, token < end);
    const unsigned peers = same_bucket(active, bucket, num_bits);
    visit(token, bucket, token < end ? peers : 0u);
  }
}

// Exclusive scan over the warps: turns each warp's counts into its first entry within each bucket,
// and sums them to the count of the bucket.
__device__ void scan_over_warps(Shared& shared, int num_buckets, int num_warps) {
  const int lane = lane_index();
  for (int bucket = warp_index(); bucket < num_buckets; bucket += num_warps) {
    const int count = lane < num_warps ? shared.entry[lane][bucket] : 0;
    const int until = inclusive_scan(count);
    if (lane < num_warps) shared.entry[lane][bucket] = until - count;
    if (lane == 31) shared.count[bucket] = until;
  }
}

// Executed by one warp: the offset of each expert's rows.
__device__ void scan_over_experts(Shared& shared, int num_experts, int* __restrict__ offsets) {
  const int lane = lane_index();
  const int count = lane < num_experts ? shared.count[lane] : 0;
  const int until = inclusive_scan(count);
  if (lane < num_experts) {
    shared.first[lane] = until - count;
    offsets[lane] = until - count;
  }
  if (lane == 31) {
    shared.first[num_experts] = until;  // the ids out of range begin here
    offsets[num_experts] = until;
  }
}

extern "C" __global__ void __launch_bounds__(32 * kMaxWarps)
    routing_index_kernel(const int* __restrict__ ids,  // [T]
                         int* __restrict__ rows,       // [T]
                         int* __restrict__ offsets,    // [E + 1]
                         int num_tokens, int num_experts) {
  __shared__ Shared shared;
  const int lane = lane_index();
  const int warp = warp_index();
  const int num_warps = blockDim.x / 32;
  const int num_buckets = num_experts + 1;
  const long long chunks = (num_tokens + 31LL) / 32;
  const long long span = (chunks + num_warps - 1) / num_warps * 32;
  const long long begin = warp * span;
  const long long end = min(begin + span, static_cast<long long>(num_tokens));
  int* const entry = shared.entry[warp];

  for (int bucket = lane; bucket < num_buckets; bucket += 32) entry[bucket] = 0;
  __syncwarp();
  for_each_token(ids, begin, end, num_experts, [&](long long, int bucket, unsigned peers) {
    if (is_first(peers)) entry[bucket] += __popc(peers);
    __syncwarp();
  });
  __syncthreads();

  scan_over_warps(shared, num_buckets, num_warps);
  __syncthreads();
  if (warp == 0) scan_over_experts(shared, num_experts, offsets);
  __syncthreads();

  for (int bucket = lane; bucket < num_buckets; bucket += 32) entry[bucket] += shared.first[bucket];
  __syncwarp();
  for_each_token(ids, begin, end, num_experts, [&](long long token, int bucket, unsigned peers) {
    const int rank = __popc(peers & lanes_below());
    if (peers != 0) rows[entry[bucket] + rank] = static_cast<int>(token);
    __syncwarp();
    if (is_first(peers)) entry[bucket] += __popc(peers);
    __syncwarp();
  });
}
