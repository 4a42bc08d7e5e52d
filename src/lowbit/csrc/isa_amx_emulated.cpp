#define LOWBIT_TILES_EMULATED
#include "dispatch.h"
#include "vec_avx512.h"
#include "brain_lanes.h"
#include "tile_lanes.h"

namespace lowbit {
const FoldedProducts kEmulatedProducts = kFoldedProducts;
const BrainProducts kEmulatedBrains = kBrainProducts;
}  // namespace lowbit
