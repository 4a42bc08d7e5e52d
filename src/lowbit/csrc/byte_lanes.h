// Sixteen sums of four products of bytes at a time: what attention over int8 keys and values is made of. The counterpart of
// vector_lanes.h for whole numbers; each instruction set's file compiles its own copy.
//
// A `Quads` holds four bytes for each of 16 lanes. dot_quads adds to every lane the four products of its unsigned and its signed
// bytes; AVX2 adds pairs in 16 bits, so there an unsigned byte up to 255 allows signed ones up to 63, and one up to 127 all. kShareByte
// is what an unsigned byte may reach next to any signed one.
// Sums that come from memory are only needed beside register tiles (attention_tiles.h), so AVX2 and NEON lack their operations.
#pragma once
#include "vector_lanes.h"

namespace lowbit {
namespace {

#if defined(LOWBIT_NEON_LANES)

// vector_neon.h

#elif defined(__AVX512F__)

constexpr int kQueryPlanes = 1, kQueryBits = 7;
constexpr float kShareByte = 255.0f;
struct I32 {
    __m512i v;
};
struct Quads {
    __m512i v;
};
inline I32 splat_int(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline I32 load_ints(const void* p) { return {_mm512_loadu_si512(p)}; }
inline I32 operator+(I32 a, I32 b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Quads load_quads(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline Quads splat_quad(const uint8_t* p) {
    int32_t four;
    memcpy(&four, p, sizeof four);
    return {_mm512_set1_epi32(four)};
}
inline I32 dot_quads(I32 sum, Quads unsigned_bytes, Quads signed_bytes) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(unsigned_bytes.v), "v"(signed_bytes.v));
    return sum;
}
template <int kBits>
inline I32 shift_left(I32 x) {
    return {_mm512_slli_epi32(x.v, kBits)};
}
inline F32 to_floats(I32 x) { return {_mm512_cvtepi32_ps(x.v)}; }
// Whole numbers below 2^14, from their nearest float, as two bytes of 7 bits each.
inline void store_planes(uint8_t* high, uint8_t* low, F32 x) {
    const __m512i whole = _mm512_cvtps_epi32(x.v);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(high), _mm512_cvtepi32_epi8(_mm512_srli_epi32(whole, 7)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(low), _mm512_cvtepi32_epi8(_mm512_and_si512(whole, _mm512_set1_epi32(127))));
}
// Whole numbers up to 255, from their nearest float, as one byte each. More counts as 255: next to scores of 1e4 and above the largest
// probability is not exactly 1.
inline void store_plane(uint8_t* to, F32 x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(x.v)));
}
// Packing works within quarters of a vector, so that the fours of the four vectors come out in turn: they are put in order at the end.
inline __m512i packed_order() { return _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15); }
inline void store_plane(uint8_t* to, const F32 (&x)[4]) {
    const __m512i first = _mm512_packus_epi32(_mm512_cvtps_epi32(x[0].v), _mm512_cvtps_epi32(x[1].v));
    const __m512i second = _mm512_packus_epi32(_mm512_cvtps_epi32(x[2].v), _mm512_cvtps_epi32(x[3].v));
    _mm512_storeu_si512(to, _mm512_permutexvar_epi32(packed_order(), _mm512_packus_epi16(first, second)));
}
inline void store_planes(uint8_t* high, uint8_t* low, const F32 (&x)[4]) {
    const __m512i order = packed_order(), bits = _mm512_set1_epi16(127);
    const __m512i first = _mm512_packus_epi32(_mm512_cvtps_epi32(x[0].v), _mm512_cvtps_epi32(x[1].v));
    const __m512i second = _mm512_packus_epi32(_mm512_cvtps_epi32(x[2].v), _mm512_cvtps_epi32(x[3].v));
    const __m512i upper = _mm512_packus_epi16(_mm512_srli_epi16(first, 7), _mm512_srli_epi16(second, 7));
    const __m512i lower = _mm512_packus_epi16(_mm512_and_si512(first, bits), _mm512_and_si512(second, bits));
    _mm512_storeu_si512(high, _mm512_permutexvar_epi32(order, upper));
    _mm512_storeu_si512(low, _mm512_permutexvar_epi32(order, lower));
}

#elif defined(__AVX2__)

#if defined(__AVXVNNI__)
constexpr int kQueryPlanes = 1, kQueryBits = 7;
constexpr float kShareByte = 255.0f;
#else
constexpr int kQueryPlanes = 2, kQueryBits = 6;
constexpr float kShareByte = 127.0f;
#endif
struct I32 {
    __m256i a, b;
};
struct Quads {
    __m256i a, b;
};
inline I32 splat_int(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Quads load_quads(const uint8_t* p) {
    const __m256i* q = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
inline Quads splat_quad(const uint8_t* p) {
    int32_t four;
    memcpy(&four, p, sizeof four);
    return {_mm256_set1_epi32(four), _mm256_set1_epi32(four)};
}
inline __m256i add_four_products(__m256i sum, __m256i unsigned_bytes, __m256i signed_bytes) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sum, unsigned_bytes, signed_bytes);
#else
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(unsigned_bytes, signed_bytes), _mm256_set1_epi16(1)));
#endif
}
inline I32 dot_quads(I32 sum, Quads unsigned_bytes, Quads signed_bytes) {
    return {add_four_products(sum.a, unsigned_bytes.a, signed_bytes.a), add_four_products(sum.b, unsigned_bytes.b, signed_bytes.b)};
}
template <int kBits>
inline I32 shift_left(I32 x) {
    return {_mm256_slli_epi32(x.a, kBits), _mm256_slli_epi32(x.b, kBits)};
}
inline F32 to_floats(I32 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline __m256i whole_shorts(F32 x) {
    const __m256i shorts = _mm256_packus_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));  // 0-3 8-11 4-7 12-15
    return _mm256_permute4x64_epi64(shorts, 0xD8);
}
inline void store_shorts(uint8_t* to, __m256i shorts) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(_mm256_castsi256_si128(shorts), _mm256_extracti128_si256(shorts, 1)));
}
inline void store_planes(uint8_t* high, uint8_t* low, F32 x) {
    const __m256i shorts = whole_shorts(x);
    store_shorts(high, _mm256_srli_epi16(shorts, 7));
    store_shorts(low, _mm256_and_si256(shorts, _mm256_set1_epi16(127)));
}
inline void store_plane(uint8_t* to, F32 x) { store_shorts(to, whole_shorts(x)); }

#else

constexpr int kQueryPlanes = 1, kQueryBits = 7;
constexpr float kShareByte = 255.0f;
struct I32 {
    int32_t v[kLane];
};
struct Quads {
    uint8_t v[4 * kLane];
};
inline I32 splat_int(int32_t x) {
    I32 out;
    for (int i = 0; i < kLane; ++i) out.v[i] = x;
    return out;
}
inline I32 load_ints(const void* p) {
    I32 out;
    memcpy(out.v, p, sizeof out.v);
    return out;
}
inline I32 operator+(I32 a, I32 b) {
    for (int i = 0; i < kLane; ++i) a.v[i] += b.v[i];
    return a;
}
inline Quads load_quads(const uint8_t* p) {
    Quads out;
    memcpy(out.v, p, sizeof out.v);
    return out;
}
inline Quads splat_quad(const uint8_t* p) {
    Quads out;
    for (int i = 0; i < kLane; ++i) memcpy(out.v + 4 * i, p, 4);
    return out;
}
inline I32 dot_quads(I32 sum, Quads unsigned_bytes, Quads signed_bytes) {
    for (int i = 0; i < kLane; ++i)
        for (int k = 0; k < 4; ++k) sum.v[i] += unsigned_bytes.v[4 * i + k] * static_cast<int8_t>(signed_bytes.v[4 * i + k]);
    return sum;
}
template <int kBits>
inline I32 shift_left(I32 x) {
    for (int i = 0; i < kLane; ++i) x.v[i] *= 1 << kBits;
    return x;
}
inline F32 to_floats(I32 x) {
    return each([&](int i) { return static_cast<float>(x.v[i]); });
}
inline void store_planes(uint8_t* high, uint8_t* low, F32 x) {
    for (int i = 0; i < kLane; ++i) {
        const int whole = x.v[i] >= 0.0f ? static_cast<int>(nearbyintf(x.v[i])) : 0;
        high[i] = static_cast<uint8_t>(whole >> 7);
        low[i] = static_cast<uint8_t>(whole & 127);
    }
}
inline void store_plane(uint8_t* to, F32 x) {
    for (int i = 0; i < kLane; ++i) to[i] = static_cast<uint8_t>(nearbyintf(x.v[i] < 255.0f ? x.v[i] : 255.0f));
}

#endif

#if defined(LOWBIT_NEON_LANES) || !defined(__AVX512F__)
inline void store_plane(uint8_t* to, const F32 (&x)[4]) {
    for (int i = 0; i < 4; ++i) store_plane(to + i * kLane, x[i]);
}
inline void store_planes(uint8_t* high, uint8_t* low, const F32 (&x)[4]) {
    for (int i = 0; i < 4; ++i) store_planes(high + i * kLane, low + i * kLane, x[i]);
}
#endif

}  // namespace
}  // namespace lowbit
