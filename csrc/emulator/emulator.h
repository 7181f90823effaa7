// Core of the CUDA emulator: runs every CUDA thread of a block as a fiber on one OS thread.
// This header is plain C++; emulator_core.cpp holds the scheduler, the checks and the reports.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace emulator {

struct Dim { unsigned x, y, z; };

// Source position of the CUDA call that a message is about (filled in by default arguments).
struct Loc {
  const char* file; int line;
  static constexpr Loc here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};
#define EMULATOR_HERE ::emulator::Loc::here()

// What kernels can see of the running thread: threadIdx and friends read from here.
struct ThreadView { Dim thread_idx, block_idx, block_dim, grid_dim; unsigned lane, warp, linear; };
extern ThreadView* current;  // null while host code runs
// Functions, so that the memory hooks do not see these reads; const, because a fiber keeps its thread.
__attribute__((const)) Dim thread_idx();
__attribute__((const)) Dim block_idx();
__attribute__((const)) Dim block_dim();
__attribute__((const)) Dim grid_dim();
__attribute__((const)) unsigned lane();

// ---- launching ----
struct LaunchOptions {
  bool checked = false;   // memory hooks are compiled in: races, bounds, uninitialised reads
  bool profile = false;   // also gather bank conflicts and sectors per request
  unsigned seed = 0;      // 0: round robin; otherwise a random thread runs next
};
extern LaunchOptions options;
void run_grid(const char* kernel_name, const void* kernel_address, Dim grid, Dim block, size_t shared_bytes,
              void (*thread_body)(const void*), const void* context);
template <class F> void run_grid(const char* name, const void* kernel, Dim grid, Dim block, size_t shared_bytes, const F& body) {
  run_grid(name, kernel, grid, block, shared_bytes, [](const void* f) __attribute__((no_sanitize("thread"))) { (*static_cast<const F*>(f))(); }, &body);
}

// The tensors of a call, by name: accesses outside every one of them are reported. element_bytes is what one element takes.
enum class TensorAccess { input, output, in_place };   // output: its old contents mean nothing
void register_tensor(const void* begin, size_t bytes, size_t element_bytes, const char* name, TensorAccess access);
void unregister_tensors();

// Device buffers: accesses outside every registered buffer are reported.
void register_buffer(const void* begin, size_t bytes, const char* name, bool writable);
void unregister_buffers();

struct Stats { uint64_t fiber_switches = 0, barriers = 0, warp_collectives = 0, accesses = 0; };
extern Stats stats;
std::string take_profile();              // text table, empties the counters
std::vector<std::string> take_reports(); // findings of the last launch (run_grid throws if there are any)

// ---- memory ----
enum Access : uint8_t { kRead = 0, kWrite = 1, kAtomic = 2 };
void check_access(const void* p, size_t bytes, Access kind, const void* pc);
void check_access(const void* p, size_t bytes, Access kind, Loc loc);
void* shared_memory(size_t bytes_needed, Loc loc);
uint32_t shared_address(const void* p, Loc loc);   // what cvta.to.shared would give
void* shared_pointer(uint32_t address, size_t bytes, Loc loc);
[[noreturn]] void fail(const std::string& message, Loc loc);

// ---- synchronisation ----
void block_barrier(int id, int thread_count, bool arrive_only, Loc loc);   // bar.sync / bar.arrive
// Waits until every lane of mask is here, then runs fn once over all lanes' arguments.
using WarpFn = void (*)(void* const lane_args[32], unsigned mask);
void warp_collective(const char* name, WarpFn fn, void* arg, unsigned mask, bool orders_memory, Loc loc);
unsigned active_lanes();
void yield();

// ---- asynchronous copies (cp.async) ----
void cp_async(void* shared_dst, const void* src, unsigned bytes, unsigned src_bytes, Loc loc);
void cp_async_commit();
void cp_async_wait(unsigned groups_left);

// ---- warp matrix instructions ----
void ldmatrix(const void* row, uint32_t* out, int count, bool transpose, Loc loc);
enum class Elem { bf16, f16 };
void mma_m16n8k16(Elem elem, float* d, const uint32_t* a, const uint32_t* b, const float* c, Loc loc);

// ---- mbarrier, TMA, wgmma ----
void mbarrier_init(uint64_t* bar, unsigned count, Loc loc);
void mbarrier_arrive(uint64_t* bar, unsigned expect_tx, Loc loc);
void mbarrier_wait(uint64_t* bar, unsigned parity, Loc loc);
void fence_proxy_async();
struct TensorMap { char* base; uint64_t dims[2]; uint64_t row_stride_bytes; uint32_t box[2]; uint32_t elem_bytes, swizzle_bytes; };
void tma_load_2d(void* shared_dst, const TensorMap& map, uint64_t* bar, int x, int y, Loc loc);
void tma_store_2d(const TensorMap& map, const void* shared_src, int x, int y, Loc loc);
void bulk_load(void* shared_dst, const void* src, unsigned bytes, uint64_t* bar, Loc loc);
void bulk_commit();
void bulk_wait(unsigned groups_left);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(unsigned groups_left);
// D[64,n] += A[64,16] B[16,n]; a_regs != null takes A from registers. acc holds n/2 floats per thread.
void wgmma(Elem elem, int n, float* acc, const uint32_t* a_regs, uint64_t desc_a, uint64_t desc_b, bool accumulate,
           bool a_mn_major, bool b_mn_major, Loc loc);

}  // namespace emulator
