// Calls the CPU kernels of shared_attention with every tensor in an allocation of its exact size.
//
// Built with AddressSanitizer, it shows reads and writes outside of the tensors. Each call also runs
// twice, with other bytes in scratch memory and results: these must have no effect.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <random>
#include <vector>
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/attention.h"

namespace vlmo::VLMO_INSTRUCTIONS {
extern const AttentionKernels attention;
}

namespace {

using vlmo::AttentionCall;
using vlmo::Item;
using vlmo::Rows;
using vlmo::Type;

struct Shape {
  std::vector<std::int64_t> lengths;
  std::int64_t heads, dim;
  bool packed, causal, mask, key_lengths, bias, positions;
};

const Shape kShapes[] = {
    // lengths, heads, dim, packed, causal, mask, key_lengths, bias, positions
    {{1}, 1, 1, false, false, false, false, true, false},
    {{5, 5}, 3, 3, false, true, true, false, true, true},
    {{15, 15}, 1, 17, false, false, false, true, true, false},
    {{16}, 2, 64, false, true, false, false, false, false},
    {{17, 17, 17}, 2, 65, false, false, true, true, true, false},
    {{47, 47}, 2, 34, false, true, false, true, true, true},
    {{49}, 1, 128, false, false, true, false, true, false},
    {{97}, 1, 2, false, true, true, false, false, false},
    {{239}, 1, 8, false, false, false, false, true, false},
    {{241, 241}, 1, 33, false, true, true, false, true, true},
    {{500}, 1, 5, false, false, false, true, true, false},
    {{0, 1, 0}, 2, 16, true, false, false, false, true, false},
    {{3, 0, 48, 15}, 2, 31, true, true, false, false, true, false},
    {{33, 130}, 2, 32, true, true, false, false, true, false},
    {{66, 5, 145}, 1, 24, true, false, false, false, true, true},
    {{250, 1, 33}, 2, 1, true, true, false, false, true, true},
    {{7, 70}, 3, 66, true, false, false, false, false, false},
};

std::mt19937 generator;

std::int64_t below(std::int64_t bound) {
  return std::uniform_int_distribution<std::int64_t>(0, bound - 1)(generator);
}

// Numbers of magnitude 1/4 to 2.
template <class T>
std::vector<T> numbers(Type type, std::int64_t count) {
  std::vector<T> result(count);
  for (T& x : result) {
    if constexpr (sizeof(T) == 4) {
      x = std::uniform_real_distribution<float>(-2, 2)(generator);
    } else {
      const int mantissa = type == Type::kBfloat16 ? 7 : 10, bias = (1 << (14 - mantissa)) - 1;
      x = static_cast<T>(below(2) << 15 | (bias - 2 + below(3)) << mantissa |
                         below(1 << mantissa));
    }
  }
  return result;
}

// A tensor whose rows are apart, without an element after its last one.
template <class T>
struct Spread {
  std::vector<T> data;
  Rows rows;

  Spread(Type type, std::int64_t sequences, std::int64_t tokens, const Shape& shape) {
    const std::int64_t head = shape.dim + below(4), token = head * shape.heads + below(3),
                       sequence = token * tokens + below(5);
    const std::int64_t last = (sequences - 1) * sequence + (tokens - 1) * token +
                              (shape.heads - 1) * head + shape.dim;
    data = numbers<T>(type, tokens == 0 ? 0 : last);
    rows = {data.data(), shape.packed ? 0 : sequence, token, head};
  }
};

// For results: lines of 64 bytes are aligned, and the size is exact.
template <class T>
struct Aligned {
  using value_type = T;
  T* allocate(std::size_t count) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, count * sizeof(T)) != 0) throw std::bad_alloc();
    return static_cast<T*>(memory);
  }
  void deallocate(T* memory, std::size_t) { std::free(memory); }
  bool operator==(const Aligned&) const { return true; }
  bool operator!=(const Aligned&) const { return false; }
};

struct Freed {
  void* memory;
  ~Freed() { std::free(memory); }
};

struct Division {
  std::int64_t head_group, chunks, parts;  // heads of an item; groups of sequences; of queries
};

// Runs the items of one thread.
void run(const AttentionCall& call, bool backward, int garbage, const Division& division) {
  const auto& kernels = vlmo::VLMO_INSTRUCTIONS::attention;
  const auto [head_group, chunks, parts] = division;
  const std::int64_t bytes = std::max(kernels.scratch_bytes(call, backward), vlmo::kZeroBytes);
  const Freed scratch{std::aligned_alloc(64, bytes)};
  std::memset(scratch.memory, garbage, bytes);
  std::memset(scratch.memory, 0, vlmo::kZeroBytes);
  for (std::int64_t head = 0; head < call.heads; head += head_group) {
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
      const std::int64_t first = chunk * call.sequences / chunks,
                         last = (chunk + 1) * call.sequences / chunks;
      for (std::int64_t part = 0; part < parts; ++part) {
        const Item item{head, std::min(head + head_group, call.heads), first, last, part, parts,
                        chunk};
        (backward ? kernels.backward : kernels.forward)(call, item, scratch.memory);
      }
    }
  }
}

template <class T>
struct Results {
  std::vector<T, Aligned<T>> out, dq, dk, dv;
  std::vector<float> lse;
  std::vector<double> dtable;

  bool operator==(const Results& r) const {
    const auto same = [](const auto& a, const auto& b) {
      return a.size() == b.size() &&
             (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof a[0]) == 0);
    };
    return same(out, r.out) && same(dq, r.dq) && same(dk, r.dk) && same(dv, r.dv) &&
           same(lse, r.lse) && same(dtable, r.dtable);
  }
};

template <class T>
bool check(Type type, const Shape& shape) {
  std::vector<std::int64_t> offsets{0}, key_lengths, positions;
  std::int64_t longest = 0;
  for (const std::int64_t length : shape.lengths) {
    offsets.push_back(offsets.back() + length);
    key_lengths.push_back(below(length + 1));
    longest = std::max(longest, length);
  }
  const std::int64_t count = shape.lengths.size(), tokens = offsets.back(),
                     entries = 7, size = longest, matrix_row = size + below(3);
  // std::vector<bool> has no data.
  std::vector<unsigned char> mask(count * longest);
  for (auto& valid : mask) valid = below(3) > 0;
  std::vector<std::int32_t> matrix((size - 1) * matrix_row + size);
  for (auto& entry : matrix) entry = static_cast<std::int32_t>(below(entries));
  // Runs of rows, and jumps.
  for (std::int64_t t = 0; t < tokens; ++t) {
    const bool run = t > 0 && below(4) > 0;
    positions.push_back(run ? (positions.back() + 1) % size : below(size));
  }
  const auto table = numbers<float>(Type::kFloat32, shape.heads * entries);

  const std::int64_t outer = shape.packed ? 1 : count, inner = shape.packed ? tokens : longest;
  const Spread<T> q(type, outer, inner, shape), k(type, outer, inner, shape),
      v(type, outer, inner, shape), dout(type, outer, inner, shape);
  AttentionCall call{};
  call.type = type;
  call.q = q.rows, call.k = k.rows, call.v = v.rows;
  if (shape.bias) {
    call.table = table.data(), call.entries = entries;
    call.matrix = matrix.data(), call.matrix_row = matrix_row, call.size = size;
    if (shape.positions) call.positions = positions.data();
  }
  if (shape.mask) call.key_mask = reinterpret_cast<const bool*>(mask.data());
  if (shape.key_lengths) call.key_lengths = key_lengths.data();
  if (shape.packed) call.offsets = offsets.data();
  call.sequences = count, call.length = longest, call.heads = shape.heads, call.dim = shape.dim;
  call.causal = shape.causal, call.scale = 0.3f;

  const auto compute = [&](int garbage, Division division, bool streams) {
    const auto filled = [&](auto& buffer, std::int64_t size) {
      buffer.resize(size);
      buffer.shrink_to_fit();
      if (size > 0) std::memset(buffer.data(), garbage, size * sizeof buffer[0]);
    };
    Results<T> r;
    const std::int64_t elements = tokens * shape.heads * shape.dim;
    filled(r.out, elements), filled(r.lse, tokens * shape.heads);
    filled(r.dq, elements), filled(r.dk, elements), filled(r.dv, elements);
    AttentionCall c = call;
    c.head_group = division.head_group;
    c.streams = streams && shape.dim * sizeof(T) % 64 == 0;
    c.result_row = c.heads * c.dim;
    c.out_result = r.out.data(), c.lse_result = r.lse.data();
    run(c, false, garbage, division);
    c.out_result = nullptr, c.lse_result = nullptr;
    const std::int64_t token = shape.heads * shape.dim;
    c.out = {r.out.data(), shape.packed ? 0 : longest * token, token, shape.dim};
    c.dout = dout.rows, c.lse = r.lse.data();
    c.dq = r.dq.data(), c.dk = r.dk.data(), c.dv = r.dv.data();
    if (shape.bias) {
      r.dtable.assign(division.chunks * shape.heads * entries, 0);
      c.dtable = r.dtable.data();
    }
    division.parts = 1;  // as keys get sums over all queries
    run(c, true, garbage, division);
    return r;
  };
  const Results<T> once = compute(0x00, {1, 1, 1}, false),
                   again = compute(0xff, {1, 1, 1}, true);
  Results<T> divided = compute(0x7f, {2, std::min<std::int64_t>(count, 2), 3}, true);
  divided.dtable = once.dtable;  // of another shape
  return once == again && once == divided;
}

}  // namespace

int main() {
#if defined(__AMX_BF16__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(2)
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return 1;
#endif
  int wrong = 0;
  for (const Shape& shape : kShapes) {
    bool right = check<std::uint16_t>(Type::kBfloat16, shape);
#if !defined(__AVX512BF16__)  // for bfloat16 only
    right = right && check<float>(Type::kFloat32, shape) &&
            check<std::uint16_t>(Type::kFloat16, shape);
#endif
    if (right) continue;
    std::printf("results of shape %d depend on unwritten memory, on the division of work, or on\n"
                "whether they are written past the caches\n",
                static_cast<int>(&shape - kShapes));
    ++wrong;
  }
  return wrong;
}
