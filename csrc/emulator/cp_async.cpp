// cp.async: PTX ISA 9.7.8.24.3. Each thread's copies are an actor of their own, and happen when their group is waited
// for: a kernel that reads earlier sees what was there before.
#include <algorithm>
#include <cstring>

#include "counters.h"
#include "machine.h"
#include "reports.h"
#include "sites.h"

namespace emulator {

namespace {

void perform(const std::vector<PendingCopy>& group) {
  for (const PendingCopy& copy : group) {
    std::memcpy(copy.to, copy.from, copy.bytes_read);
    std::memset(static_cast<char*>(copy.to) + copy.bytes_read, 0, copy.bytes - copy.bytes_read);
  }
}

}  // namespace

void cp_async(void* shared_to, const void* from, unsigned bytes, unsigned bytes_read) {
  const Caller caller = EMULATOR_CALLER;
  need_chip(80, "cp.async", caller);
  Thread& thread = *current_thread;
  if (uintptr_t(shared_to) % bytes || uintptr_t(from) % bytes)
    fail("misaligned address", format("cp.async of %u bytes needs both addresses to be multiples of it", bytes),
         caller);
  if (!in_shared(shared_to)) fail("not shared memory", "cp.async copies to dynamic shared memory only", caller);
  if (bytes_read) {
    touch_global(from, bytes_read, Access::read, thread_actor(thread), caller);
    if (machine.profiled()) count_access(uintptr_t(from), bytes_read, Access::read, Space::global, caller);
  }
  const Actor actor{copy_actor(thread), thread.committed_copies + 1, &thread.clock, nullptr};
  touch_shared(shared_to, bytes, Access::write, actor, caller);
  thread.open_copies.push_back({shared_to, from, bytes, bytes_read});
}

void cp_async_commit() {
  const Caller caller = EMULATOR_CALLER;
  if (site_disabled("cp.async.commit_group", caller)) return;
  Thread& thread = *current_thread;
  ++thread.committed_copies;
  thread.copy_groups.push_back(std::move(thread.open_copies));
  thread.open_copies.clear();
}

void cp_async_wait(unsigned groups_left) {
  const Caller caller = EMULATOR_CALLER;
  if (site_disabled("cp.async.wait_group", caller)) return;
  if (site_altered("leaves one more group", caller)) ++groups_left;
  Thread& thread = *current_thread;
  while (thread.copy_groups.size() > groups_left) {
    perform(thread.copy_groups.front());
    thread.copy_groups.pop_front();
  }
  Clock& seen = thread.clock[copy_actor(thread)];
  seen = std::max(seen, Clock(thread.committed_copies - thread.copy_groups.size()));
}

// Copies that nobody waits for happen after the thread is gone.
void finish_thread_copies(Thread& thread) {
  for (const auto& group : thread.copy_groups) perform(group);
  perform(thread.open_copies);
}

}  // namespace emulator
