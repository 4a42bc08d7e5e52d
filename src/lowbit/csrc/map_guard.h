// Files under a map that are cut off while they are read.
//
// A page beyond the new end of a file is gone from every map of it, also from private and locked ones, and looking there is SIGBUS,
// whose default is the end of the process. Asking for the size before each step would not do: nearly all of a run is spent inside
// steps. So maps are registered (lowbit_guard_map), and a handler puts zeros where their pages were and marks them; the step goes on
// to its end, finds the mark and is refused with the file's name. Nothing is unwound, so no thread of the pool has to know.
#pragma once
#include <atomic>

namespace lowbit {

extern std::atomic<bool> some_map_damaged;

// LOWBIT_OK, or LOWBIT_BAD_WEIGHT with a sentence where the address lies in a map that was cut off.
int check_mapped(const void* address);

}  // namespace lowbit
