// wgmma: PTX ISA 9.7.14. Each warp computes its own 16 of the 64 rows; the results appear when the program waits for
// them, and until then the accumulator registers hold NaN. An operation is complete for its whole warpgroup at once.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "counters.h"
#include "elements.h"
#include "machine.h"
#include "reports.h"
#include "sites.h"
#include "swizzle.h"

namespace emulator {

namespace {

constexpr uint32_t kWholeWarp = 0xffffffffu;
constexpr unsigned kWarpgroup = 128, kRows = 16, kDepth = 16;

// ---- operands in shared memory: 9.7.14.5.1, "Shared memory matrix layout", and .2, "matrix descriptor" ----

struct Operand {
  uint32_t start, leading, stride;  // in bytes
  unsigned swizzle;
  bool mn_major;
};

Operand decode(uint64_t descriptor, bool mn_major, Caller caller) {
  static const unsigned kSwizzles[4] = {0, 128, 64, 32};
  if (descriptor >> 49 & 7)
    fail("unsupported instruction", "matrix descriptors with a base offset are not modelled", caller);
  const auto field = [&](int bit) { return uint32_t(descriptor >> bit & 0x3fff) << 4; };
  return {field(0), field(16), field(32), kSwizzles[descriptor >> 62], mn_major};
}

// The 16-byte chunk that holds element (mn, k). A core matrix is 8 rows of 16 bytes, or of a swizzle's width.
uint32_t chunk_address(const Operand& operand, unsigned mn, unsigned k) {
  const unsigned width = operand.swizzle ? operand.swizzle : 16;
  uint32_t address = operand.start;
  if (!operand.mn_major) {
    address += mn / 8 * operand.stride + mn % 8 * width + (operand.swizzle ? k * 2 : k / 8 * operand.leading);
  } else if (operand.swizzle) {
    const unsigned elements_a_row = width / 2;
    address += mn / elements_a_row * operand.leading + mn % elements_a_row * 2 + k % 8 * width + k / 8 * operand.stride;
  } else {
    address += mn / 8 * operand.stride + k % 8 * 16 + k / 8 * operand.leading;
  }
  return swizzle_address(address & ~15u, operand.swizzle);
}

void read_operand(MatrixType type, const Operand& operand, unsigned first, unsigned count, float* out, Caller caller) {
  for (unsigned i = 0; i < count; ++i) {
    for (unsigned k = 0; k < kDepth; ++k) {
      const unsigned in_chunk = operand.mn_major ? (first + i) % 8 * 2 : k % 8 * 2;
      uint16_t bits;
      std::memcpy(&bits, shared_pointer(chunk_address(operand, first + i, k), 16, caller) + in_chunk, 2);
      out[i * kDepth + k] = half_to_float(type, bits);
    }
  }
}

void check_operand(const Operand& operand, unsigned first, unsigned count, const Actor& actor, Caller caller) {
  for (unsigned i = 0; i < count; i += operand.mn_major ? 8 : 1)
    for (unsigned k = 0; k < kDepth; k += operand.mn_major ? 1 : 8)
      touch_shared(shared_pointer(chunk_address(operand, first + i, k), 16, caller), 16, Access::read, actor, caller);
}

// ---- issuing ----

struct Argument {
  MatrixType type;
  int columns;
  float* accumulators;
  const uint32_t* a_registers;
  uint64_t a, b;
  bool accumulate, a_mn_major, b_mn_major;
};

Thread& lane_thread(const Warp& warp, unsigned lane) { return *warp.block->threads[warp.index * 32 + lane]; }

// Which registers are in use changes with each wgmma and each wait.
void refresh_busy_registers(Warp& warp) {
  for (unsigned lane = 0; lane < 32; ++lane) {
    auto& busy = lane_thread(warp, lane).busy_registers;
    busy.clear();
    for (const auto& [key, accumulators] : warp.in_flight) {
      const uintptr_t begin = uintptr_t(accumulators.registers[lane]);
      busy.push_back({begin, begin + accumulators.values.size() / 32 * sizeof(float), true});
    }
    const auto add = [&](const std::vector<Wgmma>& group) {
      for (const Wgmma& wgmma : group)
        if (!wgmma.a_registers.empty())
          busy.push_back({uintptr_t(wgmma.a_in[lane]), uintptr_t(wgmma.a_in[lane]) + 16, false});
    };
    add(warp.open_wgmmas);
    for (const auto& group : warp.wgmma_groups) add(group);
  }
}

void issue(void* const arguments[32], unsigned, const Caller& caller) {
  const auto argument = [&](int lane) -> const Argument& { return *static_cast<Argument*>(arguments[lane]); };
  const Argument& first = argument(0);
  Warp& warp = current_thread->block->warps[current_thread->warp];
  for (int lane = 1; lane < 32; ++lane)
    if (argument(lane).a != first.a || argument(lane).b != first.b || argument(lane).accumulate != first.accumulate)
      fail("divergent warp", format("wgmma: lane %d has other descriptors than lane 0", lane), caller);

  const size_t per_lane = first.columns / 2;
  auto found = warp.in_flight.find(first.accumulators);
  if (found == warp.in_flight.end()) {
    if (!warp.wgmma_fenced)
      report("missing wgmma fence", "registers were used since the last wgmma, without a wgmma.fence after it", caller);
    Accumulators accumulators{{}, std::vector<float>(32 * per_lane)};
    for (int lane = 0; lane < 32; ++lane) {
      float* registers = accumulators.registers[lane] = argument(lane).accumulators;
      std::memcpy(&accumulators.values[lane * per_lane], registers, per_lane * sizeof(float));
      std::fill_n(registers, per_lane, std::nanf(""));
    }
    warp.in_flight.emplace(first.accumulators, std::move(accumulators));
  } else if (found->second.values.size() != 32 * per_lane) {
    fail("missing wgmma fence", "the accumulators are in flight with another shape", caller);
  }

  Wgmma wgmma{first.type,       first.columns,    first.accumulators, {}, {}, first.a,       first.b,
              first.accumulate, first.a_mn_major, first.b_mn_major,   0,  0,  caller.address};
  for (int lane = 0; lane < 32 && first.a_registers; ++lane) {
    wgmma.a_in[lane] = argument(lane).a_registers;
    wgmma.a_registers.insert(wgmma.a_registers.end(), wgmma.a_in[lane], wgmma.a_in[lane] + 4);
  }
  wgmma.actor = new_async_operation("a wgmma", *current_thread, caller.address, &wgmma.clock);
  if (machine.checked()) {
    static VectorClock view, proxy;  // what the warp's lanes have seen together
    view.assign(machine.clock_size, 0);
    proxy.assign(machine.clock_size, 0);
    for (unsigned lane = 0; lane < 32; ++lane) {
      join(view, lane_thread(warp, lane).clock);
      join(proxy, lane_thread(warp, lane).proxy);
    }
    const Actor actor{async_actor(wgmma.actor), wgmma.clock, &view, &proxy};
    if (!first.a_registers)
      check_operand(decode(wgmma.a, wgmma.a_mn_major, caller), warp.index % 4 * kRows, kRows, actor, caller);
    check_operand(decode(wgmma.b, wgmma.b_mn_major, caller), 0, wgmma.columns, actor, caller);
  }
  if (machine.profiled()) count_flops(2ull * kRows * kDepth * wgmma.columns, caller);
  warp.open_wgmmas.push_back(std::move(wgmma));
  refresh_busy_registers(warp);
}

// ---- completing ----

void perform(Warp& warp, const Wgmma& wgmma) {
  static float a[kRows][kDepth], b[256][kDepth], b_rows[kDepth][256], row[256];
  const Caller caller{wgmma.address, nullptr};
  const int columns = wgmma.columns;
  if (wgmma.a_registers.empty()) {
    read_operand(wgmma.type, decode(wgmma.a, wgmma.a_mn_major, caller), warp.index % 4 * kRows, kRows, &a[0][0],
                 caller);
  } else {  // the layout of A in registers: 9.7.14.5.1
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i)
        for (int half = 0; half < 2; ++half)
          a[lane / 4 + i % 2 * 8][lane % 4 * 2 + half + i / 2 * 8] =
              half_to_float(wgmma.type, uint16_t(wgmma.a_registers[lane * 4 + i] >> 16 * half));
  }
  read_operand(wgmma.type, decode(wgmma.b, wgmma.b_mn_major, caller), 0, columns, &b[0][0], caller);
  for (int column = 0; column < columns; ++column)
    for (unsigned k = 0; k < kDepth; ++k) b_rows[k][column] = b[column][k];

  std::vector<float>& values = warp.in_flight.at(wgmma.key).values;
  const int per_lane = columns / 2;
  for (unsigned r = 0; r < kRows; ++r) {
    // The layout of D: 9.7.14.5.1.
    const auto at = [&](int column) -> float& {
      return values[(r % 8 * 4 + column % 8 / 2) * per_lane + column / 8 * 4 + r / 8 * 2 + column % 2];
    };
    for (int column = 0; column < columns; ++column) row[column] = wgmma.accumulate ? at(column) : 0.0f;
    for (unsigned k = 0; k < kDepth; ++k)
      for (int column = 0; column < columns; ++column) row[column] += a[r][k] * b_rows[k][column];
    for (int column = 0; column < columns; ++column) at(column) = row[column];
  }
}

void finish_groups(Warp& warp, unsigned groups_left) {
  const unsigned first_thread = warp.index / 4 * kWarpgroup;
  while (warp.wgmma_groups.size() > groups_left) {
    for (const Wgmma& wgmma : warp.wgmma_groups.front()) {
      perform(warp, wgmma);
      for (unsigned i = first_thread; i < first_thread + kWarpgroup; ++i) {
        Clock& seen = warp.block->threads[i]->clock[async_actor(wgmma.actor)];
        seen = std::max(seen, wgmma.clock);
      }
    }
    warp.wgmma_groups.pop_front();
  }
  const auto uses = [](const std::vector<Wgmma>& group, const void* key) {
    return std::any_of(group.begin(), group.end(), [&](const Wgmma& wgmma) { return wgmma.key == key; });
  };
  for (auto entry = warp.in_flight.begin(); entry != warp.in_flight.end();) {
    bool busy = uses(warp.open_wgmmas, entry->first);
    for (const auto& group : warp.wgmma_groups) busy = busy || uses(group, entry->first);
    if (busy) {
      ++entry;
      continue;
    }
    const Accumulators& done = entry->second;
    const size_t per_lane = done.values.size() / 32;
    for (int lane = 0; lane < 32; ++lane)
      std::memcpy(done.registers[lane], &done.values[lane * per_lane], per_lane * sizeof(float));
    entry = warp.in_flight.erase(entry);
  }
  warp.wgmma_fenced = false;
  refresh_busy_registers(warp);
}

void check_warpgroup(Caller caller) {
  const Thread& thread = *current_thread;
  if ((thread.linear / kWarpgroup + 1) * kWarpgroup > thread.block_size.count())
    fail("divergent warp", "wgmma needs whole warpgroups of 128 threads", caller);
}

}  // namespace

void wgmma_fence() {
  const Caller caller = EMULATOR_CALLER;
  need_chip(90, "wgmma", caller);
  if (site_disabled("wgmma.fence", caller)) return;
  meet_in_warp(
      "wgmma.fence",
      [](void* const*, unsigned, const Caller&) {
        current_thread->block->warps[current_thread->warp].wgmma_fenced = true;
      },
      nullptr, kWholeWarp, false, caller);
}

void wgmma_commit() {
  const Caller caller = EMULATOR_CALLER;
  if (site_disabled("wgmma.commit_group", caller)) return;
  meet_in_warp(
      "wgmma.commit_group",
      [](void* const*, unsigned, const Caller&) {
        Warp& warp = current_thread->block->warps[current_thread->warp];
        warp.wgmma_groups.push_back(std::move(warp.open_wgmmas));
        warp.open_wgmmas.clear();
      },
      nullptr, kWholeWarp, false, caller);
}

void wgmma_wait(unsigned groups_left) {
  const Caller caller = EMULATOR_CALLER;
  if (site_disabled("wgmma.wait_group", caller)) return;
  if (site_altered("leaves one more group", caller)) ++groups_left;
  check_warpgroup(caller);
  Thread& thread = *current_thread;
  Block& block = *thread.block;
  Barrier& meeting = block.warpgroup_waits[thread.linear / kWarpgroup];
  if (++meeting.arrived < kWarpgroup) {
    meeting.waiting.push_back(&thread);
    wait_here("wgmma.wait_group", caller);
    return;
  }
  const Barrier done = std::move(meeting);
  meeting = Barrier();
  const unsigned first_warp = thread.warp / 4 * 4;
  for (unsigned warp = first_warp; warp < first_warp + 4; ++warp) finish_groups(block.warps[warp], groups_left);
  for (Thread* other : done.waiting) set_ready(*other);
}

void wgmma(MatrixType type, int columns, float* accumulators, const uint32_t* a_registers, uint64_t a, uint64_t b,
           bool accumulate, bool a_mn_major, bool b_mn_major) {
  const Caller caller = EMULATOR_CALLER;
  need_chip(90, "wgmma", caller);
  check_warpgroup(caller);
  Argument argument{type, columns, accumulators, a_registers, a, b, accumulate, a_mn_major, b_mn_major};
  meet_in_warp("wgmma.mma_async", issue, &argument, kWholeWarp, false, caller);
}

void check_unfinished_wgmmas(const Thread& thread) {
  const Warp& warp = thread.block->warps[thread.warp];
  const Wgmma* first = !warp.open_wgmmas.empty() ? &warp.open_wgmmas.front()
                       : !warp.wgmma_groups.empty() && !warp.wgmma_groups.front().empty()
                           ? &warp.wgmma_groups.front().front()
                           : nullptr;
  if (first) report("missing wgmma wait", "the thread exits while a wgmma is in flight", {first->address, nullptr});
}

// ---- setmaxnreg: the register file of a multiprocessor is shared by the block's warpgroups ----

void set_max_registers(unsigned count) {
  const Caller caller = EMULATOR_CALLER;
  need_chip(90, "setmaxnreg", caller);
  if (count < 24 || count > 256 || count % 8)
    fail("wrong register count", format("setmaxnreg takes a multiple of 8 from 24 to 256, got %u", count), caller);
  current_thread->block->registers_asked[current_thread->linear / kWarpgroup] = count;
}

void check_register_budget(Block& block) {
  constexpr unsigned kRegisterFile = 64 * 1024;
  unsigned total = 0;
  for (const unsigned count : block.registers_asked) total += count * kWarpgroup;
  if (total > kRegisterFile)
    report("wrong register count",
           format("setmaxnreg: the warpgroups ask for %u registers, a multiprocessor has %u", total, kRegisterFile),
           {});
}

}  // namespace emulator
