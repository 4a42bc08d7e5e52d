#include "engine_isa.h"

#include "dispatch.h"

namespace lowbit {

// Sets of products that share their decoding share the engine's lanes too.
const EngineIsa& engine_isa() {
#if defined(LOWBIT_AVX512)
    if (isa().decode_rows == kAvx512.decode_rows) return kEngineAvx512;
#endif
#if defined(LOWBIT_AVX2)
    if (isa().decode_rows == kAvx2.decode_rows) return kEngineAvx2;
#endif
#if defined(LOWBIT_NEON)
    if (isa().decode_rows == kNeon.decode_rows) return kEngineNeon;
#endif
    return kEnginePortable;
}

}  // namespace lowbit
