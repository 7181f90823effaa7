// Fibers: many stacks on one OS thread, with a switch that saves only the callee-saved registers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {

class Fiber {
 public:
  Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber();

  void restart();  // the next switch to it begins fiber_main()
  bool owns(uintptr_t address) const { return address - uintptr_t(stack_) < kStackBytes; }
  uintptr_t stack_end() const { return uintptr_t(stack_) + kStackBytes; }

  void* stack_pointer = nullptr;

 private:
  static constexpr size_t kStackBytes = 256 * 1024, kGuardBytes = 4096;
  char* stack_;
};

[[noreturn]] void fiber_main();  // the scheduler's: runs the kernel in the current thread

}  // namespace emulator

// Saves the running fiber's registers under *save and goes on where load was saved.
extern "C" void fastgpt_emulator_switch(void** save, void* load);
