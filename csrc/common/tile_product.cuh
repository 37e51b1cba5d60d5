// C[128, 128] = A[128, K] B[K, 128] by one CTA, half precision with float accumulators.
//
// 2 x 2 warps own 64 x 64 of C each: 128 accumulators per thread. Both operands go from global
// memory through registers into one of two stages of shared memory, 32 k at a time, and from there
// as fragments into registers, 8 k ahead of the products. Two CTAs fit on a multiprocessor, so that
// one multiplies while the other is in the prologue or epilogue of a tile.
//
// Lower bound for each 32 k of a CTA: 1024 cycles of the tensor cores; in the load/store unit 512
// for fragments, 128 for stores and 128 for loads (256 if k is contiguous).
#pragma once

#include "common/memory.cuh"
#include "common/volta_mma.cuh"

constexpr int kTile = 128;     // rows and columns of a CTA's tile
constexpr int kWarpTile = 64;  // rows and columns of a warp's tile
constexpr int kThreads = 128;
constexpr int kStepK = 32;  // k of one step of the main loop
constexpr int kChunk = 8;   // halves in the 16 bytes that a thread moves at a time
constexpr int kMoves = kTile * kStepK / kChunk / kThreads;  // chunks per operand, thread, step

// The 16 x 16 blocks of a warp's tile, with eight registers each: [m][n][register].
using Accumulators = float[kWarpTile / 16][kWarpTile / 16][8];

// An operand in shared memory. Rows are padded so that no access has bank conflicts: the 8 lanes of
// one phase of a 16-byte access cover all 8 groups of banks.
template <Major>
struct Layout;

// One row of 32 k for each m or n.
template <>
struct Layout<Major::kK> {
  static constexpr int kPitch = (kStepK + kChunk) * 2;  // bytes
  static constexpr int kBytes = kTile * kPitch;
  static constexpr int kRowsPerMove = kThreads / 4;
  // Four lanes move a row; a phase moves rows s and s + 4.
  __device__ static int first_row() {
    const int quad = threadIdx.x / 4;
    return quad / 8 * 8 + quad % 2 * 4 + quad / 2 % 4;
  }
  __device__ static int first_chunk() { return threadIdx.x % 4; }
};

// One row of 128 m or n for each k.
template <>
struct Layout<Major::kMN> {
  static constexpr int kPitch = (kTile + 2 * kChunk) * 2;
  static constexpr int kBytes = kStepK * kPitch;
  static constexpr int kRowsPerMove = kThreads / 16;
  __device__ static int first_row() { return threadIdx.x / 16; }
  __device__ static int first_chunk() { return threadIdx.x % 16; }
};

constexpr int kOperandBytes = Layout<Major::kK>::kBytes;
static_assert(Layout<Major::kMN>::kBytes <= kOperandBytes, "A's stage runs into B's");
constexpr int kStageBytes = 2 * kOperandBytes;  // A, then B
constexpr int kSharedBytes = 2 * kStageBytes;

// The column of C whose k are in row s of B's shared memory: permuted so that the 8 columns of a
// row for which a thread has accumulators are neighbours.
__device__ inline int column_in_row(int s) {
  return (s & ~31) + (s & 2) * 8 + (s & 4) * 2 + (s & 16) / 4 + (s & 8) / 4 + (s & 1);
}

// The addresses that a thread loads of one operand. Past the last k it repeats earlier loads, and
// zeros are written to shared memory instead: a conditional load would cost registers and time.
template <Major kM>
struct Source {
  static constexpr Major kMajor = kM;
  const char* rows[kMoves];
  int pitch;  // bytes from one step to the next
  int left;   // k from this thread's first one to the end

  // The first k of a move, relative to the thread's first: moves differ in k only in layout kMN.
  __device__ static constexpr int first_k(int move) {
    return kM == Major::kK ? 0 : move * Layout<kM>::kRowsPerMove;
  }
  __device__ uint4 load(int move, int step) const {
    const int last = max((left - first_k(move) - 1) / kStepK, 0);
    return load_global(rows[move] + static_cast<long long>(min(step, last)) * pitch);
  }
  __device__ bool outside(int move, int step) const {
    return step * kStepK + first_k(move) >= left;
  }
};

// Rows with contiguous k; row_pointer(s) is the source of row s of shared memory, for every s.
template <class RowPointer>
__device__ inline Source<Major::kK> rows_of_k(RowPointer row_pointer, int depth) {
  using L = Layout<Major::kK>;
  Source<Major::kK> source;
  const int k = L::first_chunk() * kChunk;
  source.pitch = kStepK * 2;
  source.left = depth - k;
#pragma unroll
  for (int i = 0; i < kMoves; ++i) {
    const __half* const row = row_pointer(L::first_row() + i * L::kRowsPerMove);
    source.rows[i] = reinterpret_cast<const char*>(row + (k < depth ? k : 0));
  }
  return source;
}

// `depth` rows of k, `pitch` elements apart, with `columns` contiguous m or n, a multiple of 8.
__device__ inline Source<Major::kMN> columns_of_k(const __half* first, int pitch, int columns,
                                                  int depth) {
  using L = Layout<Major::kMN>;
  Source<Major::kMN> source;
  const int k = L::first_row(), column = L::first_chunk() * kChunk;
  source.pitch = kStepK * 2 * pitch;
  source.left = depth - k;
#pragma unroll
  for (int i = 0; i < kMoves; ++i) {
    const int row = min(k + i * L::kRowsPerMove, depth - 1);
    source.rows[i] = reinterpret_cast<const char*>(first + static_cast<long long>(row) * pitch +
                                                   (column < columns ? column : 0));
  }
  return source;
}

// Stores a thread's chunks of an operand to shared memory.
template <Major kMajor>
struct Writer {
  unsigned base;

  __device__ Writer(unsigned operand)
      : base(operand + Layout<kMajor>::first_row() * Layout<kMajor>::kPitch +
             Layout<kMajor>::first_chunk() * kChunk * 2) {}
  __device__ void write(int move, uint4 chunk) const {
    store_shared(base + move * Layout<kMajor>::kRowsPerMove * Layout<kMajor>::kPitch, chunk);
  }
  // Overwrites what a step loaded past the last k.
  __device__ void write_zeros(const Source<kMajor>& source, int step) const {
#pragma unroll
    for (int i = 0; i < kMoves; ++i) {
      if (source.outside(i, step)) write(i, make_uint4(0, 0, 0, 0));
    }
  }
};

// A thread's fragments of one operand: 8 k of 4 blocks of 16 rows or columns, [block][k / 4].
using Fragments = uint2[4][2];

template <Major kMajor>
struct Reader {
  unsigned base;

  // first: first row or column of the warp's tile; half: the quad pair's place in a block.
  __device__ Reader(unsigned operand, int first, int half) {
    const QuadPair at;
    if constexpr (kMajor == Major::kK) {
      base = operand + (first + at.high * 8 + half * 4 + at.low) * Layout<kMajor>::kPitch;
    } else {
      base = operand + at.low * Layout<kMajor>::kPitch + (first + at.high * 16 + half * 8) * 2;
    }
  }
  // One of the 4 accesses for k = 8 octet..8 octet + 7.
  __device__ void read(int octet, int access, Fragments& fragments) const {
    if constexpr (kMajor == Major::kK) {
      const uint4 v = load_shared(base + access * 16 * Layout<kMajor>::kPitch + octet * 16);
      fragments[access][0] = make_uint2(v.x, v.y);
      fragments[access][1] = make_uint2(v.z, v.w);
    } else {
      const int pair = access % 2, quad = access / 2;  // of blocks, of k
      const unsigned row = (octet * 2 + quad) * 4 * Layout<kMajor>::kPitch;
      const uint4 v = load_shared(base + row + pair * 64);
      fragments[pair * 2][quad] = make_uint2(v.x, v.y);
      fragments[pair * 2 + 1][quad] = make_uint2(v.z, v.w);
    }
  }
};

// Software pipeline: at which of the 128 products of a warp's step each other operation is issued.
// docs/volta.md describes how these values were found. ptxas moves instructions, but not far.
template <Major kA, Major kB>
struct Pace {
  static constexpr int kStoreB = 33;  // loaded in the previous step
  static constexpr int kLoadA = 52;
  static constexpr int kStoreA = 79;
  static constexpr int kLoadB = 99;
  static constexpr int kMove = 3;       // products from one chunk to the next
  static constexpr int kRead = 5;       // in each octet: the first fragment of the next octet
  static constexpr int kReadLast = 13;  // in the last octet, which reads from the next stage
  static constexpr int kSync = 6;       // in the last octet
  static constexpr int kReadEvery = 2;
};

// acc += A B. `shared` has kSharedBytes; the caller synchronises before it writes to it again.
//
// Kept as one function: split into a struct with a member function for each part, the same
// instructions in the same order were a tenth slower (forward, modelled), because ptxas scheduled
// them differently.
template <class SourceA, class SourceB>
__device__ inline void multiply(Accumulators& acc, const SourceA& a, const SourceB& b, int depth,
                                char* shared) {
  constexpr Major kA = SourceA::kMajor, kB = SourceB::kMajor;
  const unsigned stage = shared_address(shared);
  const int warp_m = warp_index() / 2 * kWarpTile, warp_n = warp_index() % 2 * kWarpTile;
  const QuadPair at;
  Reader<kA> read_a(stage, warp_m, at.m);
  Reader<kB> read_b(stage + kOperandBytes, warp_n, at.n);
  Writer<kA> write_a(stage);
  Writer<kB> write_b(stage + kOperandBytes);
  const int steps = (depth + kStepK - 1) / kStepK, whole = depth / kStepK;
  uint4 moved_a[kMoves], moved_b[kMoves];
  Fragments fa[2], fb[2];
  using P = Pace<kA, kB>;
  static_assert(P::kStoreA + 4 * P::kMove <= 96 + P::kSync, "stored behind the barrier");
  static_assert(P::kReadLast >= P::kSync, "read before the barrier");

#pragma unroll
  for (int i = 0; i < kMoves; ++i) moved_a[i] = a.load(i, 0);
#pragma unroll
  for (int i = 0; i < kMoves; ++i) moved_b[i] = b.load(i, 0);
#pragma unroll
  for (int i = 0; i < kMoves; ++i) write_a.write(i, moved_a[i]);
#pragma unroll
  for (int i = 0; i < kMoves; ++i) write_b.write(i, moved_b[i]);
  if (whole == 0) {
    write_a.write_zeros(a, 0);
    write_b.write_zeros(b, 0);
  }
#pragma unroll
  for (int i = 0; i < kMoves; ++i) moved_b[i] = b.load(i, 1);
  __syncthreads();

  int flip = kStageBytes;
  write_a.base += flip;
  write_b.base += flip;
#pragma unroll
  for (int i = 0; i < 4; ++i) read_a.read(0, i, fa[0]);
#pragma unroll
  for (int i = 0; i < 4; ++i) read_b.read(0, i, fb[0]);

#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    // Whether a memory access is due at product t: every kMove products from `first`, four times.
    const auto due = [](int t, int first) {
      return t >= first && t < first + 4 * P::kMove && (t - first) % P::kMove == 0;
    };
#pragma unroll
    for (int octet = 0; octet < 4; ++octet) {
      const int now = octet % 2, then = 1 - now;
      const int read_at = octet == 3 ? P::kReadLast : P::kRead;
#pragma unroll
      for (int j = 0; j < 32; ++j) {
        const int t = octet * 32 + j;
        if (octet == 3 && j == P::kSync) {
          if (step + 1 >= whole) {
            write_a.write_zeros(a, step + 1);
            write_b.write_zeros(b, step + 1);
          }
          __syncthreads();
          read_a.base += flip;
          read_b.base += flip;
          flip = -flip;
          write_a.base += flip;
          write_b.base += flip;
        }
        if (j >= read_at && j < read_at + 8 * P::kReadEvery &&
            (j - read_at) % P::kReadEvery == 0) {
          const int access = (j - read_at) / P::kReadEvery;
          if (access % 2 == 0) {
            read_a.read((octet + 1) % 4, access / 2, fa[then]);
          } else {
            read_b.read((octet + 1) % 4, access / 2, fb[then]);
          }
        }
        if (due(t, P::kStoreB)) {
          const int i = (t - P::kStoreB) / P::kMove;
          write_b.write(i, moved_b[i]);
        }
        if (due(t, P::kStoreA)) {
          const int i = (t - P::kStoreA) / P::kMove;
          write_a.write(i, moved_a[i]);
        }
        if (due(t, P::kLoadA)) {
          const int i = (t - P::kLoadA) / P::kMove;
          moved_a[i] = a.load(i, step + 1);
        }
        if (due(t, P::kLoadB)) {
          const int i = (t - P::kLoadB) / P::kMove;
          moved_b[i] = b.load(i, step + 2);
        }
        // Alternating direction, so that neighbouring products share an operand.
        const int k = j / 16, n = j / 4 % 4, m = n % 2 ? 3 - j % 4 : j % 4;
        mma<kA, kB>(acc[m][n], fa[now][m][k], fb[now][n][k]);
      }
    }
  }
}

// Visits all accumulators of a thread in octets: v[0..7] are neighbouring columns of a row of the
// CTA's tile, the first of them a multiple of 8. at_column(column) is called once for each of a
// thread's two octets of columns and returns visit(row, v).
template <Major kA, Major kB, class AtColumn>
__device__ inline void for_each_octet(const Accumulators& acc, AtColumn at_column) {
  const QuadPair at;
  const int warp_m = warp_index() / 2 * kWarpTile, warp_n = warp_index() % 2 * kWarpTile;
  const bool right = at.low & 2;
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    const auto visit = at_column(warp_n + pair * 32 + (at.low & 2) * 8 + at.n * 8);
#pragma unroll
    for (int block = 0; block < 4; ++block) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int local = (at.low & 1) + 2 * half;
        const int row =
            kA == Major::kK
                ? block * 16 + at.high * 8 + at.m * 4 + local
                : block / 2 * 32 + at.high * 16 + at.m * 8 + block % 2 * 4 + local;
        float v[8];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float* const left_block = acc[block][pair * 2];
          const float* const right_block = acc[block][pair * 2 + 1];
          if constexpr (kB == Major::kK) {
            const int i = (e & 2) * 2 + half * 2 + (e & 1);
            v[e] = left_block[i];
            v[4 + e] = right_block[i];
          } else {
            // The lane holds one half of each of two octets, and lane ^ 2 the other halves.
            const float* const from = e & 2 ? right_block : left_block;
            const float low = from[half * 2 + (e & 1)], high = from[4 + half * 2 + (e & 1)];
            const float other = __shfl_xor_sync(kFullWarp, right ? low : high, 2);
            v[(e & 2) * 2 + (e & 1)] = right ? other : low;
            v[(e & 2) * 2 + 2 + (e & 1)] = right ? high : other;
          }
        }
        visit(warp_m + row, v);
      }
    }
  }
}
