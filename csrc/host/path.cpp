#include "host/path.h"

#include <string>

namespace {
struct Choice {
  const char *entry = "", *path = "", *reason = "";
};
thread_local Choice last;
}  // namespace

void fastgpt::remember_path(const char* entry, const char* path, const char* reason) { last = {entry, path, reason}; }

// {"entry": ..., "path": ..., "reason": ...}, valid until the next call on this thread.
extern "C" __attribute__((visibility("default"))) const char* fastgpt_last_path() {
  thread_local std::string json;
  json = std::string("{\"entry\": \"") + last.entry + "\", \"path\": \"" + last.path + "\", \"reason\": \"" +
         last.reason + "\"}";
  return json.c_str();
}
