// Which of an op's kernel paths served a call, and why: said by choose_path() in <op>.cpp, read by tests and people.
#pragma once

namespace fastgpt {

// The strings are literals. Of this thread's calls the last one is remembered; fastgpt_last_path() tells it.
void remember_path(const char* entry, const char* path, const char* reason);

}  // namespace fastgpt
