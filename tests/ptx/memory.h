// Loads, stores, atomics, asynchronous copies, ldmatrix and stmatrix.
#pragma once
#include "history.h"

#define FOR_LANES(w, l) for (int l = 0; l < LANES; l++) if ((w).active >> l & 1)

// The bytes at an address if the access is valid; else the launch fails and null is returned.
inline u8* global_at(Warp& w, const Instruction& i, u64 address, u32 size, u32 alignment) {
  Machine& m = *w.cta->machine;
  if (!m.find(address, size)) m.fail(w, i, "global access out of bounds", address);
  else if (address % alignment) m.fail(w, i, "misaligned global access", address);
  else return (u8*)address;
  return nullptr;
}

inline u8* shared_at(Warp& w, const Instruction& i, u32 address, u32 size, u32 alignment) {
  if (address + (u64)size > w.cta->shared.size()) w.cta->machine->fail(w, i, "shared access out of bounds", address);
  else if (address % alignment) w.cta->machine->fail(w, i, "misaligned shared access", address);
  else return w.cta->shared.data() + address;
  return nullptr;
}

// copy: the reader, if it is a copy that the lane starts
inline void read_global(Warp& w, int lane, int at, u64 address, u32 size, const Reader* copy = nullptr) {
  Machine& m = *w.cta->machine;
  Buffer& b = *m.find(address, size);
  const u64 offset = address - b.begin;
  if (b.written && memchr(b.written + offset, 0, size))
    m.report(Finding::UNWRITTEN_GLOBAL, w, lane, at, address, 0, -1);
  if (!m.options.races) return;
  for (u64 k = offset / m.granule; k * m.granule < offset + size; k++)
    note_read(w, lane, b.shadow[k], b.begin + k * m.granule, at, copy ? *copy : reader(w, lane));
}

inline void write_global(Warp& w, int lane, int at, u64 address, u32 size, bool same) {
  Machine& m = *w.cta->machine;
  Buffer& b = *m.find(address, size);
  const u64 offset = address - b.begin;
  if (b.written) memset(b.written + offset, 1, size);
  if (!m.options.races) return;
  for (u64 k = offset / m.granule; k * m.granule < offset + size; k++)
    note_write(w, lane, b.shadow[k], b.begin + k * m.granule, at, same);
}

inline void read_shared(Warp& w, int lane, int at, u32 address, u32 size) {
  Machine& m = *w.cta->machine;
  SharedShadow* s = &w.cta->shadow[address];
  for (u32 k = 0; k < size; k++)
    if (!(s[k].flags & WRITTEN)) {
      m.report(Finding::UNWRITTEN_SHARED, w, lane, at, address, 0, -1);
      break;
    }
  if (m.options.races)
    for (u32 k = 0; k < size; k++) note_read(w, lane, s[k], address + k, at, reader(w, lane));
}

inline void write_shared(Warp& w, int lane, int at, u32 address, u32 size, bool same, bool in_flight = false) {
  SharedShadow* s = &w.cta->shadow[address];
  for (u32 k = 0; k < size; k++)
    if (w.cta->machine->options.races) note_write(w, lane, s[k], address + k, at, same, in_flight);
    else s[k].flags |= WRITTEN;
}

// Counts how often an access of the active lanes passes through the 32 banks of shared memory. Lanes
// that together access up to 128 bytes pass at once, except that a bank serves one word at a time.
template <class F> void count_conflicts(Warp& w, const Instruction& i, u32 size, F address_of_lane) {
  Machine& m = *w.cta->machine;
  if (!m.options.conflicts) return;
  const int together = size > 4 ? 128 / size : LANES;
  for (int first = 0; first < LANES; first += together) {
    std::vector<u32> words;
    for (int l = first; l < first + together; l++)
      if (w.active >> l & 1)
        for (u32 a = address_of_lane(l) / 4, end = (address_of_lane(l) + size + 3) / 4; a < end; a++) words.push_back(a);
    if (words.empty()) continue;
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    u32 of_bank[32] = {}, most = 0;
    for (u32 word : words) most = std::max(most, ++of_bank[word % 32]);
    m.wavefronts[i.number] += most;
    m.ideal_wavefronts[i.number]++;
  }
}

// operands of ld, st: address register (or -1), offset, bytes of an element, bytes of a register,
// whether the value is signed, number of elements, registers
template <bool SHARED> u64 address_of(Warp& w, const Instruction& i, int lane, int operand = 0) {
  const s64 place = i.operands[operand], offset = i.operands[operand + 1];
  if (SHARED) return (u32)((place < 0 ? 0 : w.at<u32>(place)[lane]) + offset);
  return w.at<u64>(place)[lane] + offset;
}

inline void extend(u8* to, const u8* from, int size, int room, bool is_signed) {
  memset(to, is_signed && (from[size - 1] & 0x80) ? 0xff : 0, room);
  memcpy(to, from, size);
}

template <bool SHARED> void load(Warp& w, const Instruction& i) {
  const int each = i.operands[2], room = i.operands[3], count = i.operands[5];
  if (SHARED) count_conflicts(w, i, each * count, [&](int l) { return address_of<true>(w, i, l); });
  FOR_LANES(w, l) {
    const u64 a = address_of<SHARED>(w, i, l);
    const u32 size = each * count;
    const u8* from = SHARED ? shared_at(w, i, a, size, size) : global_at(w, i, a, size, size);
    if (!from) return;
    SHARED ? read_shared(w, l, i.number, a, size) : read_global(w, l, i.number, a, size);
    for (int k = 0; k < count; k++)
      extend(w.at<u8>(i.operands[6 + k]) + l * room, from + k * each, each, room, i.operands[4]);
  }
}

template <bool SHARED> void store(Warp& w, const Instruction& i) {
  const int each = i.operands[2], room = i.operands[3], count = i.operands[5];
  if (SHARED) count_conflicts(w, i, each * count, [&](int l) { return address_of<true>(w, i, l); });
  FOR_LANES(w, l) {
    const u64 a = address_of<SHARED>(w, i, l);
    const u32 size = each * count;
    u8* to = SHARED ? shared_at(w, i, a, size, size) : global_at(w, i, a, size, size);
    if (!to) return;
    bool same = true;
    for (int k = 0; k < count; k++)
      same &= !memcmp(to + k * each, w.at<u8>(i.operands[6 + k]) + l * room, each);
    SHARED ? write_shared(w, l, i.number, a, size, same) : write_global(w, l, i.number, a, size, same);
    for (int k = 0; k < count; k++) memcpy(to + k * each, w.at<u8>(i.operands[6 + k]) + l * room, each);
  }
}

// operands of ld.param: register of an offset in the parameters (or -1), a constant that is added to it, bytes, bytes of
// the register, whether signed, register
inline void load_parameter(Warp& w, const Instruction& i) {
  Machine& m = *w.cta->machine;
  const int bytes = i.operands[2], room = i.operands[3];
  FOR_LANES(w, l) {
    const u64 offset = (i.operands[0] < 0 ? 0 : w.at<u64>(i.operands[0])[l]) + i.operands[1];
    if (offset + bytes > m.parameters.size()) {
      m.fail(w, i, "access out of the parameters", offset);
      return;
    }
    extend(w.at<u8>(i.operands[5]) + l * room, m.parameters.data() + offset, bytes, room, i.operands[4]);
  }
}

// operands of prefetch: address register, offset. The hardware ignores an invalid address.
inline void prefetch(Warp& w, const Instruction& i) {
  FOR_LANES(w, l)
    if (!global_at(w, i, address_of<false>(w, i, l), 1, 1)) return;
}

// ---- Atomics, which the L2 cache executes for the whole GPU.
inline bool touch_atomic(Warp& w, const Instruction& i, int lane, u64 address, u32 size, bool writes, bool acquires,
                         bool releases) {
  Machine& m = *w.cta->machine;
  if (!global_at(w, i, address, size, size)) return false;
  Buffer& b = *m.find(address, size);
  u8* written = b.written ? b.written + (address - b.begin) : nullptr;
  if (written && memchr(written, 0, size)) m.report(Finding::UNWRITTEN_GLOBAL, w, lane, i.number, address, 0, -1);
  if (written && writes) memset(written, 1, size);
  if (!m.options.races) return true;
  Atomic& atomic = m.atomics[address];
  atomic.size = std::max(atomic.size, size);
  if (acquires) acquire(w, lane, atomic);
  for (u64 k = (address - b.begin) / m.granule; k * m.granule < address - b.begin + size; k++) {
    GlobalShadow& s = b.shadow[k];
    if (s.write.thread && !ordered(w, lane, s.write))
      m.report(Finding::PLAIN_AND_ATOMIC, w, lane, i.number, address, s.write.thread, s.write.at);
    if (writes)
      for (auto& r : s.readers)
        if (r.cta && !ordered(w, lane, r))
          m.report(Finding::PLAIN_AND_ATOMIC, w, lane, i.number, address, thread_of(r), s.read_at);
    s.flags |= ATOMIC;
  }
  Reader& last = atomic.last[w.cta->id];
  const int me = w.thread(lane);
  const bool alone = last.cta == 0 || last.epoch < w.cta->epoch || last.who == me;
  last = {w.cta->id + 1, alone ? me : SEVERAL_WARPS, w.cta->epoch, w.clock};
  if (releases) release(w, lane, atomic);
  return true;
}

// operands of atom: address, offset, bytes, operation, acquires, releases, old value (or -1), operand
enum AtomicOperation { ADD_INTEGER, ADD_F32, EXCHANGE };
inline void atomic(Warp& w, const Instruction& i) {
  const u32 size = i.operands[2];
  FOR_LANES(w, l) {
    const u64 a = address_of<false>(w, i, l);
    if (!touch_atomic(w, i, l, a, size, true, i.operands[4], i.operands[5])) return;
    u64 old = 0, operand = 0, value;
    memcpy(&old, (void*)a, size);
    memcpy(&operand, w.at<u8>(i.operands[7]) + l * size, size);
    value = i.operands[3] == EXCHANGE ? operand : old + operand;
    if (i.operands[3] == ADD_F32) {
      f32 x, y;
      memcpy(&x, &old, 4), memcpy(&y, &operand, 4);
      x += y;
      memcpy(&value, &x, 4);
    }
    memcpy((void*)a, &value, size);
    if (i.operands[6] >= 0) memcpy(w.at<u8>(i.operands[6]) + l * size, &old, size);
  }
}

// ld with a memory order; operands as of ld
template <bool ACQUIRES> void load_ordered(Warp& w, const Instruction& i) {
  FOR_LANES(w, l) {
    const u64 a = address_of<false>(w, i, l);
    if (!touch_atomic(w, i, l, a, i.operands[2], false, ACQUIRES, false)) return;
    extend(w.at<u8>(i.operands[6]) + l * i.operands[3], (u8*)a, i.operands[2], i.operands[3], i.operands[4]);
  }
}

// ---- Asynchronous copies from global to shared memory
// operands of cp.async: to, offset, from, offset, bytes, register of the bytes to read (or -1: all)
inline void start_copy(Warp& w, const Instruction& i) {
  Machine& m = *w.cta->machine;
  count_conflicts(w, i, i.operands[4], [&](int l) { return address_of<true>(w, i, l); });
  FOR_LANES(w, l) {
    const u32 size = i.operands[4], read = i.operands[5] < 0 ? size : w.at<u32>(i.operands[5])[l];
    const Copy copy = {&i, (u32)address_of<true>(w, i, l), address_of<false>(w, i, l, 2), size, read};
    if (read > size) return m.fail(w, i, "cp.async reads more than it writes", read);
    if (read && !global_at(w, i, copy.from, read, size)) return;
    u8* to = shared_at(w, i, copy.to, size, size);
    if (!to) return;
    if (read) read_global(w, l, i.number, copy.from, read);
    write_shared(w, l, i.number, copy.to, size, false, true);
    memset(to, m.options.late ? 0xff : 0, size);
    if (!m.options.late) memcpy(to, (void*)copy.from, read);
    w.copies[l].push_back(copy);
  }
}

inline void commit_copies(Warp& w, const Instruction&) {
  FOR_LANES(w, l) {
    w.copy_groups[l].push_back(std::move(w.copies[l]));
    w.copies[l].clear();
  }
}

inline void end_copy(Warp& w, int lane, const Copy& copy) {
  Machine& m = *w.cta->machine;
  if (m.options.late) {
    u8* to = w.cta->shared.data() + copy.to;
    memset(to, 0, copy.size);
    memcpy(to, (void*)copy.from, copy.read);
  }
  if (!m.options.races) return;
  for (u32 k = 0; k < copy.size; k++) {
    SharedShadow& s = w.cta->shadow[copy.to + k];
    s.flags &= ~IN_FLIGHT;
    s.write.epoch = w.cta->epoch;
    s.write.clock = w.clock;
  }
  // The hardware may read the source at any time until now, so it is checked again.
  if (copy.read) read_global(w, lane, copy.instruction->number, copy.from, copy.read);
}

// operand of cp.async.wait_group: the number of groups that may still be in flight
inline void wait_copies(Warp& w, const Instruction& i) {
  FOR_LANES(w, l) {
    auto& groups = w.copy_groups[l];
    while (groups.size() > (size_t)i.operands[0]) {
      for (auto& copy : groups.front()) end_copy(w, l, copy);
      groups.pop_front();
    }
  }
}

// ---- ldmatrix and stmatrix, matrices of 8 x 8 halves; operands: address, offset, number, whether
// transposed, registers. Lanes 8 n to 8 n + 7 hold the addresses of the rows of matrix n.
inline bool whole_warp(Warp& w, const Instruction& i) {
  if (w.active != ALL_LANES) w.cta->machine->fail(w, i, "part of a warp at an instruction of the whole warp");
  return w.active == ALL_LANES;
}

// A row is distributed over four lanes; transposed, each of its columns goes to one lane.
template <class F> void each_part(bool transposed, int row, F f) {
  if (transposed)
    for (int column = 0; column < 8; column++) f(column * 4 + row / 2, column * 2, 2);
  else
    for (int part = 0; part < 4; part++) f(row * 4 + part, part * 4, 4);
}

// The rows of a matrix pass at once, like eight lanes with 16 bytes each.
inline void count_conflicts_of_matrices(Warp& w, const Instruction& i) {
  w.active = i.operands[2] == 4 ? ALL_LANES : (1u << 8 * i.operands[2]) - 1;
  count_conflicts(w, i, 16, [&](int l) { return address_of<true>(w, i, l); });
  w.active = ALL_LANES;
}

inline void load_matrix(Warp& w, const Instruction& i) {
  if (!whole_warp(w, i)) return;
  count_conflicts_of_matrices(w, i);
  const bool transposed = i.operands[3];
  for (int n = 0; n < i.operands[2]; n++) {
    u16 rows[8][8];
    for (int r = 0; r < 8; r++) {
      const u32 a = address_of<true>(w, i, n * 8 + r);
      const u8* from = shared_at(w, i, a, 16, 16);
      if (!from) return;
      each_part(transposed, r, [&](int lane, int at, int size) { read_shared(w, lane, i.number, a + at, size); });
      memcpy(rows[r], from, 16);
    }
    u32* to = w.at<u32>(i.operands[4 + n]);
    for (int l = 0; l < LANES; l++) {
      const int row = l / 4, column = l % 4 * 2;
      to[l] = transposed ? rows[column][row] | (u32)rows[column + 1][row] << 16
                         : rows[row][column] | (u32)rows[row][column + 1] << 16;
    }
  }
}

inline void store_matrix(Warp& w, const Instruction& i) {
  if (!whole_warp(w, i)) return;
  count_conflicts_of_matrices(w, i);
  const bool transposed = i.operands[3];
  for (int n = 0; n < i.operands[2]; n++) {
    const u32* from = w.at<u32>(i.operands[4 + n]);
    u16 rows[8][8];
    for (int l = 0; l < LANES; l++) {
      const int row = l / 4, column = l % 4 * 2;
      (transposed ? rows[column][row] : rows[row][column]) = from[l];
      (transposed ? rows[column + 1][row] : rows[row][column + 1]) = from[l] >> 16;
    }
    for (int r = 0; r < 8; r++) {
      const u32 a = address_of<true>(w, i, n * 8 + r);
      u8* to = shared_at(w, i, a, 16, 16);
      if (!to) return;
      const bool same = !memcmp(to, rows[r], 16);
      each_part(transposed, r,
                [&](int lane, int at, int size) { write_shared(w, lane, i.number, a + at, size, same); });
      memcpy(to, rows[r], 16);
    }
  }
}
