// Calls that only ask which path they would take: the bindings do all that they do, and launch nothing.
#pragma once

namespace fastgpt {

// For the whole process: autograd calls backwards from threads of its own.
inline bool only_asking = false;

}  // namespace fastgpt
