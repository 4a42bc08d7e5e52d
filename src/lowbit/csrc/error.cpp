#include "error.h"

#include <cstdarg>
#include <cstdio>
#include <new>
#include <system_error>

#include "face/refusal.h"

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

int caught() {
    try {
        throw;
    } catch (const Refusal& refusal) {
        return fail(refusal.code(), "%s", refusal.what());
    } catch (const std::bad_alloc&) {
        return fail(LOWBIT_NO_MEMORY, "not enough memory for what was asked");
    } catch (const std::system_error& error) {
        return fail(LOWBIT_NO_MEMORY, "the system refuses what was asked: %s", error.what());
    } catch (const std::exception& error) {
        return fail(LOWBIT_BAD_ARGUMENT, "what was given contradicts itself: %s", error.what());
    }
}

}  // namespace lowbit

extern "C" const char* lowbit_last_error(void) { return lowbit::message; }
extern "C" const char* lowbit_version(void) { return "0.1.0"; }
