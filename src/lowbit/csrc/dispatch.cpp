#include "dispatch.h"

#include <atomic>
#include <cstring>

#include "error.h"
#include "product_plan.h"

#if defined(LOWBIT_NEON) || defined(LOWBIT_NEON_I8MM)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(LOWBIT_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lowbit {
namespace {

struct Row {
    const Isa* isa;
    bool (*runs_here)();
    bool by_name_only = false;
};

#if defined(LOWBIT_AVX2) || defined(LOWBIT_AVX512)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }
#endif

#if defined(LOWBIT_AVX_VNNI)
bool has_avx_vnni() {
    constexpr unsigned kFeature = 1u << 4;
    unsigned a = 0, b = 0, c = 0, d = 0;
    return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && a & kFeature;
}
#endif

#if defined(LOWBIT_AVX512)
bool has_avx512_vnni() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}
bool has_avx512() { return has_avx512_vnni() && __builtin_cpu_supports("avx512vbmi"); }
#endif

#if defined(LOWBIT_AVX512_BF16)
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
// Intel's cores begin a product of pairs every second cycle, where two fused products of fp32 begin in each: 113 against 194 GFLOP/s.
bool has_fast_avx512_bf16() { return has_avx512_bf16() && __builtin_cpu_is("amd"); }
#endif

#if defined(LOWBIT_NEON)
bool has_dot_products() { return getauxval(AT_HWCAP) & HWCAP_ASIMDDP; }
#endif

#if defined(LOWBIT_NEON_I8MM)
bool has_matrix_products() {
    constexpr unsigned long kI8mm = 1ul << 13;  // HWCAP2_I8MM, which older headers do not name
    return getauxval(AT_HWCAP) & HWCAP_ASIMDDP && getauxval(AT_HWCAP2) & kI8mm;
}
#endif

#if defined(LOWBIT_AMX)
// Linux lends tile registers to the processes that ask, since they cost 8 KiB at every switch; it may say no.
bool has_amx() {
    constexpr unsigned kFeatures = 1u << 22 | 1u << 24 | 1u << 25;  // bf16, tiles, int8
    constexpr long kAskForState = 0x1023, kTileData = 18;
    unsigned a = 0, b = 0, c = 0, d = 0;
    return has_avx512() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kFeatures) == kFeatures &&
           syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
}
#endif

bool always() { return true; }

// Sets that differ from another in their products of many tokens only, and those with tiles where prompts attend (engine_isa.cpp).
Isa with_brains(const Isa& base, const char* name, const BrainProducts& brains) {
    Isa set = base;
    set.name = name;
    set.brains = &brains;
    return set;
}
Isa with_tiles(const Isa& base, const char* name, const FoldedProducts& folded, const BrainProducts& brains) {
    Isa set = with_brains(base, name, brains);
    set.folded = &folded;
    return set;
}

#if defined(LOWBIT_AMX)
const Isa kAmx = with_tiles(kAvx512, "amx", kAmxProducts, kAmxBrains);
#endif
#if defined(LOWBIT_AVX512_BF16)
const Isa kAvx512Bf16 = with_brains(kAvx512, "avx512_bf16", kPairsOfBrains);
#endif
#if defined(LOWBIT_AVX512)
const Isa kAmxEmulated = with_tiles(kAvx512, "amx_emulated", kEmulatedProducts, kEmulatedBrains);
#endif
const Isa kAmxPortable = with_tiles(kPortable, "amx_emulated", kPortableTiles, kPortableBrains);

// Best first.
const Row kRows[] = {
#if defined(LOWBIT_AMX)
    {&kAmx, has_amx},
#endif
#if defined(LOWBIT_AVX512_BF16)
    {&kAvx512Bf16, has_fast_avx512_bf16},
    {&kAvx512Bf16, has_avx512_bf16, true},
#endif
#if defined(LOWBIT_AVX512)
    {&kAvx512, has_avx512},
    {&kAmxEmulated, has_avx512, true},
    {&kAvx512Vnni, has_avx512_vnni},
#endif
#if defined(LOWBIT_AVX_VNNI)
    {&kAvxVnni, has_avx_vnni},
#endif
#if defined(LOWBIT_AVX2)
    {&kAvx2, has_avx2},
#endif
#if defined(LOWBIT_NEON_I8MM)
    {&kNeonI8mm, has_matrix_products},
#endif
#if defined(LOWBIT_NEON)
    {&kNeon, has_dot_products},
#endif
    {&kPortable, always},
    {&kAmxPortable, always, true},
};

std::atomic<const Isa*> chosen{nullptr};

const Isa* find(const char* name) {
    for (const Row& row : kRows)
        if ((name ? !strcmp(name, row.isa->name) : !row.by_name_only) && row.runs_here()) return row.isa;
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

bool asks_second_cache() {
#if defined(__x86_64__)
    static const bool intel = __builtin_cpu_is("intel");
    return intel;
#else
    return false;
#endif
}

}  // namespace lowbit

extern "C" int lowbit_fold_length(void) { return lowbit::isa().folded ? static_cast<int>(lowbit::kFoldMost) : 0; }

extern "C" int lowbit_bf16_tokens(void) { return lowbit::rounds_to_brains(true, lowbit::kFewTokens + 1, LOWBIT_COMPUTE_INT8) ? lowbit::kFewTokens + 1 : 0; }

extern "C" const char* lowbit_isa(void) { return lowbit::isa().name; }

extern "C" int lowbit_set_isa(const char* name) {
    const lowbit::Isa* found = lowbit::find(name);
    if (!found) return lowbit::fail(LOWBIT_UNSUPPORTED, "this processor has no instruction set '%s'", name);
    lowbit::chosen.store(found);
    return LOWBIT_OK;
}
