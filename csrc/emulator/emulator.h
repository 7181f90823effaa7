// What kernels, launch() and the bindings see of the emulator: plain C++ without CUDA's headers.
//
// Every thread of a block is a fiber on one OS thread. Kernels are compiled with the compiler's thread-sanitizer hooks,
// which this library defines itself, so that each access to memory reaches its checks (see docs/emulator.md).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace emulator {

struct Dim {
  unsigned x = 1, y = 1, z = 1;
  unsigned count() const { return x * y * z; }
};

// What a kernel can see of its own thread.
struct ThreadView {
  Dim thread_index, block_index, block_size, grid_size, cluster_size;
  unsigned linear = 0, lane = 0, warp = 0, cluster_rank = 0;
};

// Functions, so that the memory hooks do not see these reads; const, because a fiber stays the same thread.
__attribute__((const)) Dim thread_index();
__attribute__((const)) Dim block_index();
__attribute__((const)) Dim block_size();
__attribute__((const)) Dim grid_size();
__attribute__((const)) Dim cluster_size();
__attribute__((const)) unsigned cluster_rank();
__attribute__((const)) unsigned lane();

// ---- settings and launching ----

struct Settings {
  bool checked = true;   // find races, bounds, uninitialised reads
  bool profile = false;  // gather the counters
  uint64_t seed = 0;     // 0: threads and blocks in order; otherwise shuffled by it
  std::string chip = "sm_90a";
  int chosen_site = -1;    // this call of a barrier, wait, fence or in_bounds() has no effect
  std::string alteration;  // or is wrong in this way
};
const Settings& settings();
void configure(const Settings& settings);
int chip_number();           // 90 for "sm_90a"
size_t most_shared_bytes();  // that a block of that chip can have

// Runs thread_body(context) once for each thread; throws std::runtime_error with the report if anything was found.
void run_grid(const void* kernel, Dim grid, Dim block, Dim cluster, size_t shared_bytes,
              void (*thread_body)(const void* context), const void* context);

// The tensors of a call, by name. Kernels may touch nothing else in global memory; inputs are read-only.
// What an output held before means nothing: it is filled with 0xff (NaN), and reading it before writing is a finding.
// An element is the unit of the checks. Belongs to the calling OS thread, until unregister_tensors().
enum class TensorAccess { input, output, in_place };
void register_tensor(const void* begin, size_t bytes, size_t element_bytes, const char* name, TensorAccess access);
void unregister_tensors();

// ---- memory ----

enum class Access : uint8_t { read, write, atomic };
void access_memory(const void* address, size_t bytes, Access access);  // checks an access that no hook sees
void copy_unseen(void* to, const void* from, size_t bytes);            // without checks: for what was checked already
void* dynamic_shared_memory(size_t bytes_needed);
uint32_t shared_address(const void* pointer);           // what cvta.to.shared gives
void* map_to_rank(const void* pointer, unsigned rank);  // mapa: the same variable of another block of the cluster

// ---- synchronisation ----

void block_barrier();                                               // __syncthreads()
void named_barrier(unsigned id, unsigned thread_count, bool wait);  // bar.sync, bar.arrive
void cluster_arrive();
void cluster_wait();
void memory_fence(const char* name);  // __threadfence() and its kin
void yield();
bool bounds_condition(bool inside);  // true too where its call is disabled
[[noreturn]] void trap();

// Waits until every lane of the mask is here; then one call of run sees the arguments of all of them.
struct Caller;
using WarpFunction = void (*)(void* const lane_arguments[32], unsigned mask, const Caller& caller);
void warp_collective(const char* name, WarpFunction run, void* argument, unsigned mask);
void warp_barrier(unsigned mask);  // __syncwarp()
unsigned active_lanes();
[[noreturn]] void bad_shuffle(int source, unsigned mask, const Caller& caller);

}  // namespace emulator
