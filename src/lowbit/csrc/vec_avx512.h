// Sixteen 32-bit lanes (64 bytes) on AVX-512 VNNI. vec_avx2.h and vec_portable.h hold the same names.
#pragma once
#include <immintrin.h>

#include "number.h"
#include "quarters_avx512.h"

// Loops over register arrays must vanish, or the arrays live in memory. Only where they fit the registers: the portable file would
// take minutes to compile for nothing.
#define LOWBIT_UNROLL _Pragma("GCC unroll 8")
#define LOWBIT_INLINE inline __attribute__((always_inline))
#define LOWBIT_UNROLL_REPACK _Pragma("GCC unroll 32")
#define LOWBIT_UNROLL_CLOSING _Pragma("GCC unroll 16")

namespace lowbit {
namespace {

typedef __m512i Bytes;   // 64 bytes: lane r holds 4 inputs of row r
typedef __m512i Ints;
typedef __m512 Floats;

// Tokens and blocks of the register tile: 16 integer sums; with 6 tokens and float sums in registers too, groups of 32 ran at 400
// instead of 530 GOP/s a core.
constexpr int kPanelTokens = 8;
constexpr int kPanelBlocks = 2;
constexpr int kWideBias = 0;  // the dot product takes weights as unsigned bytes, all 256 values

inline Bytes load_bytes(const void* from) { return _mm512_loadu_si512(from); }
inline void store_bytes(void* to, Bytes value) { _mm512_storeu_si512(to, value); }
// Always inlined: gcc takes a call that only prefetches for one without effect and drops it.
LOWBIT_INLINE void fetch(const void* address) { _mm_prefetch(static_cast<const char*>(address), _MM_HINT_T0); }
LOWBIT_INLINE void fetch_second(const void* address) { _mm_prefetch(static_cast<const char*>(address), _MM_HINT_T1); }
// As a word of assembly: gcc makes a read of it where no flag names the instruction, which every processor with AVX2 has or passes over.
LOWBIT_INLINE void fetch_to_write(const void* address) { asm volatile("prefetchw %0" ::"m"(*static_cast<const char*>(address))); }

// (v >> kRight) & kMask in each byte; a negative kRight shifts left.
template <int kRight, int kMask>
inline Bytes part(Bytes v) {
    if (kRight > 0) v = _mm512_srli_epi16(v, kRight > 0 ? kRight : 0);
    if (kRight < 0) v = _mm512_slli_epi16(v, kRight < 0 ? -kRight : 0);
    return _mm512_and_si512(v, _mm512_set1_epi8(static_cast<char>(kMask)));
}
inline Bytes merge(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
inline Bytes subtract_bytes(Bytes a, Bytes b) { return _mm512_sub_epi8(a, b); }

inline Ints splat_ints(int32_t value) { return _mm512_set1_epi32(value); }
inline Ints multiply_ints(Ints a, Ints b) { return _mm512_mullo_epi32(a, b); }
inline Ints widen_bytes(const uint8_t* from) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))); }
inline Ints subtract_ints(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
inline Ints add_ints(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
// Four copies of each row's byte.
inline Bytes spread_bytes(const uint8_t* from) { return _mm512_mullo_epi32(widen_bytes(from), splat_ints(0x01010101)); }

// sums + weights (unsigned) . x (signed, the same 4 inputs in every lane); kWide when weights exceed 127.
template <bool kWide>
inline Ints dot(Ints sums, Bytes weights, Ints x) {
    return _mm512_dpbusd_epi32(sums, weights, x);
}

inline Floats to_floats(Ints v) { return _mm512_cvtepi32_ps(v); }
inline Floats splat_floats(float value) { return _mm512_set1_ps(value); }
inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats load_floats(const float* from) { return _mm512_loadu_ps(from); }
inline void store_floats(float* to, Floats value) { _mm512_storeu_ps(to, value); }

inline __m256i load_half(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
inline Floats halves_to_floats(const void* from) { return _mm512_cvtph_ps(load_half(from)); }
inline Floats brains_to_floats(const void* from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_half(from)), 16));
}
// Even and odd bf16 of each 32-bit lane.
inline Floats even_brains(Bytes v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); }
inline Floats odd_brains(Bytes v) { return _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(0xffff0000u)))); }

inline Floats exponents_to_floats(const uint8_t* from) { return _mm512_castsi512_ps(_mm512_slli_epi32(widen_bytes(from), 23)); }
// E4M3 through fp16, whose exponent is biased by 8 more; the factor 256 is the caller's.
inline Floats e4m3_to_floats(const uint8_t* from) {
    const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x80)), 8);
    const __m256i rest = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x7f)), 7);
    return _mm512_mul_ps(_mm512_cvtph_ps(_mm256_or_si256(sign, rest)), _mm512_set1_ps(256.0f));
}

inline void floats_to_halves(void* to, Floats value) { _mm256_storeu_si256(static_cast<__m256i*>(to), _mm512_cvtps_ph(value, 0)); }
// Rounded to bf16: the upper half of each lane.
inline __m512i round_brains(Floats value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x00400000));
}
inline void floats_to_brains(void* to, Floats value) {
    _mm256_storeu_si256(static_cast<__m256i*>(to), _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_brains(value), 16)));
}
// Sixteen as bf16, then sixteen more.
inline Bytes join_brains(Floats first, Floats second) {
    const auto half = [](Floats value) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_brains(value), 16)); };
    return _mm512_inserti64x4(_mm512_castsi256_si512(half(first)), half(second), 1);
}
// A whole line past the caches, and the end of a thread's last such lines: another thread may read them behind its next barrier.
inline void stream_bytes(void* to, Bytes value) { _mm512_stream_si512(static_cast<__m512i*>(to), value); }
inline void stream_floats(float* to, Floats value) { _mm512_stream_ps(to, value); }
inline void settle_streams() { _mm_sfence(); }
// Both as bf16, side by side in each lane.
inline Bytes pair_brains(Floats even, Floats odd) {
    const __m512i upper = _mm512_and_si512(round_brains(odd), _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
    return _mm512_or_si512(_mm512_srli_epi32(round_brains(even), 16), upper);
}
// Sixteen rows of 16 words of 32 bits as 16 columns, one after another. A quarter of four rows at a time comes from memory.
inline void transpose_words(const uint16_t* const* rows, uint8_t* to) {
    for (int c = 0; c < 4; ++c) {
        const auto quarter = [&](int row) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[row] + 8 * c)); };
        transpose_quarters(quarter, [&](int i, __m512i column) { store_bytes(to + 256 * c + 64 * i, column); });
    }
}

// Codes to bytes through a table of 2^kBits entries.
struct Table {
    __m512i parts[4];
};
inline Table load_table(const uint8_t* bytes) {
    return {{load_bytes(bytes), load_bytes(bytes + 64), load_bytes(bytes + 128), load_bytes(bytes + 192)}};
}
#if defined(__AVX512VBMI__)
template <int kBits>
inline Bytes look_up(const Table& table, Bytes codes) {
    if (kBits <= 6) return _mm512_permutexvar_epi8(codes, table.parts[0]);
    const __m512i low = _mm512_permutex2var_epi8(table.parts[0], codes, table.parts[1]);
    const __m512i high = _mm512_permutex2var_epi8(table.parts[2], codes, table.parts[3]);
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(codes), low, high);
}
#else
// The entry of each code in the lower half of a lane of 16 bits: entries come in pairs, of which the lowest bit of the code takes one.
template <int kBits>
inline Bytes look_up_pairs(const Table& table, Bytes codes) {
    const Bytes pair = _mm512_srli_epi16(codes, 1), which = _mm512_slli_epi16(_mm512_and_si512(codes, _mm512_set1_epi16(1)), 3);
    Bytes found;
    if (kBits <= 6) {
        found = _mm512_permutexvar_epi16(pair, table.parts[0]);
    } else {
        const Bytes low = _mm512_permutex2var_epi16(table.parts[0], pair, table.parts[1]);
        const Bytes high = _mm512_permutex2var_epi16(table.parts[2], pair, table.parts[3]);
        found = _mm512_mask_blend_epi16(_mm512_test_epi16_mask(codes, _mm512_set1_epi16(128)), low, high);
    }
    return _mm512_and_si512(_mm512_srlv_epi16(found, which), _mm512_set1_epi16(255));
}
template <int kBits>
inline Bytes look_up(const Table& table, Bytes codes) {
    if (kBits <= 4) return _mm512_shuffle_epi8(_mm512_shuffle_i32x4(table.parts[0], table.parts[0], 0), codes);
    const Bytes even = look_up_pairs<kBits>(table, _mm512_and_si512(codes, _mm512_set1_epi16(255)));
    return _mm512_or_si512(even, _mm512_slli_epi16(look_up_pairs<kBits>(table, _mm512_srli_epi16(codes, 8)), 8));
}
#endif

inline Ints round_floats(Floats v) { return _mm512_cvtps_epi32(v); }

// Per row a factor and a zero point or minimum of 16 bits, spread for the two functions below. Splitting and joining both keep to the
// quarters of a register, so that nothing has to be put back in order.
struct RowFactors {
    __m512i factors[2], offsets[2];
};
inline RowFactors spread_factors(Ints factors, Ints offsets) {
    const auto twice = [](__m512i v) { return _mm512_or_si512(_mm512_slli_epi32(v, 16), _mm512_and_si512(v, _mm512_set1_epi32(0xffff))); };
    const __m512i f = twice(factors), o = twice(offsets);
    return {{_mm512_unpacklo_epi32(f, f), _mm512_unpackhi_epi32(f, f)}, {_mm512_unpacklo_epi32(o, o), _mm512_unpackhi_epi32(o, o)}};
}
inline __m512i spread_balance(const int16_t* balance) {
    int64_t four;
    memcpy(&four, balance, sizeof four);
    return _mm512_set1_epi64(four);
}
template <int kRight>
inline __m512i shift_rounded(__m512i v) {
    return kRight == 0 ? v : _mm512_srai_epi16(_mm512_add_epi16(v, _mm512_set1_epi16(static_cast<short>((1 << kRight) >> 1))), kRight);
}
// round((byte - offset) * balance * factor / 2^(15 + kRight)), saturated to signed bytes; the balance is that of the four inputs.
template <int kRight>
inline Bytes fold_bytes(Bytes v, const RowFactors& rows, const int16_t* balance) {
    const __m512i none = _mm512_setzero_si512(), four = spread_balance(balance);
    const auto whole = [&](__m512i bytes, int i) {
        return shift_rounded<kRight>(_mm512_mulhrs_epi16(_mm512_mullo_epi16(_mm512_sub_epi16(bytes, rows.offsets[i]), four), rows.factors[i]));
    };
    return _mm512_packs_epi16(whole(_mm512_unpacklo_epi8(v, none), 0), whole(_mm512_unpackhi_epi8(v, none), 1));
}
// round((byte * factor / 2^7 + offset) * balance / 2^7 / kFoldMinimum) for bytes up to 127.
constexpr float kFoldMinimum = 64.0f;
inline Bytes fold_minimum(Bytes v, const RowFactors& rows, const int16_t* balance) {
    const __m512i none = _mm512_setzero_si512(), four = _mm512_slli_epi16(spread_balance(balance), 8);
    // A balance of 1 would be 2^15 and so has no place: 2^15 - 1 is as good.
    const __m512i places = _mm512_min_epu16(four, _mm512_set1_epi16(0x7fff));
    const auto whole = [&](__m512i bytes, int i) {
        const __m512i sum = _mm512_add_epi16(_mm512_mulhrs_epi16(bytes, rows.factors[i]), rows.offsets[i]);
        return shift_rounded<6>(_mm512_mulhrs_epi16(sum, places));
    };
    return _mm512_packs_epi16(whole(_mm512_unpacklo_epi8(none, v), 0), whole(_mm512_unpackhi_epi8(none, v), 1));
}

// Input kInput (0..3) of each row as an integer.
template <int kInput>
inline Ints byte_of(Bytes v) {
    return _mm512_and_si512(_mm512_srli_epi32(v, 8 * kInput), _mm512_set1_epi32(0xff));
}
template <int kBits>
inline Floats look_up_floats(const float* levels, Ints codes) {
    if (kBits <= 4) return _mm512_permutexvar_ps(codes, _mm512_loadu_ps(levels));
    return _mm512_i32gather_ps(codes, levels, 4);
}

// x scaled and rounded half to even, as bytes; |x * inverse| <= 127.
inline void floats_to_bytes(int8_t* to, Floats x, Floats inverse) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(x, inverse))));
}
inline Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats square_root(Floats v) { return _mm512_sqrt_ps(v); }
inline Floats absolute_most(Floats most, Floats x) { return _mm512_max_ps(most, _mm512_abs_ps(x)); }
inline float most_of(Floats v) { return _mm512_reduce_max_ps(v); }
// Largest magnitude as bits, which order like the numbers do and keep what is none on top.
inline Ints larger_magnitude(Ints most, Floats x) { return _mm512_max_epi32(most, _mm512_castps_si512(_mm512_abs_ps(x))); }
inline float largest_magnitude(Ints most) { return float_of(static_cast<uint32_t>(_mm512_reduce_max_epi32(most))); }
// 64 numbers like floats_to_bytes, written as one line. Packing keeps to the quarters of a register; the permutation puts them in order.
inline void floats_to_line(int8_t* to, const float* x, Floats inverse) {
    const auto whole = [&](int i) { return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + 16 * i), inverse)); };
    const __m512i all = _mm512_packs_epi16(_mm512_packs_epi32(whole(0), whole(1)), _mm512_packs_epi32(whole(2), whole(3)));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi32(order, all));
}
inline float sum_of(Floats v) { return _mm512_reduce_add_ps(v); }

}  // namespace
}  // namespace lowbit
