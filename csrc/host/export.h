// Lets Python launch the kernels of one file under the emulator: by name, on memory that has names. Written for
// fastgpt/native/emulate.py, which puts FASTGPT_KERNEL(name) after the file for each of its kernels.
#pragma once

#include <cstddef>
#include <exception>
#include <map>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "emulator/emulator.h"
#include "host/launch.h"

#define FASTGPT_EXPORT extern "C" __attribute__((visibility("default")))
#define FASTGPT_KERNEL(name) static const bool known_##name = fastgpt::know(#name, name);

namespace fastgpt {

// As numpy and torch call it; bytes16 for a struct of that size, such as float4.
template <class T>
std::string type_name() {
  constexpr size_t kBits = 8 * sizeof(T);
  if constexpr (std::is_same_v<T, bool>) return "bool";
  else if constexpr (std::is_same_v<T, __half>) return "float16";
  else if constexpr (std::is_same_v<T, __nv_bfloat16>) return "bfloat16";
  else if constexpr (std::is_floating_point_v<T>) return "float" + std::to_string(kBits);
  else if constexpr (std::is_integral_v<T>) return (std::is_signed_v<T> ? "int" : "uint") + std::to_string(kBits);
  else return "bytes" + std::to_string(sizeof(T));
}

template <class T>
std::string parameter_name() {
  static_assert(std::is_pointer_v<T> || std::is_arithmetic_v<T>, "Python can pass pointers and numbers to a kernel");
  if constexpr (std::is_pointer_v<T>) {
    using Element = std::remove_pointer_t<T>;
    return (std::is_const_v<Element> ? "const " : "") + type_name<std::remove_cv_t<Element>>() + "*";
  } else {
    return type_name<T>();
  }
}

struct Kernel {
  std::vector<std::string> parameters;
  void (*entry)();
  void (*launch)(void (*entry)(), const LaunchShape& shape, void* const* arguments);
};
inline std::map<std::string, Kernel>& kernels() {
  static std::map<std::string, Kernel> all;
  return all;
}

template <class... Params, size_t... index>
void launch_on(void (*entry)(), const LaunchShape& shape, void* const* arguments, std::index_sequence<index...>) {
  launch(reinterpret_cast<void (*)(Params...)>(entry), shape, *static_cast<Params*>(arguments[index])...);
}

template <class... Params>
bool know(const char* name, void (*kernel)(Params...)) {
  const auto launch = [](void (*entry)(), const LaunchShape& shape, void* const* arguments) {
    launch_on<Params...>(entry, shape, arguments, std::index_sequence_for<Params...>());
  };
  return kernels().insert({name, {{parameter_name<Params>()...}, reinterpret_cast<void (*)()>(kernel), launch}}).second;
}

}  // namespace fastgpt

// {"kernel": ["const float32*", "int32"]}
FASTGPT_EXPORT const char* fastgpt_kernels() {
  static std::string text;
  text = "{";
  for (const auto& [name, kernel] : fastgpt::kernels()) {
    text += (text.size() > 1 ? ", \"" : "\"") + name + "\": [";
    for (size_t i = 0; i < kernel.parameters.size(); ++i) text += (i ? ", \"" : "\"") + kernel.parameters[i] + "\"";
    text += "]";
  }
  text += "}";
  return text.c_str();
}

FASTGPT_EXPORT void fastgpt_register_tensor(void* begin, size_t bytes, size_t element_bytes, const char* name,
                                            int access) {
  emulator::register_tensor(begin, bytes, element_bytes, name, emulator::TensorAccess(access));
}

// Runs a kernel and forgets the tensors; returns the report of what was found, or nothing.
FASTGPT_EXPORT const char* fastgpt_launch(const char* kernel, const unsigned* grid, const unsigned* block,
                                          size_t shared_bytes, void* const* arguments) {
  static std::string report;
  report.clear();
  const fastgpt::Kernel& found = fastgpt::kernels().at(kernel);
  const LaunchShape shape{dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]), shared_bytes};
  try {
    found.launch(found.entry, shape, arguments);
  } catch (const std::exception& error) {
    report = error.what();
  }
  emulator::unregister_tensors();
  return report.c_str();
}
