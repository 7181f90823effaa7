// What this library was built from and for, as JSON; written by fastgpt/native/build.py.
#include "fastgpt_build_info.h"

// The loader looks for the marker in the file before it loads it: a library that is refused must never have run.
#define MARKER "fastgpt-build-info:"
__attribute__((used)) static const char marked_info[] = MARKER FASTGPT_BUILD_INFO;

extern "C" __attribute__((visibility("default"))) const char* fastgpt_build_info() {
  return marked_info + sizeof(MARKER) - 1;
}
