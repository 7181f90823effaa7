#include "counters.h"

#include <algorithm>
#include <bit>
#include <deque>
#include <map>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "json.h"
#include "machine.h"
#include "positions.h"

namespace emulator {

namespace {

constexpr size_t kSector = 32, kBanks = 32;

struct Line {  // of one kernel
  bool shared = false, matrix = false;
  Access access = Access::read;
  uint64_t requests = 0, bytes = 0;
  uint64_t units = 0, ideal = 0;  // sectors of global memory; wavefronts of shared memory
  uint64_t flops = 0;
};
std::map<std::pair<const void*, const void*>, Line> lines;  // by kernel and return address

struct Shape {
  unsigned threads;  // of a block
  size_t shared_bytes;
  bool operator<(const Shape& other) const {
    return std::tie(threads, shared_bytes) < std::tie(other.threads, other.shared_bytes);
  }
};
struct Launches {
  uint64_t count = 0, blocks = 0;
};
std::map<std::pair<const void*, Shape>, Launches> launches;  // by kernel and shape

// What the lanes of one warp did at one place, one execution of it.
struct Request {
  uint32_t lanes = 0;
  unsigned bytes = 0;
  uintptr_t address[32];
};
struct Site {
  bool shared = false;
  Access access = Access::read;
  uint32_t executions[32] = {};
  uint64_t first = 0;  // the number of open.front()
  std::deque<Request> open;
};
std::vector<std::unordered_map<const void*, Site>> sites;  // of each warp of the running cluster

// Sectors that the request touches, and the fewest that could hold its distinct bytes.
void count_sectors(const Request& request, Line& line) {
  std::vector<uintptr_t> sectors;
  std::vector<std::pair<uintptr_t, uintptr_t>> ranges;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(request.lanes >> lane & 1)) continue;
    const uintptr_t begin = request.address[lane], end = begin + request.bytes;
    ranges.push_back({begin, end});
    for (uintptr_t sector = begin / kSector; sector <= (end - 1) / kSector; ++sector) sectors.push_back(sector);
  }
  std::sort(sectors.begin(), sectors.end());
  line.units += std::unique(sectors.begin(), sectors.end()) - sectors.begin();
  std::sort(ranges.begin(), ranges.end());
  uint64_t distinct = 0;
  uintptr_t reached = 0;
  for (auto [begin, end] : ranges) {
    begin = std::max(begin, reached);
    if (end > begin) distinct += end - begin;
    reached = std::max(reached, end);
  }
  line.bytes += distinct;
  line.ideal += (distinct + kSector - 1) / kSector;
}

// Shared memory serves one 4-byte word of each bank at a time; wide accesses go in phases of 128 bytes.
void count_wavefronts(const Request& request, Line& line) {
  const int lanes_a_phase = request.bytes <= 4 ? 32 : int(4 * kBanks / request.bytes);
  for (int begin = 0; begin < 32; begin += lanes_a_phase) {
    std::vector<uintptr_t> words;
    for (int lane = begin; lane < begin + lanes_a_phase; ++lane) {
      if (!(request.lanes >> lane & 1)) continue;
      line.bytes += request.bytes;
      for (uintptr_t word = request.address[lane] / 4; word <= (request.address[lane] + request.bytes - 1) / 4; ++word)
        words.push_back(word);
    }
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    uint64_t of_bank[kBanks] = {}, worst = 0;
    for (uintptr_t word : words) worst = std::max(worst, ++of_bank[word % kBanks]);
    line.units += worst;
    line.ideal += worst > 0;
  }
}

void close(const void* address, const Site& site, const Request& request) {
  Line& line = lines[{machine.kernel, address}];
  line.shared = site.shared;
  line.access = site.access;
  ++line.requests;
  if (site.shared)
    count_wavefronts(request, line);
  else
    count_sectors(request, line);
}

}  // namespace

void count_access(uintptr_t address, size_t bytes, Access access, Space space, Caller caller) {
  constexpr size_t kWidest = 16;  // longer ones are copies, done in steps of what an instruction can take
  for (size_t step; (step = std::min(std::bit_floor(bytes), kWidest)) < bytes; address += step, bytes -= step)
    count_access(address, step, access, space, caller);
  const Thread& thread = *current_thread;
  if (sites.size() <= thread.warp_number) sites.resize(thread.warp_number + 1);
  Site& site = sites[thread.warp_number][caller.address];
  site.shared = space == Space::shared;
  site.access = access;
  // Lanes of one warp go through the same code: the n-th time here of one lane belongs with the n-th of the others.
  const uint64_t index = site.executions[thread.lane]++ - site.first;
  while (site.open.size() <= index) site.open.emplace_back();
  Request& request = site.open[index];
  request.bytes = unsigned(bytes);
  request.lanes |= 1u << thread.lane;
  request.address[thread.lane] = address;
  while (!site.open.empty() && site.open.front().lanes == 0xffffffffu) {
    close(caller.address, site, site.open.front());
    site.open.pop_front();
    ++site.first;
  }
}

void count_bulk(size_t bytes, Access access, Caller caller) {
  Line& line = lines[{machine.kernel, caller.address}];
  line.access = access;
  ++line.requests;
  line.bytes += bytes;
  line.units += (bytes + kSector - 1) / kSector;
  line.ideal += (bytes + kSector - 1) / kSector;
}

void count_flops(uint64_t flops, Caller caller) {
  Line& line = lines[{machine.kernel, caller.address}];
  line.matrix = true;
  ++line.requests;
  line.flops += flops;
}

void count_launch() {
  Launches& same = launches[{machine.kernel, {machine.block.count(), machine.shared_bytes}}];
  ++same.count;
  same.blocks += machine.grid.count();
}

void finish_counting() {
  for (auto& warp : sites) {
    for (auto& [address, site] : warp)
      for (const Request& request : site.open)
        if (request.lanes) close(address, site, request);
    warp.clear();
  }
}

std::string take_counters_json() {
  std::vector<const void*> addresses;
  for (const auto& [key, line] : lines) addresses.push_back(key.second);
  look_up(addresses);
  // Copies that the compiler made of one line, by unrolling or inlining, count together.
  std::map<std::tuple<std::string, std::string, int, std::string>, Line> totals;
  for (const auto& [key, line] : lines) {
    const Position& at = user_position(key.second);
    const char* access = line.access == Access::read ? "load" : line.access == Access::write ? "store" : "atomic";
    const std::string what = line.matrix ? "matrix" : std::string(line.shared ? "shared " : "global ") + access;
    Line& total = totals[{function_name(key.first), at.file, at.line, what}];
    total.requests += line.requests;
    total.bytes += line.bytes;
    total.units += line.units;
    total.ideal += line.ideal;
    total.flops += line.flops;
  }
  lines.clear();
  JsonArray out;
  for (const auto& [key, line] : totals) {
    const auto& [kernel, file, number, what] = key;
    JsonObject entry;
    entry.add("kernel", kernel).add("file", file).add("line", number);
    const size_t space = what.find(' ');
    entry.add("space", what.substr(0, space)).add("requests", line.requests);
    if (what == "matrix") {
      entry.add("flops", line.flops);
    } else {
      entry.add("access", what.substr(space + 1)).add("bytes", line.bytes);
      const bool shared = what[0] == 's';
      entry.add(shared ? "wavefronts" : "sectors", line.units)
          .add(shared ? "ideal_wavefronts" : "ideal_sectors", line.ideal);
      if (shared) entry.add("bank_conflicts", line.units - line.ideal);
    }
    out.add(entry);
  }
  return out.text();
}

std::string take_launches_json() {
  JsonArray out;
  for (const auto& [key, same] : launches) {
    JsonObject entry;
    entry.add("kernel", function_name(key.first)).add("threads", uint64_t(key.second.threads));
    entry.add("shared_bytes", uint64_t(key.second.shared_bytes)).add("launches", same.count).add("blocks", same.blocks);
    out.add(entry);
  }
  launches.clear();
  return out.text();
}

}  // namespace emulator
