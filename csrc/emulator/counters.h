// Counters for each kernel and source line: traffic with global memory, bank conflicts, matrix FLOPs; and launches.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "caller.h"
#include "emulator.h"

namespace emulator {

enum class Space : uint8_t { global, shared };

// One lane's access. The accesses that the lanes of a warp make at one place form a request.
void count_access(uintptr_t address, size_t bytes, Access access, Space space, Caller caller);
// A copy by the TMA unit.
void count_bulk(size_t bytes, Access access, Caller caller);
void count_flops(uint64_t flops, Caller caller);
void count_launch();      // the running one
void finish_counting();  // at the end of a block
std::string take_counters_json();
std::string take_launches_json();

}  // namespace emulator
