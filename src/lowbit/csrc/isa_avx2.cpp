#include "dispatch.h"
#include "quantize_lanes.h"

namespace lowbit {
const Isa kAvx2 = {"avx2", quantize_rows, dequantize_rows};
}  // namespace lowbit
