// Copies of tiles of tensors from global to shared memory (TMA), and the mbarriers that count them.
#pragma once
#include "arithmetic.h"

// ---- mbarriers. The emulator holds their state; memory has only a mark.
constexpr u64 MBARRIER_MARK = 0x72656972'7261626d;

inline Mbarrier* mbarrier_at(Warp& w, const Instruction& i, int lane, u32 address) {
  const u8* at = shared_at(w, i, address, 8, 8);
  if (!at) return nullptr;
  read_shared(w, lane, i.number, address, 8);
  u64 mark;
  memcpy(&mark, at, 8);
  if (mark == MBARRIER_MARK) return &w.cta->mbarriers.at(address);
  w.cta->machine->fail(w, i, "no mbarrier at this address", address);
  return nullptr;
}

inline void expect_waited(Warp& w, int lane, const Mbarrier& b) {
  if (b.copied > b.waited) w.cta->machine->report(Finding::NEVER_WAITED_FOR, w, lane, b.copied_at, 0, 0, -1);
}

// operands of mbarrier.init: address, offset, arrivals
inline void make_mbarrier(Warp& w, const Instruction& i) {
  Cta& cta = *w.cta;
  FOR_LANES(w, l) {
    const u32 a = address_of<true>(w, i, l), count = w.at<u32>(i.operands[2])[l];
    u8* at = shared_at(w, i, a, 8, 8);
    if (!at) return;
    write_shared(w, l, i.number, a, 8, false);
    memcpy(at, &MBARRIER_MARK, 8);
    auto found = cta.mbarriers.find(a);
    const bool fresh = found == cta.mbarriers.end();
    const int slot = fresh ? cta.mbarriers.size() : found->second.slot;
    const u32 phase = fresh ? 0 : (found->second.phase + 1) / 2 * 2;  // the order of accesses remembers earlier phases
    cta.mbarriers[a] = {.slot = slot, .count = count, .pending = count, .phase = phase, .copied = phase, .waited = phase};
  }
}

inline void end_mbarrier(Warp& w, const Instruction& i) {
  FOR_LANES(w, l) {
    const u32 a = address_of<true>(w, i, l);
    Mbarrier* b = mbarrier_at(w, i, l, a);
    if (!b) return;
    expect_waited(w, l, *b);
    write_shared(w, l, i.number, a, 8, false);
    memset(w.cta->shared.data() + a, 0xff, 8);
  }
}

// ---- the elements of a tile
enum Field { ADDRESS, RANK, BOX, DIM, STRIDE, STEP, TYPE, INTERLEAVE, SWIZZLE, FILL };
// Bytes of the element types, in the order of the table of tensormap.replace in the PTX ISA.
constexpr u32 ELEMENT_BYTES[] = {1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2, 4, 4};

// Calls f(row, address, skipped, bytes) for each row of a tile: its first element inside the tensor, the bytes in front of
// this, and the number of bytes inside.
template <class F> void each_row(const TileCopy& c, F f) {
  const TensorMap& map = c.map;
  const s64 size = ELEMENT_BYTES[map.type];
  const s64 first = std::max<s64>(0, -(s64)c.from[0]), end = std::min<s64>(map.box[0], (s64)map.dims[0] - c.from[0]);
  for (u32 row = 0; row * size * map.box[0] < c.size; row++) {
    bool inside = first < end;
    u64 address = map.address + (c.from[0] + first) * size;
    u32 rest = row;
    for (int d = 1; d <= map.rank; d++) {
      const s64 index = (s64)c.from[d] + rest % map.box[d];
      rest /= map.box[d];
      inside &= index >= 0 && index < map.dims[d];
      address += index * map.strides[d - 1];
    }
    f(row, address, first * size, inside ? (end - first) * size : 0);
  }
}

inline void copy_tile(const TileCopy& c) {
  const u32 pitch = c.map.box[0] * ELEMENT_BYTES[c.map.type], span = 16u << c.map.swizzle;
  each_row(c, [&](u32 row, u64 address, u32 skipped, u32 bytes) {
    std::vector<u8> line(pitch);
    if (bytes) memcpy(line.data() + skipped, (void*)address, bytes);
    for (u32 k = 0; k < pitch; k += 16) {
      const u32 at = c.to + row * pitch + k;
      memcpy(c.warp->cta->shared.data() + (at ^ (at >> 3 & (span - 16))), line.data() + k, 16);
    }
  });
}

// Completes the phase of an mbarrier if nothing is missing. Late copies execute when a warp waits for nothing else.
inline void settle(Cta& cta, Mbarrier& b) {
  Machine& m = *cta.machine;
  const bool late = m.options.late && !b.copies.empty();
  s64 in_flight = 0;
  for (auto& c : b.copies) in_flight += late * c.size;
  const auto waits = [&](auto& w) { return w->awaited == &b; };
  if (b.pending || b.transactions != in_flight) return;
  if (late && std::none_of(cta.warps.begin(), cta.warps.end(), waits)) return;
  for (auto& c : b.copies) {
    if (late) copy_tile(c);
    for (u32 k = 0; m.options.races && k < c.size; k++) cta.shadow[c.to + k].flags &= ~IN_FLIGHT;
  }
  b.copies.clear();
  b.phase++;
  b.pending = b.count;
  b.transactions = 0;
  b.completed.join(b.arrived);
  b.completed.seen.raise(clock_of((copies_of(cta, b) - 1) % MAX_THREADS), b.phase);
  for (auto& w : cta.warps)
    if (waits(w)) w->waiting = false, w->awaited = nullptr;
}

// operands of mbarrier.arrive: address, offset, registers of the expected bytes and of the number of arrivals (or -1)
inline void arrive(Warp& w, const Instruction& i) {
  FOR_LANES(w, l) {
    Mbarrier* b = mbarrier_at(w, i, l, address_of<true>(w, i, l));
    if (!b) return;
    const u32 count = i.operands[3] < 0 ? 1 : w.at<u32>(i.operands[3])[l];
    if (count > b->pending) return w.cta->machine->fail(w, i, "more arrivals at an mbarrier than it expects");
    b->arrived.join(w.order);
    b->arrived.known.join(known_to(w, l));
    b->pending -= count;
    if (i.operands[2] >= 0) b->transactions += w.at<u32>(i.operands[2])[l];
    settle(*w.cta, *b);
  }
}

// operands of mbarrier.try_wait.parity: address, offset, parity, result. The warp sleeps until the phase is complete.
inline void wait_for_phase(Warp& w, const Instruction& i) {
  if (!whole_warp(w, i)) return;
  const u32 address = address_of<true>(w, i, 0), parity = w.at<u32>(i.operands[2])[0] & 1;
  for (int l = 0; l < LANES; l++) {
    if (address_of<true>(w, i, l) != address || (w.at<u32>(i.operands[2])[l] & 1) != parity)
      return w.cta->machine->fail(w, i, "lanes of a warp wait for different phases");
    if (!mbarrier_at(w, i, l, address)) return;
  }
  Mbarrier& b = w.cta->mbarriers.at(address);
  if ((b.phase & 1) == parity) {
    w.waiting = true, w.awaited = &b;
    settle(*w.cta, b);
    if (w.waiting) return;
  }
  b.waited = std::max(b.waited, b.phase);
  w.order.join(b.completed);
  *w.at<u32>(i.operands[3]) = ALL_LANES;
}

// ---- descriptors of tensors
// operands of tensormap.replace: address, offset, field, index, value
inline void replace_field(Warp& w, const Instruction& i) {
  FOR_LANES(w, l) {
    const u32 a = w.at<u64>(i.operands[0])[l] + i.operands[1], k = i.operands[3];
    u8* at = shared_at(w, i, a, TENSOR_MAP_BYTES, TENSOR_MAP_BYTES);
    if (!at) return;
    TensorMap map;
    memcpy(&map, at, sizeof map);
    const bool wide = i.operands[2] == ADDRESS || i.operands[2] == STRIDE;
    const u64 value = wide ? w.at<u64>(i.operands[4])[l] : w.at<u32>(i.operands[4])[l];
    switch (i.operands[2]) {
      case ADDRESS: map.address = value; break;
      case RANK: map.rank = value; break;
      case BOX: map.box[k] = value; break;
      case DIM: map.dims[k] = value; break;
      case STRIDE: map.strides[k] = value; break;
      case STEP: map.steps[k] = value; break;
      case TYPE: map.type = value; break;
      case INTERLEAVE: map.interleave = value; break;
      case SWIZZLE: map.swizzle = value; break;
      case FILL: map.fill = value; break;
    }
    read_shared(w, l, i.number, a, TENSOR_MAP_BYTES);
    write_shared(w, l, i.number, a, TENSOR_MAP_BYTES, false);
    memcpy(at, &map, sizeof map);
  }
}

// operands of tensormap.cp_fenceproxy: destination, offset, source, offset
inline void publish_map(Warp& w, const Instruction& i) {
  if (!whole_warp(w, i)) return;
  synchronise_warp(w);
  const u32 from = w.at<u64>(i.operands[2])[0] + i.operands[3];
  const u64 to = address_of<false>(w, i, 0);
  const u8* source = shared_at(w, i, from, TENSOR_MAP_BYTES, TENSOR_MAP_BYTES);
  if (!source || !global_at(w, i, to, TENSOR_MAP_BYTES, TENSOR_MAP_BYTES)) return;
  read_shared(w, 0, i.number, from, TENSOR_MAP_BYTES);
  write_global(w, 0, i.number, to, TENSOR_MAP_BYTES, false);
  memcpy((void*)to, source, TENSOR_MAP_BYTES);
}

inline const Event& last_write(Machine& m, u64 address) {
  Buffer& b = *m.find(address, TENSOR_MAP_BYTES);
  return b.shadow[(address - b.begin) / m.granule].write;
}

// operands of fence.proxy.tensormap::generic.acquire: address, offset
inline void acquire_map(Warp& w, const Instruction& i) {
  if (!whole_warp(w, i)) return;
  const u64 a = address_of<false>(w, i, 0);
  if (!global_at(w, i, a, TENSOR_MAP_BYTES, TENSOR_MAP_BYTES) || !w.cta->machine->options.races) return;
  synchronise_warp(w);
  w.cta->tensormaps[a] = {{w.global_thread(0), w.cta->epoch, w.clock, i.number}, last_write(*w.cta->machine, a)};
}

// A copy may use a descriptor if an acquire has happened after its last write.
inline void check_map(Warp& w, int lane, const Instruction& i, u64 address) {
  Machine& m = *w.cta->machine;
  read_global(w, lane, i.number, address, TENSOR_MAP_BYTES);
  if (!m.options.races) return;
  const Event& write = last_write(m, address);
  auto found = w.cta->tensormaps.find(address);
  const bool acquired = found != w.cta->tensormaps.end() && found->second.second.thread == write.thread &&
                        found->second.second.clock == write.clock && ordered(w, lane, found->second.first);
  if (write.thread && !acquired)
    m.report(Finding::NO_TENSORMAP_FENCE, w, lane, i.number, address, write.thread, write.at);
}

// The reason why the hardware would not execute a copy; null if there is none.
inline const char* invalid(const TileCopy& c, int dimensions) {
  const TensorMap& map = c.map;
  if (map.rank + 1 != dimensions) return "a descriptor of another rank";
  if (map.type >= std::size(ELEMENT_BYTES) || map.swizzle > 3) return "not a descriptor";
  if (map.interleave || map.fill) return "a descriptor with an interleaved layout or a fill mode, which is not implemented";
  if (map.address % 16) return "the address of a tensor is not a multiple of 16";
  const u64 pitch = (u64)map.box[0] * ELEMENT_BYTES[map.type];
  if (pitch % 16 || (map.swizzle && pitch != 16u << map.swizzle)) return "a box whose rows do not fit its layout";
  if (c.to % (map.swizzle ? 128u << map.swizzle : 128u)) return "misaligned destination of a tile";
  for (int d = 0; d <= map.rank; d++) {
    if (!map.dims[d]) return "a tensor without elements";
    if (!map.box[d] || map.box[d] > 256) return "a box of no elements or more than 256 in a dimension";
    if (map.steps[d] != 1) return "a descriptor with element strides, which is not implemented";
    if (d < map.rank && (map.strides[d] % 16 || map.strides[d] >> 40)) return "a stride of a tensor is not a multiple of 16";
  }
  return nullptr;
}

inline void check_source(const TileCopy& c, u64 address, u32 bytes) {
  Warp& w = *c.warp;
  Machine& m = *w.cta->machine;
  Buffer& b = *m.find(address, bytes);
  for (u64 k = (address - b.begin) / m.granule; k * m.granule < address - b.begin + bytes; k++) {
    const Event& e = b.shadow[k].write;
    if (e.thread && ordered(w, c.lane, e) && !fenced(w, e, GLOBAL))
      m.report(Finding::COPY_READS_UNFENCED, w, c.lane, c.instruction->number, address, e.thread, e.at);
  }
}

inline void occupy_destination(const TileCopy& c, const Mbarrier& b) {
  Warp& w = *c.warp;
  Machine& m = *w.cta->machine;
  const int at = c.instruction->number;
  for (u32 k = 0; k < c.size; k++) {
    SharedShadow& s = w.cta->shadow[c.to + k];
    const Event before = s.write;
    // Triton has no fence between an mbarrier and a tile that is copied to the same place: its pass
    // that inserts proxy fences ignores mbarrier.init and mbarrier.inval.
    const auto writer = before.thread ? m.code[before.at].run : nullptr;
    const bool exempt = !writer || writer == make_mbarrier || writer == end_mbarrier || !ordered(w, c.lane, before);
    if (!exempt && !fenced(w, before, SHARED))
      m.report(Finding::COPY_WRITES_UNFENCED, w, c.lane, at, c.to + k, before.thread, before.at);
    note_write(w, c.lane, s, c.to + k, at, false, true);
    s.write = {copies_of(*w.cta, b), w.cta->epoch, b.phase, at};
  }
}

// operands of cp.async.bulk.tensor: to, offset, mbarrier, offset, descriptor, dimensions, coordinates
inline void start_tile_copy(Warp& w, const Instruction& i) {
  Machine& m = *w.cta->machine;
  FOR_LANES(w, l) {
    const u64 descriptor = w.at<u64>(i.operands[4])[l];
    if (!global_at(w, i, descriptor, TENSOR_MAP_BYTES, TENSOR_MAP_BYTES)) return;
    check_map(w, l, i, descriptor);
    const int dimensions = i.operands[5];
    TileCopy c = {&i, &w, l, {}, {}, (u32)address_of<true>(w, i, l), 0};
    memcpy(&c.map, (void*)descriptor, sizeof c.map);
    if (const char* reason = invalid(c, dimensions)) return m.fail(w, i, reason, descriptor);
    c.size = ELEMENT_BYTES[c.map.type];
    for (int d = 0; d < dimensions; d++) {
      c.from[d] = w.at<s32>(i.operands[6 + d])[l];
      c.size *= c.map.box[d];
    }
    Mbarrier* b = mbarrier_at(w, i, l, address_of<true>(w, i, l, 2));
    if (!b || !shared_at(w, i, c.to, c.size, 128)) return;
    const Reader as_reader = {w.cta->id + 1, REAL_THREADS + b->slot, w.cta->epoch, b->phase};
    each_row(c, [&](u32, u64 address, u32, u32 bytes) {
      if (!bytes || !m.error.empty() || !global_at(w, i, address, bytes, 1)) return;
      if (m.options.races) check_source(c, address, bytes);
      read_global(w, l, i.number, address, bytes, &as_reader);
    });
    if (!m.error.empty()) return;
    if (m.options.races) occupy_destination(c, *b);
    else write_shared(w, l, i.number, c.to, c.size, false);
    b->copied = b->phase + 1, b->copied_at = i.number;
    b->copies.push_back(c);
    if (m.options.late) memset(w.cta->shared.data() + c.to, 0xff, c.size);
    else copy_tile(c), b->transactions -= c.size;
    settle(*w.cta, *b);
  }
}

// operands of elect.sync: result, predicate
inline void elect(Warp& w, const Instruction& i) {
  const u32 leader = w.active & -w.active;
  FOR_LANES(w, l) w.at<u32>(i.operands[0])[l] = __builtin_ctz(leader);
  u32& d = *w.at<u32>(i.operands[1]);
  d = (d & ~w.active) | leader;
}

inline void tensor_copies(Table& t) {
  t["mbarrier.init"] = make_mbarrier, t["mbarrier.inval"] = end_mbarrier, t["mbarrier.arrive"] = arrive;
  t["mbarrier.try_wait.parity"] = wait_for_phase;
  t["tensormap.replace"] = replace_field, t["tensormap.cp_fenceproxy"] = publish_map;
  t["fence.proxy.tensormap"] = acquire_map;
  t["cp.async.bulk.tensor"] = start_tile_copy;
  t["elect.sync"] = elect;
}
