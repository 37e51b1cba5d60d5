// The relative position bias and the masks: the initial values of the scores.
#pragma once

#include "attention/products.cuh"

// Copies a head's table into shared memory, with all threads; the caller synchronises.
template <int kThreads>
__device__ inline void load_table(const Bias& bias, int head, char* shared) {
  if (bias.table == nullptr || !bias.in_shared) return;
  const int chunks = bias.entries / 4;
  const uint4* const table = reinterpret_cast<const uint4*>(bias.table) +
                             static_cast<long long>(head) * chunks;
  constexpr int kAtOnce = 4;  // loads in flight per thread, to hide the latency of global memory
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

__device__ inline void store_word(unsigned at, unsigned value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(value) : "memory");
}

__device__ inline unsigned load_word(unsigned at) {
  unsigned value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(at) : "memory");
  return value;
}

// One word for each of a thread's neighbouring columns.
template <int kCount>
__device__ inline void load_words(unsigned at, int (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const uint4 v = load_shared(at + i * 4);
    values[i] = v.x, values[i + 1] = v.y, values[i + 2] = v.z, values[i + 3] = v.w;
  }
}
template <int kCount>
__device__ inline void load_words(unsigned at, float (&values)[kCount]) {
  int bits[kCount];
  load_words(at, bits);
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = __int_as_float(bits[i]);
}

__device__ inline float load_entry(unsigned at) {
  float value;
  asm("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(at));
  return value;
}

template <class Scores, class Value>
__device__ inline void fill(Scores& scores, Value value) {
#pragma unroll
  for (int r = 0; r < Scores::kThreadRows; ++r) {
#pragma unroll
    for (int e = 0; e < Scores::kThreadColumns; ++e) scores.at(r, e) = value(r, e);
  }
}

// Replaces indices of table entries by the entries.
template <class Scores>
__device__ inline void look_up(const Bias& bias, int head, unsigned table, Scores& scores) {
  const float* const far = bias.table + static_cast<long long>(head) * bias.entries;
  fill(scores, [&](int r, int e) {
    const int entry = __float_as_int(scores.at(r, e));
    return bias.in_shared ? load_entry(table + entry * 4) : far[entry];
  });
}

__device__ inline int entry_at(const Bias& bias, int query, int key) {
  const long long row = query;
  return bias.narrow != nullptr ? bias.narrow[row * bias.pitch + key]
                                : bias.matrix[row * bias.size + key];
}

// Indices of the entries that rows of the narrow index hold from `column` on, as the bits of the
// scores. Columns past the padded row are never used; their addresses are clamped to stay valid.
template <class Scores>
__device__ inline void load_entries(const Bias& bias, const int (&rows)[Scores::kThreadRows],
                                    int column, Scores& scores) {
  constexpr int kCount = Scores::kThreadColumns;
  uint2 pairs[Scores::kThreadRows][kCount / 4];
  column = min(column, bias.pitch - kCount);
#pragma unroll
  for (int r = 0; r < Scores::kThreadRows; ++r) {
    const unsigned short* const entries =
        bias.narrow + static_cast<long long>(rows[r]) * bias.pitch + column;
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) pairs[r][i] = reinterpret_cast<const uint2*>(entries)[i];
  }
  fill(scores, [&](int r, int e) {
    const unsigned pair = e % 4 < 2 ? pairs[r][e / 4].x : pairs[r][e / 4].y;
    return __int_as_float(e % 2 == 0 ? pair & 0xffff : pair >> 16);
  });
}

// The token of a thread's row; rows past the end repeat the last token.
template <class Scores>
__device__ inline int token_of(const Sequence& sequence, int r) {
  return min(sequence.row_of_warp(Scores::kWarpRows) + Scores::row(r), sequence.tokens - 1);
}

// What the lookup needs of a key of a column tile: four times its column in the closed form of the
// index, with flags in the low bits, and its position. One key per lane. All warps load, which is
// cheaper than a branch on the warp index; the first warp stores.
constexpr int kIrregular = 1, kMasked = 2;

struct KeyCodes {
  static constexpr int kPositions = kColumns * 4;  // bytes between codes and positions
  static constexpr int kBytes = 2 * kPositions;
  int column, regular, attended;

  // Only issues loads; store() uses their results. Each load that depends on another load is in a
  // branch of its own: otherwise its wait would be a wait for all loads in flight.
  __device__ void load(const Call& call, const Sequence& sequence, int first, int last, int keys) {
    const int key = min(first + lane_index(), last);
    column = regular = 0;
    attended = first + lane_index() < keys;
    if (call.positions != nullptr) {
      const int4 affine = call.bias.affine[sequence.position(call, key)];
      column = affine.z;
      regular = affine.w;
    } else if (call.bias.table != nullptr) {
      const int4* const affine = call.bias.affine + key;
      column = affine->z;
      regular = affine->w;
    }
    if (call.key_mask != nullptr && attended) attended = call.key_mask[sequence.first_value + key];
  }
  // A bit mask of the keys of the tile that are attended to.
  __device__ unsigned all_attended() const { return __ballot_sync(kFullWarp, attended); }
  __device__ void store(const Call& call, const Sequence& sequence, unsigned tile, int first,
                        int last) const {
    if (threadIdx.x >= kColumns) return;
    int code = column * 4;
    if (call.bias.table != nullptr && !(regular && call.bias.in_shared)) code = kIrregular;
    if (!attended) code |= kMasked;
    const unsigned at = tile + threadIdx.x * 4;
    store_word(at, code);
    if (call.positions == nullptr) return;
    store_word(at + kPositions, sequence.position(call, min(first + lane_index(), last)));
  }
};

// Lookup for scores with queries as rows and keys as columns.
template <class Scores>
struct QueryLookup {
  static constexpr int kThreadRows = Scores::kThreadRows;
  static constexpr int kThreadColumns = Scores::kThreadColumns;
  unsigned table;                // in shared memory
  unsigned lane_codes;           // byte offset of the codes of the thread's columns
  unsigned factors;              // bit r is the factor of row r
  unsigned offset[kThreadRows];  // address of the entry for column 0

  __device__ QueryLookup(const Call& call, const Sequence& sequence, unsigned table)
      : table(table), lane_codes(keep(Scores::first_column() * 4)), factors(0) {
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      offset[r] = table;
      if (call.bias.table != nullptr) {
        const int query = token_of<Scores>(sequence, r);
        const int4 affine = call.bias.affine[sequence.position(call, query)];
        offset[r] = table + affine.x * 4;
        factors |= affine.y << r;
      }
    }
  }

  // Sets the scores to the bias of 32 keys, and to minus infinity where a query does not attend.
  __device__ void start(const Call& call, const Sequence& sequence, Scores& scores, unsigned codes,
                        int first_key) const {
    int code[kThreadColumns];
    load_words(codes + lane_codes, code);
    int flags = 0;
#pragma unroll
    for (int e = 0; e < kThreadColumns; ++e) flags |= code[e];
    const bool special = __any_sync(kFullWarp, flags & (kIrregular | kMasked));
    if (call.bias.table == nullptr) {
      fill(scores, [](int, int) { return 0.0f; });
    } else if (special && __any_sync(kFullWarp, flags & kIrregular)) {
      start_from_index(call, sequence, scores, codes + KeyCodes::kPositions, first_key);
      mask(call, sequence, scores, code, first_key);  // keeps the waits for loads in this branch
      return;
    } else {
      fill(scores, [&](int r, int e) {
        return load_entry((code[e] & ~3) * (factors >> r & 1) + offset[r]);
      });
    }
    if (special || (call.causal && first_key + kColumns - 1 > sequence.first_row)) {
      mask(call, sequence, scores, code, first_key);
    }
  }

  __device__ void mask(const Call& call, const Sequence& sequence, Scores& scores,
                       const int (&code)[kThreadColumns], int first_key) const {
    const int first_row = sequence.row_of_warp(Scores::kWarpRows);
    fill(scores, [&](int r, int e) {
      const int key = first_key + Scores::first_column() + e;
      const bool later = call.causal && key > first_row + Scores::row(r);
      return code[e] & kMasked || later ? -infinity() : scores.at(r, e);
    });
  }

  // For irregular keys, which have no closed form: reads the index itself. All loads of a phase are
  // issued at once.
  __device__ void start_from_index(const Call& call, const Sequence& sequence, Scores& scores,
                                   unsigned positions, int first_key) const {
    const Bias& bias = call.bias;
    int query[kThreadRows];
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      query[r] = sequence.position(call, token_of<Scores>(sequence, r));
    }
    const int column = first_key + Scores::first_column();
    if (bias.narrow != nullptr && call.positions == nullptr) {
      load_entries(bias, query, column, scores);
    } else {
      int key[kThreadColumns];
      load_words(positions + lane_codes, key);
#pragma unroll
      for (int e = 0; e < kThreadColumns; ++e) {
        if (call.positions == nullptr) key[e] = min(column + e, sequence.tokens - 1);
      }
      fill(scores, [&](int r, int e) { return __int_as_float(entry_at(bias, query[r], key[e])); });
    }
    look_up(bias, sequence.head, table, scores);
  }
};

// What the lookup needs of a query of a column tile: the address of the entry it reads for column 0
// of the closed form, with bit 0 set if it reads that entry for every key; log2 of its sum of
// exponentials; delta; its position.
struct QueryCodes {
  static constexpr int kPart = kColumns * 4;
  static constexpr int kLogSums = kPart, kDeltas = 2 * kPart, kPositions = 3 * kPart;
  static constexpr int kBytes = 4 * kPart;
  int offset, factor, outside;
  float lse, delta;

  // Only issues loads, see KeyCodes.
  __device__ void load(const Call& call, const float* deltas, const Sequence& sequence, int first,
                       int last) {
    const int query = min(first + lane_index(), last);
    offset = factor = 0;
    if (call.positions != nullptr) {
      const int4 affine = call.bias.affine[sequence.position(call, query)];
      offset = affine.x;
      factor = affine.y;
    } else if (call.bias.table != nullptr) {
      const int4* const affine = call.bias.affine + query;
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
    store_word(at, table + offset * 4 + (factor == 0 ? 1 : 0));
    store_word(at + kLogSums, __float_as_int(outside ? infinity() : log_sum(lse)));
    store_word(at + kDeltas, __float_as_int(delta));
    if (call.positions == nullptr) return;
    store_word(at + kPositions, sequence.position(call, min(first + lane_index(), last)));
  }
};

// Lookup for scores with keys as rows and queries as columns.
template <class Scores>
struct KeyLookup {
  static constexpr int kThreadRows = Scores::kThreadRows;
  static constexpr int kThreadColumns = Scores::kThreadColumns;
  unsigned table;           // in shared memory
  unsigned lane_codes;      // byte offset of the codes of the thread's columns
  int column[kThreadRows];  // four times the key's column in the closed form
  unsigned masked;          // bit r is set if no query attends to row r
  bool irregular, special;  // whether some key of the warp is irregular; masked

  __device__ KeyLookup(const Call& call, const Sequence& sequence, unsigned table)
      : table(table), lane_codes(keep(Scores::first_column() * 4)), masked(0) {
    bool any = false;
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      column[r] = 0;
      if (call.bias.table != nullptr) {
        const int position = sequence.position(call, token_of<Scores>(sequence, r));
        const int4 affine = call.bias.affine[position];
        column[r] = affine.z * 4;
        any = any || affine.w == 0 || !call.bias.in_shared;
      }
      const int key = sequence.row_of_warp(Scores::kWarpRows) + Scores::row(r);
      masked |= !sequence.attended(call, key) << r;
    }
    irregular = __any_sync(kFullWarp, any);
    special = __any_sync(kFullWarp, masked != 0);
  }

  // Sets the scores to the bias of 32 queries, and to minus infinity where one does not attend.
  __device__ void start(const Call& call, const Sequence& sequence, Scores& scores, unsigned codes,
                        int first_query) const {
    if (call.bias.table == nullptr) {
      fill(scores, [](int, int) { return 0.0f; });
    } else if (irregular) {
      start_from_index(call, sequence, scores, codes + QueryCodes::kPositions, first_query);
      mask(call, sequence, scores, first_query);  // keeps the waits for loads in this branch
      return;
    } else {
      int code[kThreadColumns];
      load_words(codes + lane_codes, code);
      fill(scores, [&](int r, int e) {
        return load_entry(code[e] & 1 ? code[e] - 1 : code[e] + column[r]);
      });
    }
    if (special || (call.causal && first_query < sequence.first_row + 4 * Scores::kWarpRows)) {
      mask(call, sequence, scores, first_query);
    }
  }

  __device__ void mask(const Call& call, const Sequence& sequence, Scores& scores,
                       int first_query) const {
    const int first_row = sequence.row_of_warp(Scores::kWarpRows);
    fill(scores, [&](int r, int e) {
      const int query = first_query + Scores::first_column() + e;
      const bool earlier = call.causal && query < first_row + Scores::row(r);
      return masked >> r & 1 || earlier ? -infinity() : scores.at(r, e);
    });
  }

  __device__ void start_from_index(const Call& call, const Sequence& sequence, Scores& scores,
                                   unsigned positions, int first_query) const {
    int query[kThreadColumns], key[kThreadRows];
    load_words(positions + lane_codes, query);
#pragma unroll
    for (int e = 0; e < kThreadColumns; ++e) {
      const int token = min(first_query + Scores::first_column() + e, sequence.tokens - 1);
      if (call.positions == nullptr) query[e] = token;
    }
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      key[r] = sequence.position(call, token_of<Scores>(sequence, r));
    }
    fill(scores,
         [&](int r, int e) { return __int_as_float(entry_at(call.bias, query[e], key[r])); });
    look_up(call.bias, sequence.head, table, scores);
  }
};
