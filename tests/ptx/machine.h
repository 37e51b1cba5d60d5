// Data structures of the emulator: instructions, warps, CTAs, reports.
//
// A warp's registers are arrays of 32 lanes, stored consecutively in a register file of bytes; an
// operand is the offset of its array. A predicate is one 32-bit mask.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using f32 = float;
using f64 = double;

constexpr u32 ALL_LANES = 0xffffffffu;
constexpr int LANES = 32;
constexpr int REAL_THREADS = 1024;           // of a CTA, at most
constexpr int MAX_THREADS = 2 * REAL_THREADS;  // numbers per CTA; those above stand for the copies of an mbarrier

struct Warp;
struct Cta;
struct Machine;

enum class Flow : int { NEXT, BRANCH, BARRIER, EXIT };

struct Instruction {
  void (*run)(Warp&, const Instruction&);
  Flow flow;
  int number;  // its index in the program
  int guard;   // offset of the predicate, or -1
  bool negated;
  int target;  // of a branch
  int join;    // where both sides of a branch reconverge; -1 if they do not
  int size;    // number of operands
  const s64* operands;
  int touches;  // number of registers that it reads or writes, listed in `touched`
  const s64* touched;
};

// ---- Findings of a launch; ptx/machine.py has a text for each.
enum class Finding : int {
  SHARED_READ_AFTER_WRITE,
  SHARED_WRITE_AFTER_WRITE,
  SHARED_WRITE_AFTER_READ,
  GLOBAL_READ_AFTER_WRITE,
  GLOBAL_WRITE_AFTER_WRITE,
  GLOBAL_WRITE_AFTER_READ,
  PLAIN_AND_ATOMIC,
  UNWRITTEN_SHARED,
  UNWRITTEN_GLOBAL,
  COPY_IN_FLIGHT,
  NO_PROXY_FENCE,
  READERS_FORGOTTEN,
  NEVER_WAITED_FOR,
  REGISTER_IN_FLIGHT,
  COPY_READS_UNFENCED,
  COPY_WRITES_UNFENCED,
  NO_TENSORMAP_FENCE,
};

struct Report {
  int finding, at, other;  // instructions; other is -1 if there is none
  u64 address;
  u32 thread, other_thread;  // 1 + MAX_THREADS * CTA + thread in it; 0: not one thread
  u32 count;
};

// ---- Order of memory accesses; history.h explains it.
struct Event {
  u32 thread;  // 1 + MAX_THREADS * CTA + thread in it; 0: none
  u32 epoch, clock;
  int at;
};

// Several warps of a CTA; SEVERAL_WARPS - 1 - k: several warps of group k of Cta::group warps.
constexpr int SEVERAL_WARPS = -1000;
constexpr int GROUPS = 3;
struct Reader {
  u32 cta;  // 1 + CTA; 0: none
  int who;  // a thread of the CTA, or -1 - warp for several of a warp, or as above for several warps
  u32 epoch, clock;
};

enum : u32 { IN_FLIGHT = 1, FORGOTTEN = 2, WRITTEN = 4, ATOMIC = 8 };
template <int READERS> struct Shadow {
  Event write;
  u32 flags;
  int read_at;
  Reader readers[READERS];
};
using SharedShadow = Shadow<GROUPS>;  // one per byte; a reader per group of warps
using GlobalShadow = Shadow<8>;       // one per granule of Machine::granule bytes; a reader per CTA

// Zeroed memory; only pages that are used are allocated.
template <class T> struct Zeroed {
  T* data;
  explicit Zeroed(size_t size) : data((T*)calloc(size ? size : 1, sizeof(T))) {}
  Zeroed(Zeroed&& other) noexcept : data(std::exchange(other.data, nullptr)) {}
  Zeroed(const Zeroed&) = delete;
  ~Zeroed() { free(data); }
  T& operator[](size_t i) { return data[i]; }
};

struct Knowledge {
  struct Released {
    u32 thread, epoch, clock;  // see warp_of for releases by a whole warp
  };
  std::vector<u32> epochs;         // per CTA: everything in earlier epochs
  std::vector<Released> releases;  // everything that a thread did before this clock
  void join(const Knowledge& other);
  bool epoch_of(u32 cta, u32 epoch) const { return cta < epochs.size() && epochs[cta] > epoch; }
  bool covers(u32 thread, u32 epoch, u32 clock) const;
};

// The clock of each warp of a CTA, and of each of its mbarriers.
struct Clocks {
  std::vector<u32> at;
  u32 operator[](size_t k) const { return k < at.size() ? at[k] : 0; }
  void raise(size_t k, u32 clock);
  void join(const Clocks& other);
};

enum Space { SHARED, GLOBAL };

// What happened before an instruction.
struct Order {
  Clocks seen;               // in its CTA: every access with a smaller clock
  Clocks fenced[2];          // the same for accesses that a fence made visible to the asynchronous proxy, per Space
  Knowledge known;           // in other CTAs, besides Cta::known
  Knowledge known_fenced;    // the same for global memory that a fence made visible to the asynchronous proxy
  void join(const Order& other);
};

// ---- Asynchronous work of a warp.
struct Copy {
  const Instruction* instruction;
  u32 to;
  u64 from;
  u32 size, read;  // bytes written, and how many of them are read; the others are zero
};
struct Product {
  const Instruction* instruction;
  bool accumulate;
  u64 a, b;  // descriptors
};

struct Path {  // lanes that execute together; an entry of the stack of branches
  int next, join;
  u32 lanes;
};

// A descriptor of a tensor of `rank` + 1 dimensions, the innermost first. The format is the emulator's own; that of
// the hardware is secret.
struct TensorMap {
  u64 address, strides[4];  // bytes, from the second dimension on
  u32 dims[5], box[5], steps[5];
  u8 rank, type, interleave, swizzle, fill;
};
constexpr u32 TENSOR_MAP_BYTES = 128;
static_assert(sizeof(TensorMap) <= TENSOR_MAP_BYTES);

struct TileCopy {  // from global to shared memory
  const Instruction* instruction;
  Warp* warp;
  int lane;
  TensorMap map;
  s32 from[5];  // coordinates
  u32 to, size;
};

struct Mbarrier {
  int slot;                  // of its copies: see copies_of
  u32 count, pending;        // arrivals of a phase, and those still missing
  s64 transactions = 0;      // bytes still missing in this phase
  u32 phase = 0;             // the number of completed phases
  u32 copied = 0, waited = 0;  // phases: that of the last copy, plus one; those that a wait has seen complete
  int copied_at = 0;         // the last copy's instruction
  std::vector<TileCopy> copies = {};  // of this phase
  Order arrived = {}, completed = {};  // released by arrivals; by completed phases
};

struct Meeting {  // at a named barrier
  std::vector<Warp*> arrived;
  int warps = 0;
};

struct Warp {
  Cta* cta;
  int id;
  std::vector<u8> registers;
  u32 active = 0;  // lanes that execute the current instruction
  std::vector<Path> paths;
  bool waiting = false, done = false;
  const Mbarrier* awaited = nullptr;  // where it is waiting
  u32 clock = 1;                      // advanced by what orders accesses of this warp: see history.h
  Order order;
  std::vector<Copy> copies[LANES];  // not committed yet
  std::deque<std::vector<Copy>> copy_groups[LANES];
  std::vector<Product> products;
  std::deque<std::vector<Product>> product_groups;
  std::unordered_map<s64, int> used_by_products;  // register -> number of products in flight that use it

  template <class T> T* at(s64 place) { return (T*)(registers.data() + place); }
  int thread(int lane) const { return id * LANES + lane; }
  u32 global_thread(int lane) const;
};

struct Cta {
  Machine* machine;
  u32 id;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<u8> shared;
  Zeroed<SharedShadow> shadow;
  int group = 4;                                // warps per group
  u32 epoch = 1, time = 1;                      // the number of barriers; the latest clock of a warp
  u32 epoch_began = 1;                          // its clock
  Knowledge known;                              // to every thread of the CTA
  std::unordered_map<int, Knowledge> acquired;  // by single threads, in this epoch
  std::map<int, Meeting> meetings;              // per barrier
  std::map<u32, Mbarrier> mbarriers;            // per address
  std::unordered_map<u64, std::pair<Event, Event>> tensormaps;  // per address: the last acquire, and the write before
  int live = 0;
  double weight = 1;

  Cta(Machine* machine, u32 id, size_t shared_bytes)
      : machine(machine), id(id), shared(shared_bytes, 0xff), shadow(shared_bytes + 16) {}
};

inline u32 Warp::global_thread(int lane) const { return cta->id * MAX_THREADS + thread(lane) + 1; }

struct Buffer {
  u64 begin, size;
  u8* written;  // per byte whether it is written; null if all is
  Zeroed<GlobalShadow> shadow;
};

struct Atomic {  // an address of atomic operations
  u32 size = 0;  // bytes
  Knowledge released;
  std::map<u32, Reader> last;  // per CTA: the thread that accessed it last
};

struct Options {
  int races;     // whether accesses are checked for order
  int late;      // copies and products execute at their wait, else when they are issued
  int resident;  // CTAs in flight at a time
  int quantum;   // about how many instructions a warp runs at a time
  int skew;      // whether some CTAs are far slower than others for a while
  int shuffle;   // whether CTAs start in random order
  int conflicts; // whether bank conflicts are counted
  u64 seed, limit;
};

struct Machine {
  // the program
  std::vector<s64> pool;
  std::vector<Instruction> code;
  std::vector<u8> initial_registers;
  int threads, shared_bytes;
  bool copies_tiles;
  int granule;  // bytes of global memory with one shadow: 1 if the program stores single bytes, else 2
  s64 tid, ctaid, nctaid, laneid;  // offsets of the special registers
  // the launch
  Options options;
  std::vector<u8> parameters;
  std::vector<Buffer> buffers;
  Buffer* last_buffer;
  std::unordered_map<u64, Atomic> atomics;
  std::mt19937_64 random;
  std::string error;
  std::vector<Report> reports;
  u64 steps;
  std::vector<u64> warp_count, lane_count;  // executions of each instruction
  std::vector<u64> wavefronts, ideal_wavefronts;  // of accesses to shared memory; see count_conflicts

  Buffer* find(u64 address, u64 size);
  // Ends the launch.
  void fail(const Warp& w, const Instruction& i, const std::string& what, u64 address = 0);
  void report(Finding finding, const Warp& w, int lane, int at, u64 address, u32 other_thread, int other);
};
