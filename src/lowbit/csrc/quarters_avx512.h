// Sixteen rows of four words of 32 bits as four columns of sixteen, for whoever has rows of 16 bytes. Included by AVX-512's files.
#pragma once
#include <immintrin.h>

namespace lowbit {
namespace {

// quarter(row) gives the 16 bytes of a row, put(i, column) takes the columns.
template <class Quarter, class Put>
inline __attribute__((always_inline)) void transpose_quarters(const Quarter& quarter, const Put& put) {
    const auto four = [&](int row) {
        __m512i v = _mm512_castsi128_si512(quarter(row));
        v = _mm512_inserti32x4(v, quarter(row + 4), 1);
        return _mm512_inserti32x4(_mm512_inserti32x4(v, quarter(row + 8), 2), quarter(row + 12), 3);
    };
    const __m512i a = four(0), b = four(1), c = four(2), d = four(3);
    const __m512i low = _mm512_unpacklo_epi32(a, b), high = _mm512_unpackhi_epi32(a, b);
    const __m512i other_low = _mm512_unpacklo_epi32(c, d), other_high = _mm512_unpackhi_epi32(c, d);
    put(0, _mm512_unpacklo_epi64(low, other_low));
    put(1, _mm512_unpackhi_epi64(low, other_low));
    put(2, _mm512_unpacklo_epi64(high, other_high));
    put(3, _mm512_unpackhi_epi64(high, other_high));
}

}  // namespace
}  // namespace lowbit
