// One segment of eight tokens rounded to int8 at once, lanes being tokens wherever something is summed or compared.
//
// A token by itself needs three reductions across lanes for its 32 numbers and eight stores of four bytes, which took a tenth of
// prefill. Eight of them share three steps of a tree for the largest and one transposition, whose rows are the tile as product.h
// draws it; sums come from the same dot product that the weights use.
#pragma once
#include "product.h"

namespace lowbit {
namespace {

constexpr int kTogether = 8;

// Lane t: the largest lane of m[t], all of them non-negative floats as integers, so that NaN and infinity are the largest.
inline __m256i most_of_each(const __m256i m[kTogether]) {
    __m256i two[4], four[2];
    for (int i = 0; i < 4; ++i)
        two[i] = _mm256_max_epu32(_mm256_unpacklo_epi32(m[2 * i], m[2 * i + 1]), _mm256_unpackhi_epi32(m[2 * i], m[2 * i + 1]));
    for (int i = 0; i < 2; ++i)
        four[i] = _mm256_max_epu32(_mm256_unpacklo_epi64(two[2 * i], two[2 * i + 1]), _mm256_unpackhi_epi64(two[2 * i], two[2 * i + 1]));
    return _mm256_max_epu32(_mm256_permute2x128_si256(four[0], four[1], 0x20), _mm256_permute2x128_si256(four[0], four[1], 0x31));
}

// Row k: lane k of every vector.
inline void transpose(__m256i v[kTogether]) {
    __m256i a[kTogether], b[kTogether];
    for (int i = 0; i < 4; ++i) {
        a[2 * i] = _mm256_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
        a[2 * i + 1] = _mm256_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i)
        for (int k = 0; k < 2; ++k) {
            b[4 * i + 2 * k] = _mm256_unpacklo_epi64(a[4 * i + k], a[4 * i + k + 2]);
            b[4 * i + 2 * k + 1] = _mm256_unpackhi_epi64(a[4 * i + k], a[4 * i + k + 2]);
        }
    for (int i = 0; i < 4; ++i) {
        v[i] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x20);
        v[i + 4] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x31);
    }
}

// Numbers [source, source + segment) of eight tokens, `stride` apart, to `bytes` [segment / 4][8 tokens][4], with scales and sums.
inline void round_together(const float* source, int64_t stride, int64_t segment, int32_t* bytes, float* scales, int32_t* sums) {
    __m256i most[kTogether];
    for (int t = 0; t < kTogether; ++t) {
        const float* x = source + t * stride;
        const __m512i size = _mm512_set1_epi32(0x7fffffff);
        __m512i all = _mm512_setzero_si512();
        for (int64_t i = 0; i < segment; i += kBlockRows) all = _mm512_max_epu32(all, _mm512_and_si512(_mm512_loadu_si512(x + i), size));
        most[t] = _mm256_max_epu32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    }
    const __m256i largest = most_of_each(most);
    const __mmask8 finite = _mm256_cmplt_epu32_mask(largest, _mm256_set1_epi32(0x7f800000));
    const __m256 value = _mm256_castsi256_ps(largest), full = _mm256_set1_ps(127.0f);
    const __mmask8 useful = finite & _mm256_test_epi32_mask(largest, largest);
    alignas(32) float inverses[kTogether];
    _mm256_store_ps(inverses, _mm256_maskz_div_ps(useful, full, value));
    _mm256_storeu_ps(scales, _mm256_mask_div_ps(_mm256_set1_ps(__builtin_nanf("")), finite, value, full));
    __m256i total = _mm256_setzero_si256();
    for (int64_t i = 0; i < segment; i += 2 * kBlockRows, bytes += kTogether * kTogether) {
        __m256i rows[kTogether];
        for (int t = 0; t < kTogether; ++t) {
            const float* x = source + t * stride + i;
            const __m512 inverse = _mm512_set1_ps(inverses[t]);
            const auto narrow = [&](const float* from) {
                return _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(from), inverse)));
            };
            rows[t] = _mm256_inserti128_si256(_mm256_castsi128_si256(narrow(x)), narrow(x + kBlockRows), 1);
        }
        transpose(rows);
        for (int k = 0; k < kTogether; ++k) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(bytes + k * kTogether), rows[k]);
            total = _mm256_dpbusd_epi32(total, _mm256_set1_epi8(1), rows[k]);
        }
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums), total);
}

}  // namespace
}  // namespace lowbit
