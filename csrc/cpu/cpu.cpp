#include "cpu.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <stdexcept>

#include "threads.h"

namespace vlmo {

namespace portable { extern const AttentionKernels attention; }
namespace avx2 { extern const AttentionKernels attention; }
namespace avx512 { extern const AttentionKernels attention; }
namespace avx512_bf16 { extern const AttentionKernels attention; }

namespace {

struct Choice {
  const AttentionKernels* kernels;
  bool available;
};

// The widest first. The builtin functions also ask whether the operating system saves the registers.
const std::vector<Choice>& choices() {
  static const std::vector<Choice> all = [] {
    std::vector<Choice> found;
#if defined(__x86_64__)
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
    found = {{&avx512_bf16::attention, has_bf16},
             {&avx512::attention, has_avx512},
             {&avx2::attention, has_avx2}};
#endif
    found.push_back({&portable::attention, true});
    return found;
  }();
  return all;
}

const AttentionKernels& kernels_for(const std::string& instructions) {
  for (const Choice& choice : choices()) {
    if (choice.available && instructions == choice.kernels->name) return *choice.kernels;
  }
  throw std::invalid_argument("this CPU has no '" + instructions + "'");
}

struct Freed {
  void operator()(void* memory) const { std::free(memory); }
};

constexpr std::int64_t kAlignment = 64;

// How a call is divided: heads x groups of sequences x parts of their queries.
struct Division {
  std::int64_t heads, chunks, parts, sequences;

  std::int64_t items() const { return heads * chunks * parts; }

  // Items of one head follow each other, so that a thread seldom expands another head's bias.
  Item item(std::int64_t number) const {
    Item item{};
    item.part = number % parts, item.parts = parts;
    item.chunk = number / parts % chunks;
    item.head = number / parts / chunks;
    item.first = item.chunk * sequences / chunks;
    item.last = (item.chunk + 1) * sequences / chunks;
    return item;
  }
};

constexpr std::int64_t kItemsPerThread = 4;  // enough to even out their differences

// Each item expands its head's bias and packs its keys, so items are as large as threads allow.
Division divide(const AttentionCall& call, int threads, std::int64_t most_parts) {
  const std::int64_t wanted = threads == 1 ? 1 : kItemsPerThread * threads;
  const std::int64_t groups = (wanted + call.heads - 1) / call.heads;
  const std::int64_t chunks = std::clamp<std::int64_t>(groups, 1, call.sequences);
  const std::int64_t parts = (wanted + call.heads * chunks - 1) / (call.heads * chunks);
  return {call.heads, chunks, std::clamp<std::int64_t>(parts, 1, most_parts), call.sequences};
}

using Compute = void (*)(const AttentionCall&, const Item&, void*);

void run(const AttentionCall& call, const Division& division, int threads, std::int64_t bytes,
         Compute compute) {
  threads = static_cast<int>(std::min<std::int64_t>(threads, division.items()));
  bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  const std::unique_ptr<char, Freed> scratch(
      static_cast<char*>(std::aligned_alloc(kAlignment, static_cast<std::size_t>(bytes) * threads)));
  if (scratch == nullptr) throw std::bad_alloc();
  for (int thread = 0; thread < threads; ++thread) {
    std::memset(scratch.get() + bytes * thread, 0, kAlignment);
  }
  std::atomic<std::int64_t> next{0};
  run_on_threads(threads, [&](int thread) {
    for (std::int64_t number; (number = next++) < division.items();) {
      compute(call, division.item(number), scratch.get() + bytes * thread);
    }
  });
}

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Choice& choice : choices()) {
    if (choice.available) names.emplace_back(choice.kernels->name);
  }
  return names;
}

void attention_forward(const AttentionCall& call, const std::string& instructions, int threads) {
  const AttentionKernels& kernels = kernels_for(instructions);
  if (call.sequences == 0 || call.length == 0) return;
  constexpr std::int64_t kPartQueries = 48;  // an item has at least as many
  const std::int64_t most = std::max<std::int64_t>(1, call.length / kPartQueries);
  run(call, divide(call, threads, most), threads, kernels.scratch_bytes(call, false),
      kernels.forward);
}

void attention_backward(AttentionCall call, const std::string& instructions, int threads,
                        double* dtable) {
  const AttentionKernels& kernels = kernels_for(instructions);
  if (call.sequences == 0 || call.length == 0) return;
  // The gradients of keys are sums over all queries, so these are not divided.
  const Division division = divide(call, threads, 1);
  const std::int64_t entries = call.heads * call.entries;
  std::vector<double> partial;
  if (dtable != nullptr) {
    partial.resize(division.chunks * entries);
    call.dtable = partial.data();
  }
  run(call, division, threads, kernels.scratch_bytes(call, true), kernels.backward);
  for (std::size_t i = 0; i < partial.size(); ++i) dtable[i % entries] += partial[i];
}

}  // namespace vlmo
