#include "host/path.h"

#include <mutex>
#include <string>
#include <vector>

#include "host/asking.h"

#define FASTGPT_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

struct Choice {
  const char *entry = "", *path = "", *reason = "";
};
thread_local Choice last;

std::mutex asked_mutex;
std::vector<Choice> asked;

std::string json(const Choice& choice) {
  return std::string("{\"entry\": \"") + choice.entry + "\", \"path\": \"" + choice.path + "\", \"reason\": \"" +
         choice.reason + "\"}";
}

const char* keep(std::string text) {
  thread_local std::string kept;
  kept = std::move(text);
  return kept.c_str();
}

}  // namespace

void fastgpt::remember_path(const char* entry, const char* path, const char* reason) {
  last = {entry, path, reason};
  if (only_asking) {
    const std::lock_guard<std::mutex> lock(asked_mutex);
    asked.push_back(last);
  }
}

// {"entry": ..., "path": ..., "reason": ...}, valid until the next call on this thread.
FASTGPT_EXPORT const char* fastgpt_last_path() { return keep(json(last)); }

// From now on calls only ask (1), or launch kernels again (0).
FASTGPT_EXPORT void fastgpt_ask(int on) {
  const std::lock_guard<std::mutex> lock(asked_mutex);
  fastgpt::only_asking = on;
  if (on) asked.clear();
}

// The paths of the calls that have asked, in order, as a list of what fastgpt_last_path() gives.
FASTGPT_EXPORT const char* fastgpt_asked() {
  const std::lock_guard<std::mutex> lock(asked_mutex);
  std::string text;
  for (const Choice& choice : asked) text += (text.empty() ? "" : ", ") + json(choice);
  return keep("[" + text + "]");
}
