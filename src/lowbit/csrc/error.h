// Errors inside the core: a code and one sentence, kept per thread until the next failure.
#pragma once
#include "lowbit.h"

namespace lowbit {

// Keep the sentence for lowbit_last_error() and return the code, so that callers can write `return fail(...)`.
int fail(int code, const char* pattern, ...) __attribute__((format(printf, 2, 3)));

}  // namespace lowbit
