// Findings: what is wrong, who did it, and where in the sources.
#pragma once

#include <string>
#include <vector>

#include "caller.h"
#include "emulator.h"

namespace emulator {

struct Finding {
  std::string kind, kernel, message;
  bool in_thread = false;
  Dim thread, block;
  std::string file;
  int line = 0;
  std::vector<std::string> inlined;  // the calls that led there, innermost first

  std::string text() const;
};

std::string format(const char* form, ...) __attribute__((format(printf, 1, 2)));

void report(const char* kind, const std::string& message, Caller caller);
[[noreturn]] void fail(const char* kind, const std::string& message, Caller caller);  // and gives the launch up
bool anything_found();
std::string end_of_launch_report();  // the text of this launch's findings; they stay until taken
std::vector<Finding> take_findings();

}  // namespace emulator
