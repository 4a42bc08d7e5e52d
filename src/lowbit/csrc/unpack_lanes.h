// From the bit planes of a unit (layout.h) to eight vectors of one code per byte, ready for the dot product.
#pragma once
#include "scale_lanes.h"

namespace lowbit {
namespace {

// Step kStep of a plane of kWidth bits that begins at vector kFirst, moved up to bit kLow.
template <int kWidth, int kFirst, int kLow, int kStep>
inline Bytes plane_part(const Bytes* vectors) {
    constexpr int kPerByte = 8 / kWidth;
    constexpr int kMask = ((1 << kWidth) - 1) << kLow;
    return part<kStep % kPerByte * kWidth - kLow, kMask>(vectors[kFirst + kStep / kPerByte]);
}

// The codes of a step, moved up by kUp bits.
template <int kBits, int kStep, int kUp>
inline Bytes step_codes(const Bytes* vectors) {
    if constexpr (kBits == 8) {
        return vectors[kStep];
    } else {
        constexpr int kNibbles = kBits & 4, kPairs = kBits & 2;
        Bytes codes;
        if constexpr (kNibbles != 0) codes = plane_part<4, 0, kUp, kStep>(vectors);
        if constexpr (kPairs != 0) {
            const Bytes pairs = plane_part<2, kNibbles, kNibbles + kUp, kStep>(vectors);
            if constexpr (kNibbles != 0) codes = merge(codes, pairs);
            else codes = pairs;
        }
        if constexpr ((kBits & 1) != 0) codes = merge(codes, plane_part<1, kNibbles + kPairs, kNibbles + kPairs + kUp, kStep>(vectors));
        return codes;
    }
}

template <int kBits, bool kTable, int kUp = 0>
LOWBIT_INLINE void unpack_unit(const uint8_t* planes, const Table& table, Bytes* steps) {
    Bytes vectors[kBits];
    LOWBIT_UNROLL
    for (int v = 0; v < kBits; ++v) vectors[v] = load_bytes(planes + v * kVector);
    steps[0] = step_codes<kBits, 0, kUp>(vectors);
    steps[1] = step_codes<kBits, 1, kUp>(vectors);
    steps[2] = step_codes<kBits, 2, kUp>(vectors);
    steps[3] = step_codes<kBits, 3, kUp>(vectors);
    steps[4] = step_codes<kBits, 4, kUp>(vectors);
    steps[5] = step_codes<kBits, 5, kUp>(vectors);
    steps[6] = step_codes<kBits, 6, kUp>(vectors);
    steps[7] = step_codes<kBits, 7, kUp>(vectors);
    if constexpr (kTable) {
    LOWBIT_UNROLL
        for (int s = 0; s < kSteps; ++s) steps[s] = look_up<kBits>(table, steps[s]);
    }
}

}  // namespace
}  // namespace lowbit
