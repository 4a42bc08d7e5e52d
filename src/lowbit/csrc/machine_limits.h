// What the machine and its container let this process have: cores and memory.
#pragma once
#include <cstdint>

namespace lowbit {

// Cores that a quota pays for, rounded up, by the text of a cgroup's cpu.max ("max 100000", "150000 100000"); 0: no limit.
int quota_cores(const char* path);
// The first number of a variable like OMP_NUM_THREADS ("4", "4,2"); 0 where it says nothing.
int threads_named(const char* text);
// OMP_NUM_THREADS, else what affinity and the container's quota allow.
int default_threads();
// Memory that can be had without swapping, by the system and by the container; -1 where nobody says.
int64_t available_bytes();

}  // namespace lowbit
