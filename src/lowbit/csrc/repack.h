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

}  // namespace lowbit
