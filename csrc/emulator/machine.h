// The state of the running launch, shared by the emulator's own files.
#pragma once

#include <array>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "caller.h"
#include "clocks.h"
#include "emulator.h"
#include "fibers.h"
#include "instructions.h"
#include "memory.h"

namespace emulator {

struct Block;

// One cp.async: performed at the last moment the program allows, when its group is waited for.
struct PendingCopy {
  void* to;
  const void* from;
  unsigned bytes, bytes_read;  // the rest is filled with zeros
};

// A range of a thread's registers that a wgmma in flight reads or writes.
struct BusyRegisters {
  uintptr_t begin, end;
  bool written;
};

enum class State : uint8_t { ready, waiting, done };

struct Thread : ThreadView {
  Block* block = nullptr;
  unsigned actor = 0;        // its entry in vector clocks
  unsigned warp_number = 0;  // over the blocks of the cluster
  State state = State::ready;
  Fiber fiber;

  // While it waits: in what, and called from where.
  const char* waits_in = "";
  Caller waits_at;
  const uint64_t* waits_for = nullptr;  // the mbarrier

  VectorClock clock;  // what it has seen
  VectorClock proxy;  // what of that the async proxy may see: what preceded its last fence.proxy.async

  std::vector<PendingCopy> open_copies;
  std::deque<std::vector<PendingCopy>> copy_groups;
  Clock committed_copies = 0;
  std::vector<size_t> open_stores;  // of the bulk group being built: indices of transfers
  std::deque<std::vector<size_t>> store_groups;
  std::vector<BusyRegisters> busy_registers;
  bool cluster_arrived = false, cluster_may_pass = false;
  std::pair<VectorClock, VectorClock> cluster_released;  // of the phase that its next wait is for

  Clock now() const { return clock[actor]; }
};

// A rendezvous of the lanes of a warp.
struct WarpMeeting {
  WarpFunction run;
  const char* name;
  unsigned mask, arrived;
  void* arguments[32];
  Caller caller;
};

struct Wgmma {
  MatrixType type;
  int columns;
  const void* key;                    // lane 0's accumulators stand for all of them
  std::vector<uint32_t> a_registers;  // 4 a lane; empty: A is in shared memory
  std::array<const uint32_t*, 32> a_in;
  uint64_t a, b;  // matrix descriptors
  bool accumulate, a_mn_major, b_mn_major;
  int actor;
  Clock clock;
  const void* address;
};

struct Accumulators {
  std::array<float*, 32> registers;
  std::vector<float> values;
};

struct Warp {
  Block* block = nullptr;
  unsigned index = 0;
  std::vector<WarpMeeting> meetings;
  std::map<const void*, Accumulators> in_flight;
  std::vector<Wgmma> open_wgmmas;
  std::deque<std::vector<Wgmma>> wgmma_groups;
  bool wgmma_fenced = false;
};

struct Barrier {
  std::vector<Thread*> waiting;
  unsigned arrived = 0, expected = 0;
  const void* first_address = nullptr;  // the call of the thread that came first
  VectorClock seen, proxy;
};

// The clocks that go with an mbarrier; its counts live in its 64-bit word, as on hardware.
struct BarrierClocks {
  VectorClock collecting, released, collecting_proxy, released_proxy;
  unsigned initialiser = 0;  // a thread, and its clock then
  Clock initialised = 0;
  bool visible_to_async_proxy = false;  // the initialisation
};

struct Block {
  Dim index;
  unsigned rank = 0;  // in its cluster
  unsigned live = 0;  // threads that have not exited
  char* shared = nullptr;
  std::vector<Thread*> threads;
  std::vector<Warp> warps;
  std::array<Barrier, 16> barriers;
  std::array<Barrier, 8> warpgroup_waits;
  std::unordered_map<const uint64_t*, BarrierClocks> mbarriers;
  SharedShadow shadow;
  StaticShared statics;
  std::array<unsigned, 8> registers_asked{};  // setmaxnreg, for each warpgroup
};

// What an asynchronous actor's number stands for, in messages.
struct AsyncOperation {
  const char* what = "";
  const Thread* issuer = nullptr;
  const void* address = nullptr;
};

// A copy of the TMA unit.
struct Transfer {
  enum class Kind { load, store, reduce_add } kind;
  char* shared;
  TensorMap map;  // for tensor copies
  std::array<int, 5> at{};
  char* global = nullptr;  // for plain bulk copies
  unsigned bytes = 0;
  uint64_t* barrier = nullptr;
  uint16_t destinations = 0;  // multicast: the blocks that get the data; 0: the issuer's
  Caller caller;              // for checks while it is issued
  int actor = 0, write_actor = 0;
  Clock clock = 0, write_clock = 0;
  std::vector<char> snapshot;  // of a store: what was read from shared memory
  bool was_read = false, done = false;
};

struct Machine {
  static constexpr unsigned kAsyncActors = 64;  // entries of vector clocks for copies and wgmmas, used in turn
  static constexpr unsigned kMaxClusterBlocks = 16;
  static constexpr size_t kSharedStride = 256 * 1024;  // between the shared memories of a cluster's blocks

  Settings settings;

  // of the launch
  const void* kernel = nullptr;
  void (*thread_body)(const void*) = nullptr;
  const void* context = nullptr;
  Dim grid, block, cluster;
  size_t shared_bytes = 0;
  uint64_t random = 1;

  // of the running cluster (a single block, mostly)
  std::vector<std::unique_ptr<Thread>> threads;  // more than are in use
  unsigned thread_count = 0, live = 0, cluster_number = 0;
  std::vector<std::unique_ptr<Block>> blocks;
  unsigned block_count = 0;
  std::vector<uint64_t> ready;  // a bit for each thread
  size_t clock_size = 0;
  unsigned next_async_actor = 0;
  std::array<Clock, kAsyncActors> async_clocks{};
  std::array<AsyncOperation, kAsyncActors> async_operations;
  bool async_proxy_used = false;
  std::vector<Transfer> transfers;
  size_t first_transfer = 0;  // those before it are done
  Barrier cluster_barrier;
  unsigned cluster_phases = 0;
  Block* statics_of = nullptr;  // whose static shared memory is in place
  uint64_t idle_yields = 0;

  char* shared_arena = nullptr;
  void* host_stack_pointer = nullptr;
  bool hooks_paused = false;
  bool given_up = false;

  bool checked() const { return settings.checked; }
  bool profiled() const { return settings.profile; }
};

extern Machine machine;
// Null while host code runs. Initial-exec: the hooks read it at every access. What is thread-local in a library with
// such a variable comes out of a small reserve that all libraries of a process share, and every file of somebody's own
// kernels (native/emulate.py) is a library with an emulator in it. So they are few and small: pointers.
extern __thread Thread* current_thread __attribute__((tls_model("initial-exec")));

// ---- scheduler.cpp ----
void set_ready(Thread& thread);
void wait_here(const char* what, Caller caller);  // blocks the current thread; returns when it is ready again
[[noreturn]] void leave_launch();                 // from a fiber: gives the launch up
void tick(Thread& thread);
void acquire(Thread& thread, const VectorClock& clock, const VectorClock& proxy);
int new_async_operation(const char* what, const Thread& issuer, const void* address, Clock* clock);
inline unsigned copy_actor(const Thread& thread) { return machine.thread_count + thread.actor; }
inline unsigned async_actor(int operation) { return 2 * machine.thread_count + operation; }
std::string actor_name(unsigned actor);
std::string thread_name(const Thread& thread);
// Waits for all lanes of the mask; the last to come runs the function over the arguments of all.
void meet_in_warp(const char* name, WarpFunction run, void* argument, unsigned mask, bool orders_memory, Caller caller);
void need_chip(int number, const char* instruction, Caller caller);

// ---- asynchronous work, of tma.cpp and cp_async.cpp ----
bool run_one_transfer();  // false: none is left
void finish_thread_copies(Thread& thread);
void check_unfinished_stores(Thread& thread);

// ---- mbarrier.cpp ----
std::string mbarrier_state(const uint64_t* barrier);
void check_mbarrier(const uint64_t* barrier, Caller caller);  // that the TMA unit may use it
void complete_bytes(uint64_t* barrier, unsigned bytes, int operation, Clock clock);  // a copy has arrived

// ---- wgmma.cpp ----
void check_unfinished_wgmmas(const Thread& thread);
void check_register_budget(Block& block);

}  // namespace emulator
