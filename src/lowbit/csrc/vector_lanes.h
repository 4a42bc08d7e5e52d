// Sixteen floats at a time, whatever the processor: one 512-bit register, two of 256 bits, four of 128, or an array that the compiler unrolls.
// Each instruction set's file includes this and compiles its own copy; everything is static.
//
// larger(a, b) and smaller(a, b) are b where a number is none (NEON: where either is), so a bound comes first and what may be NaN second.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "number.h"
#if defined(LOWBIT_NEON_LANES)
#include "vector_neon.h"
#endif

namespace lowbit {
namespace {

constexpr int kLane = 16;

#if defined(LOWBIT_NEON_LANES)

// vector_neon.h

#elif defined(__AVX512F__)

struct F32 {
    __m512 v;
};
inline F32 splat(float x) { return {_mm512_set1_ps(x)}; }
inline F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, F32 x) { _mm512_storeu_ps(p, x.v); }
inline __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1); }
inline F32 load_first(const float* p, int count) { return {_mm512_maskz_loadu_ps(first(count), p)}; }
inline void store_first(float* p, F32 x, int count) { _mm512_mask_storeu_ps(p, first(count), x.v); }
inline F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32 operator/(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F32 multiply_add(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F32 larger(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F32 smaller(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline float first_of(F32 x) { return _mm512_cvtss_f32(x.v); }
inline float sum_of(F32 x) { return _mm512_reduce_add_ps(x.v); }
inline float largest_of(F32 x) { return _mm512_reduce_max_ps(x.v); }
// Lane r of the result: what the lanes of row r come to. 45 instructions for sixteen rows, where each by itself takes ten and waits for them.
template <class Fold>
inline F32 fold_each(const float (*rows)[kLane], Fold fold) {
    __m512 pairs[8], fours[4], eights[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        const __m512 a = _mm512_load_ps(rows[2 * i]), b = _mm512_load_ps(rows[2 * i + 1]);
        pairs[i] = fold(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
        fours[i] = fold(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
        eights[i] = fold(_mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0x88), _mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0xdd));
    return {fold(_mm512_shuffle_f32x4(eights[0], eights[1], 0x88), _mm512_shuffle_f32x4(eights[0], eights[1], 0xdd))};
}
inline F32 round_near(F32 x) { return {_mm512_roundscale_ps(x.v, 0)}; }
inline F32 times_power(F32 x, F32 n) { return {_mm512_scalef_ps(x.v, n.v)}; }
inline F32 load_half(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline void store_half(uint16_t* p, F32 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x.v, 0)); }
inline F32 load_brain(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline F32 load_bytes(const int8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline void store_bytes(int8_t* p, F32 x) {  // rounded to nearest and saturated
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x.v)));
}
// x where from <= lane < to, else `other`.
inline F32 inside(F32 x, int from, int to, float other) {
    return {_mm512_mask_mov_ps(_mm512_set1_ps(other), static_cast<__mmask16>(first(to) & ~first(from)), x.v)};
}
inline F32 count_up() { return {_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)}; }
inline F32 select_negative(F32 sign, F32 yes, F32 no) {
    return {_mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(sign.v)), no.v, yes.v)};
}

#elif defined(__AVX2__)

struct F32 {
    __m256 a, b;
};
inline F32 splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F32 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F32 x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
inline F32 load_first(const float* p, int count) {
    float all[kLane] = {};
    memcpy(all, p, static_cast<size_t>(count) * sizeof(float));
    return load(all);
}
inline void store_first(float* p, F32 x, int count) {
    float all[kLane];
    store(all, x);
    memcpy(p, all, static_cast<size_t>(count) * sizeof(float));
}
inline F32 operator+(F32 x, F32 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F32 operator-(F32 x, F32 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F32 operator*(F32 x, F32 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F32 operator/(F32 x, F32 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F32 multiply_add(F32 x, F32 y, F32 z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline F32 larger(F32 x, F32 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F32 smaller(F32 x, F32 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline float first_of(F32 x) { return _mm256_cvtss_f32(x.a); }
inline float sum_of(F32 x) {
    const __m256 s = _mm256_add_ps(x.a, x.b);
    __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_add_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_add_ss(t, _mm_shuffle_ps(t, t, 1)));
}
inline float largest_of(F32 x) {
    const __m256 s = _mm256_max_ps(x.a, x.b);
    __m128 t = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_max_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_max_ss(t, _mm_shuffle_ps(t, t, 1)));
}
inline F32 round_near(F32 x) { return {_mm256_round_ps(x.a, 0 | 8), _mm256_round_ps(x.b, 0 | 8)}; }
inline __m256 power_of(__m256 n) {  // 2^n for whole n, 0 below the normal numbers
    n = _mm256_max_ps(n, _mm256_set1_ps(-127.0f));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline F32 times_power(F32 x, F32 n) { return {_mm256_mul_ps(x.a, power_of(n.a)), _mm256_mul_ps(x.b, power_of(n.b))}; }
inline F32 load_half(const uint16_t* p) {
    const __m128i* q = reinterpret_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
inline void store_half(uint16_t* p, F32 x) {
    __m128i* q = reinterpret_cast<__m128i*>(p);
    _mm_storeu_si128(q, _mm256_cvtps_ph(x.a, 0));
    _mm_storeu_si128(q + 1, _mm256_cvtps_ph(x.b, 0));
}
inline __m256 brain(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline F32 load_brain(const uint16_t* p) { return {brain(p), brain(p + 8)}; }
inline __m256 bytes_of(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline F32 load_bytes(const int8_t* p) { return {bytes_of(p), bytes_of(p + 8)}; }
inline void store_bytes(int8_t* p, F32 x) {
    const __m256i shorts = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));  // 0-3 8-11 4-7 12-15
    const __m256i ordered = _mm256_permute4x64_epi64(shorts, 0xD8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1)));
}
inline F32 inside(F32 x, int from, int to, float other) {
    float all[kLane];
    store(all, x);
    for (int i = 0; i < kLane; ++i) all[i] = i >= from && i < to ? all[i] : other;
    return load(all);
}
inline F32 count_up() { return {_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7), _mm256_setr_ps(8, 9, 10, 11, 12, 13, 14, 15)}; }
inline F32 select_negative(F32 s, F32 yes, F32 no) {
    return {_mm256_blendv_ps(no.a, yes.a, s.a), _mm256_blendv_ps(no.b, yes.b, s.b)};
}

#else

struct F32 {
    float v[kLane];
};
template <class Function>
inline F32 each(const Function& function) {
    F32 out;
    for (int i = 0; i < kLane; ++i) out.v[i] = function(i);
    return out;
}
inline F32 splat(float x) {
    return each([&](int) { return x; });
}
inline F32 load(const float* p) {
    return each([&](int i) { return p[i]; });
}
inline void store(float* p, F32 x) { memcpy(p, x.v, sizeof x.v); }
inline F32 load_first(const float* p, int count) {
    return each([&](int i) { return i < count ? p[i] : 0.0f; });
}
inline void store_first(float* p, F32 x, int count) { memcpy(p, x.v, static_cast<size_t>(count) * sizeof(float)); }
inline F32 operator+(F32 a, F32 b) {
    return each([&](int i) { return a.v[i] + b.v[i]; });
}
inline F32 operator-(F32 a, F32 b) {
    return each([&](int i) { return a.v[i] - b.v[i]; });
}
inline F32 operator*(F32 a, F32 b) {
    return each([&](int i) { return a.v[i] * b.v[i]; });
}
inline F32 operator/(F32 a, F32 b) {
    return each([&](int i) { return a.v[i] / b.v[i]; });
}
inline F32 multiply_add(F32 a, F32 b, F32 c) {
    return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline F32 larger(F32 a, F32 b) {
    return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline F32 smaller(F32 a, F32 b) {
    return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline float first_of(F32 x) { return x.v[0]; }
inline float sum_of(F32 x) {
    for (int half = kLane / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) x.v[i] += x.v[i + half];
    return x.v[0];
}
inline float largest_of(F32 x) {
    float most = x.v[0];
    for (int i = 1; i < kLane; ++i) most = x.v[i] > most ? x.v[i] : most;
    return most;
}
inline F32 round_near(F32 x) {  // |x| is far below 2^22 wherever this is used
    return each([&](int i) { return (x.v[i] + 12582912.0f) - 12582912.0f; });
}
inline F32 times_power(F32 x, F32 n) {
    return each([&](int i) {
        const int power = n.v[i] > -127.0f ? static_cast<int>(n.v[i] < 128.0f ? n.v[i] : 128.0f) : -127;
        return x.v[i] * float_of(static_cast<uint32_t>(power + 127) << 23);
    });
}
inline F32 load_half(const uint16_t* p) {
    return each([&](int i) { return from_fp16(p[i]); });
}
inline void store_half(uint16_t* p, F32 x) {
    for (int i = 0; i < kLane; ++i) p[i] = to_fp16(x.v[i]);
}
inline F32 load_brain(const uint16_t* p) {
    return each([&](int i) { return from_bf16(p[i]); });
}
inline F32 load_bytes(const int8_t* p) {
    return each([&](int i) { return static_cast<float>(p[i]); });
}
inline void store_bytes(int8_t* p, F32 x) {
    for (int i = 0; i < kLane; ++i)
        p[i] = static_cast<int8_t>(x.v[i] > 127.0f ? 127.0f : x.v[i] < -128.0f ? -128.0f : nearbyintf(x.v[i]));
}
inline F32 inside(F32 x, int from, int to, float other) {
    return each([&](int i) { return i >= from && i < to ? x.v[i] : other; });
}
inline F32 count_up() {
    return each([](int i) { return static_cast<float>(i); });
}
inline F32 select_negative(F32 s, F32 yes, F32 no) {
    return each([&](int i) { return std::signbit(s.v[i]) ? yes.v[i] : no.v[i]; });
}

#endif

// Lane i of the result: what the lanes of row i add up to, or the largest of them.
inline F32 each_sum(const float (*rows)[kLane], int count) {
#if defined(__AVX512F__)
    if (count == kLane) return fold_each(rows, [](__m512 a, __m512 b) { return _mm512_add_ps(a, b); });
#endif
    alignas(64) float sums[kLane] = {};
    for (int i = 0; i < count; ++i) sums[i] = sum_of(load(rows[i]));
    return load(sums);
}
inline F32 each_largest(const float (*rows)[kLane], int count) {
#if defined(__AVX512F__)
    if (count == kLane) return fold_each(rows, [](__m512 a, __m512 b) { return _mm512_max_ps(a, b); });
#endif
    alignas(64) float most[kLane] = {};
    for (int i = 0; i < count; ++i) most[i] = largest_of(load(rows[i]));
    return load(most);
}

inline F32 clamp_to(F32 x, float low, float high) { return smaller(splat(high), larger(splat(low), x)); }

// e^x = 2^n e^r with |r| <= ln 2 / 2; the polynomial is good to two units in the last place. Below -87 the result is 0 or nearly.
inline F32 exponential(F32 x) {
    x = clamp_to(x, -104.0f, 88.3f);
    const F32 n = round_near(x * splat(1.44269504f));
    F32 r = multiply_add(n, splat(-0.693359375f), x);
    r = multiply_add(n, splat(2.12194440e-4f), r);
    F32 p = splat(1.9875691500e-4f);
    p = multiply_add(p, r, splat(1.3981999507e-3f));
    p = multiply_add(p, r, splat(8.3334519073e-3f));
    p = multiply_add(p, r, splat(4.1665795894e-2f));
    p = multiply_add(p, r, splat(1.6666665459e-1f));
    p = multiply_add(p, r, splat(5.0000001201e-1f));
    p = multiply_add(p, r * r, r + splat(1.0f));
    return times_power(p, n);
}

// 2^x = 2^n 2^r with |r| <= 1/2, good to one unit in the last place; below -126 the result is 0 or nearly.
inline F32 power_of_two(F32 x) {
    x = larger(splat(-126.0f), x);
    const F32 n = round_near(x), r = x - n;
    F32 p = multiply_add(splat(1.327644094e-3f), r, splat(9.675541086e-3f));
    p = multiply_add(p, r, splat(5.550713370e-2f));
    p = multiply_add(p, r, splat(2.402211973e-1f));
    p = multiply_add(p, r, splat(6.931469670e-1f));
    p = multiply_add(p, r, splat(1.000000072f));
    return times_power(p, n);
}

// The same to 3 millionths, a twentieth of what a probability is rounded to as 14 bits.
inline F32 power_for_shares(F32 x) {
#if defined(__AVX512F__)
    // Both the reduction and the scaling by a power split x at the whole number below it.
    const F32 r = {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF)};
    F32 p = multiply_add(splat(1.353417e-2f), r, splat(5.201146e-2f));
    p = multiply_add(p, r, splat(2.4144276e-1f));
    p = multiply_add(p, r, splat(6.9300383e-1f));
    p = multiply_add(p, r, splat(1.00000259f));
    return times_power(p, x);
#else
    return power_of_two(x);
#endif
}

// 1 / x for 1 <= x < infinity, to one unit in the last place.
inline F32 inverse_of(F32 x) {
#if defined(__AVX512F__)
    // A division of 512 bits takes 16 cycles in which nothing else can be divided; 14 bits and one step of Newton's take four.
    const F32 near = {_mm512_rcp14_ps(x.v)};
    return multiply_add(near, {_mm512_fnmadd_ps(near.v, x.v, _mm512_set1_ps(1.0f))}, near);
#else
    return splat(1.0f) / x;
#endif
}

// Bounded above too, so that the inverse has a number to begin with.
inline F32 sigmoid(F32 x) { return inverse_of(splat(1.0f) + power_of_two(smaller(splat(126.0f), x * splat(-1.44269504f)))); }
inline F32 hyperbolic_tangent(F32 x) {
    return splat(1.0f) - splat(2.0f) * inverse_of(splat(1.0f) + exponential(x + x));
}

}  // namespace
}  // namespace lowbit
