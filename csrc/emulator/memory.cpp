// The checks of memory accesses. Shared memory is known byte by byte, tensors element by element.
#include "memory.h"

#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "counters.h"
#include "machine.h"
#include "positions.h"
#include "reports.h"

namespace emulator {

namespace {

// ---- tensors ----

struct Tensor {
  uintptr_t begin, end;
  std::string name;
  size_t element_bytes;
  bool writable;
};

// Tensors that overlap, such as views of one packed tensor, share what is known of their memory.
struct Region {
  uintptr_t begin, end;
  size_t granule;  // the smallest element of its tensors
  bool writable;
  std::vector<Tensor> tensors;
  std::vector<Shadow> shadow;        // of this launch; made at its first access
  std::vector<uint8_t> initialised;  // since the tensors were registered; empty: all of it
};

// In order, apart from each other. One pointer for each OS thread and nothing to destroy, for the reason in machine.h.
std::vector<Region>& registered() {
  static __thread std::vector<Region>* regions = nullptr;
  if (!regions) regions = new std::vector<Region>;
  return *regions;
}
std::vector<Region>* launched = nullptr;      // those of the OS thread that launched
size_t last_region = 0;

Region* find_region(uintptr_t p) {
  std::vector<Region>& regions = *launched;
  if (last_region < regions.size() &&
      p - regions[last_region].begin < regions[last_region].end - regions[last_region].begin)
    return &regions[last_region];
  auto after = std::upper_bound(regions.begin(), regions.end(), p,
                                [](uintptr_t address, const Region& region) { return address < region.begin; });
  if (after == regions.begin()) return nullptr;
  --after;
  if (p >= after->end) return nullptr;
  last_region = after - regions.begin();
  return &*after;
}

const Tensor* find_tensor(const Region& region, uintptr_t p, size_t bytes, bool writable) {
  for (const Tensor& tensor : region.tensors)
    if (p >= tensor.begin && p + bytes <= tensor.end && (tensor.writable || !writable)) return &tensor;
  return nullptr;
}

const char* verb(Access access) {
  return access == Access::read ? "read" : access == Access::write ? "write" : "atomic";
}

[[noreturn]] void fail_outside(uintptr_t p, size_t bytes, Access access, Caller caller) {
  const std::vector<Region>& regions = *launched;
  constexpr long kNear = 1 << 24;
  std::string place = regions.empty() ? "no tensor is registered" : "no tensor is near";
  long best = kNear;
  for (const Region& region : regions) {
    for (const Tensor& tensor : region.tensors) {
      const long past = long(p + bytes) - long(tensor.end), before = long(tensor.begin) - long(p);
      if (past > 0 && long(p) >= long(tensor.begin) && past < best) {
        best = past;
        place = format("%ld bytes past the end of '%s' (%ld bytes)", past, tensor.name.c_str(),
                       long(tensor.end - tensor.begin));
      }
      if (before > 0 && before < best) {
        best = before;
        place = format("%ld bytes before '%s'", before, tensor.name.c_str());
      }
    }
  }
  fail("out of bounds", format("%s of %zu bytes in global memory, %s", verb(access), bytes, place.c_str()), caller);
}

// ---- what is known of a byte or element ----

struct ReadBy {
  uint16_t actor;
  Clock clock;
  uint32_t place;
};
// A list, or, for what all threads of a block read, a clock for each actor: a list would be searched too often.
struct ReadSet {
  static constexpr size_t kMostListed = 16;
  std::vector<ReadBy> listed;
  std::vector<Clock> clocks;  // empty, or 0 for who has not read
  uint32_t place = 0;         // of the last read, once there are clocks

  void clear() {
    listed.clear();
    clocks.clear();
  }
  void add(const ReadBy& read) {
    if (!clocks.empty()) {
      clocks[read.actor] = read.clock;
      place = read.place;
      return;
    }
    for (ReadBy& earlier : listed) {
      if (earlier.actor != read.actor) continue;
      earlier = read;
      return;
    }
    listed.push_back(read);
    if (listed.size() <= kMostListed) return;
    clocks.assign(machine.clock_size, 0);
    for (const ReadBy& earlier : listed) clocks[earlier.actor] = earlier.clock;
    place = read.place;
  }
  // A read that the actor has not seen; its clock is 0 where there is none.
  ReadBy unseen_by(const Actor& actor) const {
    for (size_t id = 0; id < clocks.size(); ++id)
      if (clocks[id] > (*actor.view)[id] && id != actor.id) return {uint16_t(id), clocks[id], place};
    if (clocks.empty())
      for (const ReadBy& read : listed)
        if (read.actor != actor.id && (*actor.view)[read.actor] < read.clock) return read;
    return {0, 0, 0};
  }
};
std::vector<ReadSet> read_sets;
std::vector<int> free_read_sets;

int new_read_set() {
  if (free_read_sets.empty()) {
    free_read_sets.push_back(int(read_sets.size()));
    read_sets.emplace_back();
  }
  const int set = free_read_sets.back();
  free_read_sets.pop_back();
  return set;
}

void drop_reads(Shadow& shadow) {
  if (shadow.read_set >= 0) {
    read_sets[shadow.read_set].clear();
    free_read_sets.push_back(shadow.read_set);
    shadow.read_set = -1;
  }
  shadow.reader = Shadow::kNobody;
  shadow.many_clusters_read = false;
}

void add_read(Shadow& shadow, const Actor& actor, uint32_t place) {
  if (shadow.reader != Shadow::kNobody && shadow.read_cluster != machine.cluster_number) {
    drop_reads(shadow);
    shadow.many_clusters_read = true;
  }
  const uint16_t id = uint16_t(actor.id);
  if (shadow.read_set >= 0) {
    read_sets[shadow.read_set].add({id, actor.clock, place});
  } else if (shadow.reader == Shadow::kNobody || shadow.reader == id ||
             (*actor.view)[shadow.reader] >= shadow.read_clock) {
    shadow.reader = id;
    shadow.read_clock = actor.clock;
    shadow.read_place = place;
  } else {
    shadow.read_set = new_read_set();
    read_sets[shadow.read_set].add({shadow.reader, shadow.read_clock, shadow.read_place});
    read_sets[shadow.read_set].add({id, actor.clock, place});
  }
  shadow.read_cluster = machine.cluster_number;
}

// From here on each byte of the word is known by itself.
void take_apart(SharedShadow& shadow, size_t word) {
  if (shadow.apart[word]) return;
  shadow.apart[word] = 1;
  const Shadow whole = shadow.bytes[word * SharedShadow::kWord];
  for (size_t i = 1; i < SharedShadow::kWord; ++i) {
    Shadow& byte = shadow.bytes[word * SharedShadow::kWord + i];
    byte = whole;
    if (whole.read_set < 0) continue;
    byte.read_set = new_read_set();
    read_sets[byte.read_set] = read_sets[whole.read_set];
  }
}

std::string at_place(uint32_t place) {
  return place ? " (" + user_position(address_of(place)).text() + ")" : std::string();
}

std::string block_name(uint32_t cluster) {  // the first of a cluster's
  const unsigned wide = machine.grid.x / machine.cluster.x, high = machine.grid.y / machine.cluster.y;
  return format("block (%u,%u,%u)", cluster % wide * machine.cluster.x, cluster / wide % high * machine.cluster.y,
                cluster / wide / high * machine.cluster.z);
}

template <class Name>
void race(Access access, const char* earlier, const std::string& by, uint32_t place, const Actor& actor, Name name,
          Caller caller) {
  report("data race",
         format("%s of %s by %s is not ordered with the %s by %s%s", verb(access), name().c_str(),
                actor_name(actor.id).c_str(), earlier, by.c_str(), at_place(place).c_str()),
         caller);
}

template <class Name>
void check_order(Shadow& shadow, Access access, const Actor& actor, Name name, Caller caller) {
  const uint32_t cluster = machine.cluster_number;
  const bool both_atomic = access == Access::atomic && shadow.atomic;
  if (shadow.writer != Shadow::kNobody && !both_atomic) {
    if (shadow.write_cluster != cluster) {
      race(access, "write", block_name(shadow.write_cluster), shadow.write_place, actor, name, caller);
    } else if (shadow.writer != actor.id && (*actor.view)[shadow.writer] < shadow.write_clock) {
      race(access, "write", actor_name(shadow.writer), shadow.write_place, actor, name, caller);
    } else if (actor.proxy && shadow.writer < machine.thread_count &&
               (*actor.proxy)[shadow.writer] < shadow.write_clock) {
      report("missing proxy fence",
             format("%s by %s of %s, written by %s with an ordinary store%s: the writer needs fence.proxy.async before "
                    "the barrier",
                    verb(access), actor_name(actor.id).c_str(), name().c_str(), actor_name(shadow.writer).c_str(),
                    at_place(shadow.write_place).c_str()),
             caller);
    }
  }
  if (access == Access::read) return;
  if (shadow.many_clusters_read || (shadow.reader != Shadow::kNobody && shadow.read_cluster != cluster)) {
    race(access, "read", block_name(shadow.read_cluster), shadow.read_place, actor, name, caller);
  } else if (shadow.read_set >= 0) {
    const ReadBy read = read_sets[shadow.read_set].unseen_by(actor);
    if (read.clock) race(access, "read", actor_name(read.actor), read.place, actor, name, caller);
  } else if (shadow.reader != Shadow::kNobody && shadow.reader != actor.id &&
             (*actor.view)[shadow.reader] < shadow.read_clock) {
    race(access, "read", actor_name(shadow.reader), shadow.read_place, actor, name, caller);
  }
}

template <class Name>
void touch(Shadow& shadow, Access access, const Actor& actor, Name name, Caller caller) {
  check_order(shadow, access, actor, name, caller);
  const uint32_t place = place_of(caller.address);
  if (access == Access::read) {
    add_read(shadow, actor, place);
    return;
  }
  drop_reads(shadow);
  shadow.writer = uint16_t(actor.id);
  shadow.write_clock = actor.clock;
  shadow.write_cluster = machine.cluster_number;
  shadow.write_place = place;
  shadow.atomic = access == Access::atomic;
}

// ---- which memory an address belongs to ----

struct Range {
  uintptr_t begin = 0, end = 0;
  bool contains(uintptr_t p) const { return p - begin < end - begin; }
};
Range module_data, module_constants;  // of the library that holds the kernel

void find_module(const void* kernel) {
  static const void* found = nullptr;
  if (kernel == found) return;
  found = kernel;
  module_data = module_constants = Range();
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) -> int {
        const uintptr_t address = uintptr_t(data);
        auto range = [&](const ElfW(Phdr) & header) {
          const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
          return Range{begin, begin + header.p_memsz};
        };
        const auto *begin = info->dlpi_phdr, *end = begin + info->dlpi_phnum;
        if (std::none_of(begin, end, [&](auto& h) { return h.p_type == PT_LOAD && range(h).contains(address); }))
          return 0;
        for (const auto* header = begin; header != end; ++header) {
          if (header->p_type != PT_LOAD) continue;
          Range& into = header->p_flags & PF_W ? module_data : module_constants;
          const Range part = range(*header);
          into = into.end ? Range{std::min(into.begin, part.begin), std::max(into.end, part.end)} : part;
        }
        return 1;
      },
      const_cast<void*>(kernel));
}

std::string static_name(uintptr_t p) {
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(p), &info) && info.dli_sname)
    return format("static shared memory near '%s'", info.dli_sname);
  return "static shared memory";
}

void touch_static(uintptr_t p, size_t bytes, Access access, Thread& thread, Caller caller) {
  const Actor actor = thread_actor(thread);
  auto& shadow = thread.block->statics.shadow;
  for (size_t i = 0; i < bytes; ++i) {
    Shadow& byte = shadow[p + i];
    auto name = [&] { return static_name(p); };
    if (byte.writer == Shadow::kNobody && access != Access::write)
      report("uninitialised read", name() + " was never written by this block", caller);
    touch(byte, access, actor, name, caller);
  }
}

// Registers that a wgmma in flight uses: reading its result, or changing its operand, needs a wait first.
void check_busy_registers(const Thread& thread, uintptr_t p, size_t bytes, Access access, Caller caller) {
  for (const BusyRegisters& busy : thread.busy_registers) {
    if (p + bytes <= busy.begin || p >= busy.end) continue;
    if (busy.written || access != Access::read)
      report("missing wgmma wait",
             format("%s of %s while the wgmma that %s them is in flight", verb(access),
                    busy.written ? "accumulator registers" : "operand registers", busy.written ? "writes" : "reads"),
             caller);
  }
}

}  // namespace

Actor thread_actor(const Thread& thread) { return {thread.actor, thread.now(), &thread.clock, nullptr}; }

void register_tensor(const void* begin, size_t bytes, size_t element_bytes, const char* name, TensorAccess access) {
  if (bytes == 0) return;
  const uintptr_t from = uintptr_t(begin);
  const bool writable = access != TensorAccess::input;
  Region region{from, from + bytes, element_bytes, writable, {{from, from + bytes, name, element_bytes, writable}}, {},
                {}};
  auto overlaps = [&](const Region& other) { return other.begin < region.end && region.begin < other.end; };
  std::vector<Region> apart;
  bool fresh = access == TensorAccess::output;  // nobody else gave this memory a meaning
  for (Region& other : registered()) {
    if (!overlaps(other)) {
      apart.push_back(std::move(other));
      continue;
    }
    fresh = fresh && !other.initialised.empty();
    region.begin = std::min(region.begin, other.begin);
    region.end = std::max(region.end, other.end);
    region.granule = std::min(region.granule, other.granule);
    region.writable |= other.writable;
    region.tensors.insert(region.tensors.begin(), other.tensors.begin(), other.tensors.end());
  }
  // Elements start where the region does: an odd offset between two views makes bytes the unit.
  for (const Tensor& tensor : region.tensors)
    while ((tensor.begin - region.begin) % region.granule) region.granule /= 2;
  if (fresh && machine.checked()) {
    std::memset(const_cast<void*>(begin), 0xff, bytes);
    region.initialised.assign((region.end - region.begin + region.granule - 1) / region.granule, 0);
  }
  apart.push_back(std::move(region));
  std::sort(apart.begin(), apart.end(), [](const Region& a, const Region& b) { return a.begin < b.begin; });
  registered() = std::move(apart);
}

void unregister_tensors() { registered().clear(); }

namespace {

// Nothing of what a block left in its static shared memory may be taken for the next one's.
void poison_statics(Block& block) {
  for (auto& entry : block.statics.shadow) *reinterpret_cast<char*>(entry.first) = char(0xff);
  block.statics.shadow.clear();
  block.statics.contents.clear();
}

}  // namespace

void begin_memory_checks(const void* kernel) {
  find_module(kernel);
  launched = &registered();
  for (Region& region : registered()) region.shadow.clear();
  for (auto& block : machine.blocks) {  // none of them may go on referring to a set that is given away again
    block->shadow.bytes.clear();
    poison_statics(*block);
  }
  read_sets.clear();
  free_read_sets.clear();
  if (!machine.shared_arena) {
    void* arena = mmap(nullptr, Machine::kSharedStride * (Machine::kMaxClusterBlocks + 1), PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (arena == MAP_FAILED) throw std::bad_alloc();
    machine.shared_arena = static_cast<char*>(arena);
  }
}

void clear_shared_memory(Block& block) {
  std::memset(block.shared, 0xff, machine.shared_bytes);  // NaN in every float format
  if (machine.checked()) {
    for (Shadow& byte : block.shadow.bytes) drop_reads(byte);
    const size_t words = (machine.shared_bytes + SharedShadow::kWord - 1) / SharedShadow::kWord;
    block.shadow.bytes.assign(words * SharedShadow::kWord, Shadow());
    block.shadow.apart.assign(words, 0);
  }
  for (auto& [address, byte] : block.statics.shadow) drop_reads(byte);
  poison_statics(block);
}

void swap_statics(Block& from, Block& to) {
  for (auto& entry : from.statics.shadow) {
    char& byte = *reinterpret_cast<char*>(entry.first);
    from.statics.contents[entry.first] = byte;
    byte = char(0xff);
  }
  for (auto& [address, byte] : to.statics.contents) *reinterpret_cast<char*>(address) = byte;
}

bool in_shared(const void* address) {
  return uintptr_t(address) - uintptr_t(machine.shared_arena) < Machine::kSharedStride * Machine::kMaxClusterBlocks;
}

Block& block_of_shared(const void* address) {
  return *machine.blocks[(uintptr_t(address) - uintptr_t(machine.shared_arena)) / Machine::kSharedStride];
}

const Shadow& shared_shadow(const void* address) {
  const Block& block = block_of_shared(address);
  return block.shadow.bytes[static_cast<const char*>(address) - block.shared];
}

void touch_shared(const void* address, size_t bytes, Access access, const Actor& actor, Caller caller) {
  const size_t in_arena = uintptr_t(address) - uintptr_t(machine.shared_arena);
  const size_t rank = in_arena / Machine::kSharedStride, offset = in_arena % Machine::kSharedStride;
  if (rank >= machine.block_count)
    fail("out of bounds",
         format("%s of shared memory of block %zu of a cluster of %u", verb(access), rank, machine.block_count),
         caller);
  if (offset + bytes > machine.shared_bytes)
    fail("out of bounds",
         format("%s of %zu bytes at byte %zu of the block's %zu bytes of shared memory", verb(access), bytes, offset,
                machine.shared_bytes),
         caller);
  if (!machine.checked()) return;
  Block& block = *machine.blocks[rank];
  if (current_thread && current_thread->block != &block) {
    if (!machine.cluster_phases)
      report("missing cluster barrier",
             "another block's shared memory is used before a cluster barrier says that it has started", caller);
    if (!block.live)
      report("shared memory of a block that has exited",
             format("%s of shared memory of block %zu of the cluster", verb(access), rank), caller);
  }
  constexpr size_t kWord = SharedShadow::kWord;
  for (size_t at = offset, end = offset + bytes; at < end;) {
    const bool whole = at % kWord == 0 && end - at >= kWord;
    if (!whole) take_apart(block.shadow, at / kWord);
    Shadow& byte = block.shadow.bytes[at];
    auto name = [&] { return format("shared byte %zu", at); };
    if (byte.writer == Shadow::kNobody && access != Access::write)
      report("uninitialised read", name() + " was never written by this block", caller);
    touch(byte, access, actor, name, caller);
    at += whole && !block.shadow.apart[at / kWord] ? kWord : 1;
  }
}

void touch_global(const void* address, size_t bytes, Access access, const Actor& actor, Caller caller) {
  if (!machine.checked()) return;
  const uintptr_t p = uintptr_t(address);
  Region* region = find_region(p);
  if (!region) fail_outside(p, bytes, access, caller);
  const Tensor* tensor = find_tensor(*region, p, bytes, access != Access::read);
  if (!tensor) {
    tensor = find_tensor(*region, p, bytes, false);
    if (!tensor) fail_outside(p, bytes, access, caller);
    report("write to an input", format("'%s' is read-only", tensor->name.c_str()), caller);
  }
  if (!region->writable) return;  // what nobody may write cannot race
  if (region->shadow.empty())
    region->shadow.resize((region->end - region->begin + region->granule - 1) / region->granule);
  const size_t first = (p - region->begin) / region->granule, last = (p + bytes - 1 - region->begin) / region->granule;
  for (size_t i = first; i <= last; ++i) {
    auto name = [&] {
      const uintptr_t at = std::max(region->begin + i * region->granule, tensor->begin);
      return format("element %zu of '%s'", size_t(at - tensor->begin) / tensor->element_bytes, tensor->name.c_str());
    };
    if (!region->initialised.empty()) {
      if (access != Access::write && !region->initialised[i])
        report("uninitialised read", name() + " was never written", caller);
      if (access != Access::read) region->initialised[i] = 1;
    }
    touch(region->shadow[i], access, actor, name, caller);
  }
}

void check_access(const void* address, size_t bytes, Access access, Caller caller) {
  if (machine.hooks_paused || !(machine.checked() || machine.profiled())) return;
  Thread& thread = *current_thread;
  const uintptr_t p = uintptr_t(address);
  if (thread.fiber.owns(p)) {
    if (!thread.busy_registers.empty()) check_busy_registers(thread, p, bytes, access, caller);
    return;
  }
  if (in_shared(address)) {
    touch_shared(address, bytes, access, thread_actor(thread), caller);
    if (machine.profiled()) count_access(p, bytes, access, Space::shared, caller);
  } else if (module_data.contains(p)) {
    if (machine.checked()) touch_static(p, bytes, access, thread, caller);
    if (machine.profiled()) count_access(p, bytes, access, Space::shared, caller);
  } else if (access == Access::read && module_constants.contains(p)) {
    // tables of constants
  } else {
    touch_global(address, bytes, access, thread_actor(thread), caller);
    if (machine.profiled()) count_access(p, bytes, access, Space::global, caller);
  }
}

void access_memory(const void* address, size_t bytes, Access access) {
  if (!current_thread) return;
  const Caller caller = EMULATOR_CALLER;
  if (uintptr_t(address) % bytes)
    fail("misaligned address",
         format("%s of %zu bytes at an address that is not a multiple of it", verb(access), bytes), caller);
  check_access(address, bytes, access, caller);
}

void copy_unseen(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }

void* dynamic_shared_memory(size_t bytes_needed) {
  const Caller caller = EMULATOR_CALLER;
  if (bytes_needed > machine.shared_bytes)
    fail("out of bounds",
         format("the kernel uses %zu bytes of dynamic shared memory, but was launched with %zu", bytes_needed,
                machine.shared_bytes),
         caller);
  return current_thread->block->shared;
}

namespace {
// The window of a block's own shared memory begins after what the system reserves; other blocks' windows follow it.
constexpr uint32_t kReserved = 1024, kWindow = 1 << 24;
}  // namespace

uint32_t shared_address(const void* pointer) {
  const Caller caller = EMULATOR_CALLER;
  if (!in_shared(pointer))
    fail("not shared memory", "an instruction takes addresses of dynamic shared memory (dynamic_shared<>()) only",
         caller);
  const Block& block = block_of_shared(pointer);
  const uint32_t offset = uint32_t(static_cast<const char*>(pointer) - block.shared) + kReserved;
  return &block == current_thread->block ? offset : (block.rank + 1) * kWindow + offset;
}

char* shared_pointer(uint32_t address, size_t bytes, Caller caller) {
  const unsigned rank = address < kWindow ? current_thread->block->rank : address / kWindow - 1;
  const uint32_t offset = address % kWindow;
  if (offset < kReserved || offset - kReserved + bytes > machine.shared_bytes || rank >= machine.block_count)
    fail("out of bounds",
         format("address %u is outside the block's %zu bytes of shared memory", address, machine.shared_bytes), caller);
  return machine.blocks[rank]->shared + (offset - kReserved);
}

void* map_to_rank(const void* pointer, unsigned rank) {
  const Caller caller = EMULATOR_CALLER;
  need_chip(90, "mapa", caller);
  if (!in_shared(pointer)) fail("not shared memory", "mapa takes addresses of dynamic shared memory only", caller);
  if (rank >= machine.block_count)
    fail("out of bounds", format("mapa to block %u of a cluster of %u", rank, machine.block_count), caller);
  return machine.blocks[rank]->shared + (static_cast<const char*>(pointer) - block_of_shared(pointer).shared);
}

}  // namespace emulator
