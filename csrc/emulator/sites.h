// Mutation sites: the calls of barriers, waits, fences and in_bounds(), each line once for every place that it was
// inlined into. Any one of them can be switched off at run time.
#pragma once

#include <string>

#include "caller.h"

namespace emulator {

// Takes note of the call; true if it is the one that is switched off. kind must be a literal.
bool site_disabled(const char* kind, Caller caller);
void choose_disabled_site(int id);  // -1: none
std::string sites_json();           // every site met so far; "met": since the last choice

}  // namespace emulator
