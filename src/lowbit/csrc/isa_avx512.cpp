#include "dispatch.h"
#include "quantize_lanes.h"

namespace lowbit {
const Isa kAvx512 = {"avx512", quantize_rows, dequantize_rows};
}  // namespace lowbit
