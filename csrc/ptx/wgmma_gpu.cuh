// wgmma (sm_90a): a warpgroup multiplies 64 rows at a time, with operands read from shared memory.
#pragma once

#include "ptx/matrix.cuh"
#include "ptx/common.cuh"

namespace fastgpt {

// Which dimension of an operand is contiguous in shared memory: the depth k, or the rows of A or columns of B (mn).
enum class Major { k, mn };

// Describes an operand in shared memory. Distances in bytes; what they mean depends on major and swizzle (PTX ISA
// 9.7.14.5.1): with a swizzle and k-major, stride is from one group of 8 rows to the next, and leading is not used.
FASTGPT_PTX uint64_t matrix_descriptor(const void* start, uint32_t leading, uint32_t stride, unsigned swizzle) {
  const uint64_t kind = swizzle == 128 ? 1 : swizzle == 64 ? 2 : swizzle == 32 ? 3 : 0;
  return uint64_t((shared_address(start) & 0x3ffff) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 |
         kind << 62;
}

// Before the first wgmma, and after registers that one reads or adds to were touched.
FASTGPT_PTX void wgmma_fence() { FASTGPT_SM90(asm volatile("wgmma.fence.sync.aligned;" :: : "memory")); }
FASTGPT_PTX void wgmma_commit() { FASTGPT_SM90(asm volatile("wgmma.commit_group.sync.aligned;" :: : "memory")); }

// Until at most kGroupsLeft groups are in flight. Registers of those that are may not be touched.
template <int kGroupsLeft>
FASTGPT_PTX void wgmma_wait() {
  FASTGPT_SM90(asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroupsLeft) : "memory"));
}

// The compiler moves no use of these registers past this place, and it emits nothing: it does not know that a wgmma
// goes on after its line, until a wait. Before a fence for what a wgmma reads or adds to, and after the wait for its
// results.
template <int kCount>
FASTGPT_PTX void pin_registers(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i]) :: "memory");
}
template <int kCount>
FASTGPT_PTX void pin_registers(uint32_t (&registers)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < 4 * kCount; ++i) asm volatile("" : "+r"(registers[i / 4][i % 4]) :: "memory");
}

// The lists of registers of the instruction for each width; asm wants them spelled out.
#define FASTGPT_REGISTERS_4 "%0, %1, %2, %3"
#define FASTGPT_REGISTERS_8 FASTGPT_REGISTERS_4 ", %4, %5, %6, %7"
#define FASTGPT_REGISTERS_12 FASTGPT_REGISTERS_8 ", %8, %9, %10, %11"
#define FASTGPT_REGISTERS_16 FASTGPT_REGISTERS_12 ", %12, %13, %14, %15"
#define FASTGPT_REGISTERS_20 FASTGPT_REGISTERS_16 ", %16, %17, %18, %19"
#define FASTGPT_REGISTERS_24 FASTGPT_REGISTERS_20 ", %20, %21, %22, %23"
#define FASTGPT_REGISTERS_28 FASTGPT_REGISTERS_24 ", %24, %25, %26, %27"
#define FASTGPT_REGISTERS_32 FASTGPT_REGISTERS_28 ", %28, %29, %30, %31"
#define FASTGPT_REGISTERS_36 FASTGPT_REGISTERS_32 ", %32, %33, %34, %35"
#define FASTGPT_REGISTERS_40 FASTGPT_REGISTERS_36 ", %36, %37, %38, %39"
#define FASTGPT_REGISTERS_44 FASTGPT_REGISTERS_40 ", %40, %41, %42, %43"
#define FASTGPT_REGISTERS_48 FASTGPT_REGISTERS_44 ", %44, %45, %46, %47"
#define FASTGPT_REGISTERS_52 FASTGPT_REGISTERS_48 ", %48, %49, %50, %51"
#define FASTGPT_REGISTERS_56 FASTGPT_REGISTERS_52 ", %52, %53, %54, %55"
#define FASTGPT_REGISTERS_60 FASTGPT_REGISTERS_56 ", %56, %57, %58, %59"
#define FASTGPT_REGISTERS_64 FASTGPT_REGISTERS_60 ", %60, %61, %62, %63"
#define FASTGPT_REGISTERS_68 FASTGPT_REGISTERS_64 ", %64, %65, %66, %67"
#define FASTGPT_REGISTERS_72 FASTGPT_REGISTERS_68 ", %68, %69, %70, %71"
#define FASTGPT_REGISTERS_76 FASTGPT_REGISTERS_72 ", %72, %73, %74, %75"
#define FASTGPT_REGISTERS_80 FASTGPT_REGISTERS_76 ", %76, %77, %78, %79"
#define FASTGPT_REGISTERS_84 FASTGPT_REGISTERS_80 ", %80, %81, %82, %83"
#define FASTGPT_REGISTERS_88 FASTGPT_REGISTERS_84 ", %84, %85, %86, %87"
#define FASTGPT_REGISTERS_92 FASTGPT_REGISTERS_88 ", %88, %89, %90, %91"
#define FASTGPT_REGISTERS_96 FASTGPT_REGISTERS_92 ", %92, %93, %94, %95"
#define FASTGPT_REGISTERS_100 FASTGPT_REGISTERS_96 ", %96, %97, %98, %99"
#define FASTGPT_REGISTERS_104 FASTGPT_REGISTERS_100 ", %100, %101, %102, %103"
#define FASTGPT_REGISTERS_108 FASTGPT_REGISTERS_104 ", %104, %105, %106, %107"
#define FASTGPT_REGISTERS_112 FASTGPT_REGISTERS_108 ", %108, %109, %110, %111"
#define FASTGPT_REGISTERS_116 FASTGPT_REGISTERS_112 ", %112, %113, %114, %115"
#define FASTGPT_REGISTERS_120 FASTGPT_REGISTERS_116 ", %116, %117, %118, %119"
#define FASTGPT_REGISTERS_124 FASTGPT_REGISTERS_120 ", %120, %121, %122, %123"
#define FASTGPT_REGISTERS_128 FASTGPT_REGISTERS_124 ", %124, %125, %126, %127"
#define FASTGPT_OPERANDS_4 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define FASTGPT_OPERANDS_8 FASTGPT_OPERANDS_4, "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define FASTGPT_OPERANDS_12 FASTGPT_OPERANDS_8, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define FASTGPT_OPERANDS_16 FASTGPT_OPERANDS_12, "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define FASTGPT_OPERANDS_20 FASTGPT_OPERANDS_16, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19])
#define FASTGPT_OPERANDS_24 FASTGPT_OPERANDS_20, "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define FASTGPT_OPERANDS_28 FASTGPT_OPERANDS_24, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27])
#define FASTGPT_OPERANDS_32 FASTGPT_OPERANDS_28, "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define FASTGPT_OPERANDS_36 FASTGPT_OPERANDS_32, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
#define FASTGPT_OPERANDS_40 FASTGPT_OPERANDS_36, "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define FASTGPT_OPERANDS_44 FASTGPT_OPERANDS_40, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43])
#define FASTGPT_OPERANDS_48 FASTGPT_OPERANDS_44, "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define FASTGPT_OPERANDS_52 FASTGPT_OPERANDS_48, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51])
#define FASTGPT_OPERANDS_56 FASTGPT_OPERANDS_52, "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define FASTGPT_OPERANDS_60 FASTGPT_OPERANDS_56, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59])
#define FASTGPT_OPERANDS_64 FASTGPT_OPERANDS_60, "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define FASTGPT_OPERANDS_68 FASTGPT_OPERANDS_64, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67])
#define FASTGPT_OPERANDS_72 FASTGPT_OPERANDS_68, "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define FASTGPT_OPERANDS_76 FASTGPT_OPERANDS_72, "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75])
#define FASTGPT_OPERANDS_80 FASTGPT_OPERANDS_76, "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define FASTGPT_OPERANDS_84 FASTGPT_OPERANDS_80, "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83])
#define FASTGPT_OPERANDS_88 FASTGPT_OPERANDS_84, "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define FASTGPT_OPERANDS_92 FASTGPT_OPERANDS_88, "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91])
#define FASTGPT_OPERANDS_96 FASTGPT_OPERANDS_92, "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define FASTGPT_OPERANDS_100 FASTGPT_OPERANDS_96, "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99])
#define FASTGPT_OPERANDS_104 FASTGPT_OPERANDS_100, "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103])
#define FASTGPT_OPERANDS_108 FASTGPT_OPERANDS_104, "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107])
#define FASTGPT_OPERANDS_112 FASTGPT_OPERANDS_108, "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111])
#define FASTGPT_OPERANDS_116 FASTGPT_OPERANDS_112, "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115])
#define FASTGPT_OPERANDS_120 FASTGPT_OPERANDS_116, "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119])
#define FASTGPT_OPERANDS_124 FASTGPT_OPERANDS_120, "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123])
#define FASTGPT_OPERANDS_128 FASTGPT_OPERANDS_124, "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])

// Columns, and the numbers of the operands after the accumulators: the first is how many of these there are.
#define FASTGPT_WGMMA_SHAPES                                 \
  FASTGPT_WGMMA_CASE(8, 4, 5, 6, 7, 8, 9, 10)                \
  FASTGPT_WGMMA_CASE(16, 8, 9, 10, 11, 12, 13, 14)           \
  FASTGPT_WGMMA_CASE(24, 12, 13, 14, 15, 16, 17, 18)         \
  FASTGPT_WGMMA_CASE(32, 16, 17, 18, 19, 20, 21, 22)         \
  FASTGPT_WGMMA_CASE(40, 20, 21, 22, 23, 24, 25, 26)         \
  FASTGPT_WGMMA_CASE(48, 24, 25, 26, 27, 28, 29, 30)         \
  FASTGPT_WGMMA_CASE(56, 28, 29, 30, 31, 32, 33, 34)         \
  FASTGPT_WGMMA_CASE(64, 32, 33, 34, 35, 36, 37, 38)         \
  FASTGPT_WGMMA_CASE(72, 36, 37, 38, 39, 40, 41, 42)         \
  FASTGPT_WGMMA_CASE(80, 40, 41, 42, 43, 44, 45, 46)         \
  FASTGPT_WGMMA_CASE(88, 44, 45, 46, 47, 48, 49, 50)         \
  FASTGPT_WGMMA_CASE(96, 48, 49, 50, 51, 52, 53, 54)         \
  FASTGPT_WGMMA_CASE(104, 52, 53, 54, 55, 56, 57, 58)        \
  FASTGPT_WGMMA_CASE(112, 56, 57, 58, 59, 60, 61, 62)        \
  FASTGPT_WGMMA_CASE(120, 60, 61, 62, 63, 64, 65, 66)        \
  FASTGPT_WGMMA_CASE(128, 64, 65, 66, 67, 68, 69, 70)        \
  FASTGPT_WGMMA_CASE(136, 68, 69, 70, 71, 72, 73, 74)        \
  FASTGPT_WGMMA_CASE(144, 72, 73, 74, 75, 76, 77, 78)        \
  FASTGPT_WGMMA_CASE(152, 76, 77, 78, 79, 80, 81, 82)        \
  FASTGPT_WGMMA_CASE(160, 80, 81, 82, 83, 84, 85, 86)        \
  FASTGPT_WGMMA_CASE(168, 84, 85, 86, 87, 88, 89, 90)        \
  FASTGPT_WGMMA_CASE(176, 88, 89, 90, 91, 92, 93, 94)        \
  FASTGPT_WGMMA_CASE(184, 92, 93, 94, 95, 96, 97, 98)        \
  FASTGPT_WGMMA_CASE(192, 96, 97, 98, 99, 100, 101, 102)     \
  FASTGPT_WGMMA_CASE(200, 100, 101, 102, 103, 104, 105, 106) \
  FASTGPT_WGMMA_CASE(208, 104, 105, 106, 107, 108, 109, 110) \
  FASTGPT_WGMMA_CASE(216, 108, 109, 110, 111, 112, 113, 114) \
  FASTGPT_WGMMA_CASE(224, 112, 113, 114, 115, 116, 117, 118) \
  FASTGPT_WGMMA_CASE(232, 116, 117, 118, 119, 120, 121, 122) \
  FASTGPT_WGMMA_CASE(240, 120, 121, 122, 123, 124, 125, 126) \
  FASTGPT_WGMMA_CASE(248, 124, 125, 126, 127, 128, 129, 130) \
  FASTGPT_WGMMA_CASE(256, 128, 129, 130, 131, 132, 133, 134)

#define FASTGPT_WGMMA_SHARED(n, p0, p1, p2, p3, p4, type)                                                 \
  FASTGPT_SM90(asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p2 ", 0;\n"                             \
                            "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type               \
                            " {" FASTGPT_REGISTERS_##p0 "}, %" #p0 ", %" #p1 ", p, 1, 1, %" #p3 ", %" #p4 \
                                                        ";\n}" : FASTGPT_OPERANDS_##p0 : "l"(a),          \
                            "l"(b), "r"(int(accumulate)), "n"(int(kA == Major::mn)), "n"(int(kB == Major::mn))))
#define FASTGPT_WGMMA_REGISTERS(n, p0, p1, p2, p3, p4, p5, p6, type)                                                   \
  FASTGPT_SM90(asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p5 ", 0;\n"                                          \
                            "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type                            \
                            " {" FASTGPT_REGISTERS_##p0 "}, {%" #p0 ", %" #p1 ", %" #p2 ", %" #p3 "}, %" #p4           \
                                                        ", p, 1, 1, %" #p6 ";\n}" : FASTGPT_OPERANDS_##p0 : "r"(a[0]), \
                            "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(int(kB == Major::mn))))

// d[64, 2 kCount] (+)= A[64,16] B[16, 2 kCount] by a warpgroup, with A and B in shared memory; sums in fp32.
#define FASTGPT_WGMMA_CASE(n, p0, p1, p2, p3, p4, p5, p6) \
  if constexpr (kCount == p0) FASTGPT_WGMMA_SHARED(n, p0, p1, p2, p3, p4, "bf16");
template <Major kA = Major::k, Major kB = Major::k, int kCount>
FASTGPT_PTX void wgmma(float (&d)[kCount], uint64_t a, uint64_t b, bool accumulate, Bf16){FASTGPT_WGMMA_SHAPES}
#undef FASTGPT_WGMMA_CASE
#define FASTGPT_WGMMA_CASE(n, p0, p1, p2, p3, p4, p5, p6) \
  if constexpr (kCount == p0) FASTGPT_WGMMA_SHARED(n, p0, p1, p2, p3, p4, "f16");
template <Major kA = Major::k, Major kB = Major::k, int kCount>
FASTGPT_PTX void wgmma(float (&d)[kCount], uint64_t a, uint64_t b, bool accumulate, F16){FASTGPT_WGMMA_SHAPES}
#undef FASTGPT_WGMMA_CASE

// The same with A in registers: 4 a thread, laid out as mma_m16n8k16's, 16 rows for each warp.
#define FASTGPT_WGMMA_CASE(n, p0, p1, p2, p3, p4, p5, p6) \
  if constexpr (kCount == p0) FASTGPT_WGMMA_REGISTERS(n, p0, p1, p2, p3, p4, p5, p6, "bf16");
template <Major kB = Major::k, int kCount>
FASTGPT_PTX
    void wgmma(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b, bool accumulate, Bf16){FASTGPT_WGMMA_SHAPES}
#undef FASTGPT_WGMMA_CASE
#define FASTGPT_WGMMA_CASE(n, p0, p1, p2, p3, p4, p5, p6) \
  if constexpr (kCount == p0) FASTGPT_WGMMA_REGISTERS(n, p0, p1, p2, p3, p4, p5, p6, "f16");
template <Major kB = Major::k, int kCount>
FASTGPT_PTX void wgmma(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b, bool accumulate, F16) {
  FASTGPT_WGMMA_SHAPES
}
#undef FASTGPT_WGMMA_CASE

#undef FASTGPT_WGMMA_SHARED
#undef FASTGPT_WGMMA_REGISTERS
#undef FASTGPT_WGMMA_SHAPES

}  // namespace fastgpt
