// The models of instructions against plain loops. Inputs are small whole numbers, so every sum is exact and every
// comparison is for equality.
#include "case.h"

#include <cstring>

#include "emulator/elements.h"
#include "kernels.cuh"

namespace {

template <class A, class B>
std::string differs(const std::vector<A>& got, const std::vector<B>& want, const char* what) {
  for (size_t i = 0; i < want.size(); ++i) {
    const double a = float(got[i]), b = float(want[i]);
    if (!(a == b))
      return std::string(what) + " " + std::to_string(i) + ": " + std::to_string(a) + ", expected " + std::to_string(b);
  }
  return "";
}

// C[m,n] = A[m,k] B[k,n], where the strides say how A and B lie.
template <class T>
std::vector<float> product(const std::vector<T>& a, const std::vector<T>& b, int m, int n, int k, int a_row, int a_k,
                           int b_k, int b_column) {
  std::vector<float> c(m * n, 0.0f);
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; ++j)
      for (int p = 0; p < k; ++p) c[i * n + j] += float(a[i * a_row + p * a_k]) * float(b[p * b_k + j * b_column]);
  return c;
}

}  // namespace

// ---- warp-level matrix instructions ----

template <class T>
std::string check_mma() {
  std::vector<T> a = random_values<T>(256, 1), b = random_values<T>(128, 2);
  std::vector<float> c = random_values<float>(128, 3), d(128), want = product(a, b, 16, 8, 16, 16, 1, 1, 16);
  for (int i = 0; i < 128; ++i) want[i] += c[i];
  Tensors tensors;
  launch(multiply_16x8<T, typename TypeOf<T>::type>, {dim3(1), dim3(32), sizeof(MultiplyShared<T>)},
         tensors.in(a, "a"), tensors.in(b, "b"), tensors.in(c, "c"), tensors.out(d, "d"));
  return differs(d, want, "element");
}
MODEL(mma_bf16) { return check_mma<bf16>(); }
MODEL(mma_f16) { return check_mma<f16>(); }

MODEL(mma_tf32) {
  std::vector<float> a = random_values<float>(128, 1), b = random_values<float>(64, 2), c(128), d(128);
  Tensors tensors;
  launch(multiply_tf32, {dim3(1), dim3(32)}, tensors.in(a, "a"), tensors.in(b, "b"), tensors.in(c, "c"),
         tensors.out(d, "d"), 1u);
  return differs(d, product(a, b, 16, 8, 8, 8, 1, 8, 1), "element");
}

MODEL(stmatrix) {
  std::vector<bf16> x = random_values<bf16>(256, 1), y(256), want(256);
  Tensors tensors;
  launch(transpose_with_stmatrix, {dim3(1), dim3(32), sizeof(TransposeShared)}, tensors.in(x, "x"),
         tensors.out(y, "y"));
  for (int m = 0; m < 4; ++m)
    for (int i = 0; i < 64; ++i) want[m * 64 + i] = x[m * 64 + i % 8 * 8 + i / 8];
  return differs(y, want, "element");
}

// ---- TMA ----

template <int kRank>
std::string check_box(int shift, bool add) {
  const BoxShape shape(kRank);
  std::vector<float> from = random_values<float>(shape.count, kRank), to = random_values<float>(shape.count, 9);
  std::vector<float> seen(shape.box_count), want_seen, want = to;
  for (int i = 0; i < shape.box_count; ++i) {
    bool inside = true;
    int offset = 0, rest = i;
    for (int d = 0, scale = 1; d < kRank; ++d) {
      const int c = rest % int(shape.box[d]) + shift;
      inside = inside && c >= 0 && c < int(shape.sizes[d]);
      offset += c * scale;
      rest /= int(shape.box[d]);
      scale *= int(shape.sizes[d]);
    }
    want_seen.push_back(inside ? from[offset] : 0.0f);
    if (inside) want[offset] = from[offset] + (add ? want[offset] : 0.0f);
  }
  Tensors tensors;
  const auto map = [&](const float* base) {
    return make_tensor_map(base, kTensorF32, kRank, shape.sizes, shape.strides, shape.box, 0);
  };
  launch(copy_box<kRank>, {dim3(1), dim3(1), sizeof(BoxShared)}, map(tensors.in(from, "from")),
         map(tensors.add(to, "to", emulator::TensorAccess::in_place)), tensors.out(seen, "seen"), shift, add);
  const std::string wrong = differs(seen, want_seen, "loaded element");
  return wrong.empty() ? differs(to, want, "stored element") : wrong;
}
template <int kRank>
std::string check_boxes() {
  for (const int shift : {0, 1, 2, -1})
    for (const bool add : {false, true})
      if (std::string wrong = check_box<kRank>(shift, add); !wrong.empty())
        return wrong + " at shift " + std::to_string(shift);
  return "";
}
MODEL(tma_1d) { return check_boxes<1>(); }
MODEL(tma_2d) { return check_boxes<2>(); }
MODEL(tma_3d) { return check_boxes<3>(); }
MODEL(tma_4d) { return check_boxes<4>(); }
MODEL(tma_5d) { return check_boxes<5>(); }

MODEL(tensor_map_limits) {
  std::vector<float> x(64);
  const uint64_t sizes[2] = {8, 8}, strides[1] = {32}, odd[1] = {36};
  const uint32_t box[2] = {8, 8}, narrow[2] = {2, 8};
  const auto refused = [&](const void* base, const uint64_t* stride, const uint32_t* of, unsigned swizzle) {
    try {
      make_tensor_map(base, kTensorF32, 2, sizes, stride, of, swizzle);
      return false;
    } catch (const std::invalid_argument&) {
      return true;
    }
  };
  void* base = reinterpret_cast<void*>((uintptr_t(x.data()) + 15) / 16 * 16);
  if (refused(base, strides, box, 32)) return "a good map was refused";
  if (!refused(static_cast<char*>(base) + 4, strides, box, 32)) return "a misaligned tensor was accepted";
  if (!refused(base, odd, box, 32)) return "an odd stride was accepted";
  if (!refused(base, strides, narrow, 32)) return "a row of 8 bytes was accepted";
  if (!refused(base, strides, box, 16)) return "a swizzle of 16 bytes was accepted";
  return "";
}

MODEL(tma_multicast) {
  std::vector<float> x = random_values<float>(64, 1), y(128), want = x;
  want.insert(want.end(), x.begin(), x.end());
  Tensors tensors;
  const HalvesShape shape(2);
  const TensorMap map =
      make_tensor_map(tensors.in(x, "x"), kTensorF32, 2, shape.sizes, shape.strides, shape.box, 0);
  launch(multicast<2>, {dim3(2), dim3(32), sizeof(MulticastShared), nullptr, dim3(2)}, map, tensors.out(y, "y"));
  return differs(y, want, "element");
}

// ---- mbarriers, bulk copies ----

MODEL(mbarrier_phases) {
  std::vector<uint32_t> x(192), y(192), want(192);
  for (int i = 0; i < 192; ++i) x[i] = 1000 + i;
  for (int i = 0; i < 192; ++i) want[i] = x[i / 64 * 64 + 63 - i % 64];
  Tensors tensors;
  launch(pass_phases, {dim3(1), dim3(64), sizeof(PhasesShared)}, tensors.in(x, "x"), tensors.out(y, "y"));
  return differs(y, want, "element");
}

MODEL(bulk_copy) {
  std::vector<float> x = random_values<float>(64, 1), first(64), second(64), want = x;
  for (int i = 0; i < 64; i += 2) want[i] += 1;
  Tensors tensors;
  launch(copy_in_bulk, {dim3(1), dim3(1), sizeof(BulkShared)}, tensors.in(x, "x"), tensors.out(first, "first"),
         tensors.out(second, "second"));
  const std::string wrong = differs(first, x, "first element");
  return wrong.empty() ? differs(second, want, "second element") : wrong;
}

// ---- wgmma ----

template <class T, int kColumns, Major kA, Major kB, int kSwizzle, bool kFromRegisters>
std::string check_wgmma() {
  std::vector<T> a = random_values<T>(64 * kDepth, 1), b = random_values<T>(kColumns * kDepth, 2);
  std::vector<float> d(64 * kColumns);
  Tensors tensors;
  using Shared = typename Multiply<T, kColumns, kA, kB, kSwizzle, kFromRegisters>::SharedMemory;
  launch(multiply_64xn<T, kColumns, kA, kB, kSwizzle, kFromRegisters>, {dim3(1), dim3(128), sizeof(Shared)},
         tensors.in(a, "a"), tensors.in(b, "b"), tensors.out(d, "d"));
  return differs(d, product(a, b, 64, kColumns, kDepth, kDepth, 1, 1, kDepth), "element");
}
MODEL(wgmma_k_k) { return check_wgmma<bf16, 64, Major::k, Major::k, 128, false>(); }
MODEL(wgmma_k_mn) { return check_wgmma<f16, 128, Major::k, Major::mn, 128, false>(); }
MODEL(wgmma_mn_k) { return check_wgmma<bf16, 8, Major::mn, Major::k, 64, false>(); }
MODEL(wgmma_mn_mn) { return check_wgmma<bf16, 64, Major::mn, Major::mn, 32, false>(); }
MODEL(wgmma_unswizzled) { return check_wgmma<bf16, 64, Major::k, Major::mn, 0, false>(); }
MODEL(wgmma_registers_k) { return check_wgmma<bf16, 64, Major::k, Major::k, 128, true>(); }
MODEL(wgmma_registers_mn) { return check_wgmma<f16, 64, Major::k, Major::mn, 128, true>(); }

MODEL(hopper_matmul) {
  const int m = matmul::kM, n = matmul::kN, k = matmul::kK;
  std::vector<bf16> a(m * k), b(n * k), c(m * n), want;
  for (int i = 0; i < m * k; ++i) a[i] = bf16(float(i * 7 % 3 - 1));  // sums stay below 256, so bf16 holds them
  for (int i = 0; i < n * k; ++i) b[i] = bf16(float(i * 5 % 3 - 1));
  for (const float x : product(a, b, m, n, k, k, 1, 1, k)) want.push_back(bf16(x));
  Tensors tensors;
  const auto map = [&](const bf16* base, int rows, int columns, uint32_t box_rows) {
    const uint64_t sizes[2] = {uint64_t(columns), uint64_t(rows)}, strides[1] = {uint64_t(columns) * 2};
    const uint32_t box[2] = {64, box_rows};
    return make_tensor_map(base, kTensorBf16, 2, sizes, strides, box, 128);
  };
  launch(matmul::kernel, {dim3(2, 2), dim3(matmul::kThreads), sizeof(matmul::SharedMemory)},
         map(tensors.in(a, "a"), m, k, 128), map(tensors.in(b, "b"), n, k, 64), map(tensors.out(c, "c"), m, n, 128), k);
  return differs(c, want, "element");
}

// ---- number formats ----

MODEL(half_precision) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const uint16_t half = uint16_t(bits);
    __half h;
    bf16 b;
    std::memcpy(&h, &half, 2);
    std::memcpy(&b, &half, 2);
    const auto same = [](float x, float y) { return x == y || (x != x && y != y); };
    if (!same(emulator::f16_to_float(half), __half2float(h))) return "f16 " + std::to_string(bits) + " to float";
    if (!same(emulator::bf16_to_float(half), __bfloat162float(b))) return "bf16 " + std::to_string(bits) + " to float";
    // The value itself, and points between it and its neighbours, ties among them.
    for (const float scale : {1.0f, 1.0f + 0x1p-11f, 1.0f + 0x1p-9f, 1.0f + 0x1.8p-9f, 1.0f - 0x1p-12f}) {
      const float x = __half2float(h) * scale, y = __bfloat162float(b) * scale;
      const __half to_half = __float2half_rn(x);
      const bf16 to_bf16 = __float2bfloat16_rn(y);
      uint16_t want_half, want_bf16;
      std::memcpy(&want_half, &to_half, 2);
      std::memcpy(&want_bf16, &to_bf16, 2);
      if (x == x && emulator::float_to_f16(x) != want_half) return std::to_string(x) + " to f16";
      if (y == y && emulator::float_to_bf16(y) != want_bf16) return std::to_string(y) + " to bf16";
    }
  }
  return "";
}

// ---- clusters ----

MODEL(cluster) {
  std::vector<float> x = random_values<float>(256, 1), y(256), want(256);
  Tensors tensors;
  launch(reverse_through_cluster, {dim3(8), dim3(32), sizeof(ClusterShared), nullptr, dim3(4)}, tensors.in(x, "x"), tensors.out(y, "y"));
  for (int i = 0; i < 256; ++i) want[i] = x[(i / 128 * 4 + 3 - i / 32 % 4) * 32 + i % 32] + float(i / 32 % 4);
  return differs(y, want, "element");
}

// ---- approximations ----

// Never exact, so that nothing can lean on it, and never further off than the manual says.
__global__ void approximate(const float* x, float* powers, float* reciprocals) {
  powers[threadIdx.x] = exp2_approx(x[threadIdx.x]);
  reciprocals[threadIdx.x] = reciprocal_approx(x[threadIdx.x]);
}
MODEL(approximations) {
  std::vector<float> x(64), powers(64), reciprocals(64);
  for (int i = 0; i < 60; ++i) x[i] = std::ldexp(1.0f + i / 60.0f, i % 7 - 4) * (i % 2 ? 1 : -1);
  const float infinite = HUGE_VALF, subnormal = 1e-40f;
  x[60] = infinite, x[61] = -infinite, x[62] = subnormal, x[63] = -200;  // 2^-200 is no float
  Tensors tensors;
  launch(approximate, {dim3(1), dim3(64)}, tensors.in(x, "x"), tensors.out(powers, "powers"),
         tensors.out(reciprocals, "reciprocals"));
  const auto off = [](float got, double exact) { return std::fabs(got / exact - 1); };
  for (int i = 0; i < 60; ++i) {
    const double power = off(powers[i], std::exp2(double(x[i]))), reciprocal = off(reciprocals[i], 1 / double(x[i]));
    if (!(power > 0x1p-23 && power < 0x1.4p-22)) return "2^x of " + std::to_string(x[i]);
    if (!(reciprocal > 0x1p-25 && reciprocal < 0x1.8p-23)) return "1 / x of " + std::to_string(x[i]);
  }
  if (powers[60] != infinite || powers[61] != 0 || powers[63] != 0) return "2^x at the ends";
  if (reciprocals[60] != 0 || reciprocals[61] != 0 || reciprocals[62] != infinite) return "1 / x at the ends";
  return "";
}

// ---- what is counted ----

// A column of a row-major matrix: 32 sectors where 4 would do. A column of shared memory: 32 conflicts where none need
// be.
__global__ void columns(const float* x, float* y) {
  struct Shared {
    float tile[32][32];
  };
  Shared& shared = dynamic_shared<Shared>();
  shared.tile[threadIdx.x][0] = x[threadIdx.x * 32];  // COUNT column
  y[threadIdx.x] = x[threadIdx.x];                    // COUNT row
  y[threadIdx.x] = shared.tile[threadIdx.x][0];
}
MODEL(counted_columns) {
  std::vector<float> x = random_values<float>(1024 + 8, 1), y(64);
  Tensors tensors;
  const auto aligned = [](float* p) { return reinterpret_cast<float*>((uintptr_t(p) + 31) / 32 * 32); };
  const float* from = aligned(tensors.in(x, "x"));
  launch(columns, {dim3(1), dim3(32), sizeof(float) * 1024}, from, aligned(tensors.out(y, "y")));
  return "";
}

// ---- the interface for Python ----

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT const char* emulator_tests() {
  static std::string names;
  names.clear();
  for (const auto& [name, twins] : twins()) names += "twins " + name + " " + twins.kind + "\n";
  for (const auto& [name, model] : models()) names += "model " + name + "\n";
  return names.c_str();
}

// What the launch threw, or nothing.
EXPORT const char* emulator_run_twin(const char* name, int faulty) {
  static std::string message;
  message.clear();
  try {
    twins().at(name).run(faulty);
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

EXPORT const char* emulator_run_model(const char* name) {
  static std::string message;
  try {
    message = models().at(name)();
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}
