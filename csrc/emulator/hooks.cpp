// What g++ -fsanitize=thread,bounds,alignment calls, defined here instead of in the sanitizers' runtime libraries,
// which could not be loaded into Python. This library itself is compiled without these hooks.
#include <cstring>

#include "machine.h"
#include "reports.h"

using emulator::Access;
using emulator::Caller;
using emulator::check_access;
using emulator::current_thread;

#define FASTGPT_HOOK(name, bytes, access)                                \
  void name(void* p) {                                                   \
    if (current_thread) check_access(p, bytes, access, EMULATOR_CALLER); \
  }
#define FASTGPT_HOOKS(bytes)                                                 \
  FASTGPT_HOOK(__tsan_read##bytes, bytes, Access::read)                      \
  FASTGPT_HOOK(__tsan_write##bytes, bytes, Access::write)                    \
  FASTGPT_HOOK(__tsan_unaligned_read##bytes, bytes, Access::read)            \
  FASTGPT_HOOK(__tsan_unaligned_write##bytes, bytes, Access::write)          \
  FASTGPT_HOOK(__tsan_volatile_read##bytes, bytes, Access::read)           \
  FASTGPT_HOOK(__tsan_volatile_write##bytes, bytes, Access::write)          \
  FASTGPT_HOOK(__tsan_unaligned_volatile_read##bytes, bytes, Access::read) \
  FASTGPT_HOOK(__tsan_unaligned_volatile_write##bytes, bytes, Access::write)

extern "C" {

FASTGPT_HOOKS(1)
FASTGPT_HOOKS(2)
FASTGPT_HOOKS(4)
FASTGPT_HOOKS(8)
FASTGPT_HOOKS(16)

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void* p, unsigned long bytes) {
  if (current_thread && bytes) check_access(p, bytes, Access::read, EMULATOR_CALLER);
}
void __tsan_write_range(void* p, unsigned long bytes) {
  if (current_thread && bytes) check_access(p, bytes, Access::write, EMULATOR_CALLER);
}

// Host code in a .cu file: guards of static variables, reference counts.
uint8_t __tsan_atomic8_load(const volatile uint8_t* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
int __tsan_atomic32_load(const volatile int* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
long __tsan_atomic64_load(const volatile long* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
void __tsan_atomic8_store(volatile uint8_t* p, uint8_t v, int) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
void __tsan_atomic32_store(volatile int* p, int v, int) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
void __tsan_atomic64_store(volatile long* p, long v, int) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
int __tsan_atomic32_fetch_add(volatile int* p, int v, int) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
long __tsan_atomic64_fetch_add(volatile long* p, long v, int) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }

// Where emulator/cuda.h sends the calls that the compiler leaves as calls.
void* fastgpt_emulator_memcpy(void* to, const void* from, size_t bytes) {
  if (current_thread && bytes) {
    const Caller caller = EMULATOR_CALLER;
    check_access(from, bytes, Access::read, caller);
    check_access(to, bytes, Access::write, caller);
  }
  return std::memcpy(to, from, bytes);
}
void* fastgpt_emulator_memset(void* to, int value, size_t bytes) {
  if (current_thread && bytes) check_access(to, bytes, Access::write, EMULATOR_CALLER);
  return std::memset(to, value, bytes);
}

// The layouts of libubsan's records.
struct UndefinedLocation {
  const char* file;
  uint32_t line, column;
};
struct UndefinedType {
  uint16_t kind, info;
  char name[1];
};
struct OutOfBounds {
  UndefinedLocation location;
  const UndefinedType *array, *index;
};
struct TypeMismatch {
  UndefinedLocation location;
  const UndefinedType* type;
  uint8_t log_alignment, check;
};

void __ubsan_handle_out_of_bounds(OutOfBounds* record, uintptr_t index) {
  if (!current_thread) return;
  emulator::fail("out of bounds",
                 emulator::format("index %ld of an array of type %s", long(index), record->array->name),
                 EMULATOR_CALLER);
}
void __ubsan_handle_type_mismatch_v1(TypeMismatch* record, uintptr_t address) {
  if (!current_thread) return;
  const uintptr_t alignment = uintptr_t(1) << record->log_alignment;
  emulator::fail("misaligned address",
                 emulator::format("a %s lies on a multiple of %zu bytes, this address is %zu past one",
                                  record->type->name, size_t(alignment), size_t(address % alignment)),
                 EMULATOR_CALLER);
}

}  // extern "C"
