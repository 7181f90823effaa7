// What this library was built from and for, as JSON; written by fastgpt/native/build.py.
#include "fastgpt_build_info.h"

// The loader looks for the marker in the file before it loads it: a library that is refused must never have run.
#define MARKER "fastgpt-build-info:"
__attribute__((used)) static const char marked_info[] = MARKER FASTGPT_BUILD_INFO;

extern "C" __attribute__((visibility("default"))) const char* fastgpt_build_info() {
  return marked_info + sizeof(MARKER) - 1;
}

// What the compiler said of every kernel, by architecture, as JSON: a list of {"name", "arch", "registers", ...}. Only
// code for GPUs has any.
#if __has_include("fastgpt_kernels.h")
#include "fastgpt_kernels.h"

extern "C" __attribute__((visibility("default"))) const char* fastgpt_kernels() { return FASTGPT_KERNELS; }
#endif
