// The names of vector_lanes.h and byte_lanes.h on NEON with dot products, and with those of mixed signs (i8mm) where the file is compiled
// for them: sixteen lanes as four registers.
#pragma once
#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace lowbit {
namespace {

struct F32 {
    float32x4_t v[4];
};
template <class Function>
inline F32 each(const Function& function) {
    return {{function(0), function(1), function(2), function(3)}};
}
inline F32 splat(float x) {
    return each([=](int) { return vdupq_n_f32(x); });
}
inline F32 load(const float* p) {
    return each([=](int i) { return vld1q_f32(p + 4 * i); });
}
inline void store(float* p, F32 x) {
    for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, x.v[i]);
}
inline F32 load_first(const float* p, int count) {
    float all[16] = {};
    memcpy(all, p, static_cast<size_t>(count) * sizeof(float));
    return load(all);
}
inline void store_first(float* p, F32 x, int count) {
    float all[16];
    store(all, x);
    memcpy(p, all, static_cast<size_t>(count) * sizeof(float));
}
inline F32 operator+(F32 a, F32 b) {
    return each([=](int i) { return vaddq_f32(a.v[i], b.v[i]); });
}
inline F32 operator-(F32 a, F32 b) {
    return each([=](int i) { return vsubq_f32(a.v[i], b.v[i]); });
}
inline F32 operator*(F32 a, F32 b) {
    return each([=](int i) { return vmulq_f32(a.v[i], b.v[i]); });
}
inline F32 operator/(F32 a, F32 b) {
    return each([=](int i) { return vdivq_f32(a.v[i], b.v[i]); });
}
inline F32 multiply_add(F32 a, F32 b, F32 c) {
    return each([=](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); });
}
inline F32 larger(F32 a, F32 b) {
    return each([=](int i) { return vmaxq_f32(a.v[i], b.v[i]); });
}
inline F32 smaller(F32 a, F32 b) {
    return each([=](int i) { return vminq_f32(a.v[i], b.v[i]); });
}
inline float first_of(F32 x) { return vgetq_lane_f32(x.v[0], 0); }
inline float sum_of(F32 x) { return vaddvq_f32(vaddq_f32(vaddq_f32(x.v[0], x.v[1]), vaddq_f32(x.v[2], x.v[3]))); }
inline float largest_of(F32 x) { return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.v[0], x.v[1]), vmaxq_f32(x.v[2], x.v[3]))); }
inline F32 round_near(F32 x) {
    return each([=](int i) { return vrndnq_f32(x.v[i]); });
}
inline F32 times_power(F32 x, F32 n) {
    return each([=](int i) {
        const int32x4_t power = vmaxq_s32(vcvtnq_s32_f32(n.v[i]), vdupq_n_s32(-127));
        return vmulq_f32(x.v[i], vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(power, vdupq_n_s32(127)), 23)));
    });
}
inline F32 load_half(const uint16_t* p) {
    return each([=](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))); });
}
inline void store_half(uint16_t* p, F32 x) {
    for (int i = 0; i < 4; ++i) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(x.v[i])));
}
inline F32 load_brain(const uint16_t* p) {
    return each([=](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)); });
}
inline F32 load_bytes(const int8_t* p) {
    const int8x16_t bytes = vld1q_s8(p);
    const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_s8(vget_high_s8(bytes));
    return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(low))),
             vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(high)))}};
}
inline void store_bytes(int8_t* p, F32 x) {  // rounded to nearest and saturated
    const int16x8_t low = vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(x.v[0])), vqmovn_s32(vcvtnq_s32_f32(x.v[1])));
    const int16x8_t high = vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(x.v[2])), vqmovn_s32(vcvtnq_s32_f32(x.v[3])));
    vst1q_s8(p, vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
}
inline F32 count_up() {
    const float first[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return load(first);
}
inline F32 inside(F32 x, int from, int to, float other) {
    const F32 lanes = count_up();
    return each([=](int i) {
        const uint32x4_t in = vandq_u32(vcgeq_f32(lanes.v[i], vdupq_n_f32(static_cast<float>(from))),
                                        vcltq_f32(lanes.v[i], vdupq_n_f32(static_cast<float>(to))));
        return vbslq_f32(in, x.v[i], vdupq_n_f32(other));
    });
}
inline F32 select_negative(F32 s, F32 yes, F32 no) {
    return each([=](int i) { return vbslq_f32(vcltzq_s32(vreinterpretq_s32_f32(s.v[i])), yes.v[i], no.v[i]); });
}

constexpr int kQueryPlanes = 1, kQueryBits = 7;
constexpr float kShareByte = 255.0f;
struct I32 {
    int32x4_t v[4];
};
struct Quads {
    uint8x16_t v[4];
};
inline I32 splat_int(int32_t x) { return {{vdupq_n_s32(x), vdupq_n_s32(x), vdupq_n_s32(x), vdupq_n_s32(x)}}; }
inline Quads load_quads(const uint8_t* p) { return {{vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}}; }
inline Quads splat_quad(const uint8_t* p) {
    uint32_t four;
    memcpy(&four, p, sizeof four);
    const uint8x16_t all = vreinterpretq_u8_u32(vdupq_n_u32(four));
    return {{all, all, all, all}};
}
#if defined(__ARM_FEATURE_MATMUL_INT8)
inline I32 dot_quads(I32 sum, Quads unsigned_bytes, Quads signed_bytes) {
    for (int i = 0; i < 4; ++i) sum.v[i] = vusdotq_s32(sum.v[i], unsigned_bytes.v[i], vreinterpretq_s8_u8(signed_bytes.v[i]));
    return sum;
}
#else
// Both sides of the instruction are signed: u s = (u - 128) s + 64 s + 64 s.
inline I32 dot_quads(I32 sum, Quads unsigned_bytes, Quads signed_bytes) {
    for (int i = 0; i < 4; ++i) {
        const int8x16_t s = vreinterpretq_s8_u8(signed_bytes.v[i]), half = vdupq_n_s8(64);
        sum.v[i] = vdotq_s32(sum.v[i], vreinterpretq_s8_u8(veorq_u8(unsigned_bytes.v[i], vdupq_n_u8(0x80))), s);
        sum.v[i] = vdotq_s32(vdotq_s32(sum.v[i], half, s), half, s);
    }
    return sum;
}
#endif
template <int kBits>
inline I32 shift_left(I32 x) {
    for (int i = 0; i < 4; ++i) x.v[i] = vshlq_n_s32(x.v[i], kBits);
    return x;
}
inline F32 to_floats(I32 x) {
    return each([=](int i) { return vcvtq_f32_s32(x.v[i]); });
}
// Whole numbers below 2^14, from their nearest float, as two bytes of 7 bits each.
inline void store_planes(uint8_t* high, uint8_t* low, F32 x) {
    for (int i = 0; i < 4; ++i) {
        int32_t whole[4];
        vst1q_s32(whole, vcvtnq_s32_f32(x.v[i]));
        for (int k = 0; k < 4; ++k) {
            high[4 * i + k] = static_cast<uint8_t>(whole[k] >> 7);
            low[4 * i + k] = static_cast<uint8_t>(whole[k] & 127);
        }
    }
}
// Whole numbers up to 255, from their nearest float, as one byte each.
inline void store_plane(uint8_t* to, F32 x) {
    const uint16x8_t low = vcombine_u16(vqmovun_s32(vcvtnq_s32_f32(x.v[0])), vqmovun_s32(vcvtnq_s32_f32(x.v[1])));
    const uint16x8_t high = vcombine_u16(vqmovun_s32(vcvtnq_s32_f32(x.v[2])), vqmovun_s32(vcvtnq_s32_f32(x.v[3])));
    vst1q_u8(to, vcombine_u8(vqmovn_u16(low), vqmovn_u16(high)));
}

}  // namespace
}  // namespace lowbit
