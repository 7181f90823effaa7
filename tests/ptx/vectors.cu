// Every function of csrc/ptx on inputs that follow from a name: the same source for the emulator, whose outputs are
// recorded, and for a GPU, whose outputs must be those. No torch: memory and launches are seen to here, and vectors.py
// calls this through ctypes.
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "device/types.h"
#include "kernels.cuh"
#include "ptx/approximate.cuh"

namespace {

constexpr size_t kAlignment = 128;  // of every input and output
constexpr size_t padded(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

template <class T>
const char* name_of() {
  return std::is_same_v<T, float> ? "f32" : std::is_same_v<T, bf16> ? "bf16" : std::is_same_v<T, f16> ? "f16" : "bits";
}

// What a vector asks for. Described first, when nothing is launched: so inputs and outputs are listed in one place.
class Io {
 public:
  Io() = default;
  Io(char* in, char* out, Stream stream) : in_(in), out_(out), stream_(stream) {}

  template <class T>
  const T* in(size_t count) {
    const T* at = reinterpret_cast<const T*>(in_ + in_bytes);
    described += std::string(described.empty() ? "" : ", ") + "[\"" + name_of<T>() + "\", " +
                 std::to_string(count * sizeof(T)) + "]";
    in_bytes += padded(count * sizeof(T));
#if !defined(__CUDACC__)
    if (in_)
      emulator::register_tensor(at, count * sizeof(T), sizeof(T), "an input", emulator::TensorAccess::input);
#endif
    return at;
  }

  template <class T>
  T* out(size_t count) {
    T* at = reinterpret_cast<T*>(out_ + out_bytes);
    out_bytes += padded(count * sizeof(T));
#if !defined(__CUDACC__)
    if (in_)
      emulator::register_tensor(at, count * sizeof(T), sizeof(T), "an output", emulator::TensorAccess::output);
#endif
    return at;
  }

  TensorMap map(const void* base, TensorType type, unsigned rank, const uint64_t* sizes, const uint64_t* strides,
                const uint32_t* box, unsigned swizzle) const {
    return in_ ? make_tensor_map(base, type, rank, sizes, strides, box, swizzle) : TensorMap{};
  }

  template <class Kernel, class... Args>
  void launch(Kernel kernel, LaunchShape shape, Args... args) const {
    shape.stream = stream_;
    if (in_) ::launch(kernel, shape, args...);
  }

  // What a kernel adds to.
  template <class T>
  T* copy_of(const T* from, size_t count) {
    T* to = out<T>(count);
    launch(copy_words, {dim3(1), dim3(32)}, reinterpret_cast<const uint32_t*>(from), reinterpret_cast<uint32_t*>(to),
           int(count * sizeof(T) / 4));
    return to;
  }

  std::string described;
  size_t in_bytes = 0, out_bytes = 0;

 private:
  char *in_ = nullptr, *out_ = nullptr;
  Stream stream_ = nullptr;
};

// bits: any. whole: small whole numbers, of which every sum is exact in any order. normal: normal numbers of mixed
// sizes, and some that are subnormal, infinite or NaN. sums: normal numbers alone.
struct Vector {
  int chip;  // the oldest that has the instruction: 80, or 90 for Hopper's own
  const char* values;
  int terms;        // of the longest sum, where its order and rounding are the hardware's; 0: bitwise
  double relative;  // of an approximation: how far two may be from each other, each as wrong as the manual allows
  void (*run)(Io&);
};
using Vectors = std::map<std::string, Vector>;
Vectors& vectors() {
  static Vectors all;
  return all;
}

bool add(const std::string& name, int chip, const char* values, int terms, void (*run)(Io&), double relative = 0) {
  return vectors().insert({name, {chip, values, terms, relative, run}}).second;
}

#define VECTOR(name, chip, values)                                       \
  void run_##name(Io& io);                                               \
  const bool known_##name = add(#name, chip, values, 0, run_##name);     \
  void run_##name([[maybe_unused]] Io& io)

// ---- sm_80 ----

template <int kBytes>
void copies(Io& io) {
  const unsigned char* x = io.in<unsigned char>(kCopies * kBytes);
  io.launch(copy_asynchronously<kBytes>, {dim3(1), dim3(32), sizeof(CopiesShared<kBytes>)}, x,
            io.out<unsigned char>(kCopies * kBytes));
}

VECTOR(store_16_bytes, 80, "bits") {
  const unsigned char* x = io.in<unsigned char>(512);
  io.launch(store_in_reverse, {dim3(1), dim3(32), 0}, x, io.out<unsigned char>(512));
}

VECTOR(named_barriers, 80, "whole") {
  const float* x = io.in<float>(64);
  io.launch(exchange_through_named_barriers, {dim3(1), dim3(64), sizeof(ExchangeShared)}, x, io.out<float>(64));
}

template <bool kTransposed, int kCount>
void ldmatrices(Io& io) {
  const uint16_t* x = io.in<uint16_t>(kCount * 64);
  io.launch(load_matrices<kTransposed, kCount>, {dim3(1), dim3(32), sizeof(MatricesShared<kCount>)}, x,
            io.out<uint32_t>(kCount * 32));
}

template <bool kTransposed, int kCount>
void stmatrices(Io& io) {
  const uint32_t* x = io.in<uint32_t>(kCount * 32);
  io.launch(store_matrices<kTransposed, kCount>, {dim3(1), dim3(32), sizeof(MatricesShared<kCount>)}, x,
            io.out<uint16_t>(kCount * 64));
}

template <class T>
void products(Io& io) {
  const T *a = io.in<T>(256), *b = io.in<T>(128);
  const float* c = io.in<float>(128);
  io.launch(multiply_16x8<T, typename TypeOf<T>::type>, {dim3(1), dim3(32), sizeof(MultiplyShared<T>)}, a, b, c,
            io.out<float>(128));
}

template <uint32_t kLowBits>
void products_tf32(Io& io) {
  const float *a = io.in<float>(128), *b = io.in<float>(64), *c = io.in<float>(128);
  io.launch(multiply_tf32, {dim3(1), dim3(32)}, a, b, c, io.out<float>(128), kLowBits);
}

template <float (*kFunction)(float)>
__global__ void apply(const float* x, float* y) {
  y[threadIdx.x] = kFunction(x[threadIdx.x]);
}
template <float (*kFunction)(float)>
void values(Io& io) {
  const float* x = io.in<float>(256);
  io.launch(apply<kFunction>, {dim3(1), dim3(256)}, x, io.out<float>(256));
}

// ---- sm_90 ----

VECTOR(stmatrix_of_ldmatrix, 90, "bits") {
  const bf16* x = io.in<bf16>(256);
  io.launch(transpose_with_stmatrix, {dim3(1), dim3(32), sizeof(TransposeShared)}, x, io.out<bf16>(256));
}

VECTOR(mbarrier, 90, "bits") {
  const uint32_t* x = io.in<uint32_t>(192);
  io.launch(pass_phases, {dim3(1), dim3(64), sizeof(PhasesShared)}, x, io.out<uint32_t>(192));
}

VECTOR(bulk_copy, 90, "whole") {
  const float* x = io.in<float>(64);
  float *first = io.out<float>(64), *second = io.out<float>(64);
  io.launch(copy_in_bulk, {dim3(1), dim3(1), sizeof(BulkShared)}, x, first, second);
}

VECTOR(bulk_reduce_add, 90, "whole") {
  const float *x = io.in<float>(64), *y = io.in<float>(64);
  io.launch(add_in_bulk, {dim3(1), dim3(32), sizeof(BulkShared)}, x, io.copy_of(y, 64));
}

template <int kRank, int kShift, bool kAdd>
void box(Io& io) {
  BoxShape shape(kRank);
  const float *from = io.in<float>(shape.count), *before = io.in<float>(shape.count);
  float *to = io.copy_of(before, shape.count), *seen = io.out<float>(shape.box_count);
  const auto map = [&](const float* base) {
    return io.map(base, kTensorF32, kRank, shape.sizes, shape.strides, shape.box, 0);
  };
  io.launch(copy_box<kRank>, {dim3(1), dim3(1), sizeof(BoxShared)}, map(from), map(to), seen, kShift, kAdd);
}

// 2048 bytes in lines as long as the swizzle, or of 64 bytes without one.
template <class T, int kSwizzle, bool kAdd>
void tile(Io& io) {
  constexpr uint32_t kLine = kSwizzle ? kSwizzle : 64, kWidth = kLine / 2;
  const TensorType type = std::is_same_v<T, bf16> ? kTensorBf16 : kTensorF16;
  const uint64_t sizes[2] = {kWidth, kTileBytes / kLine}, strides[1] = {kLine};
  const uint32_t box[2] = {kWidth, kTileBytes / kLine};
  const T *from = io.in<T>(kTileBytes / 2), *before = io.in<T>(kTileBytes / 2);
  T* to = io.copy_of(before, kTileBytes / 2);
  uint16_t* seen = io.out<uint16_t>(kTileBytes / 2);
  io.launch(copy_tile, {dim3(1), dim3(32), sizeof(TileShared)}, io.map(from, type, 2, sizes, strides, box, kSwizzle),
            io.map(to, type, 2, sizes, strides, box, kSwizzle), seen, kAdd);
}

template <int kRank>
void halves(Io& io) {
  HalvesShape shape(kRank);
  const float* x = io.in<float>(64);
  io.launch(multicast<kRank>, {dim3(2), dim3(32), sizeof(MulticastShared), nullptr, dim3(2)},
            io.map(x, kTensorF32, kRank, shape.sizes, shape.strides, shape.box, 0), io.out<float>(128));
}

template <class T, int kColumns, Major kA, Major kB, int kSwizzle, bool kFromRegisters>
void wide_products(Io& io) {
  const T *a = io.in<T>(64 * kDepth), *b = io.in<T>(kColumns * kDepth);
  using Shared = typename Multiply<T, kColumns, kA, kB, kSwizzle, kFromRegisters>::SharedMemory;
  io.launch(multiply_64xn<T, kColumns, kA, kB, kSwizzle, kFromRegisters>, {dim3(1), dim3(128), sizeof(Shared)}, a, b,
            io.out<float>(64 * kColumns));
}

VECTOR(pipeline, 90, "whole") {
  using namespace matmul;
  const bf16 *a = io.in<bf16>(kM * kK), *b = io.in<bf16>(kN * kK);
  bf16* c = io.out<bf16>(kM * kN);
  const auto map = [&](const bf16* base, int rows, int columns, uint32_t box_rows) {
    const uint64_t sizes[2] = {uint64_t(columns), uint64_t(rows)}, strides[1] = {uint64_t(columns) * 2};
    const uint32_t box[2] = {64, box_rows};
    return io.map(base, kTensorBf16, 2, sizes, strides, box, 128);
  };
  io.launch(kernel, {dim3(2, 2), dim3(kThreads), sizeof(SharedMemory)}, map(a, kM, kK, 128), map(b, kN, kK, 64),
            map(c, kM, kN, 128), kK);
}

VECTOR(cluster, 90, "whole") {
  const float* x = io.in<float>(256);
  io.launch(reverse_through_cluster, {dim3(8), dim3(32), sizeof(ClusterShared), nullptr, dim3(4)}, x,
            io.out<float>(256));
}

// ---- the vectors of templates ----

template <int kCount>
void add_matrices() {
  const std::string x = "_x" + std::to_string(kCount);
  add("ldmatrix" + x, 80, "bits", 0, ldmatrices<false, kCount>);
  add("ldmatrix" + x + "_transposed", 80, "bits", 0, ldmatrices<true, kCount>);
  add("stmatrix" + x, 90, "bits", 0, stmatrices<false, kCount>);
  add("stmatrix" + x + "_transposed", 90, "bits", 0, stmatrices<true, kCount>);
}

template <int kRank>
void add_boxes() {
  const std::string rank = std::to_string(kRank) + "d";
  add("tma_store_" + rank, 90, "bits", 0, box<kRank, 0, false>);
  add("tma_store_" + rank + "_over_the_end", 90, "bits", 0, box<kRank, 2, false>);
  add("tma_reduce_add_" + rank, 90, "whole", 0, box<kRank, 0, true>);
  add("tma_reduce_add_" + rank + "_before_the_begin", 90, "whole", 0, box<kRank, -1, true>);
  add("tma_multicast_" + rank, 90, "bits", 0, halves<kRank>);
}

template <int kSwizzle>
void add_tiles() {
  const std::string name = "tma_swizzle_" + std::to_string(kSwizzle);
  add(name, 90, "bits", 0, tile<bf16, kSwizzle, false>);
  add(name + "_reduce_add_bf16", 90, "sums", 0, tile<bf16, kSwizzle, true>);
  add(name + "_reduce_add_f16", 90, "sums", 0, tile<f16, kSwizzle, true>);
}

// Every width, A in shared memory and in registers.
template <int kColumns>
void add_widths() {
  const std::string n = "_n" + std::to_string(kColumns);
  add("wgmma_bf16" + n, 90, "whole", 0, wide_products<bf16, kColumns, Major::k, Major::k, 128, false>);
  add("wgmma_bf16_registers" + n, 90, "whole", 0, wide_products<bf16, kColumns, Major::k, Major::k, 128, true>);
  if constexpr (kColumns > 8) add_widths<kColumns - 8>();
}

// Every layout, of tiles that are narrower than a swizzle's line, as wide, and wider.
template <int kColumns, int kSwizzle>
void add_layouts() {
  const std::string n = "_swizzle_" + std::to_string(kSwizzle) + "_n" + std::to_string(kColumns);
  constexpr Major k = Major::k, mn = Major::mn;
  add("wgmma_k_k" + n, 90, "whole", 0, wide_products<bf16, kColumns, k, k, kSwizzle, false>);
  add("wgmma_k_mn" + n, 90, "whole", 0, wide_products<f16, kColumns, k, mn, kSwizzle, false>);
  add("wgmma_mn_k" + n, 90, "whole", 0, wide_products<f16, kColumns, mn, k, kSwizzle, false>);
  add("wgmma_mn_mn" + n, 90, "whole", 0, wide_products<bf16, kColumns, mn, mn, kSwizzle, false>);
  add("wgmma_registers_k" + n, 90, "whole", 0, wide_products<f16, kColumns, k, k, kSwizzle, true>);
  add("wgmma_registers_mn" + n, 90, "whole", 0, wide_products<bf16, kColumns, k, mn, kSwizzle, true>);
}

const bool known_templates = [] {
  add("cp_async_4", 80, "bits", 0, copies<4>);
  add("cp_async_8", 80, "bits", 0, copies<8>);
  add("cp_async_16", 80, "bits", 0, copies<16>);
  add_matrices<1>();
  add_matrices<2>();
  add_matrices<4>();
  add("mma_bf16", 80, "whole", 0, products<bf16>);
  add("mma_f16", 80, "whole", 0, products<f16>);
  add("mma_tf32", 80, "whole", 0, products_tf32<0x1fff>);
  add("mma_bf16_rounding", 80, "normal", 17, products<bf16>);
  add("mma_f16_rounding", 80, "normal", 17, products<f16>);
  add("mma_tf32_rounding", 80, "normal", 9, products_tf32<0>);
  add("exp2_approx", 80, "sums", 0, values<exp2_approx>, 2 * 0x1p-22);
  add("reciprocal_approx", 80, "sums", 0, values<reciprocal_approx>, 2 * 0x1p-23);
  add_boxes<1>();
  add_boxes<2>();
  add_boxes<3>();
  add_boxes<4>();
  add_boxes<5>();
  add_tiles<0>();
  add_tiles<32>();
  add_tiles<64>();
  add_tiles<128>();
  add_widths<256>();
  add_layouts<64, 0>();
  add_layouts<64, 32>();
  add_layouts<64, 64>();
  add_layouts<64, 128>();
  add_layouts<8, 128>();
  add_layouts<128, 128>();
  add("wgmma_bf16_rounding", 90, "normal", 65, wide_products<bf16, 16, Major::k, Major::k, 128, false>);
  add("wgmma_f16_rounding", 90, "normal", 65, wide_products<f16, 16, Major::k, Major::k, 128, false>);
  add("wgmma_bf16_registers_rounding", 90, "normal", 65, wide_products<bf16, 16, Major::k, Major::k, 128, true>);
  add("wgmma_f16_registers_rounding", 90, "normal", 65, wide_products<f16, 16, Major::k, Major::k, 128, true>);
  return true;
}();

// ---- running one ----

#if defined(__CUDACC__)

constexpr size_t kGuard = 4096;  // after the outputs, where nothing may be written

struct DeviceMemory {
  explicit DeviceMemory(size_t bytes) { check_cuda(cudaMalloc(&data, bytes), "allocating"); }
  ~DeviceMemory() { cudaFree(data); }
  void* data = nullptr;
};

void run(const Vector& vector, const char* in, size_t in_bytes, char* out, size_t out_bytes) {
  DeviceMemory from(in_bytes), to(out_bytes + kGuard);
  check_cuda(cudaMemcpy(from.data, in, in_bytes, cudaMemcpyHostToDevice), "copying the inputs");
  check_cuda(cudaMemset(to.data, 0xff, out_bytes + kGuard), "poisoning the outputs");
  Io io(static_cast<char*>(from.data), static_cast<char*>(to.data), nullptr);
  vector.run(io);
  check_cuda(cudaDeviceSynchronize(), "running");
  check_cuda(cudaMemcpy(out, to.data, out_bytes, cudaMemcpyDeviceToHost), "copying the outputs");
  std::vector<unsigned char> guard(kGuard);
  check_cuda(cudaMemcpy(guard.data(), static_cast<char*>(to.data) + out_bytes, kGuard, cudaMemcpyDeviceToHost),
             "reading past the outputs");
  for (const unsigned char byte : guard)
    if (byte != 0xff) throw std::runtime_error("something was written past the outputs");
}

#else

void run(const Vector& vector, const char* in, size_t, char* out, size_t out_bytes) {
  struct Unregister {
    ~Unregister() { emulator::unregister_tensors(); }
  } at_the_end;
  std::memset(out, 0xff, out_bytes);
  Io io(const_cast<char*>(in), out, nullptr);
  vector.run(io);
}

#endif

const char* keep(std::string text) {
  static std::string kept;
  kept = std::move(text);
  return kept.c_str();
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// What there is, as JSON.
EXPORT const char* ptx_vectors() {
  std::string json;
  for (const auto& [name, vector] : vectors()) {
    Io io;
    vector.run(io);
    json += (json.empty() ? "[" : ",\n ") + ("{\"name\": \"" + name) + "\", \"chip\": " + std::to_string(vector.chip) +
            ", \"values\": \"" + vector.values + "\", \"terms\": " + std::to_string(vector.terms) +
            ", \"relative\": " + std::to_string(vector.relative * 0x1p24) + ", \"inputs\": [" +
            io.described + "], \"out_bytes\": " + std::to_string(io.out_bytes) + "}";
  }
  return keep(json + "]");
}

// From host memory to host memory; what went wrong, or nothing.
EXPORT const char* ptx_run(const char* name, const char* in, size_t in_bytes, char* out, size_t out_bytes) {
  try {
    run(vectors().at(name), in, in_bytes, out, out_bytes);
    return "";
  } catch (const std::exception& error) {
    return keep(error.what());
  }
}

#if defined(__CUDACC__)
// The sources that this was built from; see build.py.
__attribute__((used)) static const char marked_digest[] = "fastgpt-vectors:" FASTGPT_VECTORS_DIGEST;
EXPORT const char* ptx_digest() { return marked_digest + sizeof("fastgpt-vectors:") - 1; }

// The compute capability of the first GPU: 90 for 9.0. Below 0: the error's number.
EXPORT int ptx_chip() {
  int major = 0, minor = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0);
  return error == cudaSuccess ? major * 10 + minor : -int(error);
}
#endif
