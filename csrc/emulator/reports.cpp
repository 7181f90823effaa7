#include "reports.h"

#include <cstdarg>
#include <cstdio>
#include <set>

#include "machine.h"
#include "positions.h"

namespace emulator {

namespace {

constexpr size_t kMostFindings = 20;  // of one launch: what follows is mostly their consequence
constexpr size_t kMostKept = 1000;    // until somebody takes them

std::vector<Finding> kept, of_launch;
std::set<std::pair<std::string, const void*>> reported;

}  // namespace

std::string format(const char* form, ...) {
  char text[2048];
  va_list arguments;
  va_start(arguments, form);
  vsnprintf(text, sizeof text, form, arguments);
  va_end(arguments);
  return text;
}

std::string Finding::text() const {
  std::string out = kind + ": " + message + "\n  in " + kernel;
  if (in_thread)
    out += format(", thread (%u,%u,%u), block (%u,%u,%u)", thread.x, thread.y, thread.z, block.x, block.y, block.z);
  out += format("\n  at %s:%d", file.c_str(), line);
  for (const std::string& call : inlined) out += "\n  called from " + call;
  return out;
}

void report(const char* kind, const std::string& message, Caller caller) {
  if (of_launch.size() >= kMostFindings || !reported.insert({kind, caller.address}).second) return;
  Finding finding;
  finding.kind = kind;
  finding.message = message;
  finding.kernel = function_name(machine.kernel);
  uintptr_t stack_end = 0;
  if (const Thread* thread = current_thread) {
    finding.in_thread = true;
    finding.thread = thread->thread_index;
    finding.block = thread->block_index;
    stack_end = thread->fiber.stack_end();
  }
  if (caller.address) {
    const std::vector<Position> chain = call_chain(caller, stack_end);
    finding.file = chain[0].file;
    finding.line = chain[0].line;
    for (size_t i = 1; i < chain.size(); ++i) finding.inlined.push_back(chain[i].text());
  }
  of_launch.push_back(finding);
}

void fail(const char* kind, const std::string& message, Caller caller) {
  report(kind, message, caller);
  leave_launch();
}

bool anything_found() { return !of_launch.empty(); }

std::string end_of_launch_report() {
  std::string text;
  for (const Finding& finding : of_launch) {
    text += (text.empty() ? "" : "\n") + finding.text();
    if (kept.size() < kMostKept) kept.push_back(finding);
  }
  of_launch.clear();
  reported.clear();
  return text;
}

std::vector<Finding> take_findings() {
  std::vector<Finding> taken;
  taken.swap(kept);
  return taken;
}

}  // namespace emulator
