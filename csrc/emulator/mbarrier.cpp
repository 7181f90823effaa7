// mbarrier: PTX ISA 9.7.12.15. As on hardware the state is in the 64-bit word itself: the phase, the arrivals that are
// expected and pending, and the bytes that are still to come.
#include <algorithm>
#include <cstring>

#include "machine.h"
#include "reports.h"
#include "sites.h"

namespace emulator {

namespace {

constexpr int kMostBytes = (1 << 20) - 1;  // 9.7.12.15.2: the range of the tx-count

struct Word {
  unsigned phase : 1, expected : 15, pending : 15, valid : 1;
  int bytes;
};
static_assert(sizeof(Word) == sizeof(uint64_t));

Word load(const uint64_t* barrier) {
  Word word;
  std::memcpy(&word, barrier, sizeof word);
  return word;
}

void store(uint64_t* barrier, const Word& word) { std::memcpy(barrier, &word, sizeof word); }

BarrierClocks& clocks_of(const uint64_t* barrier) { return block_of_shared(barrier).mbarriers.at(barrier); }

Word checked_load(const uint64_t* barrier, Caller caller) {
  if (!in_shared(barrier)) fail("not shared memory", "an mbarrier lies in dynamic shared memory", caller);
  if (uintptr_t(barrier) % 8) fail("misaligned address", "an mbarrier lies on a multiple of 8 bytes", caller);
  if (!block_of_shared(barrier).mbarriers.count(barrier))
    fail("uninitialised mbarrier", "it was not initialised, or not any more", caller);
  if (machine.checked()) {
    const Shadow& byte = shared_shadow(barrier);
    if (byte.writer != Shadow::kNobody && current_thread->clock[byte.writer] < byte.write_clock)
      report("data race",
             "the initialisation of the mbarrier by " + actor_name(byte.writer) +
                 " is not ordered with its use: a barrier is missing",
             caller);
  }
  return load(barrier);
}

void finish_phase_if_complete(uint64_t* barrier) {
  Word word = load(barrier);
  if (word.pending || word.bytes) return;
  word.phase ^= 1;
  word.pending = word.expected;
  store(barrier, word);
  BarrierClocks& clocks = clocks_of(barrier);
  clocks.released = clocks.collecting;
  clocks.released_proxy = clocks.collecting_proxy;
  std::fill(clocks.collecting.begin(), clocks.collecting.end(), 0);
  std::fill(clocks.collecting_proxy.begin(), clocks.collecting_proxy.end(), 0);
  for (unsigned i = 0; i < machine.thread_count; ++i) {
    Thread& thread = *machine.threads[i];
    if (thread.state == State::waiting && thread.waits_for == barrier) set_ready(thread);
  }
}

void expect(Word& word, unsigned bytes, Caller caller) {
  if (bytes && site_altered("16 bytes more", caller)) bytes += 16;
  if (bytes && site_altered("16 bytes fewer", caller)) bytes -= 16;
  if (bytes && site_altered("half of the bytes", caller)) bytes /= 2;
  if (word.bytes + int64_t(bytes) > kMostBytes)
    fail("wrong mbarrier bytes",
         format("an mbarrier expects at most %d bytes, here %ld", kMostBytes, long(word.bytes + int64_t(bytes))),
         caller);
  word.bytes += int(bytes);
}

void arrive(uint64_t* barrier, unsigned expected_bytes, Caller caller) {
  Thread& thread = *current_thread;
  Word word = checked_load(barrier, caller);
  if (!word.pending)
    fail("wrong mbarrier count", format("more arrivals in a phase than the %u it was initialised for", word.expected),
         caller);
  if (machine.checked()) {
    BarrierClocks& clocks = clocks_of(barrier);
    join(clocks.collecting, thread.clock);
    join(clocks.collecting_proxy, thread.proxy);
    tick(thread);
  }
  expect(word, expected_bytes, caller);
  word.pending -= 1;
  store(barrier, word);
  finish_phase_if_complete(barrier);
}

}  // namespace

void mbarrier_init(uint64_t* barrier, unsigned count) {
  const Caller caller = EMULATOR_CALLER;
  need_chip(90, "mbarrier", caller);  // sm_80 has some of it; our twins are Hopper's
  if (site_disabled("mbarrier.init", caller)) return;
  if (site_altered("one arrival fewer", caller)) --count;
  if (site_altered("one arrival more", caller)) ++count;
  constexpr unsigned kMostArrivals = 0x7fff;
  if (count == 0 || count > kMostArrivals)
    fail("wrong mbarrier count", format("an mbarrier takes 1 to %u arrivals, got %u", kMostArrivals, count), caller);
  if (!in_shared(barrier)) fail("not shared memory", "an mbarrier lies in dynamic shared memory", caller);
  if (uintptr_t(barrier) % 8) fail("misaligned address", "an mbarrier lies on a multiple of 8 bytes", caller);
  auto& mbarriers = block_of_shared(barrier).mbarriers;
  if (mbarriers.count(barrier))
    report("mbarrier initialised twice", "it is in use: mbarrier.inval comes first", caller);
  touch_shared(barrier, 8, Access::write, thread_actor(*current_thread), caller);
  BarrierClocks& clocks = mbarriers[barrier];
  clocks.collecting.assign(machine.clock_size, 0);
  clocks.released = clocks.collecting_proxy = clocks.released_proxy = clocks.collecting;
  clocks.initialiser = current_thread->actor;
  clocks.initialised = current_thread->now();
  machine.async_proxy_used = true;
  store(barrier, Word{0, count, count, 1, 0});
}

void mbarrier_invalidate(uint64_t* barrier) {
  const Caller caller = EMULATOR_CALLER;
  checked_load(barrier, caller);
  for (unsigned i = 0; i < machine.thread_count; ++i)
    if (machine.threads[i]->waits_for == barrier)
      fail("mbarrier invalidated", thread_name(*machine.threads[i]) + " waits for it", caller);
  touch_shared(barrier, 8, Access::write, thread_actor(*current_thread), caller);
  block_of_shared(barrier).mbarriers.erase(barrier);
}

void mbarrier_arrive(uint64_t* barrier, unsigned expected_bytes) {
  const Caller caller = EMULATOR_CALLER;
  if (site_disabled("mbarrier.arrive", caller)) return;
  arrive(barrier, expected_bytes, caller);
  if (site_altered("twice", caller)) arrive(barrier, 0, caller);
}

void mbarrier_arrive_at_rank(uint64_t* barrier, unsigned rank) {
  const Caller caller = EMULATOR_CALLER;
  if (site_disabled("mbarrier.arrive", caller)) return;
  need_chip(90, "mbarrier.arrive.shared::cluster", caller);
  if (rank >= machine.block_count)
    fail("out of bounds", format("block %u of a cluster of %u", rank, machine.block_count), caller);
  const ptrdiff_t offset = reinterpret_cast<char*>(barrier) - block_of_shared(barrier).shared;
  uint64_t* const there = reinterpret_cast<uint64_t*>(machine.blocks[rank]->shared + offset);
  arrive(there, 0, caller);
  if (site_altered("twice", caller)) arrive(there, 0, caller);
}

void mbarrier_expect(uint64_t* barrier, unsigned bytes) {
  const Caller caller = EMULATOR_CALLER;
  if (site_disabled("mbarrier.expect_tx", caller)) return;
  Word word = checked_load(barrier, caller);
  expect(word, bytes, caller);
  store(barrier, word);
  finish_phase_if_complete(barrier);
}

void mbarrier_wait(uint64_t* barrier, unsigned parity) {
  const Caller caller = EMULATOR_CALLER;
  if (site_disabled("mbarrier.try_wait", caller)) return;
  if (site_altered("the other parity", caller)) parity ^= 1;
  if (parity > 1) fail("wrong mbarrier parity", format("a parity is 0 or 1, got %u", parity), caller);
  Thread& thread = *current_thread;
  while (checked_load(barrier, caller).phase == parity) {
    thread.waits_for = barrier;
    wait_here("mbarrier.try_wait", caller);
  }
  if (machine.checked()) acquire(thread, clocks_of(barrier).released, clocks_of(barrier).released_proxy);
}

std::string mbarrier_state(const uint64_t* barrier) {
  const Word word = load(barrier);
  return format("shared byte %ld: phase %u, %u of %u arrivals and %d bytes are missing",
                long(reinterpret_cast<const char*>(barrier) - block_of_shared(barrier).shared), word.phase,
                word.pending, word.expected, word.bytes);
}

// 9.7.12.4 "fence.mbarrier_init": makes this thread's initialisations visible to the cluster, the TMA unit included. The
// barrier that must follow is what orders them here before the uses by threads.
void fence_mbarrier_init() {
  const Caller caller = EMULATOR_CALLER;
  need_chip(90, "fence.mbarrier_init", caller);
  if (site_disabled("fence.mbarrier_init", caller)) return;
  for (auto& [barrier, clocks] : current_thread->block->mbarriers)
    if (clocks.initialiser == current_thread->actor) clocks.visible_to_async_proxy = true;
}

// fence.proxy.async: what this thread has seen up to now may from now on be seen through the async proxy.
void fence_proxy_async() {
  const Caller caller = EMULATOR_CALLER;
  need_chip(90, "fence.proxy.async", caller);
  if (site_disabled("fence.proxy.async", caller) || !machine.checked()) return;
  Thread& thread = *current_thread;
  machine.async_proxy_used = true;
  for (auto& [barrier, clocks] : thread.block->mbarriers)
    if (thread.clock[clocks.initialiser] >= clocks.initialised) clocks.visible_to_async_proxy = true;
  thread.proxy = thread.clock;
  tick(thread);
}

// For the TMA unit: bytes have arrived.
void complete_bytes(uint64_t* barrier, unsigned bytes, int operation, Clock clock) {
  Word word = load(barrier);
  word.bytes -= int(bytes);
  store(barrier, word);
  BarrierClocks& clocks = clocks_of(barrier);
  clocks.collecting[async_actor(operation)] = clock;
  clocks.collecting_proxy[async_actor(operation)] = clock;
  finish_phase_if_complete(barrier);
}

void check_mbarrier(const uint64_t* barrier, Caller caller) {
  checked_load(barrier, caller);
  const BarrierClocks& clocks = clocks_of(barrier);
  if (machine.checked() && !clocks.visible_to_async_proxy)
    report("missing proxy fence",
           "the TMA unit is to complete an mbarrier whose initialisation by " + actor_name(clocks.initialiser) +
               " it may not see: fence.mbarrier_init comes after it, before the barrier",
           caller);
}

}  // namespace emulator
