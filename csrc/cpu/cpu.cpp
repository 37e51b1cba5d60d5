#include "cpu.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <memory>
#include <new>
#include <stdexcept>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "threads.h"

namespace vlmo {

#define VLMO_KERNELS_OF(name)              \
  namespace name {                         \
  extern const AttentionKernels attention; \
  extern const MatmulKernels matmul;       \
  extern const RowsKernels rows;           \
  }
VLMO_KERNELS_OF(portable)
VLMO_KERNELS_OF(avx2)
VLMO_KERNELS_OF(avx512)
#undef VLMO_KERNELS_OF
// Of bfloat16; other types have the kernels of avx512.
namespace avx512_bf16 {
extern const AttentionKernels attention;
}
namespace amx_bf16 {
extern const AttentionKernels attention;
}

namespace {

// Whether the system lets this process use the tiles of AMX, which it must ask for.
[[maybe_unused]] bool allows_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(2)
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

struct Choice {
  const char* name;
  bool available;
  const AttentionKernels *bfloat16_attention, *attention;  // the latter of the other types
  const MatmulKernels* matmul;
  const RowsKernels* rows;
};

// The widest first. The builtin functions also ask whether the system saves the registers.
const std::vector<Choice>& choices() {
  static const std::vector<Choice> all = [] {
    std::vector<Choice> found;
#if defined(__x86_64__)
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
    const bool has_amx = has_bf16 && __builtin_cpu_supports("amx-tile") &&
                         __builtin_cpu_supports("amx-bf16") && allows_tiles();
    const auto with_bf16 = [](const char* name, bool available, const AttentionKernels& kernels) {
      return Choice{name, available, &kernels, &avx512::attention, &avx512::matmul, &avx512::rows};
    };
    found = {with_bf16("amx_bf16", has_amx, amx_bf16::attention),
             with_bf16("avx512_bf16", has_bf16, avx512_bf16::attention),
             {"avx512", has_avx512, &avx512::attention, &avx512::attention, &avx512::matmul,
              &avx512::rows},
             {"avx2", has_avx2, &avx2::attention, &avx2::attention, &avx2::matmul, &avx2::rows}};
#endif
    found.push_back({"portable", true, &portable::attention, &portable::attention,
                     &portable::matmul, &portable::rows});
    return found;
  }();
  return all;
}

const Choice& choice_of(const std::string& instructions) {
  for (const Choice& choice : choices()) {
    if (choice.available && instructions == choice.name) return choice;
  }
  throw std::invalid_argument("this CPU has no '" + instructions + "'");
}

const AttentionKernels& attention_of(const AttentionCall& call, const std::string& instructions) {
  const Choice& choice = choice_of(instructions);
  return *(call.type == Type::kBfloat16 ? choice.bfloat16_attention : choice.attention);
}

struct Freed {
  void operator()(void* memory) const { std::free(memory); }
};

constexpr std::int64_t kAlignment = 64;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// How a call is divided: groups of heads x groups of sequences x parts of their queries.
struct Division {
  std::int64_t heads, head_group, chunks, parts, sequences;

  std::int64_t head_groups() const { return ceil_div(heads, head_group); }
  std::int64_t items() const { return head_groups() * chunks * parts; }

  // Items of the same heads follow each other, so that a thread seldom expands another bias.
  Item item(std::int64_t number) const {
    Item item{};
    item.part = number % parts, item.parts = parts;
    item.chunk = number / parts % chunks;
    item.first_head = number / parts / chunks * head_group;
    item.last_head = std::min(item.first_head + head_group, heads);
    item.first = item.chunk * sequences / chunks;
    item.last = (item.chunk + 1) * sequences / chunks;
    return item;
  }
};

constexpr std::int64_t kItemsPerThread = 4;  // enough to even out their differences
constexpr std::int64_t kBiasBytes = 1 << 18;  // of the expanded bias of an item's heads

// Each item expands the bias of its heads and packs its keys, so items are as large as the number
// of threads allows. An item has several heads if their bias fits in cache: a token's heads are
// adjacent in memory.
Division divide(const AttentionCall& call, int threads, std::int64_t most_parts) {
  const std::int64_t wanted = threads == 1 ? 1 : kItemsPerThread * threads;
  std::int64_t group = kMaxHeadGroup;
  if (call.table != nullptr && call.size > 0) {
    group = std::clamp<std::int64_t>(kBiasBytes / (4 * call.size * call.size), 1, group);
  }
  const std::int64_t groups_wanted = ceil_div(wanted, call.sequences);
  group = std::min(group, std::max<std::int64_t>(1, call.heads / groups_wanted));
  Division division{call.heads, group, 1, 1, call.sequences};
  const std::int64_t groups = division.head_groups();
  division.chunks = std::clamp<std::int64_t>(ceil_div(wanted, groups), 1, call.sequences);
  division.parts =
      std::clamp<std::int64_t>(ceil_div(wanted, groups * division.chunks), 1, most_parts);
  return division;
}

// Calls compute(number, scratch) for each item, on several threads with scratch memory of their own
// that begins with zeros.
template <class Compute>
void run(std::int64_t items, int threads, std::int64_t bytes, const Compute& compute) {
  threads = static_cast<int>(std::min<std::int64_t>(threads, items));
  bytes = ceil_div(std::max(bytes, kZeroBytes), kAlignment) * kAlignment;
  const std::unique_ptr<char, Freed> scratch(static_cast<char*>(
      std::aligned_alloc(kAlignment, static_cast<std::size_t>(bytes) * threads)));
  if (scratch == nullptr) throw std::bad_alloc();
  for (int thread = 0; thread < threads; ++thread) {
    std::memset(scratch.get() + bytes * thread, 0, kZeroBytes);
  }
  std::atomic<std::int64_t> next{0};
  run_on_threads(threads, [&](int thread) {
    for (std::int64_t number; (number = next++) < items;) {
      compute(number, scratch.get() + bytes * thread);
    }
  });
}

// Whether to write results past the caches: whole lines, and too many for the next reader to find
// them in a cache. Ordinary writes of them took a third of the backward on an Intel CPU.
bool streams(const AttentionCall& call, std::initializer_list<Result> results) {
  constexpr std::int64_t kLine = 64, kCached = std::int64_t{1} << 20;
  const std::int64_t element = call.type == Type::kFloat32 ? 4 : 2, row = call.dim * element;
  if (row % kLine != 0 || call.result_row * element % kLine != 0) return false;
  for (Result result : results) {
    if (reinterpret_cast<std::uintptr_t>(result) % kLine != 0) return false;
  }
  const auto count = static_cast<std::int64_t>(results.size());
  return call.sequences * call.length * call.heads * row * count > kCached;
}

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Choice& choice : choices()) {
    if (choice.available) names.emplace_back(choice.name);
  }
  return names;
}

bool is_intel() {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

void attention_forward(AttentionCall call, const std::string& instructions, int threads) {
  const AttentionKernels& kernels = attention_of(call, instructions);
  if (call.sequences == 0 || call.length == 0) return;
  constexpr std::int64_t kPartQueries = 48;  // an item has at least as many
  const std::int64_t most = std::max<std::int64_t>(1, call.length / kPartQueries);
  const Division division = divide(call, threads, most);
  call.streams = streams(call, {call.out_result});
  call.head_group = division.head_group;
  run(division.items(), threads, kernels.scratch_bytes(call, false),
      [&](std::int64_t number, void* scratch) {
        kernels.forward(call, division.item(number), scratch);
      });
}

void attention_backward(AttentionCall call, const std::string& instructions, int threads,
                        double* dtable) {
  const AttentionKernels& kernels = attention_of(call, instructions);
  if (call.sequences == 0 || call.length == 0) return;
  // The gradients of keys are sums over all queries, so these are not divided.
  const Division division = divide(call, threads, 1);
  call.streams = streams(call, {call.dq, call.dk, call.dv});
  call.head_group = division.head_group;
  const std::int64_t entries = call.heads * call.entries;
  std::vector<double> partial;
  if (dtable != nullptr) {
    partial.resize(division.chunks * entries);
    call.dtable = partial.data();
  }
  run(division.items(), threads, kernels.scratch_bytes(call, true),
      [&](std::int64_t number, void* scratch) {
        kernels.backward(call, division.item(number), scratch);
      });
  for (std::size_t i = 0; i < partial.size(); ++i) dtable[i % entries] += partial[i];
}

void matmul(const MatmulCall& call, const std::string& instructions, int threads) {
  const MatmulKernels& kernels = *choice_of(instructions).matmul;
  if (call.rows == 0 || call.columns == 0) return;
  // Every item copies its columns of b, which then fit in the L2 cache, and a transposed a.
  const std::int64_t width = call.a_transposed ? 384 : 192;
  const std::int64_t step = kernels.column_step * ceil_div(width, kernels.column_step);
  const std::int64_t groups = ceil_div(call.columns, step);
  const std::int64_t wanted = threads == 1 ? 1 : ceil_div(2 * threads, groups);
  const std::int64_t height =
      kernels.row_step * ceil_div(ceil_div(call.rows, wanted), kernels.row_step);
  const std::int64_t parts = ceil_div(call.rows, height);
  const auto item = [&](std::int64_t number) {
    const std::int64_t row = number % parts * height, column = number / parts * step;
    return MatmulItem{row, std::min(row + height, call.rows), column,
                      std::min(column + step, call.columns)};
  };
  run(groups * parts, threads, kernels.scratch_bytes(call, item(0)),
      [&](std::int64_t number, void* scratch) { kernels.compute(call, item(number), scratch); });
}

void compute_rows(RowsKernel RowsKernels::*kernel, const RowsCall& call,
                  const std::string& instructions, int threads, float* sums, float* more_sums) {
  const RowsKernel compute = choice_of(instructions).rows->*kernel;
  constexpr std::int64_t kRowsPerItem = 16;  // few, because a long chain of additions rounds often
  const std::int64_t items = ceil_div(call.rows, kRowsPerItem), columns = call.columns;
  if (items == 0 || columns == 0) return;
  // Each item has sums of its own, which are then added in order.
  const std::int64_t vectors = (sums != nullptr) + (more_sums != nullptr);
  std::vector<float> partial(items * vectors * columns);
  run(items, threads, 0, [&](std::int64_t number, void*) {
    float* own = partial.data() + number * vectors * columns;
    const std::int64_t first = number * kRowsPerItem;
    compute(call, first, std::min(first + kRowsPerItem, call.rows), own, own + columns);
  });
  std::vector<double> totals(vectors * columns);
  const float* own = partial.data();
  for (std::int64_t number = 0; number < items; ++number) {
    for (double& total : totals) total += *own++;
  }
  for (std::int64_t i = 0; i < vectors * columns; ++i) {
    (i < columns ? sums[i] : more_sums[i - columns]) = static_cast<float>(totals[i]);
  }
}

}  // namespace vlmo
