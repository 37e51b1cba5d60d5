// The kernels of shared_attention for the instruction set VLMO_INSTRUCTIONS: of bfloat16 if the set
// has products of it, otherwise of every type.
//
// A thread computes one head of a sequence at a time, for a block of queries after another. Scores
// lie transposed in memory, [keys, queries], so that a vector holds a key's scores of several
// queries: the softmax then needs no operation across lanes, a key is left out by leaving out its
// row, and all products take k, v, p and ds as they are. Only q, out and their gradients are
// transposed, which costs dim operations for each query instead of for each pair.
#include "attention.h"

#include "product.h"

namespace vlmo {
namespace {

// Keys whose probabilities, or products with them, are summed before they are added to the others:
// one long chain of additions would round too often for the error bound.
constexpr int kSummedKeys = 16, kMultipliedKeys = 80;  // even
constexpr float kLog2E = 1.44269504089f, kLn2 = 0.693147180560f;

// Memory of one thread. Without memory, it counts the bytes.
class Scratch {
 public:
  explicit Scratch(void* memory) : start_(static_cast<char*>(memory)) {}

  template <class T>
  T* take(std::int64_t count) {
    const std::int64_t offset = used_;
    used_ += round_up(count * static_cast<std::int64_t>(sizeof(T)), 64);
    return start_ == nullptr ? nullptr : reinterpret_cast<T*>(start_ + offset);
  }
  std::int64_t used() const { return used_; }

 private:
  char* start_;
  std::int64_t used_ = 0;
};

// The columns of a head's expanded bias that the scratch memory holds; kept between items.
struct Expanded {
  std::int64_t head_plus_one, first, last;
};

// One sequence of a call.
struct Sequence {
  std::int64_t number, start, length;  // start: first token, counted over all sequences
  std::int64_t count;                  // of valid keys
  const std::int32_t* keys;            // [count]: their places in the sequence
  const std::int64_t* positions;       // [length], or null
};

struct Run {
  std::int64_t lane, column, count;
};

template <class Product>
class Kernel {
 public:
  static constexpr int kElements = Product::kElements;
  static constexpr bool kTiles = Product::kTiles;

  // Three accumulators of 16 lanes, or two pairs of tiles.
  static constexpr int kBlockQueries = kTiles ? 64 : 48;
  static constexpr int kBlockKeys = kTiles ? 128 : 240;  // 32 or 46 KB of scores
  // Multiples of these hold a product's rows and the units that it sums.
  static constexpr int kPadding = kTiles ? 32 : kRowPadding, kDepthPadding = kTiles ? 16 : 1;
  static_assert(kBlockQueries % kLanes == 0 && kBlockKeys % kPadding == 0 &&
                kBlockKeys % (kElements * kDepthPadding) == 0);

  // Products of pairs round to bfloat16, so a rough exponential will do, of scores that include the
  // factor log2(e) of their base. Otherwise rounding that factor would exceed the error bound.
  static constexpr bool kExact = kElements == 1;
  static constexpr float kBase = kExact ? 1.f : kLog2E, kInverseBase = kExact ? 1.f : kLn2;
  static Floats power(Floats x) {
    if constexpr (kExact) return exp_nonpositive(x);
    return rough_exp2_nonpositive(x);
  }
  static Floats exact_power(Floats x) { return exp_nonpositive(x * splat(kInverseBase)); }

  static std::int64_t forward_bytes(const AttentionCall& call) {
    Kernel kernel(call, nullptr);
    kernel.take_forward();
    return kernel.scratch_.used();
  }
  static std::int64_t backward_bytes(const AttentionCall& call) {
    Kernel kernel(call, nullptr);
    kernel.take_backward();
    return kernel.scratch_.used();
  }
  static void forward(const AttentionCall& call, const Item& item, void* scratch) {
    Product::begin();
    Kernel kernel(call, scratch);
    kernel.take_forward();
    kernel.run_forward(item);
    finish_streams();
    Product::end();
  }
  static void backward(const AttentionCall& call, const Item& item, void* scratch) {
    Product::begin();
    Kernel kernel(call, scratch);
    kernel.take_backward();
    kernel.run_backward(item);
    finish_streams();
    Product::end();
  }

 private:
  Kernel(const AttentionCall& call, void* scratch)
      : call_(call), scratch_(scratch), type_(kElements == 2 ? Type::kBfloat16 : call.type),
        size_(type_ == Type::kFloat32 ? 4 : 2), dim_(call.dim), units_(pairs(dim_)),
        row_(round_up(units_, kTiles ? kDepthPadding : 4)), columns_(round_up(dim_, kLanes)),
        wide_(round_up(dim_, kPadding)), most_keys_(round_up(call.length, kPadding)),
        bias_row_(round_up(call.size, kLanes) + kBlockQueries) {
    expanded_ = scratch_.template take<Expanded>(kMaxHeadGroup);
    keys_ = scratch_.template take<std::int32_t>(call.length);
    rows_ = scratch_.template take<std::int64_t>(call.length);
    if (call.table != nullptr) {
      biases_ = scratch_.template take<float>(call.head_group * call.size * bias_row_);
      if (call.positions != nullptr) {
        bias_tile_ = scratch_.template take<float>(kBlockKeys * kBlockQueries);
      }
    }
    k_rows_ = scratch_.template take<float>(most_keys_ * row_);
    q_columns_ = scratch_.template take<float>(round_up(units_, kLanes) * kBlockQueries);
    results_ = scratch_.template take<char>(kLanes * columns_ * size_);
  }

  void take_forward() {
    scores_ = scratch_.template take<float>(kBlockKeys * kBlockQueries);
    v_pairs_ = scratch_.template take<float>(pairs(most_keys_) * wide_);
    result_ = scratch_.template take<float>(round_up(wide_, kLanes) * kBlockQueries);
    top_ = scratch_.template take<float>(kBlockQueries);
    sum_ = scratch_.template take<float>(kBlockQueries);
  }

  void take_backward() {
    v_rows_ = scratch_.template take<float>(most_keys_ * row_);
    k_pairs_ = scratch_.template take<float>(pairs(most_keys_) * wide_);
    do_columns_ = scratch_.template take<float>(round_up(units_, kLanes) * kBlockQueries);
    q_pairs_ = scratch_.template take<float>(pairs(kBlockQueries) * columns_);
    do_pairs_ = scratch_.template take<float>(pairs(kBlockQueries) * columns_);
    // An exact product keeps the scores of all keys.
    const std::int64_t tile = (kExact ? most_keys_ : kBlockKeys) * kBlockQueries;
    scores_ = scratch_.template take<float>(tile);
    dscores_ = scratch_.template take<float>(tile);
    if (!kExact) {
      p_rows_ = scratch_.template take<float>(tile / 2);
      ds_rows_ = scratch_.template take<float>(tile / 2);
    }
    result_ = scratch_.template take<float>(round_up(wide_, kLanes) * kBlockQueries);
    dk_ = scratch_.template take<float>(most_keys_ * columns_);
    dv_ = scratch_.template take<float>(most_keys_ * columns_);
    top_ = scratch_.template take<float>(kBlockQueries);
    delta_ = scratch_.template take<float>(kBlockQueries);
    if (kExact) factor_ = scratch_.template take<float>(kBlockQueries);
    if (call_.dtable != nullptr) {
      dbiases_ = scratch_.template take<float>(call_.head_group * call_.size * bias_row_);
      if (call_.positions != nullptr) {
        dbias_tile_ = scratch_.template take<float>(kBlockKeys * kBlockQueries);
      }
    }
  }

  // ---- heads, sequences and blocks ----

  void choose_head(const Item& item, std::int64_t head) {
    head_ = head, slot_ = head - item.first_head;
    if (biases_ != nullptr) bias_ = biases_ + slot_ * call_.size * bias_row_;
    if (dbiases_ != nullptr) dbias_ = dbiases_ + slot_ * call_.size * bias_row_;
    if (call_.table != nullptr) first_column_ = expanded_[slot_].first;
  }

  static constexpr std::int64_t pairs(std::int64_t count) {
    return (count + kElements - 1) / kElements;
  }

  // Rows of tensors, and their elements.

  const char* row_of(const Rows& rows, const Sequence& s, std::int64_t token) const {
    const std::int64_t at = call_.offsets == nullptr ? s.number * rows.sequence + token * rows.token
                                                     : (s.start + token) * rows.token;
    return static_cast<const char*>(rows.data) + (at + head_ * rows.head) * size_;
  }

  char* result_row(Result result, const Sequence& s, std::int64_t token) const {
    const std::int64_t at = (s.start + token) * call_.result_row + head_ * dim_;
    return static_cast<char*>(result) + at * size_;
  }

  static const std::uint16_t* halves(const char* row) {
    return reinterpret_cast<const std::uint16_t*>(row);
  }

  Floats read(const char* row, std::int64_t first, std::int64_t count) const {
    if (type_ == Type::kFloat32) {
      return load_some(reinterpret_cast<const float*>(row) + first, count);
    }
    return widen(type_, load_bits(halves(row) + first, count));
  }

  void write(char* row, std::int64_t first, Floats x) const {
    if (type_ == Type::kFloat32) {
      store(reinterpret_cast<float*>(row) + first, x);
    } else {
      store_bits(reinterpret_cast<std::uint16_t*>(row) + first, narrow(type_, x), kLanes);
    }
  }

  std::int64_t length_of(std::int64_t number) const {
    const std::int64_t* offsets = call_.offsets;
    return offsets == nullptr ? call_.length : offsets[number + 1] - offsets[number];
  }

  Sequence sequence(std::int64_t number) {
    Sequence s{};
    s.number = number;
    s.start = call_.offsets == nullptr ? number * call_.length : call_.offsets[number];
    s.length = length_of(number);
    s.positions = call_.positions == nullptr ? nullptr : call_.positions + s.start;
    std::int64_t limit = s.length;
    if (call_.key_lengths != nullptr) limit = smaller(limit, call_.key_lengths[number]);
    const bool* mask =
        call_.key_mask == nullptr ? nullptr : call_.key_mask + number * call_.length;
    for (std::int64_t key = 0; key < limit; ++key) {
      if (mask == nullptr || mask[key]) keys_[s.count++] = static_cast<std::int32_t>(key);
    }
    s.keys = keys_;
    if (call_.table != nullptr) {
      for (std::int64_t j = 0; j < s.count; ++j) {
        rows_[j] = (s.positions == nullptr ? s.keys[j] : s.positions[s.keys[j]]) * bias_row_;
      }
    }
    return s;
  }

  // First query of a block, and of the next one.
  struct Block {
    std::int64_t first, last, width;  // width: a multiple of kLanes
  };

  static std::int64_t block_count(std::int64_t length) {
    return (length + kBlockQueries - 1) / kBlockQueries;
  }

  // Blocks differ by one vector at most, so that none is narrow.
  static Block block(std::int64_t length, std::int64_t number) {
    const std::int64_t vectors = (length + kLanes - 1) / kLanes, count = block_count(length);
    const std::int64_t first = number * vectors / count, last = (number + 1) * vectors / count;
    return {first * kLanes, smaller(last * kLanes, length), (last - first) * kLanes};
  }

  // Fetches rows of the sequence after the current one into the L2 cache, a few at each call: the
  // rows of one head are far apart, which prefetchers of CPUs do not follow. Without it, waiting
  // for memory took a quarter of the forward.
  void begin_prefetch(const Sequence& s, std::int64_t next, std::int64_t last) {
    next_.number = next;
    next_.length = 0, prefetched_ = 0;
    if (next >= last) return;
    next_.start = call_.offsets == nullptr ? next * call_.length : call_.offsets[next];
    next_.length = length_of(next);
    // About one call for every 8 keys of each block of queries.
    const std::int64_t calls = block_count(s.length) * ((s.count + 7) / 8);
    prefetch_step_ = 1 + next_.length / (calls + 1);
  }

  void prefetch_rows() {
    for (int i = 0; i < prefetch_step_ && prefetched_ < next_.length; ++i, ++prefetched_) {
      prefetch_row(row_of(call_.q, next_, prefetched_));
      prefetch_row(row_of(call_.k, next_, prefetched_));
      prefetch_row(row_of(call_.v, next_, prefetched_));
      if (call_.dout.data != nullptr) {
        if (!kExact) prefetch_row(row_of(call_.out, next_, prefetched_));
        prefetch_row(row_of(call_.dout, next_, prefetched_));
      }
    }
  }

  void prefetch_row(const char* row) const {
    for (std::int64_t at = 0; at < dim_ * size_; at += 64) __builtin_prefetch(row + at, 0, 2);
  }

  // ---- operands ----

  // Units of a row, from unit `first` on, with zeros beyond dim.
  Floats units(const char* row, std::int64_t first) const {
    const std::int64_t left = dim_ - first * kElements;
    if constexpr (kElements == 1) {
      return read(row, first, left);
    } else {
      Floats bits{};  // memcpy: rows of odd strides are not aligned to 4 bytes
      if (left >= 2 * kLanes) {
        std::memcpy(&bits, row + 4 * first, sizeof bits);
      } else if (left > 0) {
        std::memcpy(&bits, row + 4 * first, 2 * left);
      }
      return bits;
    }
  }

  // [count, row_]: the rows of a tensor for the valid keys.
  void pack_rows(float* to, const Rows& rows, const Sequence& s) const {
    for (std::int64_t j = 0; j < s.count; ++j) {
      const char* row = row_of(rows, s, s.keys[j]);
      for (std::int64_t u = 0; u < units_; u += kLanes) {
        const Floats bits = units(row, u);
        if (u + kLanes <= row_) {
          store(to + j * row_ + u, bits);
        } else {
          std::memcpy(to + j * row_ + u, &bits, 4 * (row_ - u));
        }
      }
    }
    std::memset(to + s.count * row_, 0, 4 * (round_up(s.count, kPadding) - s.count) * row_);
  }

  // Elements of two rows in pairs, from dimension d on; a row that is null has zeros.
  Floats interleaved(const char* first, const char* second, std::int64_t d) const {
    Words both{};
    if (first != nullptr) both = load_bits(halves(first) + d, dim_ - d);
    if (second != nullptr) both |= load_bits(halves(second) + d, dim_ - d) << 16;
    return Floats(both);
  }

  // [pairs(count), width]: rows, each two of them interleaved if the product takes pairs.
  template <class RowAt>
  void pack_pairs(float* to, std::int64_t width, std::int64_t count, RowAt row_at) const {
    for (std::int64_t j = 0; j < count; j += kElements) {
      float* target = to + j / kElements * width;
      const char* first = row_at(j);
      const char* second = kElements == 2 && j + 1 < count ? row_at(j + 1) : nullptr;
      for (std::int64_t d = 0; d < width; d += kLanes) {
        Floats bits;
        if constexpr (kElements == 1) {
          bits = read(first, d, dim_ - d);
        } else {
          bits = interleaved(first, second, d);
        }
        if (d + kLanes <= width) {
          store(target + d, bits);
        } else {
          std::memcpy(target + d, &bits, 4 * (width - d));
        }
      }
    }
  }

  // The rows of a tensor for the valid keys, in pairs, as add_products takes them:
  // [pairs(keys), wide_], or [wide_, most_pairs()] for tiles.
  void pack_key_pairs(float* to, const Rows& rows, const Sequence& s) const {
    const auto row_at = [&](std::int64_t j) { return row_of(rows, s, s.keys[j]); };
    if constexpr (!kTiles) {
      pack_pairs(to, wide_, s.count, row_at);
    } else {
      for (std::int64_t pair = 0; pair < pairs(s.count); pair += kLanes) {
        Floats square[kLanes];
        for (std::int64_t d = 0; d < wide_; d += kLanes) {
          for (int lane = 0; lane < kLanes; ++lane) {
            const std::int64_t j = 2 * (pair + lane);
            square[lane] = interleaved(j < s.count ? row_at(j) : nullptr,
                                       j + 1 < s.count ? row_at(j + 1) : nullptr, d);
          }
          transpose(square);
          for (int lane = 0; lane < kLanes; ++lane) {
            store(to + (d + lane) * most_pairs() + pair, square[lane]);
          }
        }
      }
    }
  }
  std::int64_t most_pairs() const { return most_keys_ / kElements; }

  // [units, kBlockQueries]: the block's rows of a tensor, transposed.
  void pack_columns(float* to, const Rows& rows, const Sequence& s, const Block& block) const {
    for (std::int64_t i = 0; i < block.width; i += kLanes) {
      for (std::int64_t u = 0; u < units_; u += kLanes) {
        Floats square[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) {
          const std::int64_t token = block.first + i + lane;
          square[lane] = token < block.last ? units(row_of(rows, s, token), u) : Floats{};
        }
        transpose(square);
        for (int lane = 0; lane < kLanes; ++lane) {
          store(to + (u + lane) * kBlockQueries + i, square[lane]);
        }
      }
    }
  }

  // The inverse for a result [dim, kBlockQueries], multiplied by factor[query].
  void unpack_columns(Result to, const float* from, const float* factor, const Sequence& s,
                      const Block& block) const {
    for (std::int64_t i = 0; i < block.width; i += kLanes) {
      const Floats factors = load(factor + i);
      for (std::int64_t d = 0; d < dim_; d += kLanes) {
        Floats square[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) {
          square[lane] = load(from + (d + lane) * kBlockQueries + i) * factors;
        }
        transpose(square);
        for (int lane = 0; lane < kLanes; ++lane) {
          write(results_ + lane * columns_ * size_, d, square[lane]);
        }
      }
      const std::int64_t token = block.first + i;
      write_rows(to, s, token, smaller(kLanes, block.last - token));
    }
  }

  // Writes the first rows of results_, [kLanes, columns_], as rows of a result.
  void write_rows(Result to, const Sequence& s, std::int64_t token, std::int64_t count) const {
    const std::int64_t bytes = dim_ * size_;
    for (std::int64_t i = 0; i < count; ++i) {
      const char* from = results_ + i * columns_ * size_;
      char* row = result_row(to, s, token + i);
      if (!call_.streams) {
        std::memcpy(row, from, bytes);
        continue;
      }
      for (std::int64_t at = 0; at < bytes; at += 64) stream_line(row + at, from + at);
    }
  }

  // ---- bias ----

  // Expands the head's bias, times kBase: bias_[key * bias_row_ + query - first].
  void expand(std::int64_t first, std::int64_t last) {
    Expanded& expanded = expanded_[slot_];
    if (expanded.head_plus_one == head_ + 1 && expanded.first <= first && last <= expanded.last) {
      return;
    }
    expanded = {head_ + 1, first, last};
    const float* entries = call_.table + head_ * call_.entries;
    const std::int64_t size = call_.size;
    for (std::int64_t key = 0; key < size; key += kLanes) {
      const std::int64_t count = smaller(kLanes, size - key);
      for (std::int64_t query = first; query < last; query += kLanes) {
        Floats square[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) {
          const std::int64_t row = smaller(query + lane, size - 1);
          square[lane] = gather(entries, call_.matrix + row * call_.matrix_row + key, count);
        }
        transpose(square);
        for (int lane = 0; lane < count; ++lane) {
          store(bias_ + (key + lane) * bias_row_ + query - first, square[lane] * splat(kBase));
        }
      }
    }
    const std::int64_t filled = round_up(last - first, kLanes);
    for (std::int64_t key = 0; key < size; ++key) {
      std::memset(bias_ + key * bias_row_ + filled, 0, 4 * kBlockQueries);
    }
  }

  static Floats gather(const float* entries, const std::int32_t* indices, std::int64_t count) {
    std::int32_t whole[kLanes] = {};
    if (count < kLanes) {
      std::memcpy(whole, indices, 4 * count);
      indices = whole;
    }
#if defined(__AVX512F__)
    return _mm512_i32gather_ps(_mm512_loadu_si512(indices), entries, 4);
#elif defined(__AVX2__)
    return _mm256_i32gather_ps(
        entries, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(indices)), 4);
#else
    Floats found;
    for (int lane = 0; lane < kLanes; ++lane) found[lane] = entries[indices[lane]];
    return found;
#endif
  }

  // The columns of the bias that the queries of an item read, and its expansion.
  void expand_for(const Item& item) {
    if (call_.table == nullptr) return;
    std::int64_t first = call_.size, last = 0;
    for (std::int64_t number = item.first; number < item.last; ++number) {
      if (call_.positions != nullptr) {
        first = 0, last = call_.size;
        break;
      }
      const std::int64_t length = length_of(number);
      const std::int64_t from = item.part * block_count(length) / item.parts;
      const std::int64_t to = (item.part + 1) * block_count(length) / item.parts;
      if (from == to) continue;
      first = smaller(first, block(length, from).first);
      const std::int64_t end = block(length, to - 1).last;
      last = last > end ? last : end;
    }
    if (first < last) expand(first, last);
  }

  // Finds the runs of consecutive positions among a block's queries.
  void find_runs(const Sequence& s, const Block& block) {
    run_count_ = 0;
    if (s.positions == nullptr) return;
    for (std::int64_t i = block.first; i < block.last; ++i) {
      if (i > block.first && s.positions[i] == s.positions[i - 1] + 1) {
        ++runs_[run_count_ - 1].count;
      } else {
        runs_[run_count_++] = {i - block.first, s.positions[i], 1};
      }
    }
  }

  // Where the rows of the block's bias begin: row j at rows_[j], or in a tile at j * kBlockQueries.
  bool in_place(const Sequence& s) const { return s.positions == nullptr || run_count_ == 1; }
  std::int64_t column_of(const Sequence& s, const Block& block) const {
    return (s.positions == nullptr ? block.first : runs_[0].column) - first_column_;
  }

  void copy_bias_tile(std::int64_t first, std::int64_t count) {
    for (std::int64_t j = 0; j < count; ++j) {
      const float* from = bias_ + rows_[first + j] - first_column_;
      float* to = bias_tile_ + j * kBlockQueries;
      for (std::int64_t r = 0; r < run_count_; ++r) {
        std::memcpy(to + runs_[r].lane, from + runs_[r].column, 4 * runs_[r].count);
      }
      const std::int64_t used = runs_[run_count_ - 1].lane + runs_[run_count_ - 1].count;
      std::memset(to + used, 0, 4 * (kBlockQueries - used));
    }
  }

  void add_dbias_tile(std::int64_t first, std::int64_t count) {
    for (std::int64_t j = 0; j < count; ++j) {
      float* to = dbias_ + rows_[first + j] - first_column_;
      const float* from = dbias_tile_ + j * kBlockQueries;
      for (std::int64_t r = 0; r < run_count_; ++r) {
        for (std::int64_t i = 0; i < runs_[r].count; ++i) {
          to[runs_[r].column + i] += from[runs_[r].lane + i];
        }
      }
    }
  }

  // Row j of a tile of the bias or of its gradient.
  struct BiasRows {
    float* start;              // null without a bias
    const std::int64_t* rows;  // null: kBlockQueries apart

    float* at(std::int64_t j) const {
      return start + (rows == nullptr ? j * kBlockQueries : rows[j]);
    }
  };

  BiasRows bias_rows(const Sequence& s, const Block& block, std::int64_t first,
                     std::int64_t count) {
    if (call_.table == nullptr) return {nullptr, nullptr};
    if (in_place(s)) return {bias_ + column_of(s, block), rows_ + first};
    copy_bias_tile(first, count);
    return {bias_tile_, nullptr};
  }

  // Adds dbias_ to the head's row of the table's gradient.
  void scatter(const Item& item) {
    double* to = call_.dtable + (item.chunk * call_.heads + head_) * call_.entries;
    const std::int64_t size = call_.size;
    for (std::int64_t query = 0; query < size; query += kLanes) {
      for (std::int64_t key = 0; key < size; key += kLanes) {
        Floats square[kLanes];
        const std::int64_t keys = smaller(kLanes, size - key);
        for (int lane = 0; lane < kLanes; ++lane) {
          square[lane] = lane < keys ? load(dbias_ + (key + lane) * bias_row_ + query) : Floats{};
        }
        transpose(square);
        for (int lane = 0; lane < smaller(kLanes, size - query); ++lane) {
          const std::int32_t* indices = call_.matrix + (query + lane) * call_.matrix_row + key;
          // Neighbouring keys often share an entry.
          std::int32_t entry = indices[0];
          double total = 0;
          for (int j = 0; j < keys; ++j) {
            if (indices[j] != entry) {
              to[entry] += total;
              entry = indices[j], total = 0;
            }
            total += square[lane][j];
          }
          to[entry] += total;
        }
      }
    }
  }

  // The number of leading keys that a block's queries attend to.
  std::int64_t reach(const Sequence& s, const Block& block) const {
    if (!call_.causal) return s.count;
    std::int64_t low = 0, high = s.count;
    while (low < high) {
      const std::int64_t middle = (low + high) / 2;
      if (s.keys[middle] < block.last) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  // How a product of q and k becomes a score, times kBase. A copy of its own in each block of a
  // product spares loads: stores of vectors might change any member.
  struct Scores {
    Floats factor;
    BiasRows bias;
    const std::int32_t* keys;  // of the rows; null if every query attends to all of them
    std::int64_t first;        // query

    template <class Use, int vectors>
    void compute(std::int64_t j, int column, Floats (&products)[vectors], Use&& use) const {
      const float* row = bias.start == nullptr ? nullptr : bias.at(j) + column;
#pragma GCC unroll 16
      for (int n = 0; n < vectors; ++n) {
        Floats x = products[n] * factor;
        if (row != nullptr) x += load(row + n * kLanes);
        if (keys != nullptr) x = without_later(x, keys[j] - first - column - n * kLanes);
        use(n, x);
      }
    }

    static Floats without_later(Floats x, std::int64_t first_valid) {
      if (first_valid <= 0) return x;
      const Words lanes = lane_numbers();
      return where(Words(lanes < static_cast<std::uint32_t>(first_valid)),
                   splat(-__builtin_inff()), x);
    }
  };

  Scores scores_rule(const Sequence& s, const Block& block, std::int64_t first,
                     std::int64_t count) {
    return {splat(call_.scale * kBase), bias_rows(s, block, first, count),
            call_.causal ? s.keys + first : nullptr, block.first};
  }

  // multiply() of rows of k or v, for the keys from `first` on, and a block's columns of q or dout.
  template <class Use>
  void multiply_keys(const float* rows, const float* columns, const Block& block,
                     std::int64_t first, std::int64_t count, Use&& use) const {
    multiply<Product, Order::kSummedAdjacent>(count, block.width, units_, rows + first * row_, row_,
                                              columns, kBlockQueries, use);
  }

  // Adds the product of k or v, [keys, dim] in pairs, and a tile of weights to result_.
  void add_products(const float* rows, const float* weights, const Block& block,
                    std::int64_t first, std::int64_t count) {
    constexpr std::int64_t step = kExact ? kMultipliedKeys : kBlockKeys;
    constexpr Order order = kTiles ? Order::kSummedAdjacent : Order::kRowsAdjacent;
    const std::int64_t row = kTiles ? most_pairs() : wide_, next = kTiles ? 1 : wide_;
    for (std::int64_t j = 0; j < count; j += step) {
      add_product<Product, order>(dim_, block.width, pairs(smaller(step, count - j)),
                                  rows + (first + j) / kElements * next, row,
                                  weights + j / kElements * kBlockQueries, kBlockQueries, result_,
                                  kBlockQueries);
    }
  }

  // Zeros behind the weights of `count` keys, as far as add_products reads them.
  static void clear_weights(float* weights, std::int64_t count) {
    const std::int64_t filled = pairs(count), all = round_up(filled, kDepthPadding);
    std::memset(weights + filled * kBlockQueries, 0, 4 * (all - filled) * kBlockQueries);
  }

  // ---- forward ----

  void run_forward(const Item& item) {
    for (std::int64_t head = item.first_head; head < item.last_head; ++head) {
      choose_head(item, head);
      expand_for(item);
    }
    for (std::int64_t number = item.first; number < item.last; ++number) {
      for (std::int64_t head = item.first_head; head < item.last_head; ++head) {
        choose_head(item, head);
        forward_sequence(item, number);
      }
    }
  }

  void forward_sequence(const Item& item, std::int64_t number) {
    const Sequence s = sequence(number);
    const std::int64_t blocks = block_count(s.length);
    const std::int64_t first = item.part * blocks / item.parts;
    const std::int64_t last = (item.part + 1) * blocks / item.parts;
    if (first == last) return;
    begin_prefetch(s, number + 1, item.last);
    pack_rows(k_rows_, call_.k, s);
    pack_key_pairs(v_pairs_, call_.v, s);
    for (std::int64_t b = first; b < last; ++b) forward_block(s, block(s.length, b));
  }

  void forward_block(const Sequence& s, const Block& block) {
    pack_columns(q_columns_, call_.q, s, block);
    find_runs(s, block);
    const float low = -__builtin_inff();
    for (std::int64_t i = 0; i < block.width; i += kLanes) {
      store(top_ + i, splat(low)), store(sum_ + i, Floats{});
    }
    std::memset(result_, 0, 4 * round_up(wide_, kLanes) * kBlockQueries);
    const std::int64_t keys = reach(s, block);
    for (std::int64_t first = 0; first < keys; first += kBlockKeys) {
      const std::int64_t count = smaller(kBlockKeys, keys - first);
      Floats before[kBlockQueries / kLanes];
      for (std::int64_t i = 0; i < block.width; i += kLanes) before[i / kLanes] = load(top_ + i);
      compute_scores(s, block, first, count);
      if (first > 0) rescale(block, before);
      exponentiate(block, count);
      clear_weights(scores_, count);
      add_products(v_pairs_, scores_, block, first, count);
    }
    for (std::int64_t i = 0; i < block.last - block.first; ++i) {
      const float total = sum_[i];
      const std::int64_t at = (s.start + block.first + i) * call_.heads + head_;
      call_.lse_result[at] =
          total == 0 ? low : (top_[i] == low ? 0 : top_[i] * kInverseBase) + __builtin_logf(total);
      sum_[i] = total == 0 ? 0 : 1 / total;
    }
    unpack_columns(call_.out_result, result_, sum_, s, block);
  }

  // scores_ [keys, queries], and their maxima in top_.
  void compute_scores(const Sequence& s, const Block& block, std::int64_t first,
                      std::int64_t count) {
    const Scores rule = scores_rule(s, block, first, count);
    multiply_keys(k_rows_, q_columns_, block, first, count,
                  [&](int row, int column, auto& products) {
                    prefetch_rows();
                    keep_scores(rule, scores_, top_, count, row, column, products);
                  });
  }

  template <int vectors>
  static void load_vectors(Floats (&to)[vectors], const float* from) {
#pragma GCC unroll 16
    for (int n = 0; n < vectors; ++n) to[n] = load(from + n * kLanes);
  }

  template <int rows, int vectors>
  static void keep_scores(const Scores rule, float* scores, float* maxima, std::int64_t count,
                          int row, int column, Floats (&products)[rows][vectors]) {
    Floats top[vectors];
    load_vectors(top, maxima + column);
#pragma GCC unroll 16
    for (int m = 0; m < rows; ++m) {
      if (row + m >= count) break;
      float* to = scores + (row + m) * kBlockQueries + column;
      rule.compute(row + m, column, products[m], [&](int n, Floats x) {
        store(to + n * kLanes, x);
        top[n] = maximum(x, top[n]);
      });
    }
#pragma GCC unroll 16
    for (int n = 0; n < vectors; ++n) store(maxima + column + n * kLanes, top[n]);
  }

  // Relates sums of earlier keys to the new maxima.
  void rescale(const Block& block, const Floats* before) {
    for (std::int64_t i = 0; i < block.width; i += kLanes) {
      const Floats factor = exact_power(before[i / kLanes] - finite_top(i));
      store(sum_ + i, load(sum_ + i) * factor);
      for (std::int64_t d = 0; d < dim_; ++d) {
        float* at = result_ + d * kBlockQueries + i;
        store(at, load(at) * factor);
      }
    }
  }

  // The maxima, or 0 where no key is valid.
  Floats finite_top(std::int64_t i) const {
    const Floats top = load(top_ + i);
    return where(Words(top == splat(-__builtin_inff())), Floats{}, top);
  }

  // Replaces scores_ by power(score - top), in pairs of keys if the product takes them.
  void exponentiate(const Block& block, std::int64_t count) {
    for (std::int64_t i = 0; i < block.width; i += kLanes) {
      const Floats top = finite_top(i);
      Floats total = load(sum_ + i);
      for (std::int64_t first = 0; first < count; first += kSummedKeys) {
        Floats part{};
        for (std::int64_t j = first; j < smaller(first + kSummedKeys, count); j += kElements) {
          const float* from = scores_ + j * kBlockQueries + i;
          float* to = scores_ + j / kElements * kBlockQueries + i;
          const Floats p = power(load(from) - top);
          part += p;
          if constexpr (kElements == 1) {
            store(to, p);
          } else {
            Floats next{};
            if (j + 1 < count) next = power(load(from + kBlockQueries) - top);
            part += next;
            store(to, Product::pair(p, next));
          }
        }
        total += part;
      }
      store(sum_ + i, total);
    }
  }

  // ---- backward ----

  void run_backward(const Item& item) {
    for (std::int64_t head = item.first_head; head < item.last_head; ++head) {
      choose_head(item, head);
      expand_for(item);
      if (dbias_ != nullptr) std::memset(dbias_, 0, 4 * call_.size * bias_row_);
    }
    for (std::int64_t number = item.first; number < item.last; ++number) {
      for (std::int64_t head = item.first_head; head < item.last_head; ++head) {
        choose_head(item, head);
        backward_sequence(item, number);
      }
    }
    for (std::int64_t head = item.first_head; head < item.last_head && dbias_ != nullptr; ++head) {
      choose_head(item, head);
      scatter(item);
    }
  }

  void backward_sequence(const Item& item, std::int64_t number) {
    const Sequence s = sequence(number);
    begin_prefetch(s, number + 1, item.last);
    pack_rows(k_rows_, call_.k, s);
    pack_rows(v_rows_, call_.v, s);
    pack_key_pairs(k_pairs_, call_.k, s);
    std::memset(dk_, 0, 4 * round_up(s.count, kPadding) * columns_);
    std::memset(dv_, 0, 4 * round_up(s.count, kPadding) * columns_);
    for (std::int64_t b = 0; b < block_count(s.length); ++b) {
      backward_block(s, block(s.length, b));
    }
    write_keys(call_.dk, dk_, call_.scale, s);
    write_keys(call_.dv, dv_, 1, s);
  }

  void backward_block(const Sequence& s, const Block& block) {
    pack_columns(q_columns_, call_.q, s, block);
    pack_columns(do_columns_, call_.dout, s, block);
    const std::int64_t queries = block.last - block.first;
    pack_pairs(q_pairs_, columns_, queries,
               [&](std::int64_t i) { return row_of(call_.q, s, block.first + i); });
    pack_pairs(do_pairs_, columns_, queries,
               [&](std::int64_t i) { return row_of(call_.dout, s, block.first + i); });
    const std::int64_t filled = pairs(queries), all = query_pairs(block);
    std::memset(q_pairs_ + filled * columns_, 0, 4 * (all - filled) * columns_);
    std::memset(do_pairs_ + filled * columns_, 0, 4 * (all - filled) * columns_);
    const std::int64_t keys = reach(s, block);
    load_lse(s, block);
    find_runs(s, block);
    std::memset(result_, 0, 4 * round_up(wide_, kLanes) * kBlockQueries);
    if (kExact) {
      for (std::int64_t first = 0; first < keys; first += kBlockKeys) {
        compute_probabilities(s, block, first, smaller(kBlockKeys, keys - first));
      }
      find_centers(block, keys);
    } else {
      compute_delta(s, block);
    }
    for (std::int64_t first = 0; first < keys; first += kBlockKeys) {
      const std::int64_t count = smaller(kBlockKeys, keys - first);
      if (!kExact) compute_probabilities(s, block, first, count);
      float *p = scores_of(first), *ds = dscores_of(first);
      BiasRows dbias{nullptr, nullptr};
      if (dbias_ != nullptr && in_place(s)) {
        dbias = {dbias_ + column_of(s, block), rows_ + first};
      } else if (dbias_ != nullptr) {
        dbias = {dbias_tile_, nullptr};
        std::memset(dbias_tile_, 0, 4 * count * kBlockQueries);
      }
      compute_dscores(dbias, p, ds, block, count);
      if (dbias.start == dbias_tile_ && dbias_tile_ != nullptr) add_dbias_tile(first, count);
      float *p_rows = kExact ? p : p_rows_, *ds_rows = kExact ? ds : ds_rows_;
      finish_pairs(p, ds, p_rows, ds_rows, block, count);
      constexpr std::int64_t line = kBlockQueries / kElements;
      add_product<Product, Order::kSummedAdjacent>(count, columns_, query_pairs(block), p_rows,
                                                   line, do_pairs_, columns_,
                                                   dv_ + first * columns_, columns_);
      add_product<Product, Order::kSummedAdjacent>(count, columns_, query_pairs(block), ds_rows,
                                                   line, q_pairs_, columns_,
                                                   dk_ + first * columns_, columns_);
      add_products(k_pairs_, ds, block, first, count);
    }
    for (std::int64_t i = 0; i < block.width; i += kLanes) store(top_ + i, splat(call_.scale));
    unpack_columns(call_.dq, result_, top_, s, block);
  }

  // Pairs of queries, with zeros up to those that a product sums.
  static std::int64_t query_pairs(const Block& block) {
    return round_up(pairs(block.width), kDepthPadding);
  }

  // Where the keys from `first` on lie: behind those before them, or in their place.
  float* scores_of(std::int64_t first) const {
    return scores_ + (kExact ? first * kBlockQueries : 0);
  }
  float* dscores_of(std::int64_t first) const {
    return dscores_ + (kExact ? first * kBlockQueries : 0);
  }

  // p and dp of the keys from `first` on.
  void compute_probabilities(const Sequence& s, const Block& block, std::int64_t first,
                             std::int64_t count) {
    float *p = scores_of(first), *dp = dscores_of(first);
    const Scores rule = scores_rule(s, block, first, count);
    multiply_keys(k_rows_, q_columns_, block, first, count,
                  [&](int row, int column, auto& products) {
                    prefetch_rows();
                    keep_probabilities(rule, p, top_, count, row, column, products);
                  });
    clear_probabilities(p, block, count);
    multiply_keys(v_rows_, do_columns_, block, first, count,
                  [&](int row, int column, auto& products) {
                    keep(dp, count, row, column, products);
                  });
  }

  // top_ = log-sum-exp times kBase, infinite in lanes without a query and without a key.
  void load_lse(const Sequence& s, const Block& block) {
    for (std::int64_t i = 0; i < block.width; ++i) {
      const std::int64_t token = block.first + i;
      top_[i] = __builtin_inff();
      if (token >= block.last) continue;
      const float lse = call_.lse[(s.start + token) * call_.heads + head_];
      if (lse != -__builtin_inff()) top_[i] = lse * kBase;
    }
  }

  // delta_ = sum(dout * out).
  void compute_delta(const Sequence& s, const Block& block) {
    for (std::int64_t i = 0; i < block.width; ++i) {
      const std::int64_t token = block.first + i;
      Floats total{};
      for (std::int64_t d = 0; d < dim_ && token < block.last; d += kLanes) {
        total += read(row_of(call_.out, s, token), d, dim_ - d) *
                 read(row_of(call_.dout, s, token), d, dim_ - d);
      }
      delta_[i] = sum(total);
    }
  }

  // p [keys, queries].
  template <int rows, int vectors>
  static void keep_probabilities(const Scores rule, float* p, const float* lse, std::int64_t count,
                                 int row, int column, Floats (&products)[rows][vectors]) {
    Floats base[vectors];
    load_vectors(base, lse + column);
#pragma GCC unroll 16
    for (int m = 0; m < rows; ++m) {
      if (row + m >= count) break;
      float* to = p + (row + m) * kBlockQueries + column;
      rule.compute(row + m, column, products[m], [&](int n, Floats x) {
        store(to + n * kLanes, power(x - base[n]));
      });
    }
  }

  // Zeros in the lanes without a query, which only the last vector has. Their bias is that of
  // another query or of none: it need not be finite.
  static void clear_probabilities(float* p, const Block& block, std::int64_t count) {
    const std::int64_t used = block.last - block.first - (block.width - kLanes);
    if (used == kLanes) return;
    const Words filled = Words(lane_numbers() < static_cast<std::uint32_t>(used));
    for (std::int64_t j = 0; j < count; ++j) {
      float* at = p + j * kBlockQueries + block.width - kLanes;
      store(at, where(filled, load(at), Floats{}));
    }
  }

  template <int rows, int vectors>
  static void keep(float* to, std::int64_t count, int row, int column,
                   Floats (&products)[rows][vectors]) {
#pragma GCC unroll 16
    for (int m = 0; m < rows; ++m) {
      if (row + m >= count) break;
#pragma GCC unroll 16
      for (int n = 0; n < vectors; ++n) {
        store(to + (row + m) * kBlockQueries + column + n * kLanes, products[m][n]);
      }
    }
  }

  // factor_ = 1 / sum(p) and delta_ = sum(p dp) / sum(p), over all keys of a query. The sum of p is
  // not 1 because the log-sum-exp is rounded. A common factor of all p of a query would shift the
  // gradients of its scores in one direction, as would delta_ from a rounded out, and their sums,
  // which are gradients of the table, far more than a rounding of each.
  void find_centers(const Block& block, std::int64_t keys) {
    for (std::int64_t i = 0; i < block.width; i += kLanes) {
      Floats weight{}, total{};
      for (std::int64_t first = 0; first < keys; first += kSummedKeys) {
        Floats some_weight{}, some{};
        for (std::int64_t j = first; j < smaller(first + kSummedKeys, keys); ++j) {
          const Floats p = load(scores_ + j * kBlockQueries + i);
          some_weight += p;
          some += p * load(dscores_ + j * kBlockQueries + i);
        }
        weight += some_weight;
        total += some;
      }
      // Lanes without a query, and queries without a key, have no weight.
      const Floats factor = where(Words(weight == Floats{}), Floats{}, splat(1) / weight);
      store(factor_ + i, factor);
      store(delta_ + i, total * factor);
    }
  }

  // ds = p (dp - delta) from dp, with p times factor_ if the product is exact.
  void compute_dscores(const BiasRows dbias, float* p, float* ds, const Block& block,
                       std::int64_t count) const {
    for (std::int64_t i = 0; i < block.width; i += kLanes) {
      const Floats delta = load(delta_ + i), factor = kExact ? load(factor_ + i) : Floats{};
      for (std::int64_t j = 0; j < count; ++j) {
        const std::int64_t at = j * kBlockQueries + i;
        Floats weight = load(p + at);
        if (kExact) store(p + at, weight = weight * factor);
        const Floats gradient = weight * (load(ds + at) - delta);
        store(ds + at, gradient);
        if (dbias.start != nullptr) {
          float* sum = dbias.at(j) + i;
          store(sum, load(sum) + gradient);
        }
      }
    }
  }

  // Completes p_rows and ds_rows [keys, pairs of queries], with zeros for further keys, and ds,
  // [pairs of keys, queries].
  static void finish_pairs(const float* p, float* ds, float* p_rows, float* ds_rows,
                           const Block& block, std::int64_t count) {
    const std::int64_t line = kBlockQueries / kElements;
    const std::int64_t missing = round_up(count, kPadding) - count;
    std::memset(p_rows + count * line, 0, 4 * missing * line);
    std::memset(ds_rows + count * line, 0, 4 * missing * line);
    if constexpr (kElements == 2) {
      for (std::int64_t j = 0; j < count; ++j) {
        for (std::int64_t i = 0; i < block.width; i += kLanes) {
          const std::int64_t at = j * kBlockQueries + i;
          store_halves(p_rows + at / 2, Product::narrow(load(p + at)));
          store_halves(ds_rows + at / 2, Product::narrow(load(ds + at)));
        }
        for (std::int64_t i = block.width; i < 2 * query_pairs(block); i += kLanes) {
          const std::int64_t at = j * kBlockQueries + i;
          store_halves(p_rows + at / 2, Halves{});
          store_halves(ds_rows + at / 2, Halves{});
        }
      }
      for (std::int64_t j = 0; j < count; j += 2) {
        for (std::int64_t i = 0; i < block.width; i += kLanes) {
          const float* from = ds + j * kBlockQueries + i;
          Floats next{};
          if (j + 1 < count) next = load(from + kBlockQueries);
          store(ds + j / 2 * kBlockQueries + i, Product::pair(load(from), next));
        }
      }
      clear_weights(ds, count);
    }
  }

  static void store_halves(float* to, Halves x) { std::memcpy(to, &x, sizeof x); }

  // Writes the gradient of k or v; zeros for keys that are not valid.
  void write_keys(Result to, const float* from, float factor, const Sequence& s) const {
    std::int64_t j = 0;
    for (std::int64_t token = 0; token < s.length; token += kLanes) {
      const std::int64_t count = smaller(kLanes, s.length - token);
      for (std::int64_t i = 0; i < count; ++i) {
        const bool valid = j < s.count && s.keys[j] == token + i;
        for (std::int64_t d = 0; d < columns_; d += kLanes) {
          const Floats x = valid ? load(from + j * columns_ + d) * splat(factor) : Floats{};
          write(results_ + i * columns_ * size_, d, x);
        }
        j += valid;
      }
      write_rows(to, s, token, count);
    }
  }

  const AttentionCall& call_;
  Scratch scratch_;
  const Type type_;
  const std::int64_t size_;         // of an element, in bytes
  const std::int64_t dim_, units_;  // of 32 bits in a row
  const std::int64_t row_, columns_, wide_, most_keys_, bias_row_;
  std::int64_t head_ = 0, slot_ = 0, first_column_ = 0;
  Sequence next_{};
  std::int64_t prefetched_ = 0, prefetch_step_ = 0;
  Run runs_[kBlockQueries];
  std::int64_t run_count_ = 0;

  Expanded* expanded_ = nullptr;
  std::int32_t* keys_ = nullptr;
  std::int64_t* rows_ = nullptr;  // [keys]: offsets of their rows of bias_ and dbias_
  float *biases_ = nullptr, *dbiases_ = nullptr;  // [heads of an item, size, bias_row_]
  float *bias_ = nullptr, *bias_tile_ = nullptr, *dbias_ = nullptr, *dbias_tile_ = nullptr;
  float *k_rows_ = nullptr, *v_rows_ = nullptr;                             // [keys, row_]
  float *k_pairs_ = nullptr, *v_pairs_ = nullptr;                           // [pairs(keys), wide_]
  float *q_columns_ = nullptr, *do_columns_ = nullptr;                      // [units_, queries]
  float *q_pairs_ = nullptr, *do_pairs_ = nullptr;  // [pairs(queries), columns_]
  float *scores_ = nullptr, *dscores_ = nullptr;                            // [keys, queries]
  float *p_rows_ = nullptr, *ds_rows_ = nullptr;
  float* result_ = nullptr;                                                 // [dim, queries]
  float *dk_ = nullptr, *dv_ = nullptr;                                     // [keys, columns_]
  char* results_ = nullptr;                                                 // [kLanes, columns_]
  float *top_ = nullptr, *sum_ = nullptr, *delta_ = nullptr, *factor_ = nullptr;  // [queries]
};

#if defined(__AMX_BF16__)
using Chosen = Kernel<TileProduct>;
#elif defined(__AVX512BF16__)
using Chosen = Kernel<PairProduct>;
#else
using Chosen = Kernel<SingleProduct>;
#endif

std::int64_t scratch_bytes(const AttentionCall& call, bool backward) {
  return backward ? Chosen::backward_bytes(call) : Chosen::forward_bytes(call);
}
void forward(const AttentionCall& call, const Item& item, void* scratch) {
  Chosen::forward(call, item, scratch);
}
void backward(const AttentionCall& call, const Item& item, void* scratch) {
  Chosen::backward(call, item, scratch);
}

}  // namespace

namespace VLMO_INSTRUCTIONS {
extern const AttentionKernels attention;
const AttentionKernels attention{scratch_bytes, forward, backward};
}  // namespace VLMO_INSTRUCTIONS

}  // namespace vlmo
