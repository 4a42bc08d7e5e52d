// The canonical bit stream of one row: code i at bit i * bits, least significant bit first, across 32-bit words.
#pragma once
#include <cstdint>
#include <cstring>

namespace lowbit {
namespace {

// Write `count` codes; the unused top of the last word becomes zero.
inline void write_codes(uint32_t* words, const uint8_t* codes, int64_t count, int bits) {
    uint64_t pending = 0;
    int filled = 0;
    for (int64_t i = 0; i < count; ++i) {
        pending |= static_cast<uint64_t>(codes[i]) << filled;
        filled += bits;
        if (filled >= 32) {
            *words++ = static_cast<uint32_t>(pending);
            pending >>= 32;
            filled -= 32;
        }
    }
    if (filled) *words = static_cast<uint32_t>(pending);
}

inline void read_codes(const uint32_t* words, uint8_t* codes, int64_t count, int bits) {
    const uint32_t mask = (1u << bits) - 1;
    uint64_t pending = 0;
    int held = 0;
    for (int64_t i = 0; i < count; ++i) {
        if (held < bits) {
            pending |= static_cast<uint64_t>(*words++) << held;
            held += 32;
        }
        codes[i] = static_cast<uint8_t>(pending & mask);
        pending >>= bits;
        held -= bits;
    }
}

}  // namespace
}  // namespace lowbit
