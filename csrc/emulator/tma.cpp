// The tensor memory accelerator: PTX ISA 9.7.8.24.5 (bulk copies) and 5.5 (tensors: boxes, swizzles, what is outside).
// Loads happen only when no thread can go on, stores when their group is waited for: whoever did not wait sees old
// data.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "counters.h"
#include "elements.h"
#include "machine.h"
#include "reports.h"
#include "sites.h"
#include "swizzle.h"

namespace emulator {

unsigned bytes_of(TensorType type) {
  switch (type) {
    case TensorType::u8:
      return 1;
    case TensorType::f16:
    case TensorType::bf16:
      return 2;
    case TensorType::f64:
      return 8;
    default:
      return 4;
  }
}

unsigned TensorMap::box_bytes() const {
  unsigned bytes = bytes_of(type);
  for (unsigned i = 0; i < rank; ++i) bytes *= box[i];
  return bytes;
}

// The limits are those of cuTensorMapEncodeTiled in the CUDA driver API's manual.
TensorMap make_tensor_map(void* base, TensorType type, unsigned rank, const uint64_t* sizes, const uint64_t* strides,
                          const uint32_t* box, unsigned swizzle) {
  const auto refuse = [](const std::string& why) { throw std::invalid_argument("tensor map: " + why); };
  if (rank < 1 || rank > 5) refuse(format("a tensor has 1 to 5 dimensions, got %u", rank));
  if (uintptr_t(base) % 16) refuse("the tensor must lie on a multiple of 16 bytes");
  TensorMap map;
  map.base = static_cast<char*>(base);
  map.type = type;
  map.rank = rank;
  map.swizzle = swizzle;
  for (unsigned i = 0; i < rank; ++i) {
    if (sizes[i] == 0 || sizes[i] > uint64_t(1) << 32)
      refuse(format("dimension %u has a size of %lu", i, (unsigned long)sizes[i]));
    if (box[i] == 0 || box[i] > 256)
      refuse(format("a box has 1 to 256 elements along dimension %u, got %u", i, box[i]));
    map.sizes[i] = sizes[i];
    map.box[i] = box[i];
    map.strides[i] = i ? strides[i - 1] : bytes_of(type);
    if (i && (map.strides[i] % 16 || map.strides[i] >= uint64_t(1) << 40))
      refuse(format("stride %u must be a multiple of 16 bytes, got %lu", i, (unsigned long)map.strides[i]));
  }
  const unsigned row = box[0] * bytes_of(type);
  if (row % 16) refuse(format("a row of the box must be a multiple of 16 bytes, got %u", row));
  if (swizzle != 0 && swizzle != 32 && swizzle != 64 && swizzle != 128)
    refuse(format("no swizzle has %u bytes", swizzle));
  if (swizzle && row > swizzle)
    refuse(format("a row of the box (%u bytes) must fit the swizzle's %u bytes", row, swizzle));
  return map;
}

namespace {

// The rows of the box: f(offset in shared memory, first element inside, elements inside, their address).
template <class F>
void for_each_row(const Transfer& transfer, F f) {
  const TensorMap& map = transfer.map;
  const unsigned element = bytes_of(map.type);
  unsigned rows = 1;
  for (unsigned i = 1; i < map.rank; ++i) rows *= map.box[i];
  const int64_t x = transfer.at[0];
  const int64_t first = std::max<int64_t>(0, -x), end = std::min<int64_t>(map.box[0], int64_t(map.sizes[0]) - x);
  for (unsigned row = 0; row < rows; ++row) {
    bool inside = end > first;
    int64_t offset = (x + first) * element;
    for (unsigned i = 1, rest = row; i < map.rank; rest /= map.box[i++]) {
      const int64_t at = int64_t(transfer.at[i]) + rest % map.box[i];
      inside = inside && at >= 0 && at < int64_t(map.sizes[i]);
      offset += at * int64_t(map.strides[i]);
    }
    f(size_t(row) * map.box[0] * element, size_t(first), inside ? size_t(end - first) : 0, map.base + offset);
  }
}

char* at_rank(const void* pointer, unsigned rank) {
  return machine.blocks[rank]->shared + (static_cast<const char*>(pointer) - block_of_shared(pointer).shared);
}

char* swizzled(char* address, unsigned swizzle) {
  return reinterpret_cast<char*>(swizzle_address(uintptr_t(address), swizzle));
}

void load_into(const Transfer& transfer, char* shared) {
  if (transfer.global) {
    std::memcpy(shared, transfer.global, transfer.bytes);
    return;
  }
  const unsigned element = bytes_of(transfer.map.type);
  for_each_row(transfer, [&](size_t offset, size_t first, size_t count, const char* from) {
    for (size_t i = 0; i < transfer.map.box[0]; ++i) {
      char* to = swizzled(shared + offset + i * element, transfer.map.swizzle);
      if (i >= first && i < first + count)
        std::memcpy(to, from + (i - first) * element, element);
      else
        std::memset(to, 0, element);  // what is outside the tensor reads as zero
    }
  });
}

template <class T>
void add_as(char* to, const char* from) {
  T a, b;
  std::memcpy(&a, to, sizeof a);
  std::memcpy(&b, from, sizeof b);
  a += b;
  std::memcpy(to, &a, sizeof a);
}

void add_element(TensorType type, char* to, const char* from) {
  uint16_t a, b;
  std::memcpy(&a, to, std::min(2u, bytes_of(type)));
  std::memcpy(&b, from, std::min(2u, bytes_of(type)));
  switch (type) {
    case TensorType::f32:
      add_as<float>(to, from);
      return;
    case TensorType::f64:
      add_as<double>(to, from);
      return;
    case TensorType::i32:
      add_as<uint32_t>(to, from);
      return;
    case TensorType::u8:
      add_as<uint8_t>(to, from);
      return;
    case TensorType::bf16:
      a = float_to_bf16(bf16_to_float(a) + bf16_to_float(b));
      break;
    case TensorType::f16:
      a = float_to_f16(f16_to_float(a) + f16_to_float(b));
      break;
  }
  std::memcpy(to, &a, 2);
}

void store_elements(const Transfer& transfer, char* to, const char* from, size_t count) {
  const unsigned element = bytes_of(transfer.map.type);
  if (transfer.kind == Transfer::Kind::store)
    std::memcpy(to, from, count * element);
  else
    for (size_t i = 0; i < count; ++i) add_element(transfer.map.type, to + i * element, from + i * element);
}

// A store's first half: its source in shared memory may be reused.
void read_source(Transfer& transfer) {
  if (transfer.was_read) return;
  transfer.was_read = true;
  transfer.snapshot.resize(transfer.bytes);
  constexpr unsigned kChunk = 16;
  for (unsigned i = 0; i < transfer.bytes; i += kChunk)
    std::memcpy(&transfer.snapshot[i], swizzled(transfer.shared + i, transfer.map.swizzle), kChunk);
}

// Its second half: the result is in global memory.
void write_result(Transfer& transfer) {
  if (transfer.done) return;
  read_source(transfer);
  transfer.done = true;
  const unsigned element = bytes_of(transfer.map.type);
  if (transfer.global)
    store_elements(transfer, transfer.global, transfer.snapshot.data(), transfer.bytes / element);
  else
    for_each_row(transfer, [&](size_t offset, size_t first, size_t count, char* to) {
      store_elements(transfer, to, &transfer.snapshot[offset + first * element], count);
    });
}

void perform_load(Transfer& transfer) {
  transfer.done = true;
  for (unsigned rank = 0; rank < machine.block_count; ++rank) {
    if (!(transfer.destinations >> rank & 1)) continue;
    load_into(transfer, at_rank(transfer.shared, rank));
    complete_bytes(reinterpret_cast<uint64_t*>(at_rank(transfer.barrier, rank)), transfer.bytes, transfer.actor,
                   transfer.clock);
  }
}

// The checks are made at once, with the clocks of now; the data moves later.
void start(Transfer transfer, Caller caller) {
  Thread& thread = *current_thread;
  const bool load = transfer.kind == Transfer::Kind::load, tensor = !transfer.global;
  const char* what = load ? "a TMA load" : transfer.kind == Transfer::Kind::store ? "a TMA store" : "a TMA reduction";
  need_chip(90, "cp.async.bulk", caller);
  if (!in_shared(transfer.shared)) fail("not shared memory", format("%s needs dynamic shared memory", what), caller);
  const unsigned alignment = tensor ? 128 : 16;
  if (uintptr_t(transfer.shared) % alignment)
    fail("misaligned address", format("the shared memory of %s lies on a multiple of %u bytes", what, alignment),
         caller);
  if (!tensor && (uintptr_t(transfer.global) % 16 || transfer.bytes % 16 || transfer.bytes == 0))
    fail("misaligned address",
         format("a bulk copy goes by multiples of 16 bytes, got %u bytes from %zu past one", transfer.bytes,
                size_t(uintptr_t(transfer.global) % 16)),
         caller);
  transfer.caller = {caller.address, nullptr};
  if (transfer.destinations == 0) transfer.destinations = uint16_t(1u << block_of_shared(transfer.shared).rank);
  if (transfer.destinations >> machine.block_count)
    fail("out of bounds",
         format("multicast to blocks 0x%x of a cluster of %u", transfer.destinations, machine.block_count), caller);

  transfer.actor = new_async_operation(what, thread, caller.address, &transfer.clock);
  const Actor shared_side{async_actor(transfer.actor), transfer.clock, &thread.clock, load ? nullptr : &thread.proxy};
  Actor global_side = shared_side;
  global_side.proxy = nullptr;
  if (load) {
    for (unsigned rank = 0; rank < machine.block_count; ++rank) {
      if (!(transfer.destinations >> rank & 1)) continue;
      check_mbarrier(reinterpret_cast<uint64_t*>(at_rank(transfer.barrier, rank)), caller);
      touch_shared(at_rank(transfer.shared, rank), transfer.bytes, Access::write, shared_side, caller);
    }
  } else {
    touch_shared(transfer.shared, transfer.bytes, Access::read, shared_side, caller);
    transfer.write_actor = new_async_operation(what, thread, caller.address, &transfer.write_clock);
    global_side.id = async_actor(transfer.write_actor);
    global_side.clock = transfer.write_clock;
  }
  const Access access = load ? Access::read : transfer.kind == Transfer::Kind::store ? Access::write : Access::atomic;
  size_t moved = 0;
  const auto touch_row = [&](const char* global, size_t bytes) {
    touch_global(global, bytes, access, global_side, caller);
    moved += bytes;
  };
  if (!tensor)
    touch_row(transfer.global, transfer.bytes);
  else
    for_each_row(transfer, [&](size_t, size_t, size_t count, const char* global) {
      if (count) touch_row(global, count * bytes_of(transfer.map.type));
    });
  if (machine.profiled()) count_bulk(moved, access, caller);
  if (!load) thread.open_stores.push_back(machine.transfers.size());
  machine.transfers.push_back(std::move(transfer));
}

Transfer tensor_transfer(Transfer::Kind kind, const void* shared, const TensorMap& map, const int* at, unsigned rank,
                         Caller caller) {
  if (map.rank != rank)
    fail("wrong tensor map", format("the instruction is for %u dimensions, the map has %u", rank, map.rank), caller);
  Transfer transfer{};
  transfer.kind = kind;
  transfer.shared = static_cast<char*>(const_cast<void*>(shared));
  transfer.map = map;
  std::copy_n(at, rank, transfer.at.begin());
  transfer.bytes = map.box_bytes();
  return transfer;
}

Transfer bulk_transfer(Transfer::Kind kind, const void* shared, const void* global, unsigned bytes) {
  Transfer transfer{};
  transfer.kind = kind;
  transfer.shared = static_cast<char*>(const_cast<void*>(shared));
  transfer.global = static_cast<char*>(const_cast<void*>(global));
  transfer.bytes = bytes;
  return transfer;
}

void see(Thread& thread, int actor, Clock clock) {
  Clock& seen = thread.clock[async_actor(actor)];
  seen = std::max(seen, clock);
}

}  // namespace

void tma_load(void* shared_to, const TensorMap& map, uint64_t* barrier, const int* at, unsigned rank,
              uint16_t destinations) {
  const Caller caller = EMULATOR_CALLER;
  Transfer transfer = tensor_transfer(Transfer::Kind::load, shared_to, map, at, rank, caller);
  transfer.barrier = barrier;
  transfer.destinations = destinations;
  start(std::move(transfer), caller);
}

void tma_store(const TensorMap& map, const void* shared_from, const int* at, unsigned rank) {
  const Caller caller = EMULATOR_CALLER;
  start(tensor_transfer(Transfer::Kind::store, shared_from, map, at, rank, caller), caller);
}

void tma_reduce_add(const TensorMap& map, const void* shared_from, const int* at, unsigned rank) {
  const Caller caller = EMULATOR_CALLER;
  start(tensor_transfer(Transfer::Kind::reduce_add, shared_from, map, at, rank, caller), caller);
}

void bulk_load(void* shared_to, const void* from, unsigned bytes, uint64_t* barrier) {
  const Caller caller = EMULATOR_CALLER;
  Transfer transfer = bulk_transfer(Transfer::Kind::load, shared_to, from, bytes);
  transfer.barrier = barrier;
  start(std::move(transfer), caller);
}

void bulk_store(void* to, const void* shared_from, unsigned bytes) {
  const Caller caller = EMULATOR_CALLER;
  start(bulk_transfer(Transfer::Kind::store, shared_from, to, bytes), caller);
}

void bulk_reduce_add(TensorType type, void* to, const void* shared_from, unsigned bytes) {
  const Caller caller = EMULATOR_CALLER;
  Transfer transfer = bulk_transfer(Transfer::Kind::reduce_add, shared_from, to, bytes);
  transfer.map.type = type;
  start(std::move(transfer), caller);
}

void bulk_commit() {
  const Caller caller = EMULATOR_CALLER;
  if (site_disabled("cp.async.bulk.commit_group", caller)) return;
  Thread& thread = *current_thread;
  thread.store_groups.push_back(std::move(thread.open_stores));
  thread.open_stores.clear();
}

// only_reading: the sources in shared memory may be reused, but the results need not be visible yet.
void bulk_wait(unsigned groups_left, bool only_reading) {
  const Caller caller = EMULATOR_CALLER;
  if (site_disabled("cp.async.bulk.wait_group", caller)) return;
  if (site_altered("leaves one more group", caller)) ++groups_left;
  if (!only_reading && site_altered("waits for reading alone", caller)) only_reading = true;
  Thread& thread = *current_thread;
  const size_t finished = thread.store_groups.size() > groups_left ? thread.store_groups.size() - groups_left : 0;
  for (size_t group = 0; group < finished; ++group) {
    for (const size_t index : thread.store_groups[group]) {
      Transfer& transfer = machine.transfers[index];
      read_source(transfer);
      see(thread, transfer.actor, transfer.clock);
      if (only_reading) continue;
      write_result(transfer);
      see(thread, transfer.write_actor, transfer.write_clock);
    }
  }
  if (!only_reading) thread.store_groups.erase(thread.store_groups.begin(), thread.store_groups.begin() + finished);
}

bool run_one_transfer() {
  auto& transfers = machine.transfers;
  size_t& first = machine.first_transfer;
  const auto pending = [](const Transfer& t) { return t.kind == Transfer::Kind::load && !t.done; };
  while (first < transfers.size() && !pending(transfers[first])) ++first;
  if (first == transfers.size()) return false;
  perform_load(transfers[first]);
  return true;
}

void check_unfinished_stores(Thread& thread) {
  const auto finish = [&](size_t index) {
    Transfer& transfer = machine.transfers[index];
    if (!transfer.was_read)
      report(
          "missing bulk wait",
          "the thread exits while its bulk copy may still read shared memory: commit_group and wait_group are needed",
          transfer.caller);
    write_result(transfer);
  };
  for (const auto& group : thread.store_groups) std::for_each(group.begin(), group.end(), finish);
  std::for_each(thread.open_stores.begin(), thread.open_stores.end(), finish);
}

}  // namespace emulator
