#define LOWBIT_TILES_EMULATED
#include "attention_tiles.h"

namespace lowbit {
void attend_tiles_portable(const AttendJob& job) { attend_with(kEnginePortable, job); }
}  // namespace lowbit
