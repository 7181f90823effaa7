#include "sites.h"

#include <map>
#include <set>
#include <unordered_map>
#include <utility>
#include <vector>

#include "json.h"
#include "positions.h"

namespace emulator {

namespace {

// A helper that was inlined in several places has a site for each: one kernel's need of a barrier is not another's.
struct Site {
  std::string kind;
  std::vector<Position> chain;  // the call, and the calls through which it was inlined
  std::set<std::string> alterations;
  bool met = false;  // since a site was chosen
};
using Key = std::pair<std::string, std::string>;  // kind, the lines of the chain

struct Call {
  const char* kind;
  std::set<const char*> alterations;
  int id = -1;  // known once its position is
  bool met = false;
};

std::unordered_map<const void*, Call> calls;  // by return address: a line may have been compiled many times
std::vector<Site> sites;                      // by id
std::map<Key, int> ids;
int chosen = -1;
std::string chosen_alteration;

struct Answer {
  const void* address = nullptr;
  bool disabled = false;
};
Answer cache[1024];  // in_bounds() is called for every element

void identify(const void* address, Call& call) {
  if (call.id >= 0) return;
  const std::vector<Position> chain = user_positions(address);
  std::string lines;
  for (const Position& position : chain) lines += position.text() + " ";
  auto [found, added] = ids.try_emplace({call.kind, lines}, int(sites.size()));
  if (added) sites.push_back({call.kind, chain});
  call.id = found->second;
}

}  // namespace

bool site_disabled(const char* kind, Caller caller) {
  Answer& answer = cache[uintptr_t(caller.address) / 4 % std::size(cache)];
  if (answer.address == caller.address) return answer.disabled;
  Call& call = calls.try_emplace(caller.address, Call{kind}).first->second;
  call.met = true;
  if (chosen >= 0) identify(caller.address, call);
  answer = {caller.address, chosen >= 0 && call.id == chosen && chosen_alteration.empty()};
  return answer.disabled;
}

bool site_altered(const char* alteration, Caller caller) {
  Call& call = calls.at(caller.address);
  call.alterations.insert(alteration);
  return chosen >= 0 && call.id == chosen && chosen_alteration == alteration;
}

void choose_site(int id, const std::string& alteration) {
  chosen = id;
  chosen_alteration = alteration;
  for (auto& [address, call] : calls) call.met = false;
  for (Answer& answer : cache) answer = Answer();
}

std::string sites_json() {
  std::vector<const void*> addresses;
  for (const auto& [address, call] : calls) addresses.push_back(address);
  look_up(addresses);
  for (Site& site : sites) site.met = false;
  for (auto& [address, call] : calls) {
    identify(address, call);
    sites[call.id].met |= call.met;
    sites[call.id].alterations.insert(call.alterations.begin(), call.alterations.end());
  }
  JsonArray out;
  for (size_t id = 0; id < sites.size(); ++id) {
    const Site& site = sites[id];
    JsonArray inlined, alterations;
    for (size_t i = 1; i < site.chain.size(); ++i) inlined.add(site.chain[i].text());
    for (const std::string& alteration : site.alterations) alterations.add(alteration);
    JsonObject entry;
    entry.add("id", int(id)).add("kind", site.kind).add("file", site.chain[0].file).add("line", site.chain[0].line);
    entry.add_raw("inlined", inlined.text()).add_raw("alterations", alterations.text());
    out.add(entry.add_raw("met", site.met ? "true" : "false"));
  }
  return out.text();
}

}  // namespace emulator
