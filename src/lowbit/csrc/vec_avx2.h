// Sixteen 32-bit lanes as two 256-bit halves, on AVX2 with FMA and F16C. vec_avx512.h says what each name means.
#pragma once
#include <immintrin.h>

#include "number.h"

#define LOWBIT_UNROLL _Pragma("GCC unroll 8")
#define LOWBIT_INLINE inline __attribute__((always_inline))
#define LOWBIT_UNROLL_REPACK

namespace lowbit {
namespace {

struct Bytes {
    __m256i h[2];
};
typedef Bytes Ints;
struct Floats {
    __m256 h[2];
};

// Half the registers of AVX-512 and two of them per block.
constexpr int kPanelBlocks = 1;
#if defined(__AVXVNNI__)
constexpr int kPanelTokens = 6;  // a sum waits five cycles for itself, and two begin in each
constexpr int kWideBias = 0;
#else
constexpr int kPanelTokens = 3;  // 8 sums of each kind would already spill
// Products of pairs saturate at 16 bits when weights exceed 127; those are made signed first.
constexpr int kWideBias = 128;
#endif

template <class Operation>
inline Bytes each(Operation operation) {
    return {{operation(0), operation(1)}};
}
template <class Operation>
inline Floats each_float(Operation operation) {
    return {{operation(0), operation(1)}};
}

inline Bytes load_bytes(const void* from) {
    return each([=](int i) { return _mm256_loadu_si256(static_cast<const __m256i*>(from) + i); });
}
inline void store_bytes(void* to, Bytes value) {
    _mm256_storeu_si256(static_cast<__m256i*>(to), value.h[0]);
    _mm256_storeu_si256(static_cast<__m256i*>(to) + 1, value.h[1]);
}
// Always inlined: gcc takes a call that only prefetches for one without effect and drops it.
LOWBIT_INLINE void fetch(const void* address) { _mm_prefetch(static_cast<const char*>(address), _MM_HINT_T0); }
LOWBIT_INLINE void fetch_second(const void* address) { _mm_prefetch(static_cast<const char*>(address), _MM_HINT_T1); }
// As a word of assembly: gcc makes a read of it where no flag names the instruction, which every processor with AVX2 has or passes over.
LOWBIT_INLINE void fetch_to_write(const void* address) { asm volatile("prefetchw %0" ::"m"(*static_cast<const char*>(address))); }

template <int kRight, int kMask>
inline Bytes part(Bytes v) {
    return each([=](int i) {
        __m256i half = v.h[i];
        if (kRight > 0) half = _mm256_srli_epi16(half, kRight > 0 ? kRight : 0);
        if (kRight < 0) half = _mm256_slli_epi16(half, kRight < 0 ? -kRight : 0);
        return _mm256_and_si256(half, _mm256_set1_epi8(static_cast<char>(kMask)));
    });
}
inline Bytes merge(Bytes a, Bytes b) {
    return each([=](int i) { return _mm256_or_si256(a.h[i], b.h[i]); });
}
inline Bytes subtract_bytes(Bytes a, Bytes b) {
    return each([=](int i) { return _mm256_sub_epi8(a.h[i], b.h[i]); });
}
inline Ints splat_ints(int32_t value) {
    return each([=](int) { return _mm256_set1_epi32(value); });
}
inline Ints multiply_ints(Ints a, Ints b) {
    return each([=](int i) { return _mm256_mullo_epi32(a.h[i], b.h[i]); });
}
inline Ints widen_bytes(const uint8_t* from) {
    return each([=](int i) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + 8 * i))); });
}
inline Ints subtract_ints(Ints a, Ints b) {
    return each([=](int i) { return _mm256_sub_epi32(a.h[i], b.h[i]); });
}
inline Ints add_ints(Ints a, Ints b) {
    return each([=](int i) { return _mm256_add_epi32(a.h[i], b.h[i]); });
}
inline Bytes spread_bytes(const uint8_t* from) { return multiply_ints(widen_bytes(from), splat_ints(0x01010101)); }

#if defined(__AVXVNNI__)
template <bool kWide>
inline Ints dot(Ints sums, Bytes weights, Ints x) {
    return each([=](int i) { return _mm256_dpbusd_avx_epi32(sums.h[i], weights.h[i], x.h[i]); });
}
#else
template <bool kWide>
inline Ints dot(Ints sums, Bytes weights, Ints x) {
    return each([=](int i) {
        __m256i unsigned_side = weights.h[i], signed_side = x.h[i];
        if (kWide) {
            const __m256i centred = _mm256_xor_si256(weights.h[i], _mm256_set1_epi8(-128));
            unsigned_side = _mm256_abs_epi8(centred);
            signed_side = _mm256_sign_epi8(x.h[i], centred);
        }
        const __m256i pairs = _mm256_maddubs_epi16(unsigned_side, signed_side);
        return _mm256_add_epi32(sums.h[i], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    });
}
#endif

inline Floats to_floats(Ints v) {
    return each_float([=](int i) { return _mm256_cvtepi32_ps(v.h[i]); });
}
inline Floats splat_floats(float value) {
    return each_float([=](int) { return _mm256_set1_ps(value); });
}
inline Floats multiply(Floats a, Floats b) {
    return each_float([=](int i) { return _mm256_mul_ps(a.h[i], b.h[i]); });
}
inline Floats multiply_add(Floats a, Floats b, Floats c) {
    return each_float([=](int i) { return _mm256_fmadd_ps(a.h[i], b.h[i], c.h[i]); });
}
inline Floats add(Floats a, Floats b) {
    return each_float([=](int i) { return _mm256_add_ps(a.h[i], b.h[i]); });
}
inline Floats load_floats(const float* from) {
    return each_float([=](int i) { return _mm256_loadu_ps(from + 8 * i); });
}
inline void store_floats(float* to, Floats value) {
    _mm256_storeu_ps(to, value.h[0]);
    _mm256_storeu_ps(to + 8, value.h[1]);
}
inline void stream_floats(float* to, Floats value) {
    _mm256_stream_ps(to, value.h[0]);
    _mm256_stream_ps(to + 8, value.h[1]);
}
inline void settle_streams() { _mm_sfence(); }

inline __m128i load_quarter(const void* from, int i) { return _mm_loadu_si128(static_cast<const __m128i*>(from) + i); }
inline Floats halves_to_floats(const void* from) {
    return each_float([=](int i) { return _mm256_cvtph_ps(load_quarter(from, i)); });
}
inline Floats brains_to_floats(const void* from) {
    return each_float([=](int i) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_quarter(from, i)), 16)); });
}
inline Floats even_brains(Bytes v) {
    return each_float([=](int i) { return _mm256_castsi256_ps(_mm256_slli_epi32(v.h[i], 16)); });
}
inline Floats odd_brains(Bytes v) {
    return each_float([=](int i) {
        return _mm256_castsi256_ps(_mm256_and_si256(v.h[i], _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
    });
}
inline Floats exponents_to_floats(const uint8_t* from) {
    const Ints wide = widen_bytes(from);
    return each_float([=](int i) { return _mm256_castsi256_ps(_mm256_slli_epi32(wide.h[i], 23)); });
}
inline Floats e4m3_to_floats(const uint8_t* from) {
    alignas(32) float values[16];
    for (int i = 0; i < 16; ++i) values[i] = from_e4m3(from[i]);
    return load_floats(values);
}
inline void floats_to_halves(void* to, Floats value) {
    for (int i = 0; i < 2; ++i) _mm_storeu_si128(static_cast<__m128i*>(to) + i, _mm256_cvtps_ph(value.h[i], 0));
}
inline void floats_to_brains(void* to, Floats value) {
    alignas(32) float values[16];
    store_floats(values, value);
    for (int i = 0; i < 16; ++i) static_cast<uint16_t*>(to)[i] = to_bf16(values[i]);
}

struct Table {
    const uint8_t* bytes;
};
inline Table load_table(const uint8_t* bytes) { return {bytes}; }
template <int kBits>
inline Bytes look_up(const Table& table, Bytes codes) {
    if (kBits <= 4) {
        const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table.bytes)));
        return each([=](int i) { return _mm256_shuffle_epi8(both, codes.h[i]); });
    }
    alignas(32) uint8_t values[64];
    store_bytes(values, codes);
    for (uint8_t& value : values) value = table.bytes[value];
    return load_bytes(values);
}

template <int kInput>
inline Ints byte_of(Bytes v) {
    return each([=](int i) { return _mm256_and_si256(_mm256_srli_epi32(v.h[i], 8 * kInput), _mm256_set1_epi32(0xff)); });
}
template <int kBits>
inline Floats look_up_floats(const float* levels, Ints codes) {
    return each_float([=](int i) { return _mm256_i32gather_ps(levels, codes.h[i], 4); });
}

inline void floats_to_bytes(int8_t* to, Floats x, Floats inverse) {
    const auto whole = [=](int i) { return _mm256_cvtps_epi32(_mm256_mul_ps(x.h[i], inverse.h[i])); };
    // 0-3 8-11 4-7 12-15
    const __m256i shorts = _mm256_permute4x64_epi64(_mm256_packs_epi32(whole(0), whole(1)), 0xD8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(_mm256_castsi256_si128(shorts), _mm256_extracti128_si256(shorts, 1)));
}
inline Floats absolute_most(Floats most, Floats x) {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    return each_float([=](int i) { return _mm256_max_ps(most.h[i], _mm256_and_ps(magnitude, x.h[i])); });
}
inline float most_of(Floats v) {
    const __m256 eight = _mm256_max_ps(v.h[0], v.h[1]);
    __m128 most = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    most = _mm_max_ps(most, _mm_movehl_ps(most, most));
    return _mm_cvtss_f32(_mm_max_ss(most, _mm_shuffle_ps(most, most, 1)));
}
inline float sum_of(Floats v) {
    const __m256 eight = _mm256_add_ps(v.h[0], v.h[1]);
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_shuffle_ps(sum, sum, 1)));
}

}  // namespace
}  // namespace lowbit
