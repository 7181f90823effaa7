// Lets Python launch the kernels of one file under the emulator: by name, on memory that has names. Written for
// fastgpt/native/emulate.py, which puts FASTGPT_KERNEL(name) after the file for each of its kernels. Every kernel of a
// reader's own is compiled with this, so it does without what is slow to compile.
#pragma once

#include <cstddef>
#include <exception>
#include <string>
#include <type_traits>
#include <utility>

#include "emulator/emulator.h"
#include "host/launch.h"

#define FASTGPT_EXPORT extern "C" __attribute__((visibility("default")))

// Two functions for a kernel: the types of its parameters, and a launch, which returns the report of what was found.
#define FASTGPT_KERNEL(name)                                                                              \
  FASTGPT_EXPORT const char* fastgpt_parameters_##name() { return fastgpt::parameters(name); }            \
  FASTGPT_EXPORT const char* fastgpt_launch_##name(const unsigned* grid, const unsigned* block,           \
                                                   size_t shared_bytes, void* const* arguments) {         \
    return fastgpt::launch_on(name, {dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]), \
                                     shared_bytes}, arguments);                                           \
  }

namespace fastgpt {

// As numpy and torch call it.
template <class T>
const char* type_name() {
  constexpr bool is_signed = std::is_signed_v<T>;
  if constexpr (std::is_same_v<T, bool>) return "bool";
  else if constexpr (std::is_same_v<T, __half>) return "float16";
  else if constexpr (std::is_same_v<T, __nv_bfloat16>) return "bfloat16";
  else if constexpr (std::is_floating_point_v<T>) return sizeof(T) == 4 ? "float32" : "float64";
  else if constexpr (!std::is_integral_v<T>) return "struct";
  else if constexpr (sizeof(T) == 1) return is_signed ? "int8" : "uint8";
  else if constexpr (sizeof(T) == 2) return is_signed ? "int16" : "uint16";
  else if constexpr (sizeof(T) == 4) return is_signed ? "int32" : "uint32";
  else return is_signed ? "int64" : "uint64";
}

template <class T>
void add_parameter(std::string& text) {
  static_assert(std::is_pointer_v<T> || std::is_arithmetic_v<T>, "Python can pass pointers and numbers to a kernel");
  using Element = std::remove_pointer_t<T>;
  if (!text.empty()) text += ", ";
  if (std::is_pointer_v<T> && std::is_const_v<Element>) text += "const ";
  text += type_name<std::remove_cv_t<Element>>();
  if (std::is_pointer_v<T>) text += "*";
}

// "const float32*, int32"
template <class... Params>
const char* parameters(void (*)(Params...)) {
  static std::string text;
  text.clear();
  (add_parameter<Params>(text), ...);
  return text.c_str();
}

template <class... Params, size_t... index>
void launch_on(void (*kernel)(Params...), const LaunchShape& shape, void* const* arguments,
               std::index_sequence<index...>) {
  launch(kernel, shape, *static_cast<Params*>(arguments[index])...);
}

template <class... Params>
const char* launch_on(void (*kernel)(Params...), const LaunchShape& shape, void* const* arguments) {
  static std::string report;
  report.clear();
  try {
    launch_on(kernel, shape, arguments, std::index_sequence_for<Params...>());
  } catch (const std::exception& error) {
    report = error.what();
  }
  emulator::unregister_tensors();
  return report.c_str();
}

}  // namespace fastgpt

FASTGPT_EXPORT void fastgpt_register_tensor(void* begin, size_t bytes, size_t element_bytes, const char* name,
                                            int access) {
  emulator::register_tensor(begin, bytes, element_bytes, name, emulator::TensorAccess(access));
}
