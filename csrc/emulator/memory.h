// The checks of memory accesses: bounds, races, uninitialised reads, proxies.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "caller.h"
#include "clocks.h"
#include "emulator.h"

namespace emulator {

struct Block;
struct Thread;

// Who accesses memory: a thread, or a copy or wgmma of its own.
struct Actor {
  unsigned id;
  Clock clock;               // its own time
  const VectorClock* view;   // what it has seen of the others
  const VectorClock* proxy;  // what the async proxy may see; null for ordinary accesses
};
Actor thread_actor(const Thread& thread);

// What is known of one byte of shared memory or one element of a tensor: its last write and the reads since.
struct Shadow {
  static constexpr uint16_t kNobody = 0xffff;
  Clock write_clock = 0, read_clock = 0;
  uint32_t write_cluster = 0, read_cluster = 0;
  uint32_t write_place = 0, read_place = 0;  // see positions.h
  int32_t read_set = -1;                     // more than one reader: an index of read_sets
  uint16_t writer = kNobody, reader = kNobody;
  bool atomic = false, many_clusters_read = false;
};

// Of a block's dynamic shared memory. The bytes of an aligned word that were only accessed together have one Shadow,
// the first byte's: most accesses are of whole words, and then there is a quarter to look after.
struct SharedShadow {
  static constexpr size_t kWord = 4;
  std::vector<Shadow> bytes;
  std::vector<uint8_t> apart;  // by word: its bytes have a Shadow each
};

// Static __shared__ variables are C++ statics: known byte by byte, and swapped between the blocks of a cluster.
struct StaticShared {
  std::unordered_map<uintptr_t, Shadow> shadow;
  std::unordered_map<uintptr_t, char> contents;  // while another block runs
};

void begin_memory_checks(const void* kernel);  // of a launch
void clear_shared_memory(Block& block);
void swap_statics(Block& from, Block& to);

void check_access(const void* address, size_t bytes, Access access, Caller caller);
void touch_shared(const void* address, size_t bytes, Access access, const Actor& actor, Caller caller);
void touch_global(const void* address, size_t bytes, Access access, const Actor& actor, Caller caller);
bool in_shared(const void* address);
Block& block_of_shared(const void* address);
// A shared memory address as instructions take it, to a pointer; checks the range.
char* shared_pointer(uint32_t address, size_t bytes, Caller caller);
const Shadow& shared_shadow(const void* address);

}  // namespace emulator
