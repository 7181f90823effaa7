#include "sites.h"

#include <map>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "json.h"
#include "positions.h"

namespace emulator {

namespace {

using Key = std::tuple<std::string, std::string, int>;  // kind, file, line

struct Call {
  const char* kind;
  int id = -1;  // known once its position is
};

std::unordered_map<const void*, Call> calls;  // by return address: a line may have been compiled many times
std::vector<Key> sites;                       // by id
std::map<Key, int> ids;
int disabled = -1;

struct Answer {
  const void* address = nullptr;
  bool disabled = false;
};
Answer cache[1024];  // in_bounds() is called for every element

void identify(const void* address, Call& call) {
  if (call.id >= 0) return;
  const Position& at = user_position(address);
  const Key key{call.kind, at.file, at.line};
  auto [found, added] = ids.try_emplace(key, int(sites.size()));
  if (added) sites.push_back(key);
  call.id = found->second;
}

}  // namespace

bool site_disabled(const char* kind, Caller caller) {
  Answer& answer = cache[uintptr_t(caller.address) / 4 % std::size(cache)];
  if (answer.address == caller.address) return answer.disabled;
  Call& call = calls.try_emplace(caller.address, Call{kind}).first->second;
  if (disabled >= 0) identify(caller.address, call);
  answer = {caller.address, disabled >= 0 && call.id == disabled};
  return answer.disabled;
}

void choose_disabled_site(int id) {
  disabled = id;
  for (Answer& answer : cache) answer = Answer();
}

std::string sites_json() {
  std::vector<const void*> addresses;
  for (const auto& [address, call] : calls) addresses.push_back(address);
  look_up(addresses);
  for (auto& [address, call] : calls) identify(address, call);
  JsonArray out;
  for (size_t id = 0; id < sites.size(); ++id) {
    const auto& [kind, file, line] = sites[id];
    out.add(JsonObject().add("id", int(id)).add("kind", kind).add("file", file).add("line", line));
  }
  return out.text();
}

}  // namespace emulator
