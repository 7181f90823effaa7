// Which of an op's kernel paths served a call, and why: said by choose_path() in <op>.cpp, read by tests and people.
#pragma once

#include <cstdint>

#include "device/types.h"

namespace fastgpt {

// The strings are literals. Of this thread's calls the last one is remembered, for fastgpt_last_path(); and every one
// that only asks, for fastgpt_asked().
void remember_path(const char* entry, const char* path, const char* reason);

// Whether rows can be read and written 16 bytes at a time. Keeps the first reason why not.
class Alignment {
 public:
  Alignment(DType dtype, int64_t columns) : vector_(16 / bytes_of(dtype)) {
    if (columns % vector_ != 0) note("the width is no multiple of 16 bytes");
  }
  void rows(const ConstRows& rows) {
    if (!rows.data) return;
    if (!aligned(rows.data)) note("a tensor does not begin at a multiple of 16 bytes");
    if (rows.stride % vector_ != 0) note("a row does not begin at a multiple of 16 bytes");
  }
  void note(const char* reason) {
    if (!reason_) reason_ = reason;
  }
  static bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }
  const char* reason() const { return reason_; }  // null: they can

 private:
  int64_t vector_;  // elements in 16 bytes
  const char* reason_ = nullptr;
};

}  // namespace fastgpt
