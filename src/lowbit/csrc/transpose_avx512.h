// Blocks of sixteen weights of sixteen groups, brought into lanes and back: one group a lane, which to store number by number took
// two cycles a weight. Included by AVX-512's file.
#pragma once
#include "rounding_lanes.h"

#if defined(__AVX512F__)
namespace lowbit {
namespace {

// Of two rows, kHalf apart: the columns without this bit of both, and those with it.
template <int kHalf>
LOWBIT_INLINE void exchange_columns(__m512i& one, __m512i& other) {
    alignas(64) int32_t without[kLanes], with[kLanes];
    for (int j = 0; j < kLanes; ++j) {
        without[j] = j & kHalf ? kLanes + j - kHalf : j;
        with[j] = j & kHalf ? kLanes + j : j + kHalf;
    }
    const __m512i a = one, b = other;
    one = _mm512_permutex2var_epi32(a, _mm512_load_si512(without), b);
    other = _mm512_permutex2var_epi32(a, _mm512_load_si512(with), b);
}

template <int kHalf>
LOWBIT_INLINE void exchange_rows(__m512i (&rows)[kLanes]) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
        if (!(i & kHalf)) exchange_columns<kHalf>(rows[i], rows[i + kHalf]);
}

// Row i's column j becomes row j's column i.
LOWBIT_INLINE void transpose(__m512i (&rows)[kLanes]) {
    exchange_rows<8>(rows);
    exchange_rows<4>(rows);
    exchange_rows<2>(rows);
    exchange_rows<1>(rows);
}

LOWBIT_INLINE __m512i sixteen_weights(const void* from, int64_t index, int dtype) {
    if (dtype == LOWBIT_FP32) return _mm512_loadu_si512(static_cast<const float*>(from) + index);
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(from) + index));
    if (dtype == LOWBIT_BF16) return _mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
    return _mm512_castps_si512(_mm512_cvtph_ps(halves));
}

// Sixteen groups whose first weights are at `places`: entry i of lane l at [i * kLanes + l].
inline void gather_groups(const void* weights, int dtype, const int64_t (&places)[kLanes], int64_t length, F32* to) {
    for (int64_t i = 0; i < length; i += kLanes) {
        __m512i rows[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) rows[lane] = sixteen_weights(weights, places[lane] + i, dtype);
        transpose(rows);
        for (int k = 0; k < kLanes; ++k) to[i + k] = (F32)rows[k];
    }
}

// And codes back, a byte each.
inline void scatter_codes(const I32* codes, const int64_t (&places)[kLanes], int64_t length, uint8_t* to) {
    for (int64_t i = 0; i < length; i += kLanes) {
        __m512i rows[kLanes];
        for (int k = 0; k < kLanes; ++k) rows[k] = (__m512i)codes[i + k];
        transpose(rows);
        for (int lane = 0; lane < kLanes; ++lane)
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + places[lane] + i), _mm512_cvtepi32_epi8(rows[lane]));
    }
}

}  // namespace
}  // namespace lowbit
#endif
