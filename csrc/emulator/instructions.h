// The models of PTX instructions, as ptx/*_emulated.cuh call them. Sections are those of the PTX ISA manual 8.5.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "emulator.h"

namespace emulator {

// ---- cp.async: 9.7.8.24.3, "Non-bulk copy" ----
void cp_async(void* shared_to, const void* from, unsigned bytes, unsigned bytes_read);
void cp_async_commit();
void cp_async_wait(unsigned groups_left);

// ---- warp-level matrix instructions: 9.7.13.4 ----
enum class MatrixType : uint8_t { bf16, f16, tf32 };
void ldmatrix(uint32_t* out, const void* row, int count, bool transposed);
void stmatrix(void* row, const uint32_t* in, int count, bool transposed);
// d = a b + c: m16n8k16 for 2-byte types, m16n8k8 for tf32.
void mma(MatrixType type, float* d, const uint32_t* a, const uint32_t* b, const float* c);

// ---- approximations: 9.7.3.13, rcp; 9.7.3.21, ex2; both .approx.ftz.f32 ----
// As wrong as the manual allows a chip to be, up or down by the bits of the argument.
float exp2_approx(float x);
float reciprocal_approx(float x);

// ---- mbarrier: 9.7.12.15 ----
void mbarrier_init(uint64_t* barrier, unsigned count);
void mbarrier_invalidate(uint64_t* barrier);
void mbarrier_arrive(uint64_t* barrier, unsigned expected_bytes);
void mbarrier_arrive_at_rank(uint64_t* barrier, unsigned rank);
void mbarrier_expect(uint64_t* barrier, unsigned bytes);
void mbarrier_wait(uint64_t* barrier, unsigned parity);
void fence_mbarrier_init();
void fence_proxy_async();

// ---- the tensor memory accelerator: 9.7.8.24.5, "Bulk copy" ----
enum class TensorType : uint8_t { u8, f16, bf16, f32, f64, i32 };
unsigned bytes_of(TensorType type);

// Stands for CUtensorMap; dimension 0 is the contiguous one, as in cuTensorMapEncodeTiled.
struct TensorMap {
  char* base = nullptr;
  TensorType type = TensorType::u8;
  unsigned rank = 0;
  uint64_t sizes[5] = {};
  uint64_t strides[5] = {};  // in bytes; strides[0] is the element's size
  uint32_t box[5] = {};
  unsigned swizzle = 0;  // bytes: 0, 32, 64 or 128
  unsigned box_bytes() const;
};
// strides: rank - 1 of them, in bytes. Throws std::invalid_argument for what the driver refuses.
TensorMap make_tensor_map(void* base, TensorType type, unsigned rank, const uint64_t* sizes, const uint64_t* strides,
                          const uint32_t* box, unsigned swizzle);
// destinations: a bit for each block of the cluster that gets the box; 0: this block alone.
void tma_load(void* shared_to, const TensorMap& map, uint64_t* barrier, const int* at, unsigned rank,
              uint16_t destinations);
void tma_store(const TensorMap& map, const void* shared_from, const int* at, unsigned rank);
void tma_reduce_add(const TensorMap& map, const void* shared_from, const int* at, unsigned rank);
void bulk_load(void* shared_to, const void* from, unsigned bytes, uint64_t* barrier);
void bulk_store(void* to, const void* shared_from, unsigned bytes);
void bulk_reduce_add(TensorType type, void* to, const void* shared_from, unsigned bytes);
void bulk_commit();
void bulk_wait(unsigned groups_left, bool only_reading);

// ---- wgmma: 9.7.14 ----
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(unsigned groups_left);
// D[64, columns] (+)= A[64, 16] B[16, columns]; a_registers null: A is in shared memory, where descriptor a says.
void wgmma(MatrixType type, int columns, float* accumulators, const uint32_t* a_registers, uint64_t a, uint64_t b,
           bool accumulate, bool a_mn_major, bool b_mn_major);
void set_max_registers(unsigned count);  // setmaxnreg: 9.7.19.5

}  // namespace emulator
