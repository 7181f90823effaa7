// The element types of matrix instructions and tensor copies, to and from float.
#pragma once

#include <cstdint>
#include <cstring>

#include "instructions.h"

namespace emulator {

inline float bf16_to_float(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline uint16_t float_to_bf16(float value) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return 0x7fff;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float f16_to_float(uint16_t bits) {  // by hand: _Float16 needs a runtime library on some machines
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
  float value;
  if (exponent == 0) {
    value = float(fraction) * 0x1p-24f;
    return sign ? -value : value;
  }
  const uint32_t wide = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline uint16_t float_to_f16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  const float size = value < 0 ? -value : value;
  if (value != value) return 0x7fff;
  if (size >= 65520.0f) return sign | 0x7c00;
  if (size < 0x1p-14f) {  // subnormal: adding 0.5 rounds to units of 2^-24
    const float shifted = size + 0.5f;
    std::memcpy(&bits, &shifted, 4);
    return uint16_t(sign | (bits - 0x3f000000u));
  }
  bits &= 0x7fffffffu;
  bits += 0xfff + (bits >> 13 & 1);
  return uint16_t(sign | ((bits >> 13) - (112 << 10)));
}

inline float tf32_to_float(uint32_t bits) {  // the lowest 13 bits are not looked at
  bits &= ~0x1fffu;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float half_to_float(MatrixType type, uint16_t bits) {
  return type == MatrixType::bf16 ? bf16_to_float(bits) : f16_to_float(bits);
}

}  // namespace emulator
