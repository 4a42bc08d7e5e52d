#include "dispatch.h"
#include "quantize_lanes.h"

namespace lowbit {
const Isa kPortable = {"portable", quantize_rows, dequantize_rows};
}  // namespace lowbit
