// Runs the threads of a block, or of a cluster's blocks, as fibers; barriers and warp-wide rendezvous.
#include <algorithm>
#include <cstring>
#include <mutex>
#include <stdexcept>

#include "counters.h"
#include "machine.h"
#include "positions.h"
#include "reports.h"
#include "sites.h"

namespace emulator {

Machine machine;
__thread Thread* current_thread __attribute__((tls_model("initial-exec"))) = nullptr;

Dim thread_index() { return current_thread->thread_index; }
Dim block_index() { return current_thread->block_index; }
Dim block_size() { return current_thread->block_size; }
Dim grid_size() { return current_thread->grid_size; }
Dim cluster_size() { return current_thread->cluster_size; }
unsigned cluster_rank() { return current_thread->cluster_rank; }
unsigned lane() { return current_thread->lane; }

const Settings& settings() { return machine.settings; }

void configure(const Settings& settings) {
  machine.settings = settings;
  choose_site(settings.chosen_site, settings.alteration);
}

int chip_number() {
  const std::string& chip = machine.settings.chip;
  return chip.rfind("sm_", 0) == 0 ? std::atoi(chip.c_str() + 3) : 0;
}

// CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
size_t most_shared_bytes() {
  switch (chip_number()) {
    case 75: return 64 * 1024;
    case 80: case 87: return 163 * 1024;
    case 86: case 89: case 120: return 99 * 1024;
    default: return 227 * 1024;
  }
}

namespace {

constexpr unsigned kMostThreads = 1024;

unsigned random_below(unsigned bound) {  // xorshift
  uint64_t& state = machine.random;
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return unsigned(state % bound);
}

// ---- whose turn it is ----

Thread* next_ready(unsigned from) {
  if (machine.settings.seed) from = random_below(machine.thread_count);
  const unsigned words = unsigned(machine.ready.size());
  unsigned word = from / 64;
  uint64_t bits = machine.ready[word] & (~0ull << (from % 64));
  for (unsigned i = 0; i <= words; ++i) {
    if (bits) return machine.threads[word * 64 + __builtin_ctzll(bits)].get();
    word = word + 1 == words ? 0 : word + 1;
    bits = machine.ready[word];
  }
  return nullptr;
}

void resume(Thread& next) {
  Thread* const old = current_thread;
  if (&next == old) return;
  if (next.block != machine.statics_of) {
    swap_statics(*machine.statics_of, *next.block);
    machine.statics_of = next.block;
  }
  current_thread = &next;
  fastgpt_emulator_switch(&old->fiber.stack_pointer, next.fiber.stack_pointer);
}

std::string lanes_text(uint32_t lanes) { return format("0x%08x", lanes); }

// What a waiting thread lacks, as far as it can be told.
std::string what_it_lacks(const Thread& thread) {
  if (thread.waits_for) return mbarrier_state(thread.waits_for);
  for (const WarpMeeting& meeting : thread.block->warps[thread.warp].meetings)
    if (meeting.arrived >> thread.lane & 1)
      return format("with mask %s, lanes %s are not here", lanes_text(meeting.mask).c_str(),
                    lanes_text(meeting.mask & ~meeting.arrived).c_str());
  for (const Barrier& barrier : thread.block->barriers)
    if (std::find(barrier.waiting.begin(), barrier.waiting.end(), &thread) != barrier.waiting.end())
      return format("%u of %u threads are here", barrier.arrived,
                    barrier.expected ? barrier.expected : thread.block->live);
  return "";
}

[[noreturn]] void fail_deadlock() {
  struct Group {
    const Thread *first, *last;
    unsigned count = 0;
  };
  std::map<std::string, Group> groups;
  unsigned exited = 0;
  for (unsigned i = 0; i < machine.thread_count; ++i) {
    const Thread& thread = *machine.threads[i];
    if (thread.state == State::done) {
      ++exited;
      continue;
    }
    std::string what = std::string(thread.waits_in) + " at " + user_position(thread.waits_at.address).text();
    const std::string lacks = what_it_lacks(thread);
    if (!lacks.empty()) what += " (" + lacks + ")";
    Group& group = groups.try_emplace(what, Group{&thread, &thread, 0}).first->second;
    group.last = &thread;
    ++group.count;
  }
  std::string message;
  const Thread* culprit = nullptr;
  for (const auto& [what, group] : groups) {
    culprit = culprit ? culprit : group.first;
    message += format("%s%u threads wait in %s: %s", message.empty() ? "" : "; ", group.count, what.c_str(),
                      thread_name(*group.first).c_str());
    if (group.count > 1) message += " to " + thread_name(*group.last);
  }
  if (exited) message += format("; %u threads have exited", exited);
  Thread* const running = current_thread;
  current_thread = const_cast<Thread*>(culprit);  // the report is about a thread that waits
  report("deadlock", message, culprit->waits_at);
  current_thread = running;
  leave_launch();
}

// The current thread waits or is done: another goes on, and asynchronous work only when none can.
void give_way() {
  for (;;) {
    if (Thread* next = next_ready((current_thread->actor + 1) % machine.thread_count)) {
      resume(*next);
      return;
    }
    if (!run_one_transfer()) fail_deadlock();
  }
}

// ---- launching ----

void prepare_cluster(unsigned cluster_x, unsigned cluster_y, unsigned cluster_z) {
  const unsigned threads_a_block = machine.block.count();
  machine.live = machine.thread_count;
  machine.ready.assign((machine.thread_count + 63) / 64, 0);
  machine.next_async_actor = 0;
  machine.async_clocks.fill(0);
  machine.async_proxy_used = false;
  machine.transfers.clear();
  machine.first_transfer = 0;
  machine.cluster_barrier = Barrier();
  machine.cluster_phases = 0;
  machine.idle_yields = 0;
  const Dim& cluster = machine.cluster;
  for (unsigned rank = 0; rank < machine.block_count; ++rank) {
    Block& block = *machine.blocks[rank];
    clear_shared_memory(block);
    block.rank = rank;
    block.index = {cluster_x * cluster.x + rank % cluster.x, cluster_y * cluster.y + rank / cluster.x % cluster.y,
                   cluster_z * cluster.z + rank / cluster.x / cluster.y};
    block.live = threads_a_block;
    block.threads.clear();
    block.warps.assign((threads_a_block + 31) / 32, Warp());
    for (unsigned i = 0; i < block.warps.size(); ++i) {
      block.warps[i].block = &block;
      block.warps[i].index = i;
    }
    for (Barrier& barrier : block.barriers) barrier = Barrier();
    for (Barrier& barrier : block.warpgroup_waits) barrier = Barrier();
    block.mbarriers.clear();
    block.registers_asked.fill(0);
    for (unsigned i = 0; i < threads_a_block; ++i) {
      Thread& thread = *machine.threads[rank * threads_a_block + i];
      thread.block = &block;
      thread.actor = rank * threads_a_block + i;
      thread.thread_index = {i % machine.block.x, i / machine.block.x % machine.block.y,
                             i / machine.block.x / machine.block.y};
      thread.block_index = block.index;
      thread.block_size = machine.block;
      thread.grid_size = machine.grid;
      thread.cluster_size = cluster;
      thread.cluster_rank = rank;
      thread.linear = i;
      thread.lane = i % 32;
      thread.warp = i / 32;
      thread.warp_number = unsigned(rank * block.warps.size()) + thread.warp;
      thread.waits_for = nullptr;
      thread.open_copies.clear();
      thread.copy_groups.clear();
      thread.committed_copies = 0;
      thread.open_stores.clear();
      thread.store_groups.clear();
      thread.busy_registers.clear();
      thread.cluster_arrived = false;
      thread.cluster_may_pass = false;
      thread.clock.assign(machine.clock_size, 0);
      thread.proxy.assign(machine.clock_size, 0);
      thread.clock[thread.actor] = 1;
      thread.fiber.restart();
      block.threads.push_back(&thread);
      set_ready(thread);
    }
  }
  machine.statics_of = machine.blocks[0].get();
}

void run_cluster() {
  Thread* first = machine.threads[0].get();
  current_thread = first;
  fastgpt_emulator_switch(&machine.host_stack_pointer, first->fiber.stack_pointer);
  current_thread = nullptr;
  machine.hooks_paused = false;
  if (machine.profiled()) finish_counting();
}

void check_shape(Dim grid, Dim block, Dim cluster, size_t shared_bytes) {
  const auto refuse = [](const std::string& why) { throw std::runtime_error("invalid launch: " + why); };
  if (block.count() == 0 || block.count() > kMostThreads || block.z > 64)
    refuse(format("a block has 1 to 1024 threads, got (%u,%u,%u)", block.x, block.y, block.z));
  if (grid.count() == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    refuse(format("a grid has 1 to (2147483647,65535,65535) blocks, got (%u,%u,%u)", grid.x, grid.y, grid.z));
  if (shared_bytes > most_shared_bytes())
    refuse(format("a block has at most %zu bytes of shared memory on %s, got %zu", most_shared_bytes(),
                  machine.settings.chip.c_str(), shared_bytes));
  if (cluster.count() > 1 && chip_number() < 90) refuse("clusters need sm_90");
  if (cluster.count() == 0 || cluster.count() > Machine::kMaxClusterBlocks || grid.x % cluster.x ||
      grid.y % cluster.y || grid.z % cluster.z)
    refuse(format("clusters of (%u,%u,%u) do not fit a grid of (%u,%u,%u)", cluster.x, cluster.y, cluster.z, grid.x,
                  grid.y, grid.z));
}

// All have arrived: those that wait go on, and so does the last, if it waits.
void release(Barrier& barrier, Thread* last) {
  Barrier done = std::move(barrier);
  barrier = Barrier();
  if (last) done.waiting.push_back(last);
  for (Thread* thread : done.waiting) {
    if (machine.checked()) acquire(*thread, done.seen, done.proxy);
    set_ready(*thread);
  }
}

void finish_cluster_barrier() {
  Barrier done = std::move(machine.cluster_barrier);
  machine.cluster_barrier = Barrier();
  ++machine.cluster_phases;
  for (unsigned i = 0; i < machine.thread_count; ++i) {
    Thread& thread = *machine.threads[i];
    thread.cluster_may_pass = thread.cluster_arrived;
    thread.cluster_released = {done.seen, done.proxy};
    thread.cluster_arrived = false;
  }
  for (Thread* waiting : done.waiting) set_ready(*waiting);
}

void thread_exits() {
  Thread& thread = *current_thread;
  finish_thread_copies(thread);
  check_unfinished_stores(thread);
  check_unfinished_wgmmas(thread);
  Block& block = *thread.block;
  thread.state = State::done;
  machine.ready[thread.actor / 64] &= ~(1ull << (thread.actor % 64));
  --machine.live;
  if (--block.live == 0) check_register_budget(block);
  // Barriers for the whole block or cluster count threads that have not exited.
  Barrier& whole_block = block.barriers[0];
  if (!whole_block.waiting.empty() && !whole_block.expected && whole_block.arrived == block.live)
    release(whole_block, nullptr);
  if (machine.cluster_barrier.arrived && machine.cluster_barrier.arrived == machine.live) finish_cluster_barrier();
  if (machine.live == 0) {
    while (run_one_transfer()) {
    }
    void* dropped;
    fastgpt_emulator_switch(&dropped, machine.host_stack_pointer);
  }
  give_way();
}

}  // namespace

void fiber_main() {
  machine.thread_body(machine.context);
  thread_exits();
  __builtin_trap();  // a thread that is done is never resumed
}

void leave_launch() {
  machine.given_up = true;
  current_thread = nullptr;
  void* dropped;
  fastgpt_emulator_switch(&dropped, machine.host_stack_pointer);
  __builtin_unreachable();
}

void run_grid(const void* kernel, Dim grid, Dim block, Dim cluster, size_t shared_bytes,
              void (*thread_body)(const void*), const void* context) {
  if (current_thread) throw std::runtime_error("invalid launch: a kernel cannot launch a kernel");
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  check_shape(grid, block, cluster, shared_bytes);

  machine.kernel = kernel;
  machine.grid = grid;
  machine.block = block;
  machine.cluster = cluster;
  machine.shared_bytes = shared_bytes;
  machine.thread_body = thread_body;
  machine.context = context;
  machine.given_up = false;
  machine.block_count = cluster.count();
  machine.thread_count = machine.block_count * block.count();
  machine.clock_size = 2 * machine.thread_count + Machine::kAsyncActors;
  machine.random = machine.settings.seed * 0x9e3779b97f4a7c15ull + 1;
  while (machine.threads.size() < machine.thread_count) machine.threads.push_back(std::make_unique<Thread>());
  begin_memory_checks(kernel);
  while (machine.blocks.size() < machine.block_count) {
    machine.blocks.push_back(std::make_unique<Block>());
    machine.blocks.back()->shared = machine.shared_arena + (machine.blocks.size() - 1) * Machine::kSharedStride;
  }

  const Dim clusters{grid.x / cluster.x, grid.y / cluster.y, grid.z / cluster.z};
  std::vector<unsigned> order;  // only where they are shuffled: a grid may be large
  const unsigned count = clusters.count();
  if (machine.settings.seed) {
    for (unsigned i = 0; i < count; ++i) order.push_back(i);
    for (unsigned i = count; i > 1; --i) std::swap(order[i - 1], order[random_below(i)]);
  }
  for (unsigned i = 0; i < count && !machine.given_up; ++i) {
    machine.cluster_number = order.empty() ? i : order[i];
    const unsigned n = machine.cluster_number;
    prepare_cluster(n % clusters.x, n / clusters.x % clusters.y, n / clusters.x / clusters.y);
    run_cluster();
  }
  if (machine.profiled()) count_launch();
  if (anything_found()) throw std::runtime_error(end_of_launch_report());
}

// ---- used by the other parts ----

void set_ready(Thread& thread) {
  thread.state = State::ready;
  machine.ready[thread.actor / 64] |= 1ull << (thread.actor % 64);
  machine.idle_yields = 0;
}

void wait_here(const char* what, Caller caller) {
  Thread& thread = *current_thread;
  thread.state = State::waiting;
  thread.waits_in = what;
  thread.waits_at = caller;
  machine.ready[thread.actor / 64] &= ~(1ull << (thread.actor % 64));
  give_way();
  thread.waits_for = nullptr;
}

void tick(Thread& thread) { ++thread.clock[thread.actor]; }

void acquire(Thread& thread, const VectorClock& clock, const VectorClock& proxy) {
  join(thread.clock, clock);
  if (machine.async_proxy_used && !proxy.empty()) join(thread.proxy, proxy);
}

int new_async_operation(const char* what, const Thread& issuer, const void* address, Clock* clock) {
  const int actor = int(machine.next_async_actor++ % Machine::kAsyncActors);
  *clock = ++machine.async_clocks[actor];
  machine.async_operations[actor] = {what, &issuer, address};
  machine.async_proxy_used = true;
  return actor;
}

std::string thread_name(const Thread& thread) {
  const Dim& i = thread.thread_index;
  std::string name = format("thread (%u,%u,%u)", i.x, i.y, i.z);
  if (machine.block_count > 1) name += format(" of block %u of the cluster", thread.cluster_rank);
  return name;
}

std::string actor_name(unsigned actor) {
  if (actor < machine.thread_count) return thread_name(*machine.threads[actor]);
  if (actor < 2 * machine.thread_count)
    return "cp.async of " + thread_name(*machine.threads[actor - machine.thread_count]);
  const AsyncOperation& operation = machine.async_operations[actor - 2 * machine.thread_count];
  return std::string(operation.what) + " of " + thread_name(*operation.issuer) + ", issued at " +
         user_position(operation.address).text();
}

void need_chip(int number, const char* instruction, Caller caller) {
  if (chip_number() < number)
    fail("unsupported instruction",
         format("%s needs sm_%d, the chip is %s", instruction, number, machine.settings.chip.c_str()), caller);
}

// ---- barriers of a block: PTX ISA 9.7.12.1, "bar" ----

namespace {

// expected == 0: all threads that have not exited.
void barrier(unsigned id, unsigned expected, bool wait, const char* name, Caller caller) {
  Thread& thread = *current_thread;
  Barrier& barrier = thread.block->barriers[id];
  if (barrier.arrived == 0) {
    barrier.expected = expected;
    barrier.first_address = caller.address;
  } else if (barrier.expected != expected) {
    fail("wrong barrier count",
         format("barrier %u is used for %u threads here, for %u by those that wait at it", id, expected,
                barrier.expected),
         caller);
  } else if (id == 0 && expected == 0 && barrier.first_address != caller.address) {
    const Position first = user_position(barrier.first_address), here = user_position(caller.address);
    if (first.text() != here.text())
      report("divergent barrier",
             "other threads of the block are at the barrier of " + first.text() + ": all must reach the same one",
             caller);
  }
  if (machine.checked()) {
    if (barrier.seen.empty()) {
      barrier.seen.assign(machine.clock_size, 0);
      barrier.proxy.assign(machine.clock_size, 0);
    }
    join(barrier.seen, thread.clock);
    if (machine.async_proxy_used) join(barrier.proxy, thread.proxy);
    tick(thread);
  }
  if (++barrier.arrived == (expected ? expected : thread.block->live)) {
    release(barrier, wait ? &thread : nullptr);
  } else if (wait) {
    barrier.waiting.push_back(&thread);
    wait_here(name, caller);
  }
}

}  // namespace

void block_barrier() {
  const Caller caller = EMULATOR_CALLER;
  if (!site_disabled("__syncthreads", caller)) barrier(0, 0, true, "__syncthreads", caller);
}

void named_barrier(unsigned id, unsigned thread_count, bool wait) {
  const Caller caller = EMULATOR_CALLER;
  const char* name = wait ? "bar.sync" : "bar.arrive";
  if (site_disabled(name, caller)) return;
  if (site_altered("32 threads fewer", caller)) thread_count -= 32;
  if (site_altered("32 threads more", caller)) thread_count += 32;
  if (site_altered("another barrier", caller)) id ^= 1;
  if (wait && site_altered("arrives and does not wait", caller)) wait = false;
  if (id > 15) fail("wrong barrier", format("there are barriers 0 to 15, got %u", id), caller);
  if (thread_count == 0 || thread_count % 32 || thread_count > current_thread->block_size.count())
    fail("wrong barrier count",
         format("a barrier takes whole warps of the block's %u threads, got %u", current_thread->block_size.count(),
                thread_count),
         caller);
  barrier(id, thread_count, wait, name, caller);
}

// ---- barriers of a cluster: PTX ISA 9.7.12.4, "barrier.cluster" ----

void cluster_arrive() {
  const Caller caller = EMULATOR_CALLER;
  need_chip(90, "barrier.cluster", caller);
  if (site_disabled("cluster arrive", caller)) return;
  Thread& thread = *current_thread;
  Barrier& barrier = machine.cluster_barrier;
  if (thread.cluster_arrived) fail("wrong cluster barrier", "a thread arrives twice without a wait between", caller);
  thread.cluster_arrived = true;
  if (machine.checked()) {
    if (barrier.seen.empty()) {
      barrier.seen.assign(machine.clock_size, 0);
      barrier.proxy.assign(machine.clock_size, 0);
    }
    join(barrier.seen, thread.clock);
    join(barrier.proxy, thread.proxy);
    tick(thread);
  }
  if (++barrier.arrived == machine.live) finish_cluster_barrier();
}

void cluster_wait() {
  const Caller caller = EMULATOR_CALLER;
  need_chip(90, "barrier.cluster", caller);
  if (site_disabled("cluster wait", caller)) return;
  Thread& thread = *current_thread;
  if (thread.cluster_arrived) {
    machine.cluster_barrier.waiting.push_back(&thread);
    wait_here("barrier.cluster.wait", caller);
  }
  if (!thread.cluster_may_pass) fail("wrong cluster barrier", "a wait without an arrive before it", caller);
  thread.cluster_may_pass = false;
  if (machine.checked()) acquire(thread, thread.cluster_released.first, thread.cluster_released.second);
}

// ---- fences, yielding ----

// What a fence orders is, in this model, ordered by the barrier or atomic that follows; only its place matters.
void memory_fence(const char* name) {
  const Caller caller = EMULATOR_CALLER;
  site_disabled(name, caller);
}

void yield() {
  constexpr uint64_t kSpinning = 1 << 20;  // turns of all threads without any of them getting on
  const Caller caller = EMULATOR_CALLER;
  if (++machine.idle_yields > kSpinning)
    fail("deadlock",
         "threads spin for what no running thread will do (blocks run one after another, unless they form a cluster)",
         caller);
  if (Thread* next = next_ready((current_thread->actor + 1) % machine.thread_count)) resume(*next);
  if (machine.idle_yields % 64 == 0) run_one_transfer();
}

void trap() {
  const Caller caller = EMULATOR_CALLER;
  fail("trap", "__trap() was called", caller);
}

bool bounds_condition(bool inside) {
  if (!current_thread) return inside;
  const Caller caller = EMULATOR_CALLER;
  return site_disabled("in_bounds", caller) || inside;
}

// ---- warps ----

unsigned active_lanes() {
  unsigned mask = 0;
  const Thread& thread = *current_thread;
  for (unsigned lane = 0; lane < 32; ++lane) {
    const unsigned i = thread.warp * 32 + lane;
    if (i < thread.block->threads.size() && thread.block->threads[i]->state != State::done) mask |= 1u << lane;
  }
  return mask;
}

void meet_in_warp(const char* name, WarpFunction run, void* argument, unsigned mask, bool orders_memory,
                  Caller caller) {
  Thread& thread = *current_thread;
  Block& block = *thread.block;
  Warp& warp = block.warps[thread.warp];
  if (!(mask >> thread.lane & 1))
    fail("wrong mask",
         format("%s: lane %u calls with mask %s, which leaves it out", name, thread.lane, lanes_text(mask).c_str()),
         caller);
  auto meeting = std::find_if(warp.meetings.begin(), warp.meetings.end(),
                              [&](const WarpMeeting& other) { return other.mask & mask; });
  if (meeting == warp.meetings.end())
    meeting = warp.meetings.insert(meeting, WarpMeeting{run, name, mask, 0, {}, caller});
  if (meeting->mask != mask || std::strcmp(meeting->name, name))
    fail("divergent warp",
         format("lane %u calls %s with mask %s while other lanes of its warp are in %s with mask %s at %s", thread.lane,
                name, lanes_text(mask).c_str(), meeting->name, lanes_text(meeting->mask).c_str(),
                user_position(meeting->caller.address).text().c_str()),
         caller);
  meeting->arguments[thread.lane] = argument;
  meeting->arrived |= 1u << thread.lane;
  if (meeting->arrived != mask) {
    wait_here(name, caller);
    return;
  }
  const WarpMeeting done = *meeting;
  warp.meetings.erase(meeting);
  const auto member = [&](int lane) -> Thread& { return *block.threads[thread.warp * 32 + lane]; };
  if (orders_memory && machine.checked()) {
    static VectorClock seen, proxy;
    seen.assign(machine.clock_size, 0);
    proxy.assign(machine.clock_size, 0);
    for (int lane = 0; lane < 32; ++lane) {
      if (!(mask >> lane & 1)) continue;
      join(seen, member(lane).clock);
      if (machine.async_proxy_used) join(proxy, member(lane).proxy);
      tick(member(lane));
    }
    for (int lane = 0; lane < 32; ++lane)
      if (mask >> lane & 1) acquire(member(lane), seen, proxy);
  }
  if (done.run) {
    machine.hooks_paused = true;  // the lanes' arguments are on their stacks
    done.run(done.arguments, mask, caller);
    machine.hooks_paused = false;
  }
  for (int lane = 0; lane < 32; ++lane)
    if ((mask >> lane & 1) && unsigned(lane) != thread.lane) set_ready(member(lane));
}

void warp_collective(const char* name, WarpFunction run, void* argument, unsigned mask) {
  const Caller caller = EMULATOR_CALLER;
  meet_in_warp(name, run, argument, mask, false, caller);
}

void warp_barrier(unsigned mask) {
  const Caller caller = EMULATOR_CALLER;
  if (!site_disabled("__syncwarp", caller)) meet_in_warp("__syncwarp", nullptr, nullptr, mask, true, caller);
}

void bad_shuffle(int source, unsigned mask, const Caller& caller) {
  fail("wrong mask", format("a shuffle reads lane %d, which mask %s leaves out", source, lanes_text(mask).c_str()),
       caller);
}

}  // namespace emulator
