#include "error.h"

#include <cstdarg>
#include <cstdio>

namespace lowbit {
namespace {
constexpr int kMessageBytes = 512;
thread_local char message[kMessageBytes] = "";
}  // namespace

int fail(int code, const char* pattern, ...) {
    va_list arguments;
    va_start(arguments, pattern);
    vsnprintf(message, sizeof message, pattern, arguments);
    va_end(arguments);
    return code;
}

}  // namespace lowbit

extern "C" const char* lowbit_last_error(void) { return lowbit::message; }
extern "C" const char* lowbit_version(void) { return "0.1.0"; }
