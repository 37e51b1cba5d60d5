// Runs a program that ptx/translate.py has translated from PTX: several CTAs in flight, one warp at a time.
//
// Control flow: on divergence the paths are executed one after the other, and lanes reconverge at the
// immediate post-dominator of the branch.
#include "products.h"
#include "tensor_copies.h"

static void nothing(Warp&, const Instruction&) {}

static Table make_table() {
  Table t;
  integers(t), floats(t), conversions(t), exchanges(t), tensor_copies(t);
  t["ld.global"] = load<false>, t["ld.shared"] = load<true>, t["ld.param"] = load_parameter;
  t["st.global"] = store<false>, t["st.shared"] = store<true>, t["atom"] = atomic;
  t["ld.acquire"] = load_ordered<true>, t["ld.relaxed"] = load_ordered<false>;
  t["prefetch"] = prefetch;
  t["cp.async"] = start_copy, t["cp.async.commit_group"] = commit_copies, t["cp.async.wait_group"] = wait_copies;
  t["ldmatrix"] = load_matrix, t["stmatrix"] = store_matrix;
  t["mma.f16"] = multiply<F16>, t["mma.bf16"] = multiply<BF16>, t["mma.tf32"] = multiply<TF32>;
  t["wgmma"] = start_product, t["wgmma.commit_group"] = commit_products, t["wgmma.wait_group"] = wait_products;
  t["nothing"] = nothing;
  t["fence.proxy.async"] = [](Warp& w, const Instruction& i) {
    for (const Space space : {SHARED, GLOBAL})
      if (i.operands[0] >> space & 1) fence_proxy(w, space);
  };
  t["bar.warp.sync"] = [](Warp& w, const Instruction& i) {
    if (whole_warp(w, i)) synchronise_warp(w);
  };
  t["bra"] = t["bar"] = t["ret"] = nothing;  // handled by Machine::run
  return t;
}

static const Table& table() {
  static const Table all = make_table();
  return all;
}

Buffer* Machine::find(u64 address, u64 size) {
  const auto inside = [&](const Buffer& b) { return address >= b.begin && address + size <= b.begin + b.size; };
  if (last_buffer && inside(*last_buffer)) return last_buffer;
  auto behind = std::upper_bound(buffers.begin(), buffers.end(), address,
                                 [](u64 a, const Buffer& b) { return a < b.begin; });
  if (behind == buffers.begin() || !inside(behind[-1])) return nullptr;
  return last_buffer = &behind[-1];
}

void Machine::fail(const Warp& w, const Instruction& i, const std::string& what, u64 address) {
  if (!error.empty()) return;
  char where[160];
  snprintf(where, sizeof where, "%d\nCTA %u, warp %d, lanes %08x, address 0x%llx\n", i.number, w.cta->id, w.id, w.active,
           (unsigned long long)address);
  error = where + what;
}

void Machine::report(Finding finding, const Warp& w, int lane, int at, u64 address, u32 other_thread, int other) {
  for (auto& r : reports)
    if (r.finding == (int)finding && r.at == at && r.other == other) {
      r.count++;
      return;
    }
  reports.push_back({(int)finding, at, other, address, w.global_thread(lane), other_thread, 1});
}

// operands of bar: number of the barrier, threads that meet there (0: all)
static void arrive_at_barrier(Warp& w, const Instruction& i) {
  Cta& cta = *w.cta;
  const int threads = i.operands[1] ? i.operands[1] : cta.machine->threads;
  Meeting& meeting = cta.meetings[i.operands[0]];
  if (w.active != ALL_LANES) return cta.machine->fail(w, i, "part of a warp at a barrier");
  if (cta.live < threads / LANES) return cta.machine->fail(w, i, "a warp has ended that others wait for at a barrier");
  if (!meeting.arrived.empty() && meeting.warps != threads / LANES)
    return cta.machine->fail(w, i, "a barrier of different numbers of threads");
  meeting.warps = threads / LANES;
  meeting.arrived.push_back(&w);
  w.waiting = true;
  if ((int)meeting.arrived.size() < meeting.warps) return;
  meet(cta, meeting.arrived);
  for (Warp* other : meeting.arrived) other->waiting = false;
  meeting.arrived.clear();
}

// Pops the paths that are empty or have reached their join.
static void leave_paths(Warp& w) {
  while (!w.paths.empty() && (!w.paths.back().lanes || w.paths.back().next == w.paths.back().join)) w.paths.pop_back();
  w.done = w.paths.empty();
}

static void branch(Warp& w, const Instruction& i, u32 taken) {
  Path& path = w.paths.back();
  const u32 others = path.lanes & ~taken;
  const int next = path.next + 1;
  if (!others || !taken) {
    path.next = taken ? i.target : next;
  } else if (i.join < 0) {
    const int join = path.join;
    path.lanes = others;
    path.next = next;
    w.paths.push_back({i.target, join, taken});
  } else {
    path.next = i.join;
    w.paths.push_back({next, i.join, others});
    w.paths.push_back({i.target, i.join, taken});
  }
  leave_paths(w);
}

static void finish_lanes(Warp& w, const Instruction& i) {
  Machine& m = *w.cta->machine;
  for (auto& path : w.paths) path.lanes &= ~w.active;
  leave_paths(w);
  if (!w.done) return;
  const auto any = [](auto& groups) { return std::any_of(groups.begin(), groups.end(), [](auto& g) { return !g.empty(); }); };
  bool left = any(w.product_groups) || !w.products.empty();
  for (int l = 0; l < LANES; l++) left |= any(w.copy_groups[l]) || !w.copies[l].empty();
  if (left) m.report(Finding::NEVER_WAITED_FOR, w, 0, i.number, 0, 0, -1);
  if (!--w.cta->live)
    for (auto& [address, b] : w.cta->mbarriers) expect_waited(w, 0, b);
  for (auto& [number, meeting] : w.cta->meetings)
    if (!meeting.arrived.empty() && meeting.warps > w.cta->live)
      m.fail(w, i, "a warp has ended that others wait for at a barrier");
}

static void run(Warp& w, u64 count) {
  Machine& m = *w.cta->machine;
  while (count-- && !w.done) {
    Path& path = w.paths.back();
    const Instruction& i = m.code[path.next];
    w.active = path.lanes;
    if (i.guard >= 0) w.active &= i.negated ? ~*w.at<u32>(i.guard) : *w.at<u32>(i.guard);
    m.steps++;
    m.warp_count[i.number]++;
    m.lane_count[i.number] += __builtin_popcount(w.active);
    switch (i.flow) {
      case Flow::NEXT:
        if (w.active && !w.used_by_products.empty()) check_registers(w, i);
        if (w.active) i.run(w, i);
        if (w.waiting) return;
        path.next++;
        leave_paths(w);
        break;
      case Flow::BRANCH:
        branch(w, i, w.active);
        break;
      case Flow::BARRIER:
        path.next++;
        leave_paths(w);
        arrive_at_barrier(w, i);
        if (w.waiting) return;
        break;
      case Flow::EXIT:
        if (w.active) finish_lanes(w, i);
        else path.next++;
        break;
    }
    if (!m.error.empty()) return;
  }
}

static std::unique_ptr<Cta> make_cta(Machine& m, int id, int grid) {
  auto cta = std::make_unique<Cta>(&m, id, m.shared_bytes);
  cta->live = m.threads / LANES;
  cta->group = std::max(4, (cta->live + GROUPS - 1) / GROUPS);
  for (int k = 0; k < cta->live; k++) {
    auto w = std::make_unique<Warp>();
    w->cta = cta.get();
    w->id = k;
    w->registers = m.initial_registers;
    for (int l = 0; l < LANES; l++) {
      w->at<u32>(m.tid)[l] = k * LANES + l;
      w->at<u32>(m.ctaid)[l] = id;
      w->at<u32>(m.nctaid)[l] = grid;
      w->at<u32>(m.laneid)[l] = l;
    }
    w->paths.push_back({0, -1, ALL_LANES});
    cta->warps.push_back(std::move(w));
  }
  return cta;
}

// Chooses the next warp, at random from the seed.
struct Scheduler {
  Machine& m;
  std::vector<std::unique_ptr<Cta>> resident;
  u64 until_new_weights = 0;

  u64 draw(u64 below) { return m.random() % below; }

  Cta& next_cta() {
    if (!m.options.skew) return *resident[draw(resident.size())];
    if (until_new_weights-- == 0) {
      for (auto& cta : resident) cta->weight = draw(3) ? 1 : 0.001;
      until_new_weights = draw(2000);
    }
    double all = 0;
    for (auto& cta : resident) all += cta->weight;
    double at = (m.random() >> 11) * 0x1p-53 * all;
    for (auto& cta : resident)
      if ((at -= cta->weight) < 0) return *cta;
    return *resident.back();
  }

  Warp* next_warp(Cta& cta) {
    const size_t first = draw(cta.warps.size());
    for (size_t k = 0; k < cta.warps.size(); k++) {
      Warp& w = *cta.warps[(first + k) % cta.warps.size()];
      if (!w.done && !w.waiting) return &w;
    }
    return nullptr;
  }

  u64 next_quantum() {
    const int quantum = m.options.quantum;
    return quantum <= 1 ? 1 : 1 + draw(draw(4) ? quantum : 8 * quantum);
  }
};

static void launch(Machine& m, int grid) {
  std::vector<int> order(grid);
  for (int k = 0; k < grid; k++) order[k] = k;
  if (m.options.shuffle) std::shuffle(order.begin(), order.end(), m.random);
  Scheduler scheduler{m, {}};
  auto& resident = scheduler.resident;
  for (size_t started = 0;;) {
    while ((int)resident.size() < m.options.resident && started < order.size())
      resident.push_back(make_cta(m, order[started++], grid));
    if (resident.empty()) return;
    Cta& cta = scheduler.next_cta();
    Warp* w = scheduler.next_warp(cta);
    if (!w) return (void)(m.error = "\n\na barrier never completes");
    run(*w, scheduler.next_quantum());
    if (!m.error.empty()) return;
    if (m.steps > m.options.limit)
      return m.fail(*w, m.code[w->done ? 0 : w->paths.back().next], "no end: the limit of instructions is reached");
    if (!cta.live) std::erase_if(resident, [&](auto& c) { return c.get() == &cta; });
  }
}

// ---- Interface for ptx/machine.py
extern "C" {
int ptx_knows(const char* name) { return table().count(name); }

// The names of all instructions, one per line.
const char* ptx_names() {
  static std::string names;
  if (names.empty())
    for (auto& [name, run] : table()) names += name + "\n";
  return names.c_str();
}

// codes, per instruction: flow, guard, negated, target, join, number of operands, their index in the
// pool, number of registers, their index in the pool
Machine* ptx_new(int size, const char** names, const int* codes, int pool_size, const s64* pool, int register_bytes,
                 const u8* registers, int threads, int shared_bytes, const s64* specials) {
  auto m = new Machine;
  m->pool.assign(pool, pool + pool_size);
  for (int k = 0; k < size; k++, codes += 9)
    m->code.push_back({table().at(names[k]), (Flow)codes[0], k, codes[1], (bool)codes[2], codes[3], codes[4], codes[5],
                       m->pool.data() + codes[6], codes[7], m->pool.data() + codes[8]});
  const auto stores_byte = [](auto& i) { return i.run == store<false> && i.operands[2] * i.operands[5] == 1; };
  m->copies_tiles = std::any_of(m->code.begin(), m->code.end(), [](auto& i) { return i.run == start_tile_copy; });
  m->granule = std::any_of(m->code.begin(), m->code.end(), stores_byte) ? 1 : 2;
  m->initial_registers.assign(registers, registers + register_bytes);
  m->threads = threads;
  m->shared_bytes = shared_bytes;
  m->tid = specials[0], m->ctaid = specials[1], m->nctaid = specials[2], m->laneid = specials[3];
  return m;
}

void ptx_delete(Machine* m) { delete m; }

// buffers: address, bytes, address of the flags of written bytes or 0
void ptx_launch(Machine* m, int grid, const u8* parameters, int parameter_bytes, const u64* buffers, int buffer_count,
                const Options* options) {
  m->options = *options;
  m->parameters.assign(parameters, parameters + parameter_bytes);
  m->buffers.clear();
  for (int k = 0; k < buffer_count; k++, buffers += 3)
    m->buffers.push_back({buffers[0], buffers[1], (u8*)buffers[2],
                          Zeroed<GlobalShadow>(options->races ? buffers[1] / m->granule + 1 : 0)});
  m->last_buffer = nullptr;
  m->atomics.clear();
  m->random.seed(options->seed);
  m->error.clear();
  m->reports.clear();
  m->steps = 0;
  m->warp_count.assign(m->code.size(), 0);
  m->lane_count.assign(m->code.size(), 0);
  m->wavefronts.assign(m->code.size(), 0);
  m->ideal_wavefronts.assign(m->code.size(), 0);
  launch(*m, grid);
  m->buffers.clear(), m->atomics.clear();  // programs are cached for long
}

const char* ptx_error(Machine* m) { return m->error.c_str(); }
int ptx_reports(Machine* m, const Report** reports) {
  *reports = m->reports.data();
  return m->reports.size();
}
void ptx_counts(Machine* m, u64* warps, u64* lanes, u64* wavefronts, u64* ideal) {
  std::copy(m->warp_count.begin(), m->warp_count.end(), warps);
  std::copy(m->lane_count.begin(), m->lane_count.end(), lanes);
  std::copy(m->wavefronts.begin(), m->wavefronts.end(), wavefronts);
  std::copy(m->ideal_wavefronts.begin(), m->ideal_wavefronts.end(), ideal);
}
}
