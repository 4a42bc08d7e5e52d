#define LOWBIT_PAIRS_OF_BRAINS
#include "dispatch.h"
#include "vec_avx512.h"
#include "brain_lanes.h"

namespace lowbit {
const BrainProducts kPairsOfBrains = kBrainProducts;
}  // namespace lowbit
