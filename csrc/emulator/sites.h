// Mutation sites: the calls of barriers, waits, fences and in_bounds(), each line once for every place that it was
// inlined into. Any one of them can be switched off at run time, or be made wrong.
#pragma once

#include <string>

#include "caller.h"

namespace emulator {

// Takes note of the call; true if it is the one that is switched off. kind must be a literal.
bool site_disabled(const char* kind, Caller caller);
// Takes note of a way in which the same call could be wrong, after site_disabled(); true if it is to be so. A literal.
bool site_altered(const char* alteration, Caller caller);
// -1: none. Without an alteration the site is switched off.
void choose_site(int id, const std::string& alteration);
std::string sites_json();  // every site met so far; "met": since the last choice

}  // namespace emulator
