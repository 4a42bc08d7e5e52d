// Allocations of this thread that still succeed, in the checks and in the library alike.
#pragma once
#include <cstdint>

namespace check {

void allow_allocations(int64_t count);
// Whether one was refused since.
bool allow_every_allocation();

}  // namespace check
