// Attention of a few rows of queries over a stretch of the cache, with the softmax taken online:
//
//   s_j = q . k_j                        capped, moved by ALiBi, masked
//   m' = max(m, max s_j)    o' = e^(m - m') o + sum e^(s_j - m') v_j    l' = e^(m - m') l + sum e^(s_j - m')
//
// Rows are the heads that share a key head, times the tokens of a tile, so that one pass over the cache serves them all. Keys lie in
// blocks of 16 with a channel's 16 numbers side by side: a broadcast query channel times one vector adds to 16 scores and nothing is
// ever summed across lanes. Values lie row by row, and a broadcast probability times a row adds to the output. Both products are
// therefore the same register tile.
#pragma once
#include "engine_isa.h"
#include "vector_lanes.h"

namespace lowbit {
namespace {

#if defined(__AVX512F__)
constexpr int kRowTile = 6, kVectorTile = 4;
#elif defined(__AVXVNNI__)
constexpr int kRowTile = 6, kVectorTile = 1;
#else
constexpr int kRowTile = 4, kVectorTile = 1;
#endif

// What a masked score is worth: finite, so that the difference of two of them is a number, and a power of two, so that this difference
// is 0 also in a fused product.
constexpr float kMasked = -0x1p100f;

inline F32 load_cached(const float* p) { return load(p); }
inline F32 load_cached(const uint16_t* p) { return load_half(p); }

// out[r][v] (+)= sum over i < count of left[r][i] * right[i][v], where row i of `right` has vectors `step` numbers apart.
template <class Number, int kRows, int kVectors, bool kAdd>
inline void multiply_tile(const float* left, int64_t left_stride, const Number* right, int64_t right_stride, int64_t step, int64_t count,
                          float* out, int64_t out_stride) {
    F32 total[kRows][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) total[r][v] = kAdd ? load(out + r * out_stride + v * kLane) : splat(0.0f);
    for (int64_t i = 0; i < count; ++i) {
        F32 row[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) row[v] = load_cached(right + i * right_stride + v * step);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
            const F32 factor = splat(left[r * left_stride + i]);
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) total[r][v] = multiply_add(factor, row[v], total[r][v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) store(out + r * out_stride + v * kLane, total[r][v]);
}

template <class Number, int kVectors, bool kAdd>
void multiply_rows(int64_t rows, const float* left, int64_t left_stride, const Number* right, int64_t right_stride, int64_t step,
                   int64_t count, float* out, int64_t out_stride) {
    int64_t r = 0;
    for (; r + kRowTile <= rows; r += kRowTile)
        multiply_tile<Number, kRowTile, kVectors, kAdd>(left + r * left_stride, left_stride, right, right_stride, step, count,
                                                        out + r * out_stride, out_stride);
    left += r * left_stride;
    out += r * out_stride;
    switch (rows - r) {
        case 1: return multiply_tile<Number, 1, kVectors, kAdd>(left, left_stride, right, right_stride, step, count, out, out_stride);
        case 2: return multiply_tile<Number, 2, kVectors, kAdd>(left, left_stride, right, right_stride, step, count, out, out_stride);
        case 3: return multiply_tile<Number, 3, kVectors, kAdd>(left, left_stride, right, right_stride, step, count, out, out_stride);
        case 4: return multiply_tile<Number, 4, kVectors, kAdd>(left, left_stride, right, right_stride, step, count, out, out_stride);
        case 5: return multiply_tile<Number, 5, kVectors, kAdd>(left, left_stride, right, right_stride, step, count, out, out_stride);
        default: return;
    }
}

template <class Number>
void score_keys(const AttendJob& job, int64_t first, int64_t blocks) {
    const Number* keys = static_cast<const Number*>(job.keys) + first * job.head_dim;
    const int64_t block = static_cast<int64_t>(job.head_dim) * kKeyBlock;
    int64_t b = 0;
    for (; b + kVectorTile <= blocks; b += kVectorTile)
        multiply_rows<Number, kVectorTile, false>(job.rows, job.queries, job.head_dim, keys + b * block, kKeyBlock, block, job.head_dim,
                                                  job.scores + b * kKeyBlock, kKeyTile);
    for (; b < blocks; ++b)
        multiply_rows<Number, 1, false>(job.rows, job.queries, job.head_dim, keys + b * block, kKeyBlock, block, job.head_dim,
                                        job.scores + b * kKeyBlock, kKeyTile);
}

template <class Number>
void add_values(const AttendJob& job, int64_t first, int64_t count) {
    const Number* values = static_cast<const Number*>(job.values) + first * job.padded;
    int64_t v = 0;
    for (; v + kVectorTile * kLane <= job.padded; v += kVectorTile * kLane)
        multiply_rows<Number, kVectorTile, true>(job.rows, job.scores, kKeyTile, values + v, job.padded, kLane, count, job.out + v,
                                                 job.padded);
    for (; v < job.padded; v += kLane)
        multiply_rows<Number, 1, true>(job.rows, job.scores, kKeyTile, values + v, job.padded, kLane, count, job.out + v, job.padded);
}

constexpr float kLog2E = 1.44269504f;

inline float power_of(float most, float lower) {  // e^(lower - most)
    return first_of(power_of_two(splat((lower - most) * kLog2E)));
}

// Scores of one row and tile as `read` takes them, times their scales, capped, moved and masked in place; returns the largest by lane.
template <class Read>
inline F32 mask_scores(const AttendJob& job, int64_t r, int64_t first, int64_t blocks, float scale, const Read& read) {
    float* scores = job.scores + r * kKeyTile;
    const int64_t position = job.positions[r];
    const int64_t window_begin = job.window ? position - job.window + 1 : 0;
    const int64_t low = window_begin > job.key_begin ? window_begin : job.key_begin;
    const int64_t high = position + 1 < job.key_end ? position + 1 : job.key_end;
    const auto lane = [](int64_t key) { return static_cast<int>(key < 0 ? 0 : key > kLane ? kLane : key); };
    F32 most = splat(kMasked);
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t key = first + b * kKeyBlock;
        F32 s = read(scores + b * kKeyBlock);
        if (job.key_scales) s = s * (load(job.key_scales + key) * splat(scale));
        if (job.soft_cap > 0.0f) s = splat(job.soft_cap) * hyperbolic_tangent(s * splat(1.0f / job.soft_cap));
        if (job.slopes) s = multiply_add(count_up() + splat(static_cast<float>(key - position)), splat(job.slopes[r]), s);
        if (key < low || key + kLane > high) s = inside(s, lane(low - key), lane(high - key), kMasked);
        store(scores + b * kKeyBlock, s);
        most = larger(most, s);
    }
    return most;
}

inline void scale_row(float* row, int64_t count, float factor) {
    for (int64_t v = 0; v < count; v += kLane) store(row + v, load(row + v) * splat(factor));
}

// What a row has so far, seen from a new largest score.
inline void rescale_row(const AttendJob& job, int64_t r, float peak) {
    const float shrink = power_of(peak, job.most[r]);
    scale_row(job.out + r * job.padded, job.padded, shrink);
    job.total[r] *= shrink;
    job.most[r] = peak;
}

// Scores of one row and tile become e^(score - most); the row's sums follow.
inline void soften_row(const AttendJob& job, int64_t r, int64_t first, int64_t blocks) {
    float* scores = job.scores + r * kKeyTile;
    const float peak = largest_of(mask_scores(job, r, first, blocks, 1.0f, [](const float* p) { return load(p); }));
    if (peak > job.most[r]) rescale_row(job, r, peak);
    const F32 lowered = splat(-job.most[r] * kLog2E);
    F32 total = splat(0.0f);
    for (int64_t b = 0; b < blocks; ++b) {
        const F32 p = power_of_two(multiply_add(load(scores + b * kKeyBlock), splat(kLog2E), lowered));
        total = total + p;
        store(scores + b * kKeyBlock, p);
    }
    job.total[r] += sum_of(total);
}

inline void begin_rows(const AttendJob& job) {
    for (int64_t r = 0; r < job.rows; ++r) {
        job.most[r] = kMasked;
        job.total[r] = 0.0f;
    }
    memset(job.out, 0, static_cast<size_t>(job.rows * job.padded) * sizeof(float));
}

template <class Number>
void attend_over(const AttendJob& job) {
    for (int64_t first = job.key_begin / kKeyBlock * kKeyBlock; first < job.key_end; first += kKeyTile) {
        const int64_t count = job.key_end - first < kKeyTile ? job.key_end - first : kKeyTile;
        const int64_t blocks = (count + kKeyBlock - 1) / kKeyBlock;
        score_keys<Number>(job, first, blocks);
        for (int64_t r = 0; r < job.rows; ++r) soften_row(job, r, first, blocks);
        add_values<Number>(job, first, count);
    }
}

}  // namespace
}  // namespace lowbit

#include "attention_bytes.h"

namespace lowbit {
namespace {

inline void attend(const AttendJob& job) {
    begin_rows(job);
    switch (job.cache_type) {
        case LOWBIT_CACHE_FP32: return attend_over<float>(job);
        case LOWBIT_CACHE_FP16: return attend_over<uint16_t>(job);
        default: return attend_bytes(job);
    }
}

}  // namespace
}  // namespace lowbit
