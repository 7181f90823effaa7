// How many multiprocessors the current device has: what a grid that stays until all rows are done is sized by.
#pragma once

#include "host/launch.h"

#if defined(__CUDACC__)

inline int multiprocessors() {
  int device = 0, count = 0;
  check_cuda(cudaGetDevice(&device), "asking for the current device");
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "asking for its multiprocessors");
  return count;
}

#else

// Few, so that the small tensors of tests give every block several rows.
inline int multiprocessors() { return 2; }

#endif
