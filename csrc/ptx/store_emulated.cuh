// st.global.v4: sixteen bytes of registers to global memory in one instruction.
#pragma once

#include "ptx/common.cuh"

namespace fastgpt {

template <class V>
FASTGPT_PTX void store_16_bytes(void* to, const V& value) {
  static_assert(sizeof(V) == 16);
  *static_cast<V*>(to) = value;
}

}  // namespace fastgpt
