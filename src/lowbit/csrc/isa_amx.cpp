#include "dispatch.h"
#include "vec_avx512.h"
#include "tile_lanes.h"

namespace lowbit {
const FoldedProducts kAmxProducts = kFoldedProducts;
}  // namespace lowbit
