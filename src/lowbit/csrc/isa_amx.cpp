#include "dispatch.h"
#include "vec_avx512.h"
#include "brain_lanes.h"
#include "tile_lanes.h"

namespace lowbit {
const FoldedProducts kAmxProducts = kFoldedProducts;
const BrainProducts kAmxBrains = kBrainProducts;
}  // namespace lowbit
