// Rounding sixteen weights, or the scales of sixteen groups, to what a format can hold. Operations and their order follow grid.py.
#pragma once
#include <cmath>

#include "number.h"
#include "quantize.h"

namespace lowbit {
namespace {

constexpr int kLanes = 16;
typedef float F32 __attribute__((vector_size(64)));
typedef int32_t I32 __attribute__((vector_size(64)));

// fp16 cannot hold a scale below this; groups that small are stored as zeros.
constexpr float kTinyScale = 6e-8f;

inline F32 splat(float value) { return F32{} + value; }
inline F32 select(I32 mask, F32 yes, F32 no) { return mask ? yes : no; }
inline F32 absolute(F32 x) { return (F32)((I32)x & 0x7fffffff); }
inline F32 clamp(F32 x, F32 low, F32 high) {
    x = select(x > low, x, low);
    return select(x < high, x, high);
}
// Round half to even: adding 1.5 * 2^23 leaves no fraction bits. Codes beyond 2^20 are clamped anyway.
constexpr float kMagic = 12582912.0f;
inline F32 round_even(F32 x) {
    const F32 limit = splat(1048576.0f), magic = splat(kMagic);
    return (clamp(x, -limit, limit) + magic) - magic;
}

// A scale beyond fp16 would be stored as infinity, and its group read as NaN; clamped, the group saturates.
constexpr float kLargestFp16 = 65504.0f;
inline F32 within_fp16(F32 x) { return clamp(x, splat(-kLargestFp16), splat(kLargestFp16)); }

inline F32 round_scales(F32 x, const QuantizeJob& job) {
    if (job.format.scale_type == LOWBIT_SCALE_FP16) x = within_fp16(x);
    F32 out;
    for (int lane = 0; lane < kLanes; ++lane) {
        const float value = x[lane];
        float rounded = value;
        switch (job.format.scale_type) {
            case LOWBIT_SCALE_BF16: rounded = from_bf16(to_bf16(value)); break;
            case LOWBIT_SCALE_FP16: rounded = from_fp16(to_fp16(value)); break;
            case LOWBIT_SCALE_E8M0: {
                const float magnitude = fabsf(value) > 0x1p-127f ? fabsf(value) : 0x1p-127f;
                // The nearest power of two, not the nearest exponent: 1.5 lies midway between 1 and 2.
                int exponent;
                if (frexpf(magnitude, &exponent) < 0.75f) --exponent;
                out[lane] = ldexpf(1.0f, exponent > 127 ? 127 : exponent < -127 ? -127 : exponent);
                continue;
            }
            case LOWBIT_SCALE_E4M3: {
                const float ratio = value / job.unit;
                out[lane] = from_e4m3(to_e4m3(ratio < 0x1p-9f ? 0x1p-9f : ratio > 448.0f ? 448.0f : ratio)) * job.unit;
                continue;
            }
            default: break;
        }
        out[lane] = fabsf(rounded) < kTinyScale ? 1.0f : rounded;
    }
    return out;
}

inline F32 round_scales_wide(F32 x, const QuantizeJob& job) {
#if defined(__AVX512F__)
    if (job.format.scale_type == LOWBIT_SCALE_FP16) {
        const F32 rounded = (F32)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)within_fp16(x), 0));
        return select(absolute(rounded) < kTinyScale, splat(1.0f), rounded);
    }
#endif
    return round_scales(x, job);
}

inline F32 root_of_each(F32 x) {
#if defined(__AVX512F__)
    return (F32)_mm512_sqrt_ps((__m512)x);
#else
    for (int lane = 0; lane < kLanes; ++lane) x[lane] = sqrtf(x[lane]);
    return x;
#endif
}

inline bool any(I32 mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#else
    int32_t found = 0;
    for (int lane = 0; lane < kLanes; ++lane) found |= mask[lane];
    return found != 0;
#endif
}

inline F32 gather(const float* table, I32 index) {
#if defined(__AVX512F__)
    return (F32)_mm512_i32gather_ps((__m512i)index, table, 4);
#else
    F32 out;
    for (int lane = 0; lane < kLanes; ++lane) out[lane] = table[index[lane]];
    return out;
#endif
}

constexpr int kFewLevels = 16;  // up to here comparing with every border beats a search through memory

// The place in rising order of the level nearest to each x; ties go to the lower level.
inline I32 nearest_index(F32 x, const QuantizeJob& job) {
    I32 index = {};
    if (job.level_count <= kFewLevels) {
        for (int i = 1; i < job.level_count; ++i) index -= x > job.borders[i];
        return index;
    }
    for (int step = kMostLevels / 2; step > 0; step /= 2) {
        const I32 probe = index + step;
        index = x > gather(job.borders, probe) ? probe : index;
    }
    return index;
}

// The nearest value of a small float type, by its exponent: steps are as far apart as those of x's own binade. Rounding half to even
// and then one down where that rounded a tie up is what "a tie goes to the lower level" means.
inline F32 nearest_float(F32 x, const FloatType& type) {
    x = clamp(x, splat(-type.most), splat(type.most));
    F32 power = (F32)((I32)x & 0x7f800000);
    power = select(power > type.least_normal, power, splat(type.least_normal));
    const F32 inverse = (F32)(0x7f000000 - (I32)power), steps = splat(type.steps);
    const F32 scaled = x * inverse * steps;
    const F32 rounded = round_even(scaled);
    return select(scaled - rounded == -0.5f, rounded - 1.0f, rounded) * power / steps;
}

// Its code. Zero has two: the sorted table has -0 above 0, so what is rounded down to zero from above is -0.
inline I32 float_code(F32 x, F32 value, const FloatType& type) {
    const F32 magnitude = absolute(value);
    const I32 normal = ((I32)magnitude >> type.shift) - type.exponent_bias;
    const I32 tiny = __builtin_convertvector(magnitude * (type.steps / type.least_normal), I32);
    const I32 code = magnitude < type.least_normal ? tiny : normal;
    const I32 negative = magnitude == 0.0f ? x > 0.0f : value < 0.0f;
    return code | (negative & type.sign_bit);
}

// The value that the nearest code of each x stands for.
inline F32 nearest_level(F32 x, const QuantizeJob& job) {
    if (job.float_type.steps > 0.0f) return nearest_float(x, job.float_type);
    if (job.level_count > kFewLevels) return gather(job.levels, nearest_index(x, job));
    F32 value = splat(job.levels[0]);
    for (int i = 1; i < job.level_count; ++i) value = select(x > job.borders[i], splat(job.levels[i]), value);
    return value;
}

struct LaneGrid {
    F32 scales;
    F32 zeros;
};

// What the nearest code of each weight stands for before the scale: code - zero, or a level.
inline F32 nearest_value(F32 w, const LaneGrid& grid, const QuantizeJob& job) {
    const F32 ratio = w / grid.scales;
    if (job.format.kind == LOWBIT_LEVELS) return nearest_level(ratio, job);
    const float max_code = static_cast<float>((1 << job.format.bits) - 1);
    if (job.fine_zeros) return clamp(round_even(ratio + grid.zeros), F32{}, splat(max_code)) - grid.zeros;
    return clamp(round_even(ratio), -grid.zeros, splat(max_code) - grid.zeros);
}

}  // namespace
}  // namespace lowbit
