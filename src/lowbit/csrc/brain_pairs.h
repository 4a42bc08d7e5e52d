// The products of pairs of AVX-512 BF16 for brain_lanes.h: eight tokens with two blocks of 16 rows, 16 registers of sums.
#pragma once
#include "brains.h"

namespace lowbit {
namespace {

struct BrainSession {
    BrainSession() {}
};
constexpr int kBrainPair = 2;  // blocks of 16 rows that meet tokens together
constexpr int kBrainGroup = 8;  // tokens
constexpr bool kBrainsByDefault = false;  // their gain does not pay for less exact activations

// sums + w[2 r] x[0] + w[2 r + 1] x[1] in each lane r.
LOWBIT_INLINE Floats dot_pairs(Floats sums, Bytes weights, Ints x) {
    return _mm512_dpbf16_ps(sums, reinterpret_cast<__m512bh>(weights), reinterpret_cast<__m512bh>(x));
}

template <int kBlocks>
void multiply_brain_group(const uint8_t* x, const uint8_t* const* panel, int64_t steps, bool first, float* sums) {
    Floats total[kBrainGroup][kBlocks];
    LOWBIT_UNROLL
    for (int t = 0; t < kBrainGroup; ++t)
        LOWBIT_UNROLL
        for (int b = 0; b < kBlocks; ++b) total[t][b] = first ? splat_floats(0.0f) : load_floats(sums + (t * kBrainPair + b) * kBlockRows);
    for (int64_t step = 0; step < steps; ++step, x += 2 * kBrainTile)
        for (int64_t pair = 0; pair < kBrainStep / 2; ++pair) {
            Bytes w[kBlocks];
            LOWBIT_UNROLL
            for (int b = 0; b < kBlocks; ++b) w[b] = load_bytes(panel[b] + step * kBrainTile + pair * kVector);
            LOWBIT_UNROLL
            for (int t = 0; t < kBrainGroup; ++t) {
                int32_t two;
                memcpy(&two, x + t * kVector + pair * 4, sizeof two);
                const Ints both = splat_ints(two);
                LOWBIT_UNROLL
                for (int b = 0; b < kBlocks; ++b) total[t][b] = dot_pairs(total[t][b], w[b], both);
            }
        }
    LOWBIT_UNROLL
    for (int t = 0; t < kBrainGroup; ++t)
        LOWBIT_UNROLL
        for (int b = 0; b < kBlocks; ++b) store_floats(sums + (t * kBrainPair + b) * kBlockRows, total[t][b]);
}

// As in brain_tiles.h.
inline void multiply_brains(const uint8_t* x, const uint8_t* const* panel, int blocks, int64_t steps, int64_t left, bool first, float* sums) {
    for (int token = 0; token < kBrainTokens && token < left; token += kBrainGroup) {
        const uint8_t* from = x + token * kVector;  // tokens 16 and on are a tile further, which is 16 vectors too
        float* to = sums + token * kBrainPair * kBlockRows;
        if (blocks == 1) multiply_brain_group<1>(from, panel, steps, first, to);
        else multiply_brain_group<kBrainPair>(from, panel, steps, first, to);
    }
}

}  // namespace
}  // namespace lowbit
