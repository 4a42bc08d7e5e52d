#include "dispatch.h"
#include "vec_avx2.h"
#include "float_lanes.h"
#include "decode_lanes.h"
#include "quantize_lanes.h"
#include "repack_lanes.h"

namespace lowbit {
const Isa kAvxVnni = {"avx_vnni",      kPanelTokens,  kPanelBlocks,  kWideBias,     quantize_rows, dequantize_rows, prepare_block,
                       restore_block, quantize_tile, widen_tile,    decode_rows, panel_items, float_items};
}  // namespace lowbit
