#include "engine_isa.h"

#include <cstring>

#include "dispatch.h"

namespace lowbit {

// The engine has fewer instruction sets than the products: a newer one of theirs takes the widest of these.
const EngineIsa& engine_isa() {
#if defined(LOWBIT_X86)
    const char* name = isa().name;
    if (!strcmp(name, "portable")) return kEnginePortable;
    return !strncmp(name, "avx2", 4) ? kEngineAvx2 : kEngineAvx512;
#else
    return kEnginePortable;
#endif
}

}  // namespace lowbit
