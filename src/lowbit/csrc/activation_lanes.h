// Activations made ready for a product: int8 with one scale per segment, or fp32, in tiles of tokens (product.h draws the tile).
#pragma once
#include "number_lanes.h"
#if defined(__AVX512F__)
#include "round_tile_avx512.h"
#endif

namespace lowbit {
namespace {

struct Quantized {
    float scale;
    int32_t sum;
};

// One segment of one token as bytes (zero beyond `width`) with its scale; a NaN or infinite input makes the scale NaN.
inline Quantized quantize_segment(const Activations& job, int64_t source, int64_t width, int8_t* bytes) {
    alignas(64) float values[kLongestSegment];
    Floats most = splat_floats(0.0f), poison = splat_floats(0.0f);
    const int64_t segment = job.header->plan.segment;
    for (int64_t i = 0; i < segment; i += kBlockRows) {
        Floats x;
        if (i + kBlockRows <= width) {
            x = load_numbers(job.x, job.dtype, source + i);
        } else {
            for (int64_t k = 0; k < kBlockRows; ++k) values[i + k] = i + k < width ? load_number(job.x, job.dtype, source + i + k) : 0.0f;
            x = load_floats(values + i);
        }
        store_floats(values + i, x);
        most = absolute_most(most, x);
        poison = multiply_add(x, splat_floats(0.0f), poison);
    }
    const float largest = most_of(most), nan = sum_of(poison);
    const Floats inverse = splat_floats(largest > 0.0f && nan == 0.0f ? 127.0f / largest : 0.0f);
    int32_t sum = 0;
    for (int64_t i = 0; i < segment; i += kBlockRows) floats_to_bytes(bytes + i, load_floats(values + i), inverse);
    for (int64_t i = 0; i < segment; ++i) sum += bytes[i];
    return {nan == 0.0f ? largest / 127.0f : nan, sum};
}

struct TileView {
    int32_t* bytes;  // [positions / 4][tile]
    float* scales;   // [segments][tile]
    int32_t* sums;   // [segments][tile]
    float* scaled_sums;  // [segments][tile] for weights with minima, else nullptr
};

inline int64_t padded(int64_t bytes) { return divide_up(bytes, kVector) * kVector; }

inline TileView view_tile(const Activations& job, int64_t tile) {
    uint8_t* base = job.data + tile * job.tile_bytes;
    uint8_t* scales = base + padded(job.header->plan.positions() * job.tile);
    uint8_t* sums = scales + padded(job.header->plan.segments * job.tile * 4);
    uint8_t* scaled_sums = sums + padded(job.header->plan.segments * job.tile * 4);
    return {reinterpret_cast<int32_t*>(base), reinterpret_cast<float*>(scales), reinterpret_cast<int32_t*>(sums),
            job.header->scales.minima ? reinterpret_cast<float*>(scaled_sums) : nullptr};
}

// Segments that round_tile_avx512.h can make of this tile: whole ones, of whole tiles of 8.
inline int64_t count_together(const Activations& job, int64_t tile) {
#if defined(__AVX512F__)
    const Plan& plan = job.header->plan;
    const bool fits = job.tile == kTogether && job.dtype == LOWBIT_FP32 && (tile + 1) * kTogether <= job.tokens && plan.segment % (2 * kBlockRows) == 0;
    int64_t count = fits ? plan.segments : 0;
    while (count > 0 && plan.width_of(count - 1, job.header->cols) < plan.segment) --count;
    return count;
#else
    (void)job;
    (void)tile;
    return 0;
#endif
}

void quantize_tile(const Activations& job, int64_t tile) {
    const Header& header = *job.header;
    const Plan& plan = header.plan;
    const TileView view = view_tile(job, tile);
    const float factor = header.unit * header.byte_factor;
    const auto put = [&](int64_t s, int t, Quantized quantized) {
        view.scales[s * job.tile + t] = quantized.scale * factor;
        view.sums[s * job.tile + t] = -job.zero_constant * quantized.sum;
        if (view.scaled_sums) view.scaled_sums[s * job.tile + t] = quantized.scale * static_cast<float>(quantized.sum);
    };
    const int64_t together = count_together(job, tile);
#if defined(__AVX512F__)
    for (int64_t s = 0; s < together; ++s) {
        const float* from = static_cast<const float*>(job.x) + tile * kTogether * job.stride + plan.column_of(s);
        float scales[kTogether];
        int32_t sums[kTogether];
        round_together(from, job.stride, plan.segment, view.bytes + s * plan.segment / 4 * kTogether, scales, sums);
        for (int t = 0; t < kTogether; ++t) put(s, t, {scales[t], sums[t]});
    }
#endif
    alignas(64) int8_t bytes[kLongestSegment];
    for (int t = 0; t < job.tile; ++t) {
        const int64_t token = tile * job.tile + t;
        const bool exists = token < job.tokens;
        for (int64_t s = together; s < plan.segments; ++s) {
            Quantized quantized = {0.0f, 0};
            if (exists) quantized = quantize_segment(job, token * job.stride + plan.column_of(s), plan.width_of(s, header.cols), bytes);
            else memset(bytes, 0, sizeof bytes);
            put(s, t, quantized);
            int32_t* to = view.bytes + s * plan.segment / 4 * job.tile + t;
            for (int64_t i = 0; i < plan.segment; i += 4, to += job.tile) memcpy(to, bytes + i, 4);
        }
        // Half a unit may follow the last short segment.
        for (int64_t i = plan.segments * plan.segment / 4; i < plan.positions() / 4; ++i) view.bytes[i * job.tile + t] = 0;
    }
}

void widen_tile(const Activations& job, int64_t tile) {
    const Header& header = *job.header;
    const Plan& plan = header.plan;
    float* values = reinterpret_cast<float*>(job.data + tile * job.tile_bytes);
    memset(values, 0, static_cast<size_t>(plan.positions() * job.tile) * sizeof(float));
    for (int t = 0; t < job.tile; ++t) {
        const int64_t token = tile * job.tile + t;
        if (token >= job.tokens) continue;
        if (plan.straight || header.kind == LOWBIT_DENSE) {
            for (int64_t k = 0; k < header.cols; ++k) values[k * job.tile + t] = load_number(job.x, job.dtype, token * job.stride + k);
        } else {
            for (int64_t k = 0; k < header.cols; ++k)
                values[plan.position_of(k) * job.tile + t] = load_number(job.x, job.dtype, token * job.stride + k);
        }
    }
    round_numbers(values, plan.positions() * job.tile, job.rounding);
}

}  // namespace
}  // namespace lowbit
