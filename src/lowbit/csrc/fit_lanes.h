// The scale (and zero point) of sixteen groups at a time: the plain one, or the best of those that a search tries.
#pragma once
#include "rounding_lanes.h"

namespace lowbit {
namespace {

// The groups of one step, transposed: entry i of lane l is at [i * kLanes + l]; lanes and entries that do not exist hold zero.
struct Lanes {
    int64_t length;
    F32* weights;
    F32* mask;  // what an entry's error weighs: its input's importance, or sqrt|w|; nullptr without a search
    F32* values;
#if defined(__AVX512VNNI__)
    __m512i* pairs;  // what first_choice_avx512.h makes of them
#endif
};

inline F32 signed_extreme(const Lanes& lanes) {
    F32 extreme = lanes.weights[0], largest = absolute(extreme);
    for (int64_t i = 1; i < lanes.length; ++i) {
        const F32 magnitude = absolute(lanes.weights[i]);
        extreme = select(magnitude > largest, lanes.weights[i], extreme);
        largest = select(magnitude > largest, magnitude, largest);
    }
    return extreme;
}

struct Range {
    F32 low, high;
};

inline Range zero_range(const Lanes& lanes) {
    Range range = {F32{}, F32{}};
    for (int64_t i = 0; i < lanes.length; ++i) {
        range.low = select(lanes.weights[i] < range.low, lanes.weights[i], range.low);
        range.high = select(lanes.weights[i] > range.high, lanes.weights[i], range.high);
    }
    return range;
}

inline F32 clamp_zero(F32 zeros, const QuantizeJob& job) { return clamp(zeros, F32{}, splat(job.max_zero)); }
// The nearest zero points that can be stored; a step is a power of two, so that nothing else is rounded.
inline F32 round_zero(F32 zeros, const QuantizeJob& job) { return clamp_zero(round_even(zeros / job.zero_step) * job.zero_step, job); }

inline LaneGrid plain_grid(const Lanes& lanes, const QuantizeJob& job) {
    const lowbit_format& format = job.format;
    const float midpoint = static_cast<float>(1 << (format.bits - 1));
    if (stores_zeros(format)) {
        const Range range = zero_range(lanes);
        const F32 scales = round_scales((range.high - range.low) / splat(static_cast<float>((1 << format.bits) - 1)), job);
        return {scales, round_zero(-range.low / scales, job)};
    }
    const F32 extreme = signed_extreme(lanes);
    if (format.kind == LOWBIT_INT) return {round_scales(extreme / splat(-midpoint), job), splat(midpoint)};
    if (format.scale_type == LOWBIT_SCALE_E8M0) {
        F32 scales;
        for (int lane = 0; lane < kLanes; ++lane) {
            const float magnitude = fabsf(extreme[lane]) > 0x1p-127f ? fabsf(extreme[lane]) : 0x1p-127f;
            scales[lane] = exp2f(ceilf(log2f(magnitude / 7.25f)));
        }
        return {scales, F32{}};
    }
    return {round_scales(absolute(extreme) / splat(job.max_level), job), F32{}};
}

// What the groups span: the unit of a search's scales, and the lowest weight, which zero points follow.
struct Spread {
    F32 unit, low;
};

inline Spread spread_of(const Lanes& lanes, const QuantizeJob& job) {
    if (stores_zeros(job.format)) {
        const Range range = zero_range(lanes);
        const F32 width = range.high - range.low;
        return {select(width > 1e-20f, width, splat(1e-20f)), range.low};
    }
    const F32 extreme = signed_extreme(lanes);
    return {job.format.kind == LOWBIT_INT ? extreme : absolute(extreme), F32{}};
}

// A candidate of each group, by its number.
inline LaneGrid candidate_grid(const QuantizeJob& job, const Spread& spread, const LaneGrid& start, I32 index) {
    const F32 scales = spread.unit * gather(job.candidates.factors, index);
    if (!stores_zeros(job.format)) return {scales, start.zeros};
    const F32 middle = round_zero(-spread.low * gather(job.candidates.ratios, index) / scales, job);
    return {scales, clamp_zero(middle + gather(job.candidates.shifts, index), job)};
}

struct Best {
    F32 error, scales, zeros;
    F32 whole;  // sum(m w^2)
};

// What a least-squares fit of a candidate's codes asks for: sum(m w q) and sum(m q^2).
struct Sums {
    F32 product, square;
};

inline void add_to(Sums& sums, const Lanes& lanes, int64_t i, F32 value) {
    lanes.values[i] = value;
    const F32 weighted = lanes.mask[i] * value;
    sums.product += weighted * lanes.weights[i];
    sums.square += weighted * value;
}

#if defined(__AVX512F__)
// The inverse of a scale beyond this has fewer digits.
constexpr float kLargestInverted = 0x1p100f;

// Integers without a division, which takes as long as all the rest: w * (1 / s), and what it leaves of w divided in the same way, are
// the quotient itself (Markstein). Limits are whole numbers, so that it is all the same whether quotients are clamped before they are
// rounded or after.
inline Sums fit_integers(const Lanes& lanes, const QuantizeJob& job, const LaneGrid& candidate) {
    const float max_code = static_cast<float>((1 << job.format.bits) - 1);
    const __m512 scales = (__m512)candidate.scales, inverse = (__m512)(1.0f / candidate.scales);
    const __m512 low = (__m512)-candidate.zeros, high = (__m512)(splat(max_code) - candidate.zeros);
    const F32 magic = splat(kMagic);
    Sums sums = {};
    for (int64_t i = 0; i < lanes.length; ++i) {
        const __m512 w = (__m512)lanes.weights[i], near = _mm512_mul_ps(w, inverse);
        const __m512 ratio = _mm512_fmadd_ps(_mm512_fnmadd_ps(near, scales, w), inverse, near);
        const F32 within = (F32)_mm512_min_ps(_mm512_max_ps(ratio, low), high);
        add_to(sums, lanes, i, (within + magic) - magic);
    }
    return sums;
}
#endif

// The codes of a candidate, and their sums.
inline Sums fit_codes(const Lanes& lanes, const QuantizeJob& job, const LaneGrid& candidate) {
#if defined(__AVX512F__)
    if (job.format.kind == LOWBIT_INT && !job.fine_zeros && !any(absolute(candidate.scales) > kLargestInverted))
        return fit_integers(lanes, job, candidate);
#endif
    Sums sums = {};
    for (int64_t i = 0; i < lanes.length; ++i) add_to(sums, lanes, i, nearest_value(lanes.weights[i], candidate, job));
    return sums;
}

// sum(m (s q - w)^2), in two sums: one would wait for itself.
inline F32 error_of(const Lanes& lanes, F32 scales) {
    F32 sums[2] = {};
    for (int64_t i = 0; i < lanes.length; ++i) {
        const F32 miss = scales * lanes.values[i] - lanes.weights[i];
        sums[i & 1] += lanes.mask[i] * (miss * miss);
    }
    return sums[0] + sums[1];
}

// Score one candidate and keep it where it is better. Two of three are seen to be worse in every lane by
// sum(m w^2) - 2 s sum(m w q) + s^2 sum(m q^2), the same error but for what the three sums were rounded by.
inline void try_candidate(const Lanes& lanes, const QuantizeJob& job, LaneGrid candidate, Best& best) {
    candidate.scales = select(absolute(candidate.scales) < kTinyScale, splat(1.0f), candidate.scales);
    const Sums sums = fit_codes(lanes, job, candidate);
    const F32 scales = round_scales_wide(select(sums.square > 0.0f, sums.product / sums.square, candidate.scales), job);
    const F32 guess = best.whole + scales * (scales * sums.square - 2.0f * sums.product);
    const F32 rounding = best.whole * (static_cast<float>(lanes.length) * 0x1p-23f);
    if (!any(~(guess > best.error + rounding))) return;
    const F32 error = error_of(lanes, scales);
    const I32 better = error < best.error;
    best.error = select(better, error, best.error);
    best.scales = select(better, scales, best.scales);
    best.zeros = select(better, candidate.zeros, best.zeros);
}

}  // namespace
}  // namespace lowbit
