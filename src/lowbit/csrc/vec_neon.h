// Sixteen 32-bit lanes as four 128-bit quarters, on NEON with dot products (ARMv8.2), and with products of small matrices (i8mm) in the
// file that is compiled for these. vec_avx512.h says what each name means.
#pragma once
#include <arm_neon.h>

#include "number.h"

#define LOWBIT_UNROLL _Pragma("GCC unroll 8")
#define LOWBIT_INLINE inline __attribute__((always_inline))
#define LOWBIT_UNROLL_REPACK

namespace lowbit {
namespace {

constexpr int kQuarters = 4;

struct Bytes {
    uint32x4_t q[kQuarters];
};
typedef Bytes Ints;
struct Floats {
    float32x4_t q[kQuarters];
};

// 16 of 32 registers for sums, 4 for weights.
constexpr int kPanelTokens = 4;
constexpr int kPanelBlocks = 1;
#if defined(__ARM_FEATURE_MATMUL_INT8)
#define LOWBIT_MATRIX_PRODUCTS
constexpr int kWideBias = 0;
#else
// Dot products take both sides as signed; weights that exceed 127 are centred first.
constexpr int kWideBias = 128;
#endif

template <class Operation>
LOWBIT_INLINE Bytes each(Operation operation) {
    return {{operation(0), operation(1), operation(2), operation(3)}};
}
template <class Operation>
LOWBIT_INLINE Floats each_float(Operation operation) {
    return {{operation(0), operation(1), operation(2), operation(3)}};
}
inline uint8x16_t bytes_of(uint32x4_t v) { return vreinterpretq_u8_u32(v); }
inline uint32x4_t words_of(uint8x16_t v) { return vreinterpretq_u32_u8(v); }

inline Bytes load_bytes(const void* from) {
    return each([=](int i) { return words_of(vld1q_u8(static_cast<const uint8_t*>(from) + 16 * i)); });
}
inline void store_bytes(void* to, Bytes value) {
    for (int i = 0; i < kQuarters; ++i) vst1q_u8(static_cast<uint8_t*>(to) + 16 * i, bytes_of(value.q[i]));
}
LOWBIT_INLINE void fetch(const void* address) { __builtin_prefetch(address); }
LOWBIT_INLINE void fetch_second(const void* address) { __builtin_prefetch(address, 0, 2); }
LOWBIT_INLINE void fetch_to_write(const void* address) { __builtin_prefetch(address, 1); }

template <int kRight, int kMask>
inline Bytes part(Bytes v) {
    return each([=](int i) {
        uint8x16_t moved = bytes_of(v.q[i]);
        if constexpr (kRight > 0) moved = vshrq_n_u8(moved, kRight);
        if constexpr (kRight < 0) moved = vshlq_n_u8(moved, -kRight);
        return words_of(vandq_u8(moved, vdupq_n_u8(kMask)));
    });
}
inline Bytes merge(Bytes a, Bytes b) {
    return each([=](int i) { return vorrq_u32(a.q[i], b.q[i]); });
}
inline Bytes subtract_bytes(Bytes a, Bytes b) {
    return each([=](int i) { return words_of(vsubq_u8(bytes_of(a.q[i]), bytes_of(b.q[i]))); });
}
inline Ints splat_ints(int32_t value) {
    return each([=](int) { return vdupq_n_u32(static_cast<uint32_t>(value)); });
}
inline Ints multiply_ints(Ints a, Ints b) {
    return each([=](int i) { return vmulq_u32(a.q[i], b.q[i]); });
}
inline Ints widen_bytes(const uint8_t* from) {
    const uint8x16_t bytes = vld1q_u8(from);
    const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_u8(vget_high_u8(bytes));
    return {{vmovl_u16(vget_low_u16(low)), vmovl_u16(vget_high_u16(low)), vmovl_u16(vget_low_u16(high)), vmovl_u16(vget_high_u16(high))}};
}
inline Ints subtract_ints(Ints a, Ints b) {
    return each([=](int i) { return vsubq_u32(a.q[i], b.q[i]); });
}
inline Ints add_ints(Ints a, Ints b) {
    return each([=](int i) { return vaddq_u32(a.q[i], b.q[i]); });
}
inline Bytes spread_bytes(const uint8_t* from) { return multiply_ints(widen_bytes(from), splat_ints(0x01010101)); }

template <bool kWide>
inline Ints dot(Ints sums, Bytes weights, Ints x) {
    return each([=](int i) {
        uint8x16_t w = bytes_of(weights.q[i]);
        const int32x4_t before = vreinterpretq_s32_u32(sums.q[i]);
        const int8x16_t four = vreinterpretq_s8_u32(x.q[i]);
#if defined(LOWBIT_MATRIX_PRODUCTS)
        return vreinterpretq_u32_s32(vusdotq_s32(before, w, four));
#else
        if (kWide) w = veorq_u8(w, vdupq_n_u8(0x80));
        return vreinterpretq_u32_s32(vdotq_s32(before, vreinterpretq_s8_u8(w), four));
#endif
    });
}

inline Floats to_floats(Ints v) {
    return each_float([=](int i) { return vcvtq_f32_s32(vreinterpretq_s32_u32(v.q[i])); });
}
inline Floats splat_floats(float value) {
    return each_float([=](int) { return vdupq_n_f32(value); });
}
inline Floats multiply(Floats a, Floats b) {
    return each_float([=](int i) { return vmulq_f32(a.q[i], b.q[i]); });
}
inline Floats multiply_add(Floats a, Floats b, Floats c) {
    return each_float([=](int i) { return vfmaq_f32(c.q[i], a.q[i], b.q[i]); });
}
inline Floats add(Floats a, Floats b) {
    return each_float([=](int i) { return vaddq_f32(a.q[i], b.q[i]); });
}
inline Floats load_floats(const float* from) {
    return each_float([=](int i) { return vld1q_f32(from + 4 * i); });
}
inline void store_floats(float* to, Floats value) {
    for (int i = 0; i < kQuarters; ++i) vst1q_f32(to + 4 * i, value.q[i]);
}
inline void stream_floats(float* to, Floats value) { store_floats(to, value); }
inline void settle_streams() {}

inline uint16x4_t load_eighth(const void* from, int i) { return vld1_u16(static_cast<const uint16_t*>(from) + 4 * i); }
inline Floats halves_to_floats(const void* from) {
    return each_float([=](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(load_eighth(from, i))); });
}
inline Floats brains_to_floats(const void* from) {
    return each_float([=](int i) { return vreinterpretq_f32_u32(vshll_n_u16(load_eighth(from, i), 16)); });
}
inline Floats even_brains(Bytes v) {
    return each_float([=](int i) { return vreinterpretq_f32_u32(vshlq_n_u32(v.q[i], 16)); });
}
inline Floats odd_brains(Bytes v) {
    return each_float([=](int i) { return vreinterpretq_f32_u32(vandq_u32(v.q[i], vdupq_n_u32(0xffff0000u))); });
}
inline Floats exponents_to_floats(const uint8_t* from) {
    const Ints wide = widen_bytes(from);
    return each_float([=](int i) { return vreinterpretq_f32_u32(vshlq_n_u32(wide.q[i], 23)); });
}
// E4M3 through fp16, whose exponent is biased by 8 more.
inline Floats e4m3_to_floats(const uint8_t* from) {
    const Ints wide = widen_bytes(from);
    return each_float([=](int i) {
        const uint32x4_t sign = vshlq_n_u32(vandq_u32(wide.q[i], vdupq_n_u32(0x80)), 8);
        const uint32x4_t rest = vshlq_n_u32(vandq_u32(wide.q[i], vdupq_n_u32(0x7f)), 7);
        return vmulq_n_f32(vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32(vorrq_u32(sign, rest)))), 256.0f);
    });
}
inline void floats_to_halves(void* to, Floats value) {
    for (int i = 0; i < kQuarters; ++i) vst1_u16(static_cast<uint16_t*>(to) + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(value.q[i])));
}
inline void floats_to_brains(void* to, Floats value) {
    alignas(16) float values[16];
    store_floats(values, value);
    for (int i = 0; i < 16; ++i) static_cast<uint16_t*>(to)[i] = to_bf16(values[i]);
}

// Up to 64 entries lie in registers; longer tables are read four registers at a time, where indices out of reach give 0.
struct Table {
    const uint8_t* bytes;
};
inline Table load_table(const uint8_t* bytes) { return {bytes}; }
inline uint8x16x4_t table_part(const Table& table, int i) { return vld1q_u8_x4(table.bytes + 64 * i); }
template <int kBits>
inline Bytes look_up(const Table& table, Bytes codes) {
    if constexpr (kBits <= 4) {
        const uint8x16_t entries = vld1q_u8(table.bytes);
        return each([=](int i) { return words_of(vqtbl1q_u8(entries, bytes_of(codes.q[i]))); });
    }
    if constexpr (kBits <= 6) {
        const uint8x16x4_t entries = table_part(table, 0);
        return each([=](int i) { return words_of(vqtbl4q_u8(entries, bytes_of(codes.q[i]))); });
    }
    Bytes out = each([=](int i) { return words_of(vqtbl4q_u8(table_part(table, 0), bytes_of(codes.q[i]))); });
    for (int k = 1; k < 4; ++k) {
        const uint8x16x4_t entries = table_part(table, k);
        for (int i = 0; i < kQuarters; ++i) {
            const uint8x16_t index = vsubq_u8(bytes_of(codes.q[i]), vdupq_n_u8(static_cast<uint8_t>(64 * k)));
            out.q[i] = vorrq_u32(out.q[i], words_of(vqtbl4q_u8(entries, index)));
        }
    }
    return out;
}

template <int kInput>
inline Ints byte_of(Bytes v) {
    return each([=](int i) {
        uint32x4_t moved = v.q[i];
        if constexpr (kInput > 0) moved = vshrq_n_u32(moved, 8 * kInput);
        return vandq_u32(moved, vdupq_n_u32(0xff));
    });
}
template <int kBits>
inline Floats look_up_floats(const float* levels, Ints codes) {
    alignas(16) uint32_t index[16];
    alignas(16) float values[16];
    store_bytes(index, codes);
    for (int i = 0; i < 16; ++i) values[i] = levels[index[i]];
    return load_floats(values);
}

inline void floats_to_bytes(int8_t* to, Floats x, Floats inverse) {
    int16x4_t narrow[kQuarters];
    for (int i = 0; i < kQuarters; ++i) narrow[i] = vmovn_s32(vcvtnq_s32_f32(vmulq_f32(x.q[i], inverse.q[i])));
    vst1q_s8(to, vcombine_s8(vmovn_s16(vcombine_s16(narrow[0], narrow[1])), vmovn_s16(vcombine_s16(narrow[2], narrow[3]))));
}
inline Floats absolute_most(Floats most, Floats x) {
    return each_float([=](int i) { return vmaxnmq_f32(most.q[i], vabsq_f32(x.q[i])); });
}
inline float most_of(Floats v) {
    return vmaxvq_f32(vmaxnmq_f32(vmaxnmq_f32(v.q[0], v.q[1]), vmaxnmq_f32(v.q[2], v.q[3])));
}
inline float sum_of(Floats v) { return vaddvq_f32(vaddq_f32(vaddq_f32(v.q[0], v.q[1]), vaddq_f32(v.q[2], v.q[3]))); }

}  // namespace
}  // namespace lowbit
