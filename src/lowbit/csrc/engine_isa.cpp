#include "engine_isa.h"

#include "dispatch.h"

namespace lowbit {
namespace {

// A set whose prompts attend on register tiles.
EngineIsa with_tiles(const EngineIsa& base, void (*attend)(const AttendJob& job)) {
    EngineIsa set = base;
    set.attend = attend;
    return set;
}

#if defined(LOWBIT_AMX)
const EngineIsa kEngineAmx = with_tiles(kEngineAvx512, attend_amx);
#endif
#if defined(LOWBIT_AVX512)
const EngineIsa kEngineAmxEmulated = with_tiles(kEngineAvx512, attend_amx_emulated);
#endif
const EngineIsa kEngineAmxPortable = with_tiles(kEnginePortable, attend_tiles_portable);

}  // namespace

// Sets of products that share their decoding share the engine's lanes too.
const EngineIsa& engine_isa() {
#if defined(LOWBIT_AMX)
    if (isa().folded == &kAmxProducts) return kEngineAmx;
#endif
#if defined(LOWBIT_AVX512)
    if (isa().folded == &kEmulatedProducts) return kEngineAmxEmulated;
    if (isa().decode_rows == kAvx512.decode_rows || isa().decode_rows == kAvx512Vnni.decode_rows) return kEngineAvx512;
#endif
#if defined(LOWBIT_AVX_VNNI)
    if (isa().decode_rows == kAvxVnni.decode_rows) return kEngineAvxVnni;
#endif
#if defined(LOWBIT_AVX2)
    if (isa().decode_rows == kAvx2.decode_rows) return kEngineAvx2;
#endif
#if defined(LOWBIT_NEON_I8MM)
    if (isa().decode_rows == kNeonI8mm.decode_rows) return kEngineNeonI8mm;
#endif
#if defined(LOWBIT_NEON)
    if (isa().decode_rows == kNeon.decode_rows) return kEngineNeon;
#endif
    return isa().folded == &kPortableTiles ? kEngineAmxPortable : kEnginePortable;
}

}  // namespace lowbit
