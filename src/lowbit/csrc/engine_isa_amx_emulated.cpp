#define LOWBIT_TILES_EMULATED
#include <immintrin.h>

#include "attention_tiles.h"

namespace lowbit {
void attend_amx_emulated(const AttendJob& job) { attend_with(kEngineAvx512, job); }
}  // namespace lowbit
