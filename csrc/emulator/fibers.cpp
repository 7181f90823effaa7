#include "fibers.h"

#include <sys/mman.h>

#include <cstring>
#include <new>

// Hand-written, because swapcontext() makes a system call for the signal mask at every switch: six times slower.
#if defined(__x86_64__)
asm(R"(
.text
.globl fastgpt_emulator_switch
.hidden fastgpt_emulator_switch
.type fastgpt_emulator_switch,@function
fastgpt_emulator_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size fastgpt_emulator_switch,.-fastgpt_emulator_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl fastgpt_emulator_switch
.hidden fastgpt_emulator_switch
.type fastgpt_emulator_switch,%function
fastgpt_emulator_switch:
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
.size fastgpt_emulator_switch,.-fastgpt_emulator_switch
)");
#else
#error "the emulator has no fiber switch for this processor"
#endif

namespace emulator {

Fiber::Fiber() {
  void* memory = mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, kGuardBytes, PROT_NONE);
  stack_ = static_cast<char*>(memory) + kGuardBytes;
}

Fiber::~Fiber() { munmap(stack_ - kGuardBytes, kStackBytes + kGuardBytes); }

// Lays the stack out as fastgpt_emulator_switch would have saved it, with fiber_main as the place to return to.
void Fiber::restart() {
  auto* top = reinterpret_cast<uint64_t*>(stack_ + kStackBytes);
#if defined(__x86_64__)
  *--top = 0;                                        // the return address of fiber_main: there is none
  *--top = reinterpret_cast<uint64_t>(&fiber_main);  // popped by ret
  for (int i = 0; i < 6; ++i) *--top = 0;
#else
  top -= 20;
  std::memset(top, 0, 160);
  top[11] = reinterpret_cast<uint64_t>(&fiber_main);  // x30
#endif
  stack_pointer = top;
}

}  // namespace emulator
