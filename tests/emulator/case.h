// The cases of the emulator's own tests: mini-kernels that are run by name, from test_findings.py and test_models.py.
#pragma once

#include <cmath>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "host/launch.h"
#include "ptx/address.cuh"
#include "ptx/approximate.cuh"
#include "ptx/barrier.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/matrix.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

using namespace fastgpt;
using bf16 = __nv_bfloat16;

// A kernel with a fault and the same without. The report must be of this kind, at the line that ends in "// HERE name".
struct Twins {
  const char* kind;
  void (*run)(bool faulty);
};
inline std::map<std::string, Twins>& twins() {
  static std::map<std::string, Twins> all;
  return all;
}

// A kernel whose results are compared with plain loops: returns what differs, or nothing.
using Model = std::string (*)();
inline std::map<std::string, Model>& models() {
  static std::map<std::string, Model> all;
  return all;
}

#define TWINS(name, kind)                                                              \
  static void run_##name(bool faulty);                                                 \
  static const bool known_##name = twins().insert({#name, {kind, run_##name}}).second; \
  static void run_##name(bool faulty)

#define MODEL(name)                                                               \
  static std::string model_##name();                                              \
  static const bool known_##name = models().insert({#name, model_##name}).second; \
  static std::string model_##name()

// Launches kernel<true> or kernel<false>.
#define LAUNCH(kernel, ...) (faulty ? launch(kernel<true>, __VA_ARGS__) : launch(kernel<false>, __VA_ARGS__))

struct Tensors {  // names their memory to the emulator while they live
  ~Tensors() { emulator::unregister_tensors(); }
  template <class T>
  T* add(std::vector<T>& values, const char* name, emulator::TensorAccess access) {
    emulator::register_tensor(values.data(), values.size() * sizeof(T), sizeof(T), name, access);
    return values.data();
  }
  template <class T>
  T* in(std::vector<T>& values, const char* name) {
    return add(values, name, emulator::TensorAccess::input);
  }
  template <class T>
  T* out(std::vector<T>& values, const char* name) {
    return add(values, name, emulator::TensorAccess::output);
  }
};

// What most twins need: an input x of ones and an output y.
struct Data : Tensors {
  std::vector<float> x_values = std::vector<float>(4096, 1.0f), y_values = std::vector<float>(4096);
  float* x = in(x_values, "x");
  float* y = out(y_values, "y");
};

template <class T>
std::vector<T> random_values(size_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::uniform_int_distribution<int> small(-8, 8);  // products and sums of these are exact in every type
  std::vector<T> values(count);
  for (T& value : values) value = T(float(small(generator)));
  return values;
}
