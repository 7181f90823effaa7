// Vector clocks: who has seen what of whom. A race is two accesses of which neither's actor had seen the other's.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace emulator {

using Clock = uint32_t;
using VectorClock = std::vector<Clock>;  // one entry for each actor of the running cluster

inline void join(VectorClock& into, const VectorClock& from) {
  Clock* a = into.data();
  const Clock* b = from.data();
  for (size_t i = 0, n = into.size(); i < n; ++i) a[i] = a[i] < b[i] ? b[i] : a[i];
}

}  // namespace emulator
