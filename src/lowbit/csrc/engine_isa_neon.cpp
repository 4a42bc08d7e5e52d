#define LOWBIT_NEON_LANES
#include "attention_lanes.h"
#include "engine_lanes.h"

namespace lowbit {
const EngineIsa kEngineNeon = {normalize,     activate,      add_scaled, cap_values, widen_numbers,
                               largest_index, dense_product, attend,     store_key,  store_value};
}  // namespace lowbit
