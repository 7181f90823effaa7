// st.global.v4: sixteen bytes of registers to global memory in one instruction.
#pragma once

#include <cstring>

#include "ptx/common.cuh"

namespace fastgpt {

// to: a multiple of 16 bytes. A struct that is assigned may be stored in up to eight parts instead: in a loop the compiler
// keeps an address for each part, and then no longer sees that they are neighbours.
template <class V>
FASTGPT_PTX void store_16_bytes(void* to, const V& value) {
  static_assert(sizeof(V) == 16);
  uint4 words;
  memcpy(&words, &value, sizeof(words));
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(words.x),
               "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
}

}  // namespace fastgpt
