// The relative position bias and the masks: what scores start from.
#pragma once

#include "attention/parts.cuh"

// A head's table into shared memory, by all threads; the caller synchronises.
template <int kThreads>
__device__ inline void load_table(const Bias& bias, int head, char* shared) {
  if (bias.table == nullptr || !bias.in_shared) return;
  const int chunks = bias.entries / 4;
  const uint4* const table = reinterpret_cast<const uint4*>(bias.table) +
                             static_cast<long long>(head) * chunks;
  constexpr int kAtOnce = 4;  // so that the latency of global memory is waited for once for all
  for (int first = threadIdx.x; first < chunks; first += kAtOnce * kThreads) {
    uint4 moved[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) moved[i] = table[min(first + i * kThreads, chunks - 1)];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int chunk = first + i * kThreads;
      if (chunk < chunks) reinterpret_cast<uint4*>(shared)[chunk] = moved[i];
    }
  }
}

// A key of a column tile as the lookup needs it: four times its column in the closed form of the
// index, and flags; beside it its position. One key for each lane: all warps load
// them, which is cheaper than to ask which warp this is, and the first one stores.
constexpr int kIrregular = 1, kMasked = 2;

struct KeyCodes {
  static constexpr int kPositions = kColumns * 4;  // bytes between codes and positions
  static constexpr int kBytes = 2 * kPositions;
  int column, regular, attended;

  // Only loads; what they bring is looked at in store().
  __device__ void load(const Call& call, const Sequence& sequence, int first, int last) {
    const int key = first + lane_index();
    column = regular = 0;
    if (call.bias.table != nullptr) {
      const int4* const affine = call.bias.affine + sequence.position(call, min(key, last));
      column = affine->z;
      regular = affine->w;
    }
    attended = key < sequence.keys;
    if (call.key_mask != nullptr && attended) attended = call.key_mask[sequence.at(call, key)];
  }
  __device__ void store(const Call& call, const Sequence& sequence, unsigned tile, int first,
                        int last) const {
    if (threadIdx.x >= kColumns) return;
    int code = column * 4;
    if (call.bias.table != nullptr && !(regular && call.bias.in_shared)) code = kIrregular;
    if (!attended) code |= kMasked;
    const unsigned at = tile + threadIdx.x * 4;
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(code) : "memory");
    if (call.positions == nullptr) return;
    const int position = sequence.position(call, min(first + lane_index(), last));
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(at + kPositions), "r"(position) : "memory");
  }
};

__device__ inline float load_entry(unsigned at) {
  float value;
  asm("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(at));
  return value;
}

__device__ inline void load_eight(unsigned at, int (&values)[8]) {
  const uint4 low = load_shared(at), high = load_shared(at + 16);
  values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
  values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
}

// Entries of the table in the place of their numbers.
template <int kBlocks>
__device__ inline void look_up(const Bias& bias, int head, unsigned table,
                               Scores<kBlocks>& scores) {
  const float* const far = bias.table + static_cast<long long>(head) * bias.entries;
#pragma unroll
  for (int r = 0; r < 2 * kBlocks; ++r) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      float& score = element<kBlocks>(scores, r, e);
      const int entry = __float_as_int(score);
      score = bias.in_shared ? load_entry(table + entry * 4) : far[entry];
    }
  }
}

// Rows are queries, columns keys.
template <int kBlocks>
struct QueryLookup {
  unsigned table;       // in shared memory
  unsigned lane_codes;  // of the codes of the thread's columns
  unsigned factors;              // bit r is the factor of row r
  unsigned offset[2 * kBlocks];  // address of the entry for column 0

  __device__ QueryLookup(const Call& call, const Sequence& sequence, int first_row, int last,
                         unsigned table)
      : table(table), lane_codes(keep(first_column() * 4)), factors(0) {
#pragma unroll
    for (int r = 0; r < 2 * kBlocks; ++r) {
      offset[r] = table;
      if (call.bias.table != nullptr) {
        const int query = min(first_row + row_in_warp(r), last);
        const int4 affine = call.bias.affine[sequence.position(call, query)];
        offset[r] = table + affine.x * 4;
        factors |= affine.y << r;
      }
    }
  }

  // The bias of 32 keys, minus infinity where a query does not attend.
  __device__ void start(const Call& call, const Sequence& sequence, Scores<kBlocks>& scores,
                        unsigned codes, int first_key) const {
    int code[8];
    load_eight(codes + lane_codes, code);
    int flags = 0;
#pragma unroll
    for (int e = 0; e < 8; ++e) flags |= code[e];
    const bool diagonal = call.causal && first_key + kColumns - 1 > sequence.row_of_warp(kBlocks * 16);
    const bool special = __any_sync(kFullWarp, flags & (kIrregular | kMasked));
    if (call.bias.table == nullptr) {
#pragma unroll
      for (int r = 0; r < 2 * kBlocks; ++r) {
#pragma unroll
        for (int e = 0; e < 8; ++e) element<kBlocks>(scores, r, e) = 0;
      }
    } else if (special && __any_sync(kFullWarp, flags & kIrregular)) {
      start_from_index(call, sequence, scores, codes + KeyCodes::kPositions, first_key);
    } else {
#pragma unroll
      for (int r = 0; r < 2 * kBlocks; ++r) {
        const unsigned factor = factors >> r & 1;
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          element<kBlocks>(scores, r, e) = load_entry((code[e] & ~3) * factor + offset[r]);
        }
      }
    }
    if (!diagonal && !special) return;
#pragma unroll
    for (int r = 0; r < 2 * kBlocks; ++r) {
      const int last = call.causal ? sequence.row_of_warp(kBlocks * 16) + row_in_warp(r) : first_key + kColumns;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (code[e] & kMasked || first_key + first_column() + e > last) {
          element<kBlocks>(scores, r, e) = -infinity();
        }
      }
    }
  }

  // Where keys are irregular, from the index itself. All of a phase's loads are issued at once.
  __device__ void start_from_index(const Call& call, const Sequence& sequence,
                                   Scores<kBlocks>& scores, unsigned positions,
                                   int first_key) const {
    const Bias& bias = call.bias;
    long long row[2 * kBlocks];
#pragma unroll
    for (int r = 0; r < 2 * kBlocks; ++r) {
      row[r] = sequence.position(call, min(sequence.row_of_warp(kBlocks * 16) + row_in_warp(r), sequence.tokens - 1));
    }
    if (bias.narrow != nullptr && call.positions == nullptr) {  // neighbouring keys are neighbours
      const int column = min(first_key + first_column(), bias.pitch - 8);
      uint4 entries[2 * kBlocks];
#pragma unroll
      for (int r = 0; r < 2 * kBlocks; ++r) {
        entries[r] = *reinterpret_cast<const uint4*>(bias.narrow + row[r] * bias.pitch + column);
      }
#pragma unroll
      for (int r = 0; r < 2 * kBlocks; ++r) {
        const unsigned pairs[4] = {entries[r].x, entries[r].y, entries[r].z, entries[r].w};
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          element<kBlocks>(scores, r, e) =
              __int_as_float(e % 2 == 0 ? pairs[e / 2] & 0xffff : pairs[e / 2] >> 16);
        }
      }
    } else {
      int position[8];
      load_eight(positions + lane_codes, position);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (call.positions == nullptr) {
          position[e] = min(first_key + first_column() + e, sequence.tokens - 1);
        }
      }
#pragma unroll
      for (int r = 0; r < 2 * kBlocks; ++r) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const int entry = bias.narrow != nullptr
                                ? bias.narrow[row[r] * bias.pitch + position[e]]
                                : bias.matrix[row[r] * bias.size + position[e]];
          element<kBlocks>(scores, r, e) = __int_as_float(entry);
        }
      }
    }
    look_up<kBlocks>(bias, sequence.head, table, scores);
  }
};

// A query of a column tile: the address of the entry it reads for column 0 of the closed form, with
// bit 0 set if it reads it for every key; log2 of its sum of exponentials; delta; its position.
struct QueryCodes {
  static constexpr int kPart = kColumns * 4;
  static constexpr int kBytes = 4 * kPart;
  int offset, factor, outside;
  float lse, delta;

  // Only loads; what they bring is looked at in store().
  __device__ void load(const Call& call, const float* deltas, const Sequence& sequence, int first,
                       int last) {
    const int query = min(first + lane_index(), last);
    offset = factor = 0;
    if (call.bias.table != nullptr) {
      const int4* const affine = call.bias.affine + sequence.position(call, query);
      offset = affine->x;
      factor = affine->y;
    }
    outside = first + lane_index() > last;
    lse = call.lse[sequence.of_head(call, query)];
    delta = deltas[sequence.of_head(call, query)];
  }
  __device__ void store(const Call& call, const Sequence& sequence, unsigned tile, unsigned table,
                        int first, int last) const {
    if (threadIdx.x >= kColumns) return;
    const unsigned at = tile + threadIdx.x * 4;
    const unsigned code = table + offset * 4 + (factor == 0 ? 1 : 0);
    const float log_sum = outside || lse == -infinity() ? infinity() : lse * kLog2e;
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(code) : "memory");
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(at + kPart), "f"(log_sum) : "memory");
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(at + 2 * kPart), "f"(delta) : "memory");
    if (call.positions == nullptr) return;
    const int position = sequence.position(call, min(first + lane_index(), last));
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(at + 3 * kPart), "r"(position) : "memory");
  }
};

__device__ inline void load_eight(unsigned at, float (&values)[8]) {
  int bits[8];
  load_eight(at, bits);
#pragma unroll
  for (int e = 0; e < 8; ++e) values[e] = __int_as_float(bits[e]);
}

// Rows are keys, columns queries.
template <int kBlocks>
struct KeyLookup {
  unsigned table;       // in shared memory
  unsigned lane_codes;  // of the codes of the thread's columns
  int column[2 * kBlocks];  // four times the key's in the closed form
  unsigned masked;          // bit r: no query attends to row r
  bool irregular, special;  // some key of the warp is irregular; some is masked

  __device__ KeyLookup(const Call& call, const Sequence& sequence, unsigned table)
      : table(table), lane_codes(keep(first_column() * 4)), masked(0) {
    bool any = false;
#pragma unroll
    for (int r = 0; r < 2 * kBlocks; ++r) {
      const int key = sequence.row_of_warp(kBlocks * 16) + row_in_warp(r);
      const int inside = min(key, sequence.tokens - 1);
      column[r] = 0;
      if (call.bias.table != nullptr) {
        const int4 affine = call.bias.affine[sequence.position(call, inside)];
        column[r] = affine.z * 4;
        any = any || affine.w == 0 || !call.bias.in_shared;
      }
      bool attended = key < sequence.keys;
      if (call.key_mask != nullptr && attended) {
        attended = call.key_mask[sequence.at(call, key)] != 0;
      }
      masked |= !attended << r;
    }
    irregular = __any_sync(kFullWarp, any);
    special = __any_sync(kFullWarp, masked != 0);
  }

  // The bias of 32 queries, minus infinity where one does not attend.
  __device__ void start(const Call& call, const Sequence& sequence, Scores<kBlocks>& scores,
                        unsigned codes, int first_query) const {
    if (call.bias.table == nullptr) {
#pragma unroll
      for (int r = 0; r < 2 * kBlocks; ++r) {
#pragma unroll
        for (int e = 0; e < 8; ++e) element<kBlocks>(scores, r, e) = 0;
      }
    } else if (irregular) {
      start_from_index(call, sequence, scores, codes + 3 * QueryCodes::kPart, first_query);
    } else {
      int code[8];
      load_eight(codes + lane_codes, code);
#pragma unroll
      for (int r = 0; r < 2 * kBlocks; ++r) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const int moving = code[e] + column[r], fixed = code[e] - 1;
          element<kBlocks>(scores, r, e) = load_entry(code[e] & 1 ? fixed : moving);
        }
      }
    }
    const int first_row = sequence.row_of_warp(kBlocks * 16);
    const bool diagonal = call.causal && first_query < first_row + kBlocks * 16 - 1;
    if (!diagonal && !special) return;
#pragma unroll
    for (int r = 0; r < 2 * kBlocks; ++r) {
      const int first = call.causal ? first_row + row_in_warp(r) : 0;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (masked >> r & 1 || first_query + first_column() + e < first) {
          element<kBlocks>(scores, r, e) = -infinity();
        }
      }
    }
  }

  // Where keys are irregular, from the index itself. All of a phase's loads are issued at once.
  __device__ void start_from_index(const Call& call, const Sequence& sequence,
                                   Scores<kBlocks>& scores, unsigned positions,
                                   int first_query) const {
    const Bias& bias = call.bias;
    int query[8];
    load_eight(positions + lane_codes, query);
    int key[2 * kBlocks];
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      if (call.positions == nullptr) {
        query[e] = min(first_query + first_column() + e, sequence.tokens - 1);
      }
    }
#pragma unroll
    for (int r = 0; r < 2 * kBlocks; ++r) {
      const int token = sequence.row_of_warp(kBlocks * 16) + row_in_warp(r);
      key[r] = sequence.position(call, min(token, sequence.tokens - 1));
    }
#pragma unroll
    for (int r = 0; r < 2 * kBlocks; ++r) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const long long row = query[e];
        const int entry = bias.narrow != nullptr ? bias.narrow[row * bias.pitch + key[r]]
                                                 : bias.matrix[row * bias.size + key[r]];
        element<kBlocks>(scores, r, e) = __int_as_float(entry);
      }
    }
    look_up<kBlocks>(bias, sequence.head, table, scores);
  }
};
