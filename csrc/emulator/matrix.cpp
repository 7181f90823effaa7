// ldmatrix, stmatrix and mma.sync: PTX ISA 9.7.13.4.8, 9.7.13.4.15 and .16. Lane = 4 * group + member throughout.
#include <cstring>

#include "counters.h"
#include "elements.h"
#include "machine.h"
#include "reports.h"

namespace emulator {

namespace {

constexpr uint32_t kWholeWarp = 0xffffffffu;

struct RowsArgument {
  char* row;
  uint32_t* out;
  const uint32_t* in;
  int count;
  bool transposed;
};

// Each lane's register of matrix m holds two neighbours of row lane / 4, or of column lane / 4 where transposed.
template <class Move>
void for_each_element(void* const arguments[32], Move move) {
  const auto argument = [&](int lane) -> RowsArgument& { return *static_cast<RowsArgument*>(arguments[lane]); };
  for (int matrix = 0; matrix < argument(0).count; ++matrix) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int half = 0; half < 2; ++half) {
        const int row = argument(0).transposed ? lane % 4 * 2 + half : lane / 4;
        const int column = argument(0).transposed ? lane / 4 : lane % 4 * 2 + half;
        move(argument(lane), matrix, half, argument(matrix * 8 + row).row + column * 2);
      }
    }
  }
}

void run_ldmatrix(void* const arguments[32], unsigned, const Caller&) {
  for_each_element(arguments, [](RowsArgument& lane, int matrix, int half, char* element) {
    std::memcpy(reinterpret_cast<char*>(&lane.out[matrix]) + 2 * half, element, 2);
  });
}

void run_stmatrix(void* const arguments[32], unsigned, const Caller&) {
  for_each_element(arguments, [](RowsArgument& lane, int matrix, int half, char* element) {
    std::memcpy(element, reinterpret_cast<const char*>(&lane.in[matrix]) + 2 * half, 2);
  });
}

// Lanes 0-7 give the rows of the first matrix, 8-15 those of the second, and so on.
void check_row(const char* name, const void* row, int count, Access access, Caller caller) {
  const Thread& thread = *current_thread;
  if (thread.lane >= unsigned(count) * 8) return;
  if (uintptr_t(row) % 16)
    fail("misaligned address", format("the rows of %s lie on multiples of 16 bytes", name), caller);
  if (!in_shared(row)) fail("not shared memory", format("%s takes rows in dynamic shared memory only", name), caller);
  touch_shared(row, 16, access, thread_actor(thread), caller);
  if (machine.profiled()) count_access(uintptr_t(row), 16, access, Space::shared, caller);
}

struct MmaArgument {
  MatrixType type;
  float* d;
  const uint32_t *a, *b;
  const float* c;
};

// Fragment layouts: 9.7.13.4.8 (m16n8k16, 2-byte types) and 9.7.13.4.6 (m16n8k8, tf32).
void run_mma(void* const arguments[32], unsigned, const Caller& caller) {
  const auto argument = [&](int lane) -> MmaArgument& { return *static_cast<MmaArgument*>(arguments[lane]); };
  const MatrixType type = argument(0).type;
  const bool tf32 = type == MatrixType::tf32;
  const int depth = tf32 ? 8 : 16;
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const MmaArgument& mine = argument(lane);
    const int group = lane / 4, member = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = group + i % 2 * 8;
      if (tf32)
        a[row][member + i / 2 * 4] = tf32_to_float(mine.a[i]);
      else
        for (int half = 0; half < 2; ++half)
          a[row][member * 2 + half + i / 2 * 8] = half_to_float(type, uint16_t(mine.a[i] >> 16 * half));
      d[group + i / 2 * 8][member * 2 + i % 2] = mine.c[i];
    }
    for (int i = 0; i < 2; ++i) {
      if (tf32)
        b[member + i * 4][group] = tf32_to_float(mine.b[i]);
      else
        for (int half = 0; half < 2; ++half)
          b[member * 2 + half + i * 8][group] = half_to_float(type, uint16_t(mine.b[i] >> 16 * half));
    }
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < depth; ++k)
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) argument(lane).d[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  if (machine.profiled()) count_flops(2ull * 16 * 8 * depth, caller);
}

}  // namespace

void ldmatrix(uint32_t* out, const void* row, int count, bool transposed) {
  const Caller caller = EMULATOR_CALLER;
  need_chip(75, "ldmatrix", caller);
  check_row("ldmatrix", row, count, Access::read, caller);
  RowsArgument argument{static_cast<char*>(const_cast<void*>(row)), out, nullptr, count, transposed};
  meet_in_warp("ldmatrix", run_ldmatrix, &argument, kWholeWarp, false, caller);
}

void stmatrix(void* row, const uint32_t* in, int count, bool transposed) {
  const Caller caller = EMULATOR_CALLER;
  need_chip(90, "stmatrix", caller);
  check_row("stmatrix", row, count, Access::write, caller);
  RowsArgument argument{static_cast<char*>(row), nullptr, in, count, transposed};
  meet_in_warp("stmatrix", run_stmatrix, &argument, kWholeWarp, false, caller);
}

void mma(MatrixType type, float* d, const uint32_t* a, const uint32_t* b, const float* c) {
  const Caller caller = EMULATOR_CALLER;
  need_chip(80, "mma.sync", caller);
  MmaArgument argument{type, d, a, b, c};
  meet_in_warp("mma.sync", run_mma, &argument, kWholeWarp, false, caller);
}

}  // namespace emulator
