// The swizzles of TMA and of wgmma's operands: PTX ISA 5.5.6. The index of a 16-byte chunk within its row is xored with
// the index of the 128-byte line.
#pragma once

#include <cstddef>

namespace emulator {

template <class Address>
Address swizzle_address(Address address, unsigned swizzle_bytes) {
  switch (swizzle_bytes) {
    case 128:
      return address ^ ((address >> 7 & 7) << 4);
    case 64:
      return address ^ ((address >> 7 & 3) << 4);
    case 32:
      return address ^ ((address >> 7 & 1) << 4);
    default:
      return address;
  }
}

}  // namespace emulator
