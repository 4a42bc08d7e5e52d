// The integer products of one segment, a panel of weights with a register tile of tokens: the innermost loop of many tokens. Included by
// panel_lanes.h, whose panel holds a vector of 16 rows for every four inputs.
#pragma once
#include "layout.h"

namespace lowbit {
namespace {

#if defined(LOWBIT_MATRIX_PRODUCTS)

// Arm's products of matrices take eight inputs of two rows and of two tokens and give four sums, twice as many products as one
// instruction for dot products. So a panel holds its vectors in pairs: eight inputs of rows 0 and 1, of rows 2 and 3, ...
constexpr int kRowPairs = kBlockRows / 2, kTokenPairs = kPanelTokens / 2;

inline void pair_vectors(uint8_t* panel, int64_t vectors) {
    for (int64_t v = 0; v < vectors; v += 2) {
        const Bytes first = load_bytes(panel + v * kVector), second = load_bytes(panel + (v + 1) * kVector);
        for (int i = 0; i < kQuarters; ++i) {
            vst1q_u8(panel + v * kVector + 32 * i, bytes_of(vzip1q_u32(first.q[i], second.q[i])));
            vst1q_u8(panel + v * kVector + 32 * i + 16, bytes_of(vzip2q_u32(first.q[i], second.q[i])));
        }
    }
}

template <int kBlocks, bool kWide>
LOWBIT_INLINE void add_segment(const uint8_t* weights, int64_t, const int32_t* inputs, int64_t vectors, Ints (*partial)[kPanelTokens]) {
    static_assert(kBlocks == 1 && kPanelTokens == 4, "16 of 32 registers hold sums");
    int32x4_t sums[kTokenPairs][kRowPairs];  // each of two rows, of two tokens
    LOWBIT_UNROLL
    for (int t = 0; t < kTokenPairs; ++t)
        LOWBIT_UNROLL
        for (int r = 0; r < kRowPairs; ++r) sums[t][r] = vdupq_n_s32(0);
    for (int64_t v = 0; v < vectors; v += 2, weights += 2 * kVector, inputs += 2 * kPanelTokens) {
        const int32x4_t first = vld1q_s32(inputs), second = vld1q_s32(inputs + kPanelTokens);
        const int8x16_t x[kTokenPairs] = {vreinterpretq_s8_s32(vzip1q_s32(first, second)), vreinterpretq_s8_s32(vzip2q_s32(first, second))};
        LOWBIT_UNROLL
        for (int r = 0; r < kRowPairs; ++r) {
            const uint8x16_t w = vld1q_u8(weights + 16 * r);
            LOWBIT_UNROLL
            for (int t = 0; t < kTokenPairs; ++t) sums[t][r] = vusmmlaq_s32(sums[t][r], w, x[t]);
        }
    }
    const auto add_to = [](uint32x4_t& to, int32x4_t more) { to = vaddq_u32(to, vreinterpretq_u32_s32(more)); };
    LOWBIT_UNROLL
    for (int t = 0; t < kTokenPairs; ++t)
        LOWBIT_UNROLL
        for (int i = 0; i < kQuarters; ++i) {
            add_to(partial[0][2 * t].q[i], vuzp1q_s32(sums[t][2 * i], sums[t][2 * i + 1]));
            add_to(partial[0][2 * t + 1].q[i], vuzp2q_s32(sums[t][2 * i], sums[t][2 * i + 1]));
        }
}

#else

inline void pair_vectors(uint8_t*, int64_t) {}

template <int kBlocks, bool kWide>
LOWBIT_INLINE void add_segment(const uint8_t* weights, int64_t block_bytes, const int32_t* inputs, int64_t vectors, Ints (*partial)[kPanelTokens]) {
    for (int64_t v = 0; v < vectors; v += 4) {
        LOWBIT_UNROLL
        for (int k = 0; k < 4; ++k) {
            Bytes w[kBlocks];
            LOWBIT_UNROLL
            for (int b = 0; b < kBlocks; ++b) w[b] = load_bytes(weights + b * block_bytes + k * kVector);
            LOWBIT_UNROLL
            for (int t = 0; t < kPanelTokens; ++t) {
                const Ints four = splat_ints(inputs[k * kPanelTokens + t]);
                LOWBIT_UNROLL
                for (int b = 0; b < kBlocks; ++b) partial[b][t] = dot<kWide>(partial[b][t], w[b], four);
            }
        }
        weights += 4 * kVector;
        inputs += 4 * kPanelTokens;
    }
}

#endif

}  // namespace
}  // namespace lowbit
