#define LOWBIT_TILES_EMULATED
#include "dispatch.h"
#include "vec_portable.h"
#include "brain_lanes.h"
#include "tile_lanes.h"

namespace lowbit {
const FoldedProducts kPortableTiles = kFoldedProducts;
const BrainProducts kPortableBrains = kBrainProducts;
}  // namespace lowbit
