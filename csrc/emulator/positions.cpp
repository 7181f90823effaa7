#include "positions.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <unordered_map>

#include "reports.h"

namespace emulator {

namespace {

std::unordered_map<const void*, std::vector<Position>> known;

bool contains(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

std::string from_repository(const std::string& path) {
  const std::string normal = std::filesystem::path(path).lexically_normal().string();
  for (const char* root : {"/csrc/", "/tests/"}) {
    const size_t at = normal.rfind(root);
    if (at != std::string::npos) return normal.substr(at + 1);
  }
  return normal;
}

// Wrappers of one instruction and CUDA's own headers: a reader wants the line that calls them.
bool is_plumbing(const Position& position) {
  const std::string& file = position.file;
  for (const char* part : {"csrc/emulator/", "csrc/ptx/", "csrc/host/launch.h", "csrc/device/bounds.cuh",
                           "csrc/device/cuda.h", "/usr/include/", "/include/c++/", "/include/cuda_", "/include/crt/"})
    if (contains(file, part)) return true;
  return file == "??";
}

void parse(FILE* output, const std::vector<const void*>& addresses) {
  // addr2line -a -f -i prints the address, then for each inlined call its function and its file:line.
  char line[4096];
  size_t index = 0;
  std::vector<Position>* chain = nullptr;
  std::string function;
  bool expects_function = true;
  while (fgets(line, sizeof line, output)) {
    std::string text(line);
    while (!text.empty() && (text.back() == '\n' || text.back() == '\r')) text.pop_back();
    if (text.rfind("0x", 0) == 0) {
      if (index == addresses.size()) return;
      chain = &known[addresses[index++]];
      chain->clear();
      expects_function = true;
    } else if (!chain) {
      continue;
    } else if (expects_function) {
      function = text;
      expects_function = false;
    } else {
      text = text.substr(0, text.find(" (discriminator"));
      const size_t colon = text.rfind(':');
      Position position;
      position.function = function;
      position.file = from_repository(text.substr(0, colon));
      position.line = colon == std::string::npos ? 0 : std::atoi(text.c_str() + colon + 1);
      chain->push_back(position);
      expects_function = true;
    }
  }
}

std::string quoted(const std::string& path) {
  std::string out = "'";
  for (char c : path) out += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return out + "'";
}

}  // namespace

void look_up(const std::vector<const void*>& return_addresses) {
  std::map<std::string, std::pair<uintptr_t, std::vector<const void*>>> by_module;
  for (const void* address : return_addresses) {
    if (!known.try_emplace(address).second) continue;
    Dl_info info;
    known[address] = {Position{"?", format("%p", address), 0}};
    if (!dladdr(address, &info) || !info.dli_fname) continue;
    auto& module = by_module[info.dli_fname];
    module.first = uintptr_t(info.dli_fbase);
    module.second.push_back(address);
  }
  for (auto& [path, module] : by_module) {
    constexpr size_t kAtOnce = 2000;  // a command line has an end
    for (size_t begin = 0; begin < module.second.size(); begin += kAtOnce) {
      const size_t end = std::min(begin + kAtOnce, module.second.size());
      const std::vector<const void*> part(module.second.begin() + begin, module.second.begin() + end);
      std::string command = "addr2line -a -f -i -C -e " + quoted(path);
      // A return address is the instruction after the call: one less lies within the call.
      for (const void* address : part)
        command += format(" 0x%lx", (unsigned long)(uintptr_t(address) - 1 - module.first));
      command += " 2>/dev/null";
      if (FILE* output = popen(command.c_str(), "r")) {
        parse(output, part);
        pclose(output);
      }
    }
  }
}

const std::vector<Position>& positions(const void* return_address) {
  auto found = known.find(return_address);
  if (found == known.end()) {
    look_up({return_address});
    found = known.find(return_address);
  }
  return found->second;
}

const Position& user_position(const void* return_address) {
  const std::vector<Position>& chain = positions(return_address);
  for (const Position& position : chain)
    if (!is_plumbing(position)) return position;
  return chain.back();
}

std::vector<Position> user_positions(const void* return_address) {
  std::vector<Position> chain;
  for (const Position& position : positions(return_address))
    if (!is_plumbing(position)) chain.push_back(position);
  if (chain.empty()) chain.push_back(positions(return_address).back());
  return chain;
}

std::vector<Position> call_chain(Caller caller, uintptr_t stack_end) {
  std::vector<const void*> addresses{caller.address};
  void* const* frame = caller.frame;
  while (frame && addresses.size() < 32) {
    auto* next = static_cast<void* const*>(frame[0]);
    // Frames lie in order on the fiber's own stack; anything else is the end, or code without frame pointers.
    if (next <= frame || uintptr_t(next) + 16 > stack_end || uintptr_t(next) % alignof(void*)) break;
    frame = next;
    if (!frame[1]) break;
    addresses.push_back(frame[1]);
  }
  look_up(addresses);
  std::vector<Position> chain;
  for (const void* address : addresses)
    for (const Position& position : positions(address))
      if (!is_plumbing(position)) chain.push_back(position);
  if (chain.empty()) chain.push_back(user_position(caller.address));
  return chain;
}

std::string function_name(const void* entry) {
  // The entry itself is wanted, not the byte before it.
  std::string name = positions(static_cast<const char*>(entry) + 1).back().function;
  if (name.rfind("void ", 0) == 0) name = name.substr(5);
  int depth = 0;
  for (size_t i = 0; i < name.size(); ++i) {  // without its parameters
    if (name[i] == '<') ++depth;
    if (name[i] == '>') --depth;
    if (name[i] == '(' && depth == 0 && name.compare(i, 11, "(anonymous ") != 0) return name.substr(0, i);
  }
  return name;
}

namespace {
std::vector<const void*> places{nullptr};
std::unordered_map<const void*, uint32_t> place_numbers;
constexpr size_t kCached = 1024;
std::pair<const void*, uint32_t> cache[kCached];
}  // namespace

uint32_t place_of(const void* return_address) {
  auto& cached = cache[uintptr_t(return_address) / 4 % kCached];
  if (cached.first == return_address) return cached.second;
  auto [found, added] = place_numbers.try_emplace(return_address, uint32_t(places.size()));
  if (added) places.push_back(return_address);
  cached = {return_address, found->second};
  return found->second;
}

const void* address_of(uint32_t place) { return places[place]; }

}  // namespace emulator
