#include "dispatch.h"

#include <atomic>
#include <cstring>

#include "error.h"

namespace lowbit {
namespace {

struct Row {
    const Isa* isa;
    bool (*runs_here)();
};

#if defined(LOWBIT_X86)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") &&
           __builtin_cpu_supports("avx512vbmi");
}
#endif

bool always() { return true; }

// Best first.
const Row kRows[] = {
#if defined(LOWBIT_X86)
    {&kAvx512, has_avx512},
    {&kAvx2, has_avx2},
#endif
    {&kPortable, always},
};

std::atomic<const Isa*> chosen{nullptr};

const Isa* find(const char* name) {
    for (const Row& row : kRows)
        if (row.runs_here() && (!name || !strcmp(name, row.isa->name))) return row.isa;
    return nullptr;
}

}  // namespace

const Isa& isa() {
    const Isa* known = chosen.load(std::memory_order_acquire);
    if (!known) {
        known = find(nullptr);
        chosen.store(known, std::memory_order_release);
    }
    return *known;
}

}  // namespace lowbit

extern "C" const char* lowbit_isa(void) { return lowbit::isa().name; }

extern "C" int lowbit_set_isa(const char* name) {
    const lowbit::Isa* found = lowbit::find(name);
    if (!found) return lowbit::fail(LOWBIT_UNSUPPORTED, "this processor has no instruction set '%s'", name);
    lowbit::chosen.store(found);
    return LOWBIT_OK;
}
