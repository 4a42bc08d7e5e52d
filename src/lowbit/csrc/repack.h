// One repacking job between the canonical and the prepared form, in either direction.
#pragma once
#include "layout.h"

namespace lowbit {

struct RepackJob {
    const Header* header;
    uint8_t* prepared;  // the whole buffer
    void* codes;        // canonical; dense: the weight itself
    void* scales;
    uint8_t* zeros;
};

// Whether codes are moved one by one, as bytes: padded segments, and GGUF's blocks.
inline bool needs_bytes(const Header& header) {
    return header.kind == LOWBIT_BLOCKS || (header.kind != LOWBIT_DENSE && !header.plan.straight);
}
// One row of GGUF's blocks between the canonical form and its lane of the block at `base`; `bytes` are its codes by position.
void blocks_to_lanes(const RepackJob& job, int64_t row, uint8_t* base, uint8_t* bytes);
void lanes_to_blocks(const RepackJob& job, int64_t row, const uint8_t* base, const uint8_t* bytes);

}  // namespace lowbit
