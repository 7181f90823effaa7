// What the bindings (<op>.cpp) share: torch's stable ABI, and nothing of torch but that.
//
// The same binding is compiled twice. For CUDA it launches on the caller's device and current stream. For the emulator
// (FASTGPT_EMULATED) tensors are on the CPU, and each is made known by its name, so that a report can say which one a
// kernel ran out of.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>

#include "device/types.h"

#if defined(FASTGPT_EMULATED)
#include "emulator/emulator.h"
#define FASTGPT_LIBRARY_IMPL(library) STABLE_TORCH_LIBRARY_IMPL(fastgpt_emulated, CPU, library)
#else
#define FASTGPT_LIBRARY_IMPL(library) STABLE_TORCH_LIBRARY_IMPL(fastgpt, CUDA, library)
// Not there in a torch without CUDA, which can load this library all the same.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace fastgpt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Double: return DType::float64;
    case ScalarType::Float: return DType::float32;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    default: STD_TORCH_CHECK(false, name, " must be float64, float32, bfloat16 or float16");
  }
}

// What statistics and sums of x are kept in.
inline ScalarType accumulator_of(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// An uninitialised, contiguous tensor on the device of x.
inline Tensor empty(const Tensor& x, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  return torch::stable::new_empty(x, sizes, dtype);
}
inline Tensor empty(const Tensor& x, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(x, {sizes.begin(), sizes.size()}, dtype);
}

// The elements between the first and the last one of x, both included.
inline int64_t span_of(const Tensor& x) {
  if (x.numel() == 0) return 0;
  int64_t span = 1;
  for (int64_t d = 0; d < x.dim(); ++d) span += (x.size(d) - 1) * x.stride(d);
  return span;
}

// A tensor (..., C) as rows of C neighbours: one stride leads from each row to the next.
struct RowsView {
  Tensor tensor;  // holds the memory: the tensor itself, or a contiguous copy where its strides are no rows
  int64_t count, columns, stride;
};

inline RowsView rows_of(const Tensor& x) {
  const int64_t columns = x.size(x.dim() - 1);
  const int64_t count = columns == 0 ? 0 : x.numel() / columns;
  bool are_rows = columns <= 1 || x.stride(x.dim() - 1) == 1;
  int64_t stride = columns, next = -1;  // next: the stride that a dimension further out must have; -1: any
  for (int64_t d = x.dim() - 2; d >= 0; --d) {
    if (x.size(d) == 1) continue;
    if (next == -1) stride = x.stride(d);
    are_rows = are_rows && (next == -1 || next == x.stride(d));
    next = x.stride(d) * x.size(d);
  }
  if (are_rows) return {x, count, columns, stride};
  return {torch::stable::contiguous(x), count, columns, columns};
}

// For ops that see each element alone: rows of which every tensor has all, without gaps, are one long row.
template <class... Rows>
inline void join_rows(int64_t& count, int64_t& columns, Rows&... rows) {
  if (count == 0 || ((rows.stride != columns) || ...)) return;
  columns *= count;
  count = 1;
  ((rows.stride = columns), ...);
}

// One call of an entry: while it lives, its tensors' device is the current one. Pointers for kernels come from here.
class Call {
 public:
  explicit Call(const Tensor& x)
#if defined(FASTGPT_EMULATED)
  {
    STD_TORCH_CHECK(x.is_cpu(), "the emulator takes tensors on the CPU");
  }
  ~Call() { emulator::unregister_tensors(); }
#else
      : device_(x.get_device_index()), guard_(device_) {
    STD_TORCH_CHECK(x.is_cuda(), "CUDA kernels take tensors on a CUDA device");
  }
#endif

  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  Stream stream() const {
#if defined(FASTGPT_EMULATED)
    return nullptr;
#else
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no support for CUDA");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    return static_cast<Stream>(stream);
#endif
  }

  const void* in(const Tensor& x, const char* name) const {
    const void* data = x.const_data_ptr();
#if defined(FASTGPT_EMULATED)
    emulator::register_tensor(data, span_of(x) * x.element_size(), x.element_size(), name,
                              emulator::TensorAccess::input);
#else
    (void)name;
#endif
    return data;
  }

  void* out(const Tensor& x, const char* name) const {
    void* data = x.mutable_data_ptr();
#if defined(FASTGPT_EMULATED)
    emulator::register_tensor(data, span_of(x) * x.element_size(), x.element_size(), name,
                              emulator::TensorAccess::output);
#else
    (void)name;
#endif
    return data;
  }

  // What is read and then overwritten.
  void* in_place(const Tensor& x, const char* name) const {
    void* data = x.mutable_data_ptr();
#if defined(FASTGPT_EMULATED)
    emulator::register_tensor(data, span_of(x) * x.element_size(), x.element_size(), name,
                              emulator::TensorAccess::in_place);
#else
    (void)name;
#endif
    return data;
  }

#if !defined(FASTGPT_EMULATED)
 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

// A tensor (B, T, heads, D) whose heads have their elements side by side: the tensor itself, or a contiguous copy.
struct HeadsView {
  Tensor tensor;  // holds the memory

  explicit HeadsView(const Tensor& x)
      : tensor(x.size(3) <= 1 || x.stride(3) == 1 ? x : torch::stable::contiguous(x)) {}

  // data: what the call gave for the tensor.
  ConstHeads at(const void* data) const {
    const auto step = [&](int64_t d) { return tensor.size(d) > 1 ? tensor.stride(d) : 0; };
    return {data, step(0), step(1), step(2)};
  }
  ConstHeads in(const Call& call, const char* name) const { return at(call.in(tensor, name)); }
};

}  // namespace fastgpt
