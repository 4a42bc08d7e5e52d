// Errors inside the core: a code and one sentence, kept per thread until the next failure.
#pragma once
#include "lowbit.h"

namespace lowbit {

// Keep the sentence for lowbit_last_error() and return the code, so that callers can write `return fail(...)`.
int fail(int code, const char* pattern, ...) __attribute__((format(printf, 2, 3)));

// Where exceptions end: call in the last catch (...) of a C function. Turns what was thrown into a code and its sentence.
int caught();

}  // namespace lowbit
