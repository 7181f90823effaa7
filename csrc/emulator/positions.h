// Source positions of return addresses, inlined calls included, through addr2line.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "caller.h"

namespace emulator {

struct Position {
  std::string function, file;  // the file as it is named from the repository's root
  int line = 0;
  std::string text() const { return line ? file + ":" + std::to_string(line) : file; }
};

// The calls inlined at a return address, innermost first; looked up once.
const std::vector<Position>& positions(const void* return_address);
// Looks many up at once: addr2line reads the debug information anew each time it is started.
void look_up(const std::vector<const void*>& return_addresses);
// The innermost position that is not the emulator's own or a one-instruction wrapper.
const Position& user_position(const void* return_address);
// And those it was inlined into.
std::vector<Position> user_positions(const void* return_address);
// The same, down the stack of the calling thread until its end.
std::vector<Position> call_chain(Caller caller, uintptr_t stack_end);
std::string function_name(const void* entry);

// Places fit shadow memory: 32 bits, 0 for none.
uint32_t place_of(const void* return_address);
const void* address_of(uint32_t place);

}  // namespace emulator
