// The happens-before order of memory accesses, for race detection.
//
// A CTA's epoch counts its barriers. A warp's clock is a time of its CTA that advances with barriers,
// with a release by one of its threads, and with a fence of the asynchronous proxy. Each warp holds a
// clock of each other warp of the CTA, Order::seen: accesses with a smaller clock happened before. A
// barrier of some warps joins theirs. Lanes of one instruction are not ordered among each other.
//
// The bytes that the copies of an mbarrier write count as written by a thread of their own, whose
// clock is the number of the mbarrier's phases. An arrival releases to the mbarrier, the completion of
// a phase passes this on, and a successful wait acquires it, together with the phase's copies.
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

// A release by all lanes of the warp of a thread.
constexpr u32 WHOLE_WARP = 1u << 31;
inline u32 warp_of(u32 thread) { return WHOLE_WARP | (thread - 1) / LANES; }

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
  std::erase_if(releases, [&](auto& r) {
    const bool whole = r.thread & WHOLE_WARP;
    const u32 cta = whole ? (r.thread & ~WHOLE_WARP) / (MAX_THREADS / LANES) : (r.thread - 1) / MAX_THREADS;
    return epoch_of(cta, r.epoch);
  });
}

inline bool Knowledge::covers(u32 thread, u32 epoch, u32 clock) const {
  if (epoch_of((thread - 1) / MAX_THREADS, epoch)) return true;
  for (auto& r : releases)
    if ((r.thread == thread || r.thread == warp_of(thread)) && clock < r.clock) return true;
  return false;
}

inline void Clocks::raise(size_t k, u32 clock) {
  if (at.size() <= k) at.resize(k + 1);
  at[k] = std::max(at[k], clock);
}

inline void Clocks::join(const Clocks& other) {
  if (at.size() < other.at.size()) at.resize(other.at.size());
  for (size_t k = 0; k < other.at.size(); k++) at[k] = std::max(at[k], other.at[k]);
}

inline void Order::join(const Order& other) {
  seen.join(other.seen);
  for (const Space space : {SHARED, GLOBAL}) fenced[space].join(other.fenced[space]);
  known.join(other.known);
  known_fenced.join(other.known_fenced);
}

inline u32 advance(Warp& w) { return w.clock = ++w.cta->time; }

template <class F> inline bool knows(const Warp& w, int lane, F covers) {
  if (covers(w.cta->known) || covers(w.order.known)) return true;
  auto own = w.cta->acquired.find(w.thread(lane));
  return own != w.cta->acquired.end() && covers(own->second);
}

// The index in Clocks of a thread of a CTA, and the thread that stands for the copies of an mbarrier.
inline u32 clock_of(u32 thread) {
  return thread < REAL_THREADS ? thread / LANES : REAL_THREADS / LANES + thread - REAL_THREADS;
}
inline u32 copies_of(const Cta& cta, const Mbarrier& b) { return cta.id * MAX_THREADS + REAL_THREADS + b.slot + 1; }
inline bool by_copy(const Event& e) { return (e.thread - 1) % MAX_THREADS >= REAL_THREADS; }

// Whether an event happened before the current instruction of a lane.
inline bool ordered(const Warp& w, int lane, const Event& e) {
  const u32 cta = (e.thread - 1) / MAX_THREADS, thread = (e.thread - 1) % MAX_THREADS;
  if (cta == w.cta->id) {
    if ((int)thread == w.thread(lane) || e.clock < w.order.seen[clock_of(thread)]) return true;
    if (by_copy(e)) return false;
  }
  return knows(w, lane, [&](auto& k) { return k.covers(e.thread, e.epoch, e.clock); });
}

inline u32 thread_of(const Reader& r) { return r.who < 0 ? 0 : (r.cta - 1) * MAX_THREADS + r.who + 1; }

// The warps [first, end) that readers may belong to.
inline std::pair<int, int> warps_of(const Cta& cta, const Reader& r) {
  if (r.who > SEVERAL_WARPS) {
    const int warp = r.who >= 0 ? r.who / LANES : -1 - r.who;
    return {warp, warp + 1};
  }
  const int all = cta.warps.size(), group = SEVERAL_WARPS - 1 - r.who;
  return group < 0 ? std::pair(0, all) : std::pair(group * cta.group, std::min((group + 1) * cta.group, all));
}

inline bool ordered(const Warp& w, int lane, const Reader& r) {
  const u32 cta = r.cta - 1;
  if (cta == w.cta->id) {
    if (r.who >= REAL_THREADS) return r.clock < w.order.seen[clock_of(r.who)];
    if (r.epoch < w.cta->epoch || r.who == w.thread(lane)) return true;
    bool all = true;
    for (auto [warp, end] = warps_of(*w.cta, r); all && warp < end; warp++) all = r.clock < w.order.seen[warp];
    if (all) return true;
  }
  const u32 thread = thread_of(r);
  if (!thread) return knows(w, lane, [&](auto& k) { return k.epoch_of(cta, r.epoch); });
  return knows(w, lane, [&](auto& k) { return k.covers(thread, r.epoch, r.clock); });
}

template <class S> constexpr bool is_shared = std::is_same_v<S, SharedShadow>;

inline Reader reader(const Warp& w, int lane) { return {w.cta->id + 1, w.thread(lane), w.cta->epoch, w.clock}; }

// now: the lane, or a copy that it starts
template <class S> void add_reader(const Warp& w, int lane, S& s, int at, const Reader& now) {
  s.read_at = at;
  Reader* free = nullptr;
  for (auto& r : s.readers) {
    const int group = w.id / w.cta->group;
    if (r.cta == now.cta && (!is_shared<S> || warps_of(*w.cta, r).first / w.cta->group == group)) {
      if (ordered(w, lane, r)) {
        r = now;
      } else if (std::max(r.who, now.who) >= REAL_THREADS) {  // a copy and others: until the next barrier
        r = {now.cta, SEVERAL_WARPS, now.epoch, ~0u};
      } else {  // several threads that are not ordered
        if (r.who <= SEVERAL_WARPS || warps_of(*w.cta, r).first != w.id) r.who = SEVERAL_WARPS - is_shared<S> * (1 + group);
        else r.who = -1 - w.id;
        r.clock = std::max(r.clock, now.clock);
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

template <class S> void note_read(Warp& w, int lane, S& s, u64 address, int at, const Reader& now) {
  Machine& m = *w.cta->machine;
  if (s.flags & IN_FLIGHT)
    m.report(Finding::COPY_IN_FLIGHT, w, lane, at, address, s.write.thread, s.write.at);
  else if (s.write.thread && !ordered(w, lane, s.write))
    m.report(is_shared<S> ? Finding::SHARED_READ_AFTER_WRITE : Finding::GLOBAL_READ_AFTER_WRITE, w, lane, at, address,
             s.write.thread, s.write.at);
  if (s.flags & ATOMIC) check_atomics(w, lane, at, address);
  add_reader(w, lane, s, at, now);
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

// Whether a plain write that happened before is visible to the asynchronous proxy of a warp: a fence
// came between.
inline bool fenced(const Warp& w, const Event& e, Space space) {
  if (by_copy(e)) return true;
  const u32 cta = (e.thread - 1) / MAX_THREADS, thread = (e.thread - 1) % MAX_THREADS;
  if (cta == w.cta->id) return e.clock < w.order.fenced[space][clock_of(thread)];
  return w.order.known_fenced.covers(e.thread, e.epoch, e.clock);
}

inline void fence_proxy(Warp& w, Space space) {
  Order& o = w.order;
  o.fenced[space].join(o.seen);
  o.fenced[space].raise(w.id, advance(w));
  if (space == SHARED || !w.cta->machine->copies_tiles) return;
  o.known_fenced.join(w.cta->known);
  o.known_fenced.join(o.known);
  for (int l = 0; l < LANES; l++)
    if (auto own = w.cta->acquired.find(w.thread(l)); own != w.cta->acquired.end()) o.known_fenced.join(own->second);
}

inline void synchronise_warp(Warp& w) {
  advance(w);
  w.order.seen.raise(w.id, w.clock);
}

// Orders what the warps did before and after a barrier. One of all warps begins an epoch.
inline void meet(Cta& cta, const std::vector<Warp*>& warps) {
  Order all;
  cta.time++;
  for (Warp* w : warps) all.join(w->order);
  for (Warp* w : warps) {
    all.seen.raise(w->id, cta.time);
    for (int l = 0; l < LANES; l++)
      if (auto own = cta.acquired.find(w->thread(l)); own != cta.acquired.end()) {
        all.known.join(own->second);
        cta.acquired.erase(own);
      }
  }
  if (warps.size() == cta.warps.size()) {
    cta.known.join(all.known);
    all.known = {};
    cta.epoch++;
    cta.epoch_began = cta.time;
  }
  for (Warp* w : warps) {
    w->clock = cta.time;
    w->order = all;
  }
}

// What happened before the current instruction of a lane.
inline Knowledge known_to(Warp& w, int lane) {
  Knowledge mine = w.cta->known;
  mine.join(w.order.known);
  auto own = w.cta->acquired.find(w.thread(lane));
  if (own != w.cta->acquired.end()) mine.join(own->second);
  if (mine.epochs.size() <= w.cta->id) mine.epochs.resize(w.cta->id + 1);
  mine.epochs[w.cta->id] = std::max(mine.epochs[w.cta->id], w.cta->epoch);
  for (auto& other : w.cta->warps)
    if (const u32 clock = w.order.seen[other->id]; clock > w.cta->epoch_began)
      mine.releases.push_back({warp_of(other->global_thread(0)), w.cta->epoch, clock});
  mine.releases.push_back({w.global_thread(lane), w.cta->epoch, advance(w)});
  return mine;
}

inline void release(Warp& w, int lane, Atomic& to) { to.released.join(known_to(w, lane)); }

inline void acquire(Warp& w, int lane, const Atomic& from) { w.cta->acquired[w.thread(lane)].join(from.released); }
