// Scheduler, memory checks and reports of the CUDA emulator. Compiled without memory hooks.
#include "emulator.h"
#include <algorithm>
#include <array>
#include <cassert>
#include <cstdarg>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <dlfcn.h>
#include <link.h>
#include <map>
#include <memory>
#include <pthread.h>
#include <set>
#include <stdexcept>
#include <sys/mman.h>
#include <unordered_map>

// ------------------------------------------------------------------------------------------------
// Fiber switch: saves the callee-saved registers on the old stack, loads them from the new one.
extern "C" void emulator_switch(void** save_sp, void* load_sp);
extern "C" void emulator_fiber_main();
#if defined(__x86_64__)
asm(R"(
.text
.globl emulator_switch
.type emulator_switch,@function
emulator_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size emulator_switch,.-emulator_switch
)");
static void* first_frame(char* top) {
  auto** sp = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t(15));
  *--sp = nullptr;                                         // fake return address of emulator_fiber_main
  *--sp = reinterpret_cast<void*>(&emulator_fiber_main);        // popped by ret
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  return sp;
}
#elif defined(__aarch64__)
asm(R"(
.text
.globl emulator_switch
.type emulator_switch,%function
emulator_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size emulator_switch,.-emulator_switch
)");
static void* first_frame(char* top) {
  auto* sp = reinterpret_cast<uint64_t*>((reinterpret_cast<uintptr_t>(top) & ~uintptr_t(15)) - 160);
  memset(sp, 0, 160);
  sp[11] = reinterpret_cast<uint64_t>(&emulator_fiber_main);    // x30
  return sp;
}
#else
#error "no fiber switch for this processor"
#endif

namespace emulator {

ThreadView* current = nullptr;
Dim thread_idx() { return current->thread_idx; }
Dim block_idx() { return current->block_idx; }
Dim block_dim() { return current->block_dim; }
Dim grid_dim() { return current->grid_dim; }
unsigned lane() { return current->lane; }
LaunchOptions options;
Stats stats;

namespace {

constexpr size_t kStackBytes = 64 * 1024, kGuardBytes = 4096;
constexpr unsigned kAsyncActors = 64;        // ids shared by TMA and wgmma operations in flight
constexpr size_t kMaxSharedBytes = 227 * 1024, kSharedRedzone = 1024;

using Clock = uint32_t;
using VectorClock = std::vector<Clock>;

void join(VectorClock& into, const VectorClock& from, size_t n) {
  Clock* a = into.data(); const Clock* b = from.data();
  for (size_t i = 0; i < n; ++i) a[i] = a[i] < b[i] ? b[i] : a[i];
}

struct CpAsync { void* dst; const void* src; uint8_t bytes, src_bytes; };

struct WarpOp {                              // one pending warp-wide rendezvous
  WarpFn fn = nullptr; const char* name = nullptr; unsigned mask = 0, arrived = 0; void* args[32]; Loc loc{};
};

struct Wgmma { Elem elem; int n; const void* key; std::vector<uint32_t> a_regs; uint64_t desc_a, desc_b; bool accumulate, a_mn, b_mn; unsigned warp_in_group; int actor; Clock clock; };

enum class State : uint8_t { ready, barrier, warp, mbarrier, done };

struct Thread : ThreadView {
  State state; void* sp; char* stack; const char* waiting_for; Loc waiting_at; int barrier_id; uint64_t* mbar;
  VectorClock clock, proxy;                  // what this thread has seen; what of that the async proxy may see
  std::vector<CpAsync> open_group; std::deque<std::vector<CpAsync>> groups; Clock cp_clock;
  std::vector<int> bulk_open; std::deque<std::vector<int>> bulk_groups;
};

struct Warp {
  std::vector<WarpOp> pending;
  std::map<const void*, std::pair<std::array<float*, 32>, std::vector<float>>> accumulators;  // wgmma results in flight
  std::vector<Wgmma> open; std::deque<std::vector<Wgmma>> groups; bool fenced = false;
};

struct Barrier { std::vector<Thread*> waiting; unsigned arrived = 0; VectorClock seen, proxy; };
struct Mbarrier { VectorClock collecting, released, collecting_proxy, released_proxy; };
struct Transfer { bool load; void* shared; TensorMap map; int x, y; const void* src; unsigned bytes; uint64_t* bar; int actor; Clock clock; Loc loc; bool done; };

// What is known of one byte: its last writer and the readers since.
struct Shadow { Clock write_clock, read_clock; uint16_t writer, reader; int32_t read_set; };   // 16 bytes
struct GlobalShadow { Clock write_clock, read_clock; uint32_t write_block, read_block; uint16_t writer, reader; uint8_t flags; };
constexpr uint16_t kNobody = 0xffff, kMany = 0xfffe;
constexpr uint8_t kAtomicWrite = 1, kManyBlocksRead = 2;

struct Buffer { uintptr_t begin, end; std::string name; bool writable; std::vector<GlobalShadow> shadow; };

struct Occurrence { uint32_t lanes = 0; uint8_t bytes = 0; uintptr_t address[32]; };
struct SiteProfile { uint64_t requests = 0, units = 0, ideal = 0; bool shared = false, write = false; uint8_t bytes = 0; };
struct SiteRecord { uint32_t count[32] = {}; std::deque<Occurrence> open; uint64_t first = 0; bool shared, write; };

// ---- state of the running launch ----
void (*body)(const void*); const void* body_context;
std::string kernel_name;
Dim grid, block; unsigned thread_count; uint32_t block_number; size_t shared_bytes;
std::vector<std::unique_ptr<Thread>> threads; std::vector<Warp> warps;
std::vector<uint64_t> ready_bits; unsigned live;
Barrier barriers[16], warpgroup_waits[8];
std::unordered_map<uint64_t*, Mbarrier> mbarriers;
std::deque<Transfer> transfers; size_t first_transfer;
char* shared_base = nullptr; std::vector<Shadow> shadow; std::vector<std::vector<std::pair<uint16_t, Clock>>> read_sets; std::vector<int> free_sets;
std::unordered_map<uintptr_t, Shadow> static_shadow;
uintptr_t module_begin, module_end, module_ro_begin, module_ro_end, host_stack_begin, host_stack_end;
std::vector<Buffer> buffers; size_t last_buffer;
size_t clock_size; unsigned next_actor; Clock actor_clock[kAsyncActors]; bool async_proxy_used;
void* host_sp; bool hooks_off = false; std::string fatal; uint64_t rng;
std::vector<std::string> reports; std::set<std::string> reported;
std::map<const void*, SiteProfile> profile; std::vector<std::unordered_map<const void*, SiteRecord>> sites;

Thread* me() { return static_cast<Thread*>(current); }
unsigned cp_actor(const Thread* t) { return thread_count + t->linear; }
unsigned async_actor(int i) { return 2 * thread_count + i; }

// ---- messages ----
std::string format(const char* f, ...) {
  char buf[1024]; va_list ap; va_start(ap, f); vsnprintf(buf, sizeof buf, f, ap); va_end(ap); return buf;
}
std::string where(Loc loc) { return loc.file && *loc.file ? format("%s:%d", loc.file, loc.line) : std::string("?"); }
std::string where_pc(const void* pc) {
  static std::unordered_map<const void*, std::string> known;
  auto it = known.find(pc); if (it != known.end()) return it->second;
  Dl_info info; std::string text = format("%p", pc);
  if (dladdr(pc, &info) && info.dli_fname) {
    uintptr_t offset = uintptr_t(pc) - 1;
    // position-independent modules are looked up by offset
    offset -= uintptr_t(info.dli_fbase);
    std::string cmd = format("addr2line -e '%s' 0x%lx 2>/dev/null", info.dli_fname, (unsigned long)offset);
    if (FILE* p = popen(cmd.c_str(), "r")) {
      char line[512]; if (fgets(line, sizeof line, p)) { text = line; while (!text.empty() && text.back() == '\n') text.pop_back(); auto d = text.find(" (disc"); if (d != std::string::npos) text.resize(d); }
      pclose(p);
    }
  }
  return known[pc] = text;
}
std::string actor_name(unsigned id) {
  auto thread = [](unsigned t) { auto d = threads[t]->thread_idx; return format("thread (%u,%u,%u)", d.x, d.y, d.z); };
  if (id < thread_count) return thread(id);
  if (id < 2 * thread_count) return "cp.async of " + thread(id - thread_count);
  return "an asynchronous copy or wgmma";
}
std::string here() { auto* t = current; if (!t) return ""; return format(" [%s, block (%u,%u,%u)]", actor_name(t->linear).c_str(), t->block_idx.x, t->block_idx.y, t->block_idx.z); }
void report(const char* kind, const std::string& place, const std::string& text) {
  if (!reported.insert(std::string(kind) + place).second) return;
  reports.push_back(format("%s: %s: %s%s", place.c_str(), kind, text.c_str(), here().c_str()));
}
[[noreturn]] void leave_launch(const std::string& message) {   // from a fiber: give the launch up
  fatal = message;
  if (!current) throw std::runtime_error(message);
  void* dropped; current = nullptr; hooks_off = false; emulator_switch(&dropped, host_sp); __builtin_unreachable();
}

// ---- scheduling ----
void set_ready(Thread* t) { t->state = State::ready; ready_bits[t->linear / 64] |= 1ull << (t->linear % 64); }
void set_blocked(Thread* t, State s, const char* what, Loc loc) {
  t->state = s; t->waiting_for = what; t->waiting_at = loc; ready_bits[t->linear / 64] &= ~(1ull << (t->linear % 64));
}
Thread* next_ready(unsigned from) {
  unsigned words = ready_bits.size();
  if (options.seed) { rng ^= rng << 13; rng ^= rng >> 7; rng ^= rng << 17; from = rng % thread_count; }
  unsigned w = from / 64; uint64_t bits = ready_bits[w] & (~0ull << (from % 64));
  for (unsigned i = 0; i <= words; ++i) {
    if (bits) return threads[w * 64 + __builtin_ctzll(bits)].get();
    w = w + 1 == words ? 0 : w + 1; bits = ready_bits[w];
  }
  return nullptr;
}
bool run_one_transfer();
std::string deadlock_message() {
  std::map<std::string, std::vector<unsigned>> groups;
  for (auto& t : threads) if (t->state != State::done) groups[format("%s at %s", t->waiting_for, where(t->waiting_at).c_str())].push_back(t->linear);
  std::string s = "deadlock:"; unsigned waiting = 0;
  for (auto& [what, list] : groups) { s += format(" %zu threads (first %u, last %u) wait in %s;", list.size(), list.front(), list.back(), what.c_str()); waiting += list.size(); }
  return s + format(" %u threads have exited", thread_count - waiting);
}
void resume(Thread* next) {
  Thread* old = me(); if (next == old) return;
  ++stats.fiber_switches; current = next; emulator_switch(&old->sp, next->sp);
}
void give_way() {                             // the running thread is blocked or done
  for (;;) {
    if (Thread* next = next_ready((me()->linear + 1) % thread_count)) { resume(next); return; }
    if (!run_one_transfer()) leave_launch(deadlock_message() + format(" [block (%u,%u,%u)]", current->block_idx.x, current->block_idx.y, current->block_idx.z));
  }
}

// ---- clocks ----
void tick(Thread* t) { ++t->clock[t->linear]; }
void acquire(Thread* t, const VectorClock& c, const VectorClock& p) {
  Clock own = t->clock[t->linear]; join(t->clock, c, clock_size); t->clock[t->linear] = std::max(own, t->clock[t->linear]);
  if (async_proxy_used && !p.empty()) join(t->proxy, p, clock_size);
}
void use_async_proxy() {
  if (async_proxy_used) return;
  async_proxy_used = true;
}
int new_async_op(Clock* clock) { int a = next_actor++ % kAsyncActors; *clock = ++actor_clock[a]; return a; }

// ---- shared memory checks ----
bool in_shared(uintptr_t p) { return p - uintptr_t(shared_base) < kMaxSharedBytes + kSharedRedzone; }

void drop_reads(Shadow& s) { if (s.read_set >= 0) { read_sets[s.read_set].clear(); free_sets.push_back(s.read_set); s.read_set = -1; } s.reader = kNobody; }

void race(const char* what, unsigned other, const std::string& place, size_t offset, unsigned actor) {
  report("data race", place, format("%s by %s is not ordered with an earlier %s by %s (shared byte %zu)", what[0] == 'r' ? "read" : "write", actor_name(actor).c_str(), what + 2, actor_name(other).c_str(), offset));
}

template <class Place>
void touch(Shadow& s, size_t offset, Access kind, unsigned actor, Clock clock, const VectorClock& view, const VectorClock* proxy, Place place) {
  if (s.write_clock == 0) {
    if (kind != kWrite) report("uninitialised read", place(), format("shared byte %zu was never written by this block", offset));
  } else if (s.writer != actor && view[s.writer] < s.write_clock) {
    race(kind == kRead ? "r write" : "w write", s.writer, place(), offset, actor);
  } else if (proxy && s.writer < thread_count && (*proxy)[s.writer] < s.write_clock) {
    report("missing fence.proxy.async", place(), format("the async proxy touches shared byte %zu, written by %s with an ordinary store", offset, actor_name(s.writer).c_str()));
  }
  if (kind == kRead) {
    if (s.read_set >= 0) {
      auto& set = read_sets[s.read_set];
      for (auto& [who, when] : set) if (who == actor) { when = clock; return; }
      set.push_back({uint16_t(actor), clock});
    } else if (s.reader == kNobody || s.reader == actor || view[s.reader] >= s.read_clock) {
      s.reader = actor; s.read_clock = clock;
    } else {
      if (free_sets.empty()) { read_sets.emplace_back(); free_sets.push_back(read_sets.size() - 1); }
      s.read_set = free_sets.back(); free_sets.pop_back();
      read_sets[s.read_set] = {{s.reader, s.read_clock}, {uint16_t(actor), clock}};
    }
    return;
  }
  if (s.read_set >= 0) {
    for (auto& [who, when] : read_sets[s.read_set]) if (who != actor && view[who] < when) { race("w read", who, place(), offset, actor); break; }
  } else if (s.reader != kNobody && s.reader != actor && view[s.reader] < s.read_clock) {
    race("w read", s.reader, place(), offset, actor);
  }
  drop_reads(s);
  s.writer = actor; s.write_clock = clock;
}

template <class Place>
void touch_shared(uintptr_t p, size_t bytes, Access kind, unsigned actor, Clock clock, const VectorClock& view, const VectorClock* proxy, Place place) {
  size_t offset = p - uintptr_t(shared_base);
  if (offset + bytes > shared_bytes)
    leave_launch(format("%s: out of bounds: %s of %zu bytes at shared byte %zu, but the block has %zu", place().c_str(), kind == kRead ? "read" : "write", bytes, offset, shared_bytes) + here());
  if (!options.checked) return;
  for (size_t i = 0; i < bytes; ++i) touch(shadow[offset + i], offset + i, kind, actor, clock, view, proxy, place);
}

// ---- global memory checks ----
Buffer* find_buffer(uintptr_t p) {
  if (last_buffer < buffers.size() && p - buffers[last_buffer].begin < buffers[last_buffer].end - buffers[last_buffer].begin) return &buffers[last_buffer];
  for (size_t i = 0; i < buffers.size(); ++i) if (p - buffers[i].begin < buffers[i].end - buffers[i].begin) { last_buffer = i; return &buffers[i]; }
  return nullptr;
}
template <class Place>
void touch_global(uintptr_t p, size_t bytes, Access kind, unsigned actor, Clock clock, const VectorClock& view, Place place) {
  if (buffers.empty()) return;               // the caller registered nothing: no bounds are known
  Buffer* b = find_buffer(p);
  if (!b || p + bytes > b->end) {
    std::string near = "no registered buffer is near";
    long best = 1 << 20;
    for (auto& x : buffers) {
      long past = long(p) - long(x.end), before = long(x.begin) - long(p);
      if (past > -long(bytes) && past < best) { best = past; near = format("%ld bytes past the end of '%s'", past < 0 ? 0 : past, x.name.c_str()); }
      if (before > 0 && before < best) { best = before; near = format("%ld bytes before '%s'", before, x.name.c_str()); }
    }
    leave_launch(format("%s: out of bounds: %s of %zu bytes in global memory, %s", place().c_str(), kind == kRead ? "read" : "write", bytes, near.c_str()) + here());
  }
  if (kind != kRead && !b->writable) report("write to a read-only buffer", place(), b->name);
  if (!options.checked) return;
  if (b->shadow.empty()) b->shadow.resize(b->end - b->begin, GlobalShadow{0, 0, 0, 0, kNobody, kNobody, 0});
  for (size_t i = 0; i < bytes; ++i) {
    GlobalShadow& s = b->shadow[p + i - b->begin];
    bool both_atomic = kind == kAtomic && (s.flags & kAtomicWrite);
    if (s.writer != kNobody && !both_atomic) {
      bool racy = s.write_block != block_number || (s.writer != actor && view[s.writer] < s.write_clock);
      if (racy) report("data race", place(), format("%s of '%s' byte %zu is not ordered with a write by %s", kind == kRead ? "read" : "write", b->name.c_str(), size_t(p + i - b->begin), s.write_block == block_number ? actor_name(s.writer).c_str() : format("block %u", s.write_block).c_str()));
    }
    if (kind == kRead) {
      if (s.reader != kNobody && s.read_block != block_number) s.flags |= kManyBlocksRead;
      s.reader = actor; s.read_clock = clock; s.read_block = block_number;
    } else {
      bool racy = s.reader != kNobody && (s.read_block != block_number || (s.flags & kManyBlocksRead) || (s.reader != actor && view[s.reader] < s.read_clock));
      if (racy) report("data race", place(), format("write of '%s' byte %zu is not ordered with an earlier read", b->name.c_str(), size_t(p + i - b->begin)));
      s.writer = actor; s.write_clock = clock; s.write_block = block_number; s.reader = kNobody;
      s.flags = kind == kAtomic ? kAtomicWrite : 0;
    }
  }
}

// ---- profile: groups what the 32 lanes of a warp do at one place ----
void close_occurrence(const void* pc, SiteRecord& r, const Occurrence& o) {
  SiteProfile& s = profile[pc]; s.shared = r.shared; s.write = r.write; s.bytes = o.bytes; ++s.requests;
  if (r.shared) {
    int per_phase = o.bytes <= 4 ? 32 : 128 / o.bytes;
    for (int begin = 0; begin < 32; begin += per_phase) {
      std::set<uintptr_t> words[32]; size_t worst = 0;
      for (int l = begin; l < begin + per_phase; ++l) if (o.lanes >> l & 1)
        for (uintptr_t w = o.address[l] / 4; w <= (o.address[l] + o.bytes - 1) / 4; ++w) { auto& set = words[w % 32]; set.insert(w); worst = std::max(worst, set.size()); }
      s.units += worst; s.ideal += worst > 0;
    }
  } else {
    std::set<uintptr_t> sectors, bytes;
    for (int l = 0; l < 32; ++l) if (o.lanes >> l & 1)
      for (uintptr_t b = o.address[l]; b < o.address[l] + o.bytes; ++b) { sectors.insert(b / 32); bytes.insert(b); }
    s.units += sectors.size(); s.ideal += (bytes.size() + 31) / 32;
  }
}
void record(uintptr_t p, size_t bytes, Access kind, bool shared, const void* pc) {
  Thread* t = me(); SiteRecord& r = sites[t->warp][pc]; r.shared = shared; r.write = kind != kRead;
  uint64_t index = r.count[t->lane]++ - r.first;
  while (r.open.size() <= index) r.open.emplace_back();
  Occurrence& o = r.open[index]; o.bytes = bytes; o.lanes |= 1u << t->lane; o.address[t->lane] = p;
  while (!r.open.empty() && r.open.front().lanes == 0xffffffffu) { close_occurrence(pc, r, r.open.front()); r.open.pop_front(); ++r.first; }
}
void flush_profile() {
  for (auto& warp : sites) { for (auto& [pc, r] : warp) for (auto& o : r.open) if (o.lanes) close_occurrence(pc, r, o); warp.clear(); }
}

template <class Place>
void access(const void* address, size_t bytes, Access kind, const void* pc, Place place) {
  Thread* t = me(); uintptr_t p = uintptr_t(address);
  if (p - uintptr_t(t->stack) < kStackBytes) return;                       // the thread's own locals
  ++stats.accesses;
  Clock clock = t->clock[t->linear];
  if (in_shared(p)) {
    touch_shared(p, bytes, kind, t->linear, clock, t->clock, nullptr, place);
    if (options.profile && pc) record(p - uintptr_t(shared_base), bytes, kind, true, pc);
  } else if (p - module_begin < module_end - module_begin) {                // static __shared__ variables
    for (size_t i = 0; i < bytes; ++i) {
      auto it = static_shadow.try_emplace(p + i, Shadow{0, 0, kNobody, kNobody, -1}).first;
      touch(it->second, p + i - module_begin, kind, t->linear, clock, t->clock, nullptr, place);
    }
    if (options.profile && pc) record(p, bytes, kind, true, pc);
  } else if (kind == kRead && (p - module_ro_begin < module_ro_end - module_ro_begin || p - host_stack_begin < host_stack_end - host_stack_begin)) {
    // constants and kernel arguments
  } else {
    touch_global(p, bytes, kind, t->linear, clock, t->clock, place);
    if (options.profile && pc) record(p, bytes, kind, false, pc);
  }
}

void find_module(const void* address) {
  static const void* last = nullptr; if (address == last) return; last = address;
  module_begin = module_end = module_ro_begin = module_ro_end = 0;
  dl_iterate_phdr([](dl_phdr_info* info, size_t, void* data) -> int {
    uintptr_t a = uintptr_t(data); bool mine = false;
    for (int i = 0; i < info->dlpi_phnum; ++i) { auto& h = info->dlpi_phdr[i]; if (h.p_type == PT_LOAD && a - (info->dlpi_addr + h.p_vaddr) < h.p_memsz) mine = true; }
    if (!mine) return 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      auto& h = info->dlpi_phdr[i]; if (h.p_type != PT_LOAD) continue;
      uintptr_t b = info->dlpi_addr + h.p_vaddr, e = b + h.p_memsz;
      if (h.p_flags & PF_W) { module_begin = b; module_end = e; }
      else { if (!module_ro_begin || b < module_ro_begin) module_ro_begin = b; module_ro_end = std::max(module_ro_end, e); }
    }
    return 1;
  }, const_cast<void*>(address));
  pthread_attr_t attr; void* low; size_t size;
  if (!pthread_getattr_np(pthread_self(), &attr)) { pthread_attr_getstack(&attr, &low, &size); host_stack_begin = uintptr_t(low); host_stack_end = host_stack_begin + size; pthread_attr_destroy(&attr); }
}

void prepare_block(unsigned bx, unsigned by, unsigned bz) {
  memset(shared_base, 0xff, shared_bytes);                                  // NaN in every float format
  if (options.checked) { std::fill_n(shadow.begin(), std::min(shared_bytes, shadow.size()), Shadow{0, 0, kNobody, kNobody, -1}); read_sets.clear(); free_sets.clear(); static_shadow.clear(); }
  for (auto& b : barriers) b = Barrier();
  for (auto& b : warpgroup_waits) b = Barrier();
  mbarriers.clear(); transfers.clear(); first_transfer = 0; async_proxy_used = false; next_actor = 0; memset(actor_clock, 0, sizeof actor_clock);
  warps.assign((thread_count + 31) / 32, Warp()); sites.resize(warps.size());
  ready_bits.assign((thread_count + 63) / 64, 0); live = thread_count;
  for (unsigned i = 0; i < thread_count; ++i) {
    Thread* t = threads[i].get();
    t->thread_idx = {i % block.x, i / block.x % block.y, i / block.x / block.y};
    t->block_idx = {bx, by, bz}; t->block_dim = block; t->grid_dim = grid; t->linear = i; t->lane = i % 32; t->warp = i / 32;
    t->open_group.clear(); t->groups.clear(); t->bulk_open.clear(); t->bulk_groups.clear(); t->cp_clock = 0;
    if (options.checked) { t->clock.assign(clock_size, 0); t->proxy.assign(clock_size, 0); t->clock[i] = 1; }
    else if (t->clock.size() < clock_size) { t->clock.assign(clock_size, 0); t->proxy.assign(clock_size, 0); }
    t->sp = first_frame(t->stack + kStackBytes); set_ready(t);
  }
}

}  // namespace

void fail(const std::string& message, Loc loc) { leave_launch(where(loc) + ": " + message + here()); }

void register_buffer(const void* begin, size_t bytes, const char* name, bool writable) {
  buffers.push_back({uintptr_t(begin), uintptr_t(begin) + bytes, name, writable, {}});
}
void register_tensor(const void* begin, size_t bytes, size_t, const char* name, TensorAccess access) {
  register_buffer(begin, bytes, name, access != TensorAccess::input);
}
void unregister_tensors() { buffers.clear(); }
void unregister_buffers() { buffers.clear(); }
std::vector<std::string> take_reports() { auto r = std::move(reports); reports.clear(); reported.clear(); return r; }

void run_grid(const char* name, const void* kernel_address, Dim g, Dim b, size_t bytes, void (*f)(const void*), const void* context) {
  if (current) throw std::runtime_error("a kernel cannot launch a kernel");
  kernel_name = name; grid = g; block = b; thread_count = b.x * b.y * b.z; shared_bytes = bytes; body = f; body_context = context; fatal.clear();
  if (!thread_count || thread_count > 1024) throw std::runtime_error("a block has 1 to 1024 threads");
  if (bytes > kMaxSharedBytes) throw std::runtime_error("a block has at most 227 KiB of shared memory");
  if (!shared_base) {
    size_t n = kMaxSharedBytes + kSharedRedzone + 4096;
    shared_base = static_cast<char*>(aligned_alloc(4096, (n + 4095) / 4096 * 4096));
  }
  if (options.checked && shadow.size() < kMaxSharedBytes) shadow.resize(kMaxSharedBytes, Shadow{0, 0, kNobody, kNobody, -1});
  clock_size = 2 * thread_count + kAsyncActors; rng = options.seed * 0x9e3779b97f4a7c15ull + 1;
  while (threads.size() < thread_count) {
    auto t = std::make_unique<Thread>();
    char* m = static_cast<char*>(mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    mprotect(m, kGuardBytes, PROT_NONE); t->stack = m + kGuardBytes; threads.push_back(std::move(t));
  }
  for (auto& x : buffers) x.shadow.clear();
  find_module(kernel_address);
  block_number = 0;
  for (unsigned z = 0; z < g.z; ++z) for (unsigned y = 0; y < g.y; ++y) for (unsigned x = 0; x < g.x; ++x, ++block_number) {
    prepare_block(x, y, z);
    current = threads[0].get(); emulator_switch(&host_sp, threads[0]->sp); current = nullptr;
    if (options.profile) flush_profile();
    if (!fatal.empty()) { reports.push_back(fatal); std::string all; for (auto& r : reports) all += r + "\n"; take_reports(); throw std::runtime_error(all); }
  }
  if (!reports.empty()) { std::string all; for (auto& r : take_reports()) all += r + "\n"; throw std::runtime_error(all); }
}

void check_access(const void* p, size_t bytes, Access kind, const void* pc) { if (current && !hooks_off) access(p, bytes, kind, pc, [=] { return where_pc(pc); }); }
void check_access(const void* p, size_t bytes, Access kind, Loc loc) {
  if (uintptr_t(p) % bytes) fail(format("misaligned address for a %zu-byte access", bytes), loc);
  if (current) access(p, bytes, kind, nullptr, [=] { return where(loc); });
}
void* shared_memory(size_t needed, Loc loc) {
  if (needed > shared_bytes) fail(format("the kernel uses %zu bytes of dynamic shared memory, but was launched with %zu", needed, shared_bytes), loc);
  return shared_base;
}
uint32_t shared_address(const void* p, Loc loc) {
  if (!in_shared(uintptr_t(p))) fail("not a shared memory address", loc);
  return uint32_t(uintptr_t(p) - uintptr_t(shared_base)) + 1024;   // nonzero and 1024-aligned, as on hardware with 1 KiB reserved
}
void* shared_pointer(uint32_t a, size_t bytes, Loc loc) {
  if (a < 1024 || a - 1024 + bytes > shared_bytes) fail(format("shared memory address %u is outside the block's %zu bytes", a, shared_bytes), loc);
  return shared_base + (a - 1024);
}
void yield() { Thread* t = me(); resume(next_ready((t->linear + 1) % thread_count)); }

// ---- barriers ----
void block_barrier(int id, int count, bool arrive_only, Loc loc) {
  Thread* t = me(); Barrier& b = barriers[id]; ++stats.barriers;
  unsigned needed = count ? unsigned(count) : live;
  if (options.checked) {
    if (b.seen.empty()) { b.seen.assign(clock_size, 0); b.proxy.assign(clock_size, 0); }
    join(b.seen, t->clock, clock_size); if (async_proxy_used) join(b.proxy, t->proxy, clock_size); tick(t);
  }
  ++b.arrived;
  if (b.arrived == needed) {
    Barrier done = std::move(b); b = Barrier();
    for (Thread* w : done.waiting) { if (options.checked) acquire(w, done.seen, done.proxy); set_ready(w); }
    if (!arrive_only && options.checked) acquire(t, done.seen, done.proxy);
    return;
  }
  if (arrive_only) return;
  b.waiting.push_back(t); t->barrier_id = id;
  set_blocked(t, State::barrier, id ? "bar.sync" : "__syncthreads", loc); give_way();
}

void thread_exit() {
  Thread* t = me();
  if (!t->groups.empty() || !t->open_group.empty()) cp_async_wait(0);
  --live; set_blocked(t, State::done, "", Loc{"", 0});
  Barrier& b = barriers[0];                                   // exited threads no longer count
  if (!b.waiting.empty() && b.arrived == live) {
    Barrier done = std::move(b); b = Barrier();
    for (Thread* w : done.waiting) { if (options.checked) acquire(w, done.seen, done.proxy); set_ready(w); }
  }
  if (!live) {
    while (run_one_transfer()) {}
    void* dropped; emulator_switch(&dropped, host_sp);
  }
  give_way();
}

unsigned active_lanes() { unsigned m = 0; for (unsigned i = 0; i < 32; ++i) { unsigned t = me()->warp * 32 + i; if (t < thread_count && threads[t]->state != State::done) m |= 1u << i; } return m; }

void warp_collective(const char* name, WarpFn fn, void* arg, unsigned mask, bool orders_memory, Loc loc) {
  Thread* t = me(); Warp& w = warps[t->warp]; ++stats.warp_collectives;
  if (!(mask >> t->lane & 1)) fail(format("%s: the calling lane %u is not in mask 0x%08x", name, t->lane, mask), loc);
  size_t k = 0;
  for (; k < w.pending.size(); ++k) if (w.pending[k].mask & mask) break;
  if (k == w.pending.size()) { w.pending.emplace_back(); auto& n = w.pending.back(); n.fn = fn; n.name = name; n.mask = mask; n.loc = loc; }
  WarpOp& op = w.pending[k];
  if (op.mask != mask || op.fn != fn)
    fail(format("lane %u calls %s with mask 0x%08x while other lanes of its warp wait in %s with mask 0x%08x (%s)", t->lane, name, mask, op.name, op.mask, where(op.loc).c_str()), loc);
  op.args[t->lane] = arg; op.arrived |= 1u << t->lane;
  if (op.arrived != mask) { set_blocked(t, State::warp, name, loc); give_way(); return; }
  WarpOp done = op; w.pending.erase(w.pending.begin() + k);
  if (orders_memory && options.checked) {
    static VectorClock seen, proxy; seen.assign(clock_size, 0); proxy.assign(clock_size, 0);
    for (int l = 0; l < 32; ++l) if (mask >> l & 1) { Thread* o = threads[t->warp * 32 + l].get(); join(seen, o->clock, clock_size); if (async_proxy_used) join(proxy, o->proxy, clock_size); tick(o); }
    for (int l = 0; l < 32; ++l) if (mask >> l & 1) acquire(threads[t->warp * 32 + l].get(), seen, proxy);
  }
  hooks_off = true; fn(done.args, mask); hooks_off = false;
  for (int l = 0; l < 32; ++l) if ((mask >> l & 1) && unsigned(l) != t->lane) set_ready(threads[t->warp * 32 + l].get());
}

// ---- cp.async: copied as late as the program allows ----
void cp_async(void* dst, const void* src, unsigned bytes, unsigned src_bytes, Loc loc) {
  Thread* t = me(); auto place = [=] { return where(loc); };
  if (uintptr_t(dst) % bytes || uintptr_t(src) % bytes) fail(format("cp.async of %u bytes from or to a misaligned address", bytes), loc);
  if (!in_shared(uintptr_t(dst))) fail("cp.async needs a shared memory destination", loc);
  if (src_bytes) touch_global(uintptr_t(src), src_bytes, kRead, t->linear, t->clock[t->linear], t->clock, place);
  touch_shared(uintptr_t(dst), bytes, kWrite, cp_actor(t), t->cp_clock + 1, t->clock, nullptr, place);
  t->open_group.push_back({dst, src, uint8_t(bytes), uint8_t(src_bytes)});
}
void cp_async_commit() { Thread* t = me(); ++t->cp_clock; t->groups.push_back(std::move(t->open_group)); t->open_group.clear(); }
void cp_async_wait(unsigned left) {
  Thread* t = me();
  while (t->groups.size() > left) {
    for (auto& c : t->groups.front()) { memcpy(c.dst, c.src, c.src_bytes); memset(static_cast<char*>(c.dst) + c.src_bytes, 0, c.bytes - c.src_bytes); }
    t->groups.pop_front();
  }
  if (options.checked) t->clock[cp_actor(t)] = t->cp_clock - t->groups.size();
}

// ---- ldmatrix and mma.sync ----
namespace {
float to_float(Elem e, uint16_t h) {
  uint32_t u;
  if (e == Elem::bf16) u = uint32_t(h) << 16;
  else { _Float16 f; memcpy(&f, &h, 2); return float(f); }
  float f; memcpy(&f, &u, 4); return f;
}
struct LdArgs { const char* row; uint32_t* out; int count; bool transpose; Loc loc; };
struct MmaArgs { Elem elem; float* d; const uint32_t* a; const uint32_t* b; const float* c; };

void run_ldmatrix(void* const args[32], unsigned) {
  auto arg = [&](int l) { return static_cast<LdArgs*>(args[l]); };
  for (int m = 0; m < arg(0)->count; ++m)
    for (int lane = 0; lane < 32; ++lane) {
      uint16_t pair[2];
      for (int e = 0; e < 2; ++e) {
        int r = arg(0)->transpose ? lane % 4 * 2 + e : lane / 4, c = arg(0)->transpose ? lane / 4 : lane % 4 * 2 + e;
        memcpy(&pair[e], arg(m * 8 + r)->row + c * 2, 2);
      }
      memcpy(&arg(lane)->out[m], pair, 4);
    }
}
void run_mma(void* const args[32], unsigned) {
  auto arg = [&](int l) { return static_cast<MmaArgs*>(args[l]); };
  float a[16][16], b[16][8], d[16][8]; Elem e = arg(0)->elem;
  for (int lane = 0; lane < 32; ++lane) {
    int g = lane / 4, t = lane % 4; MmaArgs& x = *arg(lane);
    for (int i = 0; i < 4; ++i) for (int h = 0; h < 2; ++h) a[g + (i & 1) * 8][t * 2 + h + (i & 2) * 4] = to_float(e, uint16_t(x.a[i] >> 16 * h));
    for (int i = 0; i < 2; ++i) for (int h = 0; h < 2; ++h) b[t * 2 + h + i * 8][g] = to_float(e, uint16_t(x.b[i] >> 16 * h));
    for (int i = 0; i < 4; ++i) d[g + (i & 2) * 4][t * 2 + (i & 1)] = x.c[i];
  }
  for (int i = 0; i < 16; ++i) for (int k = 0; k < 16; ++k) { float v = a[i][k]; for (int j = 0; j < 8; ++j) d[i][j] += v * b[k][j]; }
  for (int lane = 0; lane < 32; ++lane) { int g = lane / 4, t = lane % 4; for (int i = 0; i < 4; ++i) arg(lane)->d[i] = d[g + (i & 2) * 4][t * 2 + (i & 1)]; }
}
}  // namespace

void ldmatrix(const void* row, uint32_t* out, int count, bool transpose, Loc loc) {
  Thread* t = me();
  if (t->lane < unsigned(count) * 8) {
    if (uintptr_t(row) % 16) fail("ldmatrix row address is not 16-byte aligned", loc);
    if (!in_shared(uintptr_t(row))) fail("ldmatrix needs a shared memory address", loc);
    touch_shared(uintptr_t(row), 16, kRead, t->linear, t->clock[t->linear], t->clock, nullptr, [=] { return where(loc); });
    if (options.profile) {                                  // each 8x8 matrix is one phase of eight 16-byte rows
      static uintptr_t rows[32]; rows[t->lane] = uintptr_t(row) - uintptr_t(shared_base);
      record(rows[t->lane], 16, kRead, true, __builtin_return_address(0));
    }
  }
  LdArgs a{static_cast<const char*>(row), out, count, transpose, loc};
  warp_collective("ldmatrix", run_ldmatrix, &a, 0xffffffffu, false, loc);
}
void mma_m16n8k16(Elem elem, float* d, const uint32_t* a, const uint32_t* b, const float* c, Loc loc) {
  MmaArgs x{elem, d, a, b, c}; warp_collective("mma.sync", run_mma, &x, 0xffffffffu, false, loc);
}

// ---- mbarrier: state lives in the 64-bit word, as on hardware: phase, expected, pending, transaction bytes ----
namespace {
struct BarWord { unsigned phase : 1, expected : 15, pending : 15, valid : 1; int tx; };
static_assert(sizeof(BarWord) == 8);
BarWord load(uint64_t* bar) { BarWord w; memcpy(&w, bar, 8); return w; }
void store(uint64_t* bar, BarWord w) { memcpy(bar, &w, 8); }
Mbarrier& clocks_of(uint64_t* bar) {
  Mbarrier& m = mbarriers[bar];
  if (options.checked && m.collecting.empty()) { m.collecting.assign(clock_size, 0); m.released = m.collecting_proxy = m.released_proxy = m.collecting; }
  return m;
}
void finish_phase_if_complete(uint64_t* bar) {
  BarWord w = load(bar); if (w.pending || w.tx) return;
  w.phase ^= 1; w.pending = w.expected; store(bar, w);
  Mbarrier& m = clocks_of(bar);
  if (options.checked) { m.released = m.collecting; m.released_proxy = m.collecting_proxy; std::fill(m.collecting.begin(), m.collecting.end(), 0); std::fill(m.collecting_proxy.begin(), m.collecting_proxy.end(), 0); }
  for (auto& t : threads) if (t->state == State::mbarrier && t->mbar == bar) set_ready(t.get());
}
BarWord checked_load(uint64_t* bar, Loc loc) {
  if (!in_shared(uintptr_t(bar))) fail("an mbarrier must lie in shared memory", loc);
  if (!mbarriers.count(bar)) fail("use of an mbarrier that was not initialised", loc);
  return load(bar);
}
}  // namespace
void mbarrier_init(uint64_t* bar, unsigned count, Loc loc) {
  use_async_proxy(); Thread* t = me();
  touch_shared(uintptr_t(bar), 8, kWrite, t->linear, t->clock[t->linear], t->clock, nullptr, [=] { return where(loc); });
  mbarriers.erase(bar); clocks_of(bar); store(bar, BarWord{0, count, count, 1, 0});
}
void mbarrier_arrive(uint64_t* bar, unsigned expect_tx, Loc loc) {
  Thread* t = me(); BarWord w = checked_load(bar, loc);
  if (options.checked && t->clock[shadow[uintptr_t(bar) - uintptr_t(shared_base)].writer] < shadow[uintptr_t(bar) - uintptr_t(shared_base)].write_clock)
    report("data race", where(loc), "the mbarrier's initialisation is not visible to this thread (missing __syncthreads?)");
  if (!w.pending) fail("more arrivals on an mbarrier phase than its count", loc);
  Mbarrier& m = clocks_of(bar);
  if (options.checked) { join(m.collecting, t->clock, clock_size); join(m.collecting_proxy, t->proxy, clock_size); tick(t); }
  w.pending -= 1; w.tx += expect_tx; store(bar, w); finish_phase_if_complete(bar);
}
void mbarrier_wait(uint64_t* bar, unsigned parity, Loc loc) {
  Thread* t = me();
  while (checked_load(bar, loc).phase == parity) { t->mbar = bar; set_blocked(t, State::mbarrier, "mbarrier wait", loc); give_way(); }
  Mbarrier& m = clocks_of(bar);
  if (options.checked) acquire(t, m.released, m.released_proxy);
}
void fence_proxy_async() { if (options.checked) { Thread* t = me(); use_async_proxy(); t->proxy = t->clock; tick(t); } }

// ---- TMA: transfers run when no thread can go on, so that a missing wait shows ----
namespace {
size_t swizzled(size_t address, unsigned swizzle_bytes) {     // xor 16-byte chunk index with the 128-byte row index
  if (swizzle_bytes == 128) return address ^ ((address >> 7 & 7) << 4);
  if (swizzle_bytes == 64) return address ^ ((address >> 7 & 3) << 4);
  if (swizzle_bytes == 32) return address ^ ((address >> 7 & 1) << 4);
  return address;
}
template <class F> void for_each_row(Transfer& x, F f) {      // f(shared row start, global row pointer or null, bytes inside, box row bytes)
  if (x.src) return;
  auto& m = x.map; size_t row_bytes = size_t(m.box[0]) * m.elem_bytes;
  for (unsigned r = 0; r < m.box[1]; ++r) {
    int64_t gy = int64_t(x.y) + r; size_t inside = 0; char* g = nullptr;
    if (gy >= 0 && uint64_t(gy) < m.dims[1] && x.x >= 0 && uint64_t(x.x) < m.dims[0]) {
      inside = std::min<uint64_t>(m.box[0], m.dims[0] - x.x) * m.elem_bytes; g = m.base + gy * m.row_stride_bytes + size_t(x.x) * m.elem_bytes;
    }
    f(static_cast<char*>(x.shared) + r * row_bytes, g, inside, row_bytes);
  }
}
void perform(Transfer& x) {
  if (x.src) memcpy(x.shared, x.src, x.bytes);
  else for_each_row(x, [&](char* s, char* g, size_t inside, size_t row_bytes) {
    for (size_t i = 0; i < row_bytes; i += 16) {
      char* at = reinterpret_cast<char*>(swizzled(uintptr_t(s) + i, x.map.swizzle_bytes));
      size_t n = i < inside ? std::min<size_t>(16, inside - i) : 0;
      if (x.load) { if (n) memcpy(at, g + i, n); memset(at + n, 0, 16 - n); } else if (n) memcpy(g + i, at, n);
    }
  });
  x.done = true;
  if (x.bar) {
    BarWord w = load(x.bar); w.tx -= x.bytes; store(x.bar, w);
    Mbarrier& m = clocks_of(x.bar);
    if (options.checked) { m.collecting[async_actor(x.actor)] = x.clock; m.collecting_proxy[async_actor(x.actor)] = x.clock; }
    finish_phase_if_complete(x.bar);
  }
}
bool run_one_transfer() {
  while (first_transfer < transfers.size() && transfers[first_transfer].done) ++first_transfer;
  for (size_t i = first_transfer; i < transfers.size(); ++i) if (!transfers[i].done && transfers[i].load) { perform(transfers[i]); return true; }
  return false;
}
void start(Transfer x) {
  Thread* t = me(); use_async_proxy(); auto place = [&] { return where(x.loc); };
  if (uintptr_t(x.shared) % 16 || (x.map.swizzle_bytes == 128 && !x.src && uintptr_t(x.shared) % 128)) fail("the shared address of a TMA copy is misaligned", x.loc);
  if (x.bar) checked_load(x.bar, x.loc);
  x.actor = new_async_op(&x.clock); unsigned actor = async_actor(x.actor);
  touch_shared(uintptr_t(x.shared), x.bytes, x.load ? kWrite : kRead, actor, x.clock, t->clock, x.load ? nullptr : &t->proxy, place);
  if (x.src) touch_global(uintptr_t(x.src), x.bytes, kRead, t->linear, t->clock[t->linear], t->clock, place);
  for_each_row(x, [&](char*, char* g, size_t inside, size_t) { if (inside) touch_global(uintptr_t(g), inside, x.load ? kRead : kWrite, x.load ? t->linear : actor, x.load ? t->clock[t->linear] : x.clock, t->clock, place); });
  if (!x.load) t->bulk_open.push_back(transfers.size());
  transfers.push_back(std::move(x));
}
}  // namespace
void tma_load_2d(void* dst, const TensorMap& map, uint64_t* bar, int x, int y, Loc loc) {
  start({true, dst, map, x, y, nullptr, map.box[0] * map.box[1] * map.elem_bytes, bar, 0, 0, loc, false});
}
void tma_store_2d(const TensorMap& map, const void* src, int x, int y, Loc loc) {
  start({false, const_cast<void*>(src), map, x, y, nullptr, map.box[0] * map.box[1] * map.elem_bytes, nullptr, 0, 0, loc, false});
}
void bulk_load(void* dst, const void* src, unsigned bytes, uint64_t* bar, Loc loc) { start({true, dst, {}, 0, 0, src, bytes, bar, 0, 0, loc, false}); }
void bulk_commit() { Thread* t = me(); t->bulk_groups.push_back(std::move(t->bulk_open)); t->bulk_open.clear(); }
void bulk_wait(unsigned left) {
  Thread* t = me();
  while (t->bulk_groups.size() > left) {
    for (int i : t->bulk_groups.front()) { perform(transfers[i]); if (options.checked) t->clock[async_actor(transfers[i].actor)] = std::max(t->clock[async_actor(transfers[i].actor)], transfers[i].clock); }
    t->bulk_groups.pop_front();
  }
}

// ---- wgmma: each warp computes its own 16 rows; results appear when the program waits ----
namespace {
struct Operand { uint32_t start, lbo, sbo; unsigned swizzle_bytes; };
Operand decode(uint64_t d, Loc loc) {
  static const unsigned kinds[4] = {0, 128, 64, 32};
  if (d >> 49 & 7) fail("matrix descriptor: base offsets other than 0 are not emulated", loc);
  return {uint32_t(d & 0x3fff) << 4, uint32_t(d >> 16 & 0x3fff) << 4, uint32_t(d >> 32 & 0x3fff) << 4, kinds[d >> 62]};
}
// Address of the 16-byte chunk that holds element (mn, k); elements are 2 bytes.
uint32_t chunk_address(const Operand& o, bool mn_major, unsigned mn, unsigned k) {
  unsigned width = o.swizzle_bytes ? o.swizzle_bytes : 16;   // bytes of one row of the swizzle atom
  uint32_t a;
  if (!mn_major) a = o.swizzle_bytes ? o.start + mn / 8 * o.sbo + mn % 8 * width + k * 2 : o.start + mn / 8 * o.sbo + mn % 8 * 16 + k / 8 * o.lbo;
  else { unsigned per_row = width / 2; a = o.swizzle_bytes ? o.start + mn / per_row * o.lbo + mn % per_row * 2 + k % 8 * width + k / 8 * o.sbo : o.start + mn / 8 * o.sbo + k % 8 * 16 + k / 8 * o.lbo; }
  return uint32_t(swizzled(a & ~15u, o.swizzle_bytes));
}
void read_operand(Elem e, const Operand& o, bool mn_major, unsigned mn0, unsigned mn_count, float* out /*[mn][16]*/, Loc loc) {
  for (unsigned i = 0; i < mn_count; ++i) for (unsigned k = 0; k < 16; ++k) {
    unsigned mn = mn0 + i; uint16_t h;
    unsigned in_chunk = mn_major ? mn % 8 * 2 : k % 8 * 2;
    memcpy(&h, static_cast<char*>(shared_pointer(chunk_address(o, mn_major, mn, k), 16, loc)) + in_chunk, 2);
    out[i * 16 + k] = to_float(e, h);
  }
}
void check_operand(const Operand& o, bool mn_major, unsigned mn0, unsigned mn_count, unsigned actor, Clock clock, const VectorClock& view, const VectorClock& proxy, Loc loc) {
  auto place = [=] { return where(loc); };
  for (unsigned i = 0; i < mn_count; i += mn_major ? 8 : 1) for (unsigned k = 0; k < 16; k += mn_major ? 1 : 8)
    touch_shared(uintptr_t(shared_pointer(chunk_address(o, mn_major, mn0 + i, k), 16, loc)), 16, kRead, actor, clock, view, &proxy, place);
}
struct WgmmaArgs { float* acc; const uint32_t* a_regs; uint64_t desc_a, desc_b; };
struct WgmmaCall { Elem elem; int n; bool accumulate, a_mn, b_mn; Loc loc; } call;   // same for all lanes of the warp
void issue_wgmma(void* const args[32], unsigned) {
  Thread* t = me(); Warp& w = warps[t->warp]; auto arg = [&](int l) { return static_cast<WgmmaArgs*>(args[l]); };
  for (int l = 1; l < 32; ++l) if (arg(l)->desc_a != arg(0)->desc_a || arg(l)->desc_b != arg(0)->desc_b) fail("wgmma: descriptors differ between lanes", call.loc);
  const void* key = arg(0)->acc; size_t per_lane = call.n / 2;
  auto it = w.accumulators.find(key);
  if (it == w.accumulators.end()) {
    if (!w.fenced) report("missing wgmma.fence", where(call.loc), "accumulator registers were touched since the last wgmma");
    it = w.accumulators.emplace(key, std::make_pair(std::array<float*, 32>(), std::vector<float>(32 * per_lane))).first;
    for (int l = 0; l < 32; ++l) {
      it->second.first[l] = arg(l)->acc; memcpy(&it->second.second[l * per_lane], arg(l)->acc, per_lane * 4);
      std::fill_n(arg(l)->acc, per_lane, std::nanf(""));       // in flight: whoever reads it now sees NaN
    }
  }
  Wgmma op{call.elem, call.n, key, {}, arg(0)->desc_a, arg(0)->desc_b, call.accumulate, call.a_mn, call.b_mn, t->warp % 4, 0, 0};
  if (arg(0)->a_regs) for (int l = 0; l < 32; ++l) op.a_regs.insert(op.a_regs.end(), arg(l)->a_regs, arg(l)->a_regs + 4);
  op.actor = new_async_op(&op.clock);
  if (options.checked) {
    static VectorClock view, proxy; view.assign(clock_size, 0); proxy.assign(clock_size, 0);
    for (int l = 0; l < 32; ++l) { Thread* o = threads[t->warp * 32 + l].get(); join(view, o->clock, clock_size); join(proxy, o->proxy, clock_size); }
    if (op.a_regs.empty()) check_operand(decode(op.desc_a, call.loc), op.a_mn, op.warp_in_group * 16, 16, async_actor(op.actor), op.clock, view, proxy, call.loc);
    check_operand(decode(op.desc_b, call.loc), op.b_mn, 0, op.n, async_actor(op.actor), op.clock, view, proxy, call.loc);
  }
  w.open.push_back(std::move(op));
}
void perform(Warp& w, Wgmma& op) {
  static float a[16][16], b[256][16]; static float bt[16][256]; Loc loc{"wgmma", 0};
  if (op.a_regs.empty()) read_operand(op.elem, decode(op.desc_a, loc), op.a_mn, op.warp_in_group * 16, 16, &a[0][0], loc);
  else for (int l = 0; l < 32; ++l) for (int i = 0; i < 4; ++i) for (int h = 0; h < 2; ++h) a[l / 4 + (i & 1) * 8][l % 4 * 2 + h + (i & 2) * 4] = to_float(op.elem, uint16_t(op.a_regs[l * 4 + i] >> 16 * h));
  read_operand(op.elem, decode(op.desc_b, loc), op.b_mn, 0, op.n, &b[0][0], loc);
  for (int j = 0; j < op.n; ++j) for (int k = 0; k < 16; ++k) bt[k][j] = b[j][k];
  auto& acc = w.accumulators.at(op.key).second; int per_lane = op.n / 2; static float row[256];
  for (int r = 0; r < 16; ++r) {
    auto at = [&](int j) -> float& { return acc[(r % 8 * 4 + j % 8 / 2) * per_lane + j / 8 * 4 + (r / 8) * 2 + j % 2]; };
    for (int j = 0; j < op.n; ++j) row[j] = op.accumulate ? at(j) : 0.0f;
    for (int k = 0; k < 16; ++k) { float v = a[r][k]; for (int j = 0; j < op.n; ++j) row[j] += v * bt[k][j]; }
    for (int j = 0; j < op.n; ++j) at(j) = row[j];
  }
}
void wait_wgmma(unsigned warp, unsigned groups_left) {
  Warp& w = warps[warp];
  while (w.groups.size() > groups_left) {
    for (auto& op : w.groups.front()) {
      perform(w, op);
      unsigned first = warp / 4 * 128;                         // complete for all four warps: it is one operation
      if (options.checked) for (unsigned i = first; i < first + 128; ++i) { Clock& c = threads[i]->clock[async_actor(op.actor)]; c = std::max(c, op.clock); }
    }
    w.groups.pop_front();
  }
  for (auto it = w.accumulators.begin(); it != w.accumulators.end();) {
    bool busy = false;
    for (auto& g : w.groups) for (auto& op : g) busy |= op.key == it->first;
    for (auto& op : w.open) busy |= op.key == it->first;
    if (busy) { ++it; continue; }
    size_t per_lane = it->second.second.size() / 32;
    for (int l = 0; l < 32; ++l) memcpy(it->second.first[l], &it->second.second[l * per_lane], per_lane * 4);
    it = w.accumulators.erase(it);
  }
  w.fenced = false;
}
}  // namespace
void wgmma_fence() { warp_collective("wgmma.fence", [](void* const*, unsigned) { warps[me()->warp].fenced = true; }, nullptr, 0xffffffffu, false, Loc{"wgmma.fence", 0}); }
void wgmma_commit() { warp_collective("wgmma.commit_group", [](void* const*, unsigned) { Warp& w = warps[me()->warp]; w.groups.push_back(std::move(w.open)); w.open.clear(); }, nullptr, 0xffffffffu, false, Loc{"wgmma.commit_group", 0}); }
void wgmma_wait(unsigned left) {
  Thread* t = me(); Barrier& g = warpgroup_waits[t->warp / 4];
  if ((t->warp / 4 + 1) * 128 > thread_count) fail("wgmma needs whole warpgroups of 128 threads", Loc{"wgmma.wait_group", 0});
  if (++g.arrived < 128) { g.waiting.push_back(t); set_blocked(t, State::warp, "wgmma.wait_group", Loc{"", 0}); give_way(); return; }
  Barrier done = std::move(g); g = Barrier();
  for (unsigned w = t->warp / 4 * 4; w < t->warp / 4 * 4 + 4; ++w) wait_wgmma(w, left);
  for (Thread* o : done.waiting) set_ready(o);
}
void wgmma(Elem elem, int n, float* acc, const uint32_t* a_regs, uint64_t desc_a, uint64_t desc_b, bool accumulate, bool a_mn, bool b_mn, Loc loc) {
  WgmmaArgs x{acc, a_regs, desc_a, desc_b};
  use_async_proxy();
  struct Full { WgmmaArgs x; WgmmaCall c; };
  // the last lane to arrive runs issue_wgmma with its own call parameters
  call = {elem, n, accumulate, a_mn, b_mn, loc};
  warp_collective("wgmma.mma_async", issue_wgmma, &x, 0xffffffffu, false, loc);
}

std::string take_profile() {
  std::string s = "place                                              kind    bytes  requests   units  per ideal\n";
  for (auto& [pc, p] : profile) {
    std::string w = where_pc(pc); auto slash = w.rfind('/'); if (slash != std::string::npos) w = w.substr(slash + 1);
    s += format("%-50s %s %s %3u %9lu %9lu  %.2f\n", w.c_str(), p.shared ? "shared" : "global", p.write ? "st" : "ld", p.bytes, (unsigned long)p.requests, (unsigned long)p.units, p.ideal ? double(p.units) / p.ideal : 0.0);
  }
  profile.clear(); return s;
}

}  // namespace emulator

extern "C" void emulator_fiber_main() { emulator::body(emulator::body_context); emulator::thread_exit(); __builtin_trap(); }

// ------------------------------------------------------------------------------------------------
// Hooks that g++ -fsanitize=thread,bounds,alignment calls; libtsan and libubsan are not linked.
#define HOOK(name, bytes, kind) extern "C" void name(void* p) { if (emulator::current) emulator::check_access(p, bytes, emulator::kind, __builtin_return_address(0)); }
#define HOOKS(n) HOOK(__tsan_read##n, n, kRead) HOOK(__tsan_write##n, n, kWrite) HOOK(__tsan_unaligned_read##n, n, kRead) HOOK(__tsan_unaligned_write##n, n, kWrite) \
  HOOK(__tsan_volatile_read##n, n, kRead) HOOK(__tsan_volatile_write##n, n, kWrite)
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16)
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void* p, unsigned long n) { if (emulator::current) emulator::check_access(p, n, emulator::kRead, __builtin_return_address(0)); }
void __tsan_write_range(void* p, unsigned long n) { if (emulator::current) emulator::check_access(p, n, emulator::kWrite, __builtin_return_address(0)); }
int __tsan_atomic32_fetch_add(volatile int* p, int v, int) { int o = *p; *p = o + v; return o; }
uint8_t __tsan_atomic8_load(const volatile uint8_t* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }

struct UbLocation { const char* file; uint32_t line, column; };
struct UbType { uint16_t kind, info; char name[1]; };
struct UbBounds { UbLocation at; const UbType* array; const UbType* index; };
struct UbMismatch { UbLocation at; const UbType* type; uint8_t log_alignment, check; };
void __ubsan_handle_out_of_bounds(UbBounds* d, uintptr_t index) {
  emulator::fail("index " + std::to_string(long(index)) + " is out of bounds for " + d->array->name, {d->at.file, int(d->at.line)});
}
void __ubsan_handle_type_mismatch_v1(UbMismatch* d, uintptr_t p) {
  if (!emulator::current) return;
  emulator::fail("misaligned address: a " + std::string(d->type->name) + " needs " + std::to_string(1 << d->log_alignment) + "-byte alignment, the address is " + std::to_string(p % (1ul << d->log_alignment)) + " past it", {d->at.file, int(d->at.line)});
}
}
