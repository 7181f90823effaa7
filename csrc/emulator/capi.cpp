// The C interface, read through ctypes. Strings belong to the library and live until the thread's next call.
#include <cstdlib>
#include <cstring>
#include <string>

#include "counters.h"
#include "emulator.h"
#include "json.h"
#include "reports.h"
#include "sites.h"

#define FASTGPT_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// Where the value of a name in a flat JSON object is written; null if the name is not there.
const char* find_value(const char* json, const char* name) {
  const std::string key = emulator::json_string(name);
  const char* at = std::strstr(json, key.c_str());
  if (!at) return nullptr;
  at += key.size();
  while (*at == ' ' || *at == ':') ++at;
  return at;
}

// A string's, which has no escapes in it.
std::string text_of(const char* value) { return std::string(value + 1, std::strcspn(value + 1, "\"")); }

const char* keep(std::string text) {
  static __thread std::string* kept = nullptr;  // see machine.h
  if (!kept) kept = new std::string;
  *kept = std::move(text);
  return kept->c_str();
}

std::string dim_json(const emulator::Dim& dim) { return emulator::format("[%u,%u,%u]", dim.x, dim.y, dim.z); }

}  // namespace

// Names that are absent keep their defaults.
FASTGPT_EXPORT void fastgpt_emulator_configure(const char* json) {
  emulator::Settings settings;
  if (const char* value = find_value(json, "checked")) settings.checked = *value == 't';
  if (const char* value = find_value(json, "profile")) settings.profile = *value == 't';
  if (const char* value = find_value(json, "seed")) settings.seed = std::strtoull(value, nullptr, 10);
  if (const char* value = find_value(json, "chip")) settings.chip = text_of(value);
  if (const char* value = find_value(json, "disabled_site")) settings.chosen_site = std::atoi(value);
  if (const char* value = find_value(json, "altered_site")) settings.chosen_site = std::atoi(value);
  if (const char* value = find_value(json, "alteration")) settings.alteration = text_of(value);
  emulator::configure(settings);
}

FASTGPT_EXPORT const char* fastgpt_emulator_findings() {
  emulator::JsonArray out;
  for (const emulator::Finding& finding : emulator::take_findings()) {
    emulator::JsonArray inlined;
    for (const std::string& call : finding.inlined) inlined.add(call);
    emulator::JsonObject entry;
    entry.add("kind", finding.kind).add("kernel", finding.kernel).add("message", finding.message);
    entry.add_raw("thread", finding.in_thread ? dim_json(finding.thread) : "null");
    entry.add_raw("block", finding.in_thread ? dim_json(finding.block) : "null");
    entry.add("file", finding.file).add("line", finding.line).add_raw("inlined", inlined.text());
    out.add(entry);
  }
  return keep(out.text());
}

FASTGPT_EXPORT const char* fastgpt_emulator_counters() { return keep(emulator::take_counters_json()); }
FASTGPT_EXPORT const char* fastgpt_emulator_launches() { return keep(emulator::take_launches_json()); }
FASTGPT_EXPORT const char* fastgpt_emulator_sites() { return keep(emulator::sites_json()); }
