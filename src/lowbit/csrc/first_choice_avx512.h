// The few candidates of a search that are worth an exact look, chosen in integers of 16 bits: a third of the work of scoring all of
// them in floats. Included by AVX-512's file, for integers of few bits whose groups have no importance given.
//
//   W = 32767 w / unit     q = clamp(W * (unit / s) >> 15, with F bits behind the point, rounded)     m = sqrt|w|, to whole numbers
//   refitted by least squares, a candidate misses by  sum(m w^2) - sum(m w q)^2 / sum(m q^2):  the last term ranks candidates
//
// Whole numbers move a candidate's error by some 1e-4 of it, so that what is as good as the best is among the few; which of them is
// the best is then decided in floats, as it was.
#pragma once
#include "fit_lanes.h"

#if defined(__AVX512VNNI__)
namespace lowbit {
namespace {

constexpr int kFew = 3;
constexpr int kMostChosenBits = 4;
constexpr int kMostChosen = 128;      // candidates
constexpr int kLongestChosen = 4096;  // weights of a group: their sums stay below 2^31
constexpr int kOne = 15;              // W has 15 bits behind the point
constexpr int kLeastFraction = 8;     // bits behind the point of a quotient
constexpr float kMost16 = 32767.0f;

struct Few {
    I32 index[kFew];
};

// Two neighbours of each of sixteen groups: what a step of vpdpwssd takes.
inline __m512i pairs_of(F32 even, F32 odd) {
    const __m512i low = _mm512_cvtps_epi32((__m512)even), high = _mm512_cvtps_epi32((__m512)odd);
    return _mm512_or_si512(_mm512_and_si512(low, _mm512_set1_epi32(0xffff)), _mm512_slli_epi32(high, 16));
}

inline __m512i pairs_of(F32 both) { return pairs_of(both, both); }

// Bits behind the point of quotients, as many as the largest one leaves.
inline int fraction_of(const QuantizeJob& job) {
    float least = INFINITY;
    for (int c = 0; c < job.candidates.count; ++c) least = fminf(least, fabsf(job.candidates.factors[c]));
    return least > 0.0f && least < 1.0f ? ilogbf(kMost16 * least) : 0;
}

inline bool chooses_first(const Lanes& lanes, const QuantizeJob& job) {
    const bool halves = job.format.scale_type == LOWBIT_SCALE_FP16 || job.format.scale_type == LOWBIT_SCALE_FP32;
    return job.format.kind == LOWBIT_INT && job.format.bits <= kMostChosenBits && !job.fine_zeros && halves && !job.search.importance &&
           job.candidates.count > kFew && job.candidates.count <= kMostChosen && lanes.length <= kLongestChosen &&
           fraction_of(job) >= kLeastFraction;
}

// The groups in hand as whole numbers.
struct Whole {
    __m512i *weights, *weighted, *mask;
    int64_t steps;
};

// Steps of two weights each, taken two at a time.
inline int64_t whole_steps(int64_t length) { return (length + 3) / 4 * 2; }
inline size_t whole_bytes(int64_t length) { return static_cast<size_t>(3 * whole_steps(length)) * sizeof(__m512i); }

inline Whole whole_of(const Lanes& lanes, const Spread& spread, float most_mask) {
    const int64_t steps = whole_steps(lanes.length);
    Whole whole = {lanes.pairs, lanes.pairs + steps, lanes.pairs + 2 * steps, steps};
    const F32 inverse = 1.0f / select(spread.unit == 0.0f, splat(1.0f), spread.unit);
    for (int64_t i = 0; i < steps; ++i) {
        F32 w[2], m[2];
        for (int n = 0; n < 2; ++n) {
            w[n] = 2 * i + n < lanes.length ? clamp(lanes.weights[2 * i + n] * inverse, splat(-1.0f), splat(1.0f)) : F32{};
            m[n] = root_of_each(absolute(w[n]));
        }
        whole.weights[i] = pairs_of(w[0] * kMost16, w[1] * kMost16);
        whole.weighted[i] = pairs_of(m[0] * w[0] * kMost16, m[1] * w[1] * kMost16);
        whole.mask[i] = pairs_of(m[0] * most_mask, m[1] * most_mask);
    }
    return whole;
}

struct WholeSums {
    __m512i product, square;
};

// How a candidate's codes are made of W.
struct Rounding {
    __m512i times, shift, low, high;
};

LOWBIT_INLINE void add_step(WholeSums& sums, const Whole& whole, int64_t i, const Rounding& rounding) {
    const __m512i quotient = _mm512_mulhrs_epi16(_mm512_mulhrs_epi16(whole.weights[i], rounding.times), rounding.shift);
    const __m512i q = _mm512_min_epi16(_mm512_max_epi16(quotient, rounding.low), rounding.high);
    sums.product = _mm512_dpwssd_epi32(sums.product, whole.weighted[i], q);
    sums.square = _mm512_dpwssd_epi32(sums.square, _mm512_mullo_epi16(whole.mask[i], q), q);
}

// sum(m w q)^2 / sum(m q^2) of a candidate, in some unit.
inline F32 score_of(const Whole& whole, const Rounding& rounding) {
    const __m512i zero = _mm512_setzero_si512();
    WholeSums even = {zero, zero}, odd = {zero, zero};  // a sum waits five cycles for itself
    for (int64_t i = 0; i < whole.steps; i += 2) add_step(even, whole, i, rounding), add_step(odd, whole, i + 1, rounding);
    const F32 product = (F32)_mm512_cvtepi32_ps(_mm512_add_epi32(even.product, odd.product));
    const F32 square = (F32)_mm512_cvtepi32_ps(_mm512_add_epi32(even.square, odd.square));
    return select(square > 0.0f, product * product / square, F32{});
}

// The candidates that come nearest to each of the sixteen groups.
inline Few choose_few(const Lanes& lanes, const QuantizeJob& job, const Spread& spread, const LaneGrid& start) {
    const float max_code = static_cast<float>((1 << job.format.bits) - 1), one = ldexpf(1.0f, fraction_of(job));
    const Whole whole = whole_of(lanes, spread, floorf(kMost16 / (max_code + 1.0f)));
    const __m512i shift = _mm512_set1_epi16(static_cast<int16_t>(ldexpf(1.0f, kOne) / one));
    F32 scores[kMostChosen];
    for (int c = 0; c < job.candidates.count; ++c) {
        const F32 zeros = candidate_grid(job, spread, start, I32{} + c).zeros;
        const __m512i times = _mm512_set1_epi16(static_cast<int16_t>(lrintf(one / job.candidates.factors[c])));
        scores[c] = score_of(whole, {times, shift, pairs_of(-zeros), pairs_of(splat(max_code) - zeros)});
    }
    Few few;
    for (int n = 0; n < kFew; ++n) {
        F32 most = splat(-INFINITY);
        I32 where = {};
        for (int c = 0; c < job.candidates.count; ++c) {
            where = scores[c] > most ? I32{} + c : where;
            most = select(scores[c] > most, scores[c], most);
        }
        for (int c = 0; c < job.candidates.count; ++c) scores[c] = select(where == c, splat(-INFINITY), scores[c]);
        few.index[n] = where;
    }
    return few;
}

}  // namespace
}  // namespace lowbit
#endif
