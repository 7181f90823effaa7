// Where a call into the emulator came from, for reports, counters and mutation sites.
#pragma once

namespace emulator {

// The frame of the function that kernel code called; frame[1] is the return address, frame[0] the caller's frame
// (kernels are compiled with frame pointers, so the walk goes on from there). Valid while that function runs.
struct Caller {
  const void* address = nullptr;
  void* const* frame = nullptr;
};

}  // namespace emulator

// To be used by functions that kernels call directly, and by nothing else.
#define EMULATOR_CALLER \
  (::emulator::Caller{__builtin_return_address(0), static_cast<void* const*>(__builtin_frame_address(0))})
