#define LOWBIT_TILES_EMULATED
#include "dispatch.h"
#include "vec_portable.h"
#include "tile_lanes.h"

namespace lowbit {
const FoldedProducts kPortableTiles = kFoldedProducts;
}  // namespace lowbit
