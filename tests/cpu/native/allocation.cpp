// The program's own operator new, which also serves the core. A file by itself, so that no compiler looks into it from a caller.
#include "allocation.h"

#include <cstdlib>
#include <new>

namespace {
thread_local int64_t left = -1;  // negative: no limit
thread_local bool refused = false;

void* allocate(size_t bytes) {
    if (left == 0) {
        refused = true;
        return nullptr;
    }
    if (left > 0) --left;
    return malloc(bytes ? bytes : 1);
}
}  // namespace

namespace check {

void allow_allocations(int64_t count) {
    left = count;
    refused = false;
}

bool allow_every_allocation() {
    left = -1;
    return refused;
}

}  // namespace check

void* operator new(size_t bytes) {
    if (void* data = allocate(bytes)) return data;
    throw std::bad_alloc();
}
void* operator new[](size_t bytes) { return operator new(bytes); }
void* operator new(size_t bytes, const std::nothrow_t&) noexcept { return allocate(bytes); }
void* operator new[](size_t bytes, const std::nothrow_t&) noexcept { return allocate(bytes); }
void operator delete(void* data) noexcept { free(data); }
void operator delete[](void* data) noexcept { free(data); }
void operator delete(void* data, size_t) noexcept { free(data); }
void operator delete[](void* data, size_t) noexcept { free(data); }

// An allocation that no machine can serve has to come back as NULL and not end a sanitized program.
extern "C" const char* __asan_default_options() { return "allocator_may_return_null=1"; }
extern "C" const char* __tsan_default_options() { return "allocator_may_return_null=1"; }
