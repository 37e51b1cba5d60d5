// The happens-before order of memory accesses, for race detection.
//
// There are two logical clocks. A CTA's epoch counts its barriers: accesses of its threads in earlier
// epochs happened before those of the current one. A warp's clock advances with bar.warp.sync, with a
// release by one of its threads, and with a fence of the asynchronous proxy. Lanes of one instruction
// are not ordered among each other.
//
// A release publishes everything that happened before it in its thread: earlier epochs of its own
// CTA, its own accesses so far, and what the thread has acquired. An acquire imports what was released
// at that address; after the next barrier, all threads of the CTA have it.
//
// Each byte of shared memory and each granule of global memory has a shadow with its last write and
// the readers since. The values in memory are always the newest ones: a missing order shows as a
// report, not as a stale value.
#pragma once
#include "machine.h"

inline void Knowledge::join(const Knowledge& other) {
  if (epochs.size() < other.epochs.size()) epochs.resize(other.epochs.size());
  for (size_t k = 0; k < other.epochs.size(); k++) epochs[k] = std::max(epochs[k], other.epochs[k]);
  for (auto& theirs : other.releases) {
    bool found = false;
    for (auto& mine : releases)
      if (mine.thread == theirs.thread) {
        if (theirs.clock > mine.clock) mine = theirs;
        found = true;
      }
    if (!found) releases.push_back(theirs);
  }
  std::erase_if(releases, [&](auto& r) { return epoch_of((r.thread - 1) / MAX_THREADS, r.epoch); });
}

inline bool Knowledge::covers(u32 thread, u32 epoch, u32 clock) const {
  if (epoch_of((thread - 1) / MAX_THREADS, epoch)) return true;
  for (auto& r : releases)
    if (r.thread == thread && clock < r.clock) return true;
  return false;
}

template <class F> inline bool knows(const Warp& w, int lane, F covers) {
  if (covers(w.cta->known)) return true;
  auto own = w.cta->acquired.find(w.thread(lane));
  return own != w.cta->acquired.end() && covers(own->second);
}

// Whether an event happened before the current instruction of a lane.
inline bool ordered(const Warp& w, int lane, const Event& e) {
  const u32 cta = (e.thread - 1) / MAX_THREADS, thread = (e.thread - 1) % MAX_THREADS;
  if (cta == w.cta->id) {
    if (e.epoch < w.cta->epoch || (int)thread == w.thread(lane)) return true;
    if ((int)thread / LANES == w.id && e.clock < w.synchronised) return true;
  }
  return knows(w, lane, [&](auto& k) { return k.covers(e.thread, e.epoch, e.clock); });
}

inline u32 thread_of(const Reader& r) { return r.who < 0 ? 0 : (r.cta - 1) * MAX_THREADS + r.who + 1; }

inline bool ordered(const Warp& w, int lane, const Reader& r) {
  const u32 cta = r.cta - 1;
  if (cta == w.cta->id) {
    if (r.epoch < w.cta->epoch || r.who == w.thread(lane)) return true;
    const int warp = r.who >= 0 ? r.who / LANES : r.who > SEVERAL_WARPS ? -1 - r.who : -1;
    if (warp == w.id && r.clock < w.synchronised) return true;
  }
  const u32 thread = thread_of(r);
  if (!thread) return knows(w, lane, [&](auto& k) { return k.epoch_of(cta, r.epoch); });
  return knows(w, lane, [&](auto& k) { return k.covers(thread, r.epoch, r.clock); });
}

template <class S> void add_reader(const Warp& w, int lane, S& s, int at) {
  const int me = w.thread(lane);
  const Reader now = {w.cta->id + 1, me, w.cta->epoch, w.clock};
  s.read_at = at;
  Reader* free = nullptr;
  for (auto& r : s.readers) {
    if (r.cta == now.cta) {
      if (r.epoch < now.epoch || r.who == me) {
        r = now;
      } else {  // several threads in this epoch
        const int warp = r.who >= 0 ? r.who / LANES : r.who > SEVERAL_WARPS ? -1 - r.who : -1;
        if (warp != w.id) r.who = SEVERAL_WARPS;
        else if (r.clock < w.synchronised) r.who = me;
        else r.who = -1 - w.id;
        r.clock = now.clock;
      }
      return;
    }
    if (!free && (!r.cta || ordered(w, lane, r))) free = &r;
  }
  if (!free) {
    s.flags |= FORGOTTEN;
    free = &s.readers[0];
  }
  *free = now;
}

// A plain access to an address of atomic operations must be ordered with all of them.
inline void check_atomics(Warp& w, int lane, int at, u64 address) {
  Machine& m = *w.cta->machine;
  for (u64 a = address & ~7ull; a <= address; a += 4) {
    auto found = m.atomics.find(a);
    if (found == m.atomics.end() || a + found->second.size <= address) continue;
    for (auto& [cta, last] : found->second.last)
      if (!ordered(w, lane, last)) m.report(Finding::PLAIN_AND_ATOMIC, w, lane, at, address, thread_of(last), -1);
  }
}

template <class S> constexpr bool is_shared = std::is_same_v<S, SharedShadow>;

template <class S> void note_read(Warp& w, int lane, S& s, u64 address, int at) {
  Machine& m = *w.cta->machine;
  if (s.flags & IN_FLIGHT)
    m.report(Finding::COPY_IN_FLIGHT, w, lane, at, address, s.write.thread, s.write.at);
  else if (s.write.thread && !ordered(w, lane, s.write))
    m.report(is_shared<S> ? Finding::SHARED_READ_AFTER_WRITE : Finding::GLOBAL_READ_AFTER_WRITE, w, lane, at, address,
             s.write.thread, s.write.at);
  if (s.flags & ATOMIC) check_atomics(w, lane, at, address);
  add_reader(w, lane, s, at);
}

// same: the store does not change the values; several lanes of one instruction may then do it.
template <class S> void note_write(Warp& w, int lane, S& s, u64 address, int at, bool same, bool in_flight = false) {
  Machine& m = *w.cta->machine;
  if (s.flags & IN_FLIGHT)
    m.report(Finding::COPY_IN_FLIGHT, w, lane, at, address, s.write.thread, s.write.at);
  else if (s.write.thread && !(same && s.write.at == at) && !ordered(w, lane, s.write))
    m.report(is_shared<S> ? Finding::SHARED_WRITE_AFTER_WRITE : Finding::GLOBAL_WRITE_AFTER_WRITE, w, lane, at, address,
             s.write.thread, s.write.at);
  for (auto& r : s.readers) {
    if (r.cta && !ordered(w, lane, r))
      m.report(is_shared<S> ? Finding::SHARED_WRITE_AFTER_READ : Finding::GLOBAL_WRITE_AFTER_READ, w, lane, at, address,
               thread_of(r), s.read_at);
    r.cta = 0;
  }
  if (s.flags & FORGOTTEN) m.report(Finding::READERS_FORGOTTEN, w, lane, at, address, 0, s.read_at);
  if (s.flags & ATOMIC) check_atomics(w, lane, at, address);
  s.write = {w.global_thread(lane), w.cta->epoch, w.clock, at};
  s.flags = (s.flags & ATOMIC) | WRITTEN | (in_flight ? (u32)IN_FLIGHT : 0);
}

// Whether a plain write of shared memory is visible to the asynchronous proxy of a warp now: the
// writer's warp has executed a fence after it and passed a barrier, or some warp has executed a fence
// in a later epoch that happened before the current one.
inline bool fenced(const Warp& w, const Event& e) {
  const int writer = (e.thread - 1) % MAX_THREADS / LANES;
  for (auto& other : w.cta->warps)
    for (auto& fence : other->fences) {
      if (fence.epoch >= w.cta->epoch && other.get() != &w) continue;
      if (fence.epoch > e.epoch) return true;
      if (fence.epoch == e.epoch && other->id == writer && fence.clock > e.clock) return true;
    }
  return false;
}

inline void fence_proxy(Warp& w) {
  if (w.fences[0].epoch != w.cta->epoch) w.fences[1] = w.fences[0];
  w.fences[0] = {w.cta->epoch, ++w.clock};
}

inline void release(Warp& w, int lane, Atomic& to) {
  Knowledge mine = w.cta->known;
  auto own = w.cta->acquired.find(w.thread(lane));
  if (own != w.cta->acquired.end()) mine.join(own->second);
  if (mine.epochs.size() <= w.cta->id) mine.epochs.resize(w.cta->id + 1);
  mine.epochs[w.cta->id] = std::max(mine.epochs[w.cta->id], w.cta->epoch);
  mine.releases.push_back({w.global_thread(lane), w.cta->epoch, ++w.clock});
  to.released.join(mine);
}

inline void acquire(Warp& w, int lane, const Atomic& from) { w.cta->acquired[w.thread(lane)].join(from.released); }
