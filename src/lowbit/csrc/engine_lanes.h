// Norms, activations and sums of the engine, and the product with plain rows. Included by each instruction set's file.
#pragma once
#include "engine_isa.h"
#include "vector_lanes.h"

namespace lowbit {
namespace {

// Calls body(index, count) for every stretch of at most 16 numbers.
template <class Body>
inline void sweep(int64_t count, const Body& body) {
    int64_t i = 0;
    for (; i + kLane <= count; i += kLane) body(i, kLane);
    if (i < count) body(i, static_cast<int>(count - i));
}

inline F32 load_up_to(const float* p, int count) { return count == kLane ? load(p) : load_first(p, count); }
inline void store_up_to(float* p, F32 x, int count) {
    if (count == kLane) store(p, x);
    else store_first(p, x, count);
}

inline float sum_of_squares(const float* x, int64_t count, float middle) {
    F32 total = splat(0.0f);
    sweep(count, [&](int64_t i, int n) {
        F32 value = load_up_to(x + i, n) - splat(middle);
        if (n < kLane) value = inside(value, 0, n, 0.0f);
        total = multiply_add(value, value, total);
    });
    return sum_of(total);
}

inline float mean_of(const float* x, int64_t count) {
    F32 total = splat(0.0f);
    sweep(count, [&](int64_t i, int n) { total = total + load_up_to(x + i, n); });
    return sum_of(total) / static_cast<float>(count);
}

void normalize(const NormJob& job, const float* x, int64_t count, float* y) {
    const float middle = job.kind == LOWBIT_LAYER_NORM ? mean_of(x, count) : 0.0f;
    const float inverse = 1.0f / sqrtf(sum_of_squares(x, count, middle) / static_cast<float>(count) + job.eps);
    sweep(count, [&](int64_t i, int n) {
        F32 value = (load_up_to(x + i, n) - splat(middle)) * splat(inverse);
        if (job.vector.weight) value = value * load_up_to(job.vector.weight + i, n);
        if (job.vector.bias) value = value + load_up_to(job.vector.bias + i, n);
        store_up_to(y + i, value, n);
    });
}

// erf after Abramowitz and Stegun 7.1.26, good to 1.5e-7.
inline F32 error_function(F32 x) {
    const F32 size = larger(x, splat(0.0f) - x);
    const F32 t = splat(1.0f) / multiply_add(size, splat(0.3275911f), splat(1.0f));
    F32 p = splat(1.061405429f);
    p = multiply_add(p, t, splat(-1.453152027f));
    p = multiply_add(p, t, splat(1.421413741f));
    p = multiply_add(p, t, splat(-0.284496736f));
    p = multiply_add(p, t, splat(0.254829592f)) * t;
    const F32 positive = splat(1.0f) - p * exponential(splat(0.0f) - size * size);
    return select_negative(x, splat(0.0f) - positive, positive);
}

inline F32 gelu_tanh(F32 x) {
    const F32 inner = splat(0.79788456f) * multiply_add(x * x * x, splat(0.044715f), x);
    return splat(0.5f) * x * (splat(1.0f) + hyperbolic_tangent(inner));
}

template <class Activation>
inline void activate_with(const Activation& act, const float* gate, const float* up, int64_t count, float* y) {
    if (up) sweep(count, [&](int64_t i, int n) { store_up_to(y + i, act(load_up_to(gate + i, n)) * load_up_to(up + i, n), n); });
    else sweep(count, [&](int64_t i, int n) { store_up_to(y + i, act(load_up_to(gate + i, n)), n); });
}

void activate(const lowbit_mlp& mlp, const float* gate, const float* up, int64_t count, float* y) {
    if (mlp.limit > 0.0f) {
        sweep(count, [&](int64_t i, int n) {
            const F32 g = smaller(splat(mlp.limit), load_up_to(gate + i, n));
            const F32 u = clamp_to(load_up_to(up + i, n), -mlp.limit, mlp.limit);
            store_up_to(y + i, g * sigmoid(g * splat(mlp.sigmoid_scale)) * (u + splat(1.0f)), n);
        });
        return;
    }
    switch (mlp.activation) {
        case LOWBIT_SILU: return activate_with([](F32 x) { return x * sigmoid(x); }, gate, up, count, y);
        case LOWBIT_GELU: return activate_with([](F32 x) { return splat(0.5f) * x * (splat(1.0f) + error_function(x * splat(0.70710678f))); }, gate, up, count, y);
        case LOWBIT_GELU_TANH: return activate_with(gelu_tanh, gate, up, count, y);
        default: return activate_with([](F32 x) { return larger(splat(0.0f), x); }, gate, up, count, y);
    }
}

void add_scaled(float* to, const float* from, float factor, int64_t count) {
    sweep(count, [&](int64_t i, int n) {
        store_up_to(to + i, multiply_add(load_up_to(from + i, n), splat(factor), load_up_to(to + i, n)), n);
    });
}

void turn_pairs(float* a, float* b, const float* cosines, const float* sines, int64_t count) {
    sweep(count, [&](int64_t i, int n) {
        const F32 first = load_up_to(a + i, n), second = load_up_to(b + i, n), cosine = load_up_to(cosines + i, n), sine = load_up_to(sines + i, n);
        store_up_to(a + i, first * cosine - second * sine, n);
        store_up_to(b + i, second * cosine + first * sine, n);
    });
}

void scale_values(const float* from, float factor, int64_t count, float* to) {
    sweep(count, [&](int64_t i, int n) { store_up_to(to + i, load_up_to(from + i, n) * splat(factor), n); });
}

void cap_values(float* x, float multiplier, float soft_cap, int64_t count) {
    sweep(count, [&](int64_t i, int n) {
        F32 value = load_up_to(x + i, n) * splat(multiplier);
        if (soft_cap > 0.0f) value = splat(soft_cap) * hyperbolic_tangent(value * splat(1.0f / soft_cap));
        store_up_to(x + i, value, n);
    });
}

// Tiles write bf16 past the caches (tile_lanes.h), row behind row, so it comes from memory: other heads of the token, then the next token.
constexpr int kLineBrains = 32, kBrainsAhead = 32 * kLineBrains;

void widen_numbers(const void* from, int dtype, int64_t index, int64_t count, float* to) {
    const uint16_t* halves = static_cast<const uint16_t*>(from) + index;
    if (dtype == LOWBIT_FP32) return static_cast<void>(memcpy(to, static_cast<const float*>(from) + index, static_cast<size_t>(count) * sizeof(float)));
    int64_t i = 0;
    for (; dtype == LOWBIT_BF16 && i + kLineBrains <= count; i += kLineBrains) {
        __builtin_prefetch(halves + i + kBrainsAhead);
        for (int k = 0; k < kLineBrains; ++k) to[i + k] = from_bf16(halves[i + k]);
    }
    for (; i < count; ++i) to[i] = load_number(from, dtype, index + i);
}

template <class Read>
inline void turn_whole(const HeadJob& job, const Read& read, float* to) {
    const F32 factor = splat(job.factor);
    for (int64_t i = 0; i < job.half; i += kLane) {
        const F32 first = read(i), second = read(job.half + i), cosine = load(job.cosines + i), sine = load(job.sines + i);
        store(to + i, (first * cosine - second * sine) * factor);
        store(to + job.half + i, (second * cosine + first * sine) * factor);
    }
    for (int64_t i = 2 * job.half; i < job.size; i += kLane) store(to + i, read(i) * factor);
}

// In one pass where whole vectors turn: each of three passes would load what the one before has just stored.
void turn_head(const HeadJob& job, float* to) {
    if (job.half % kLane == 0 && job.size % kLane == 0 && job.dtype == LOWBIT_FP32) {
        const float* from = static_cast<const float*>(job.from) + job.index;
        return turn_whole(job, [from](int64_t i) { return load(from + i); }, to);
    }
    if (job.half % kLane == 0 && job.size % kLane == 0 && job.dtype == LOWBIT_BF16) {
        const uint16_t* from = static_cast<const uint16_t*>(job.from) + job.index;
        return turn_whole(job, [from](int64_t i) { return load_brain(from + i); }, to);
    }
    widen_numbers(job.from, job.dtype, job.index, job.size, to);
    turn_pairs(to, to + job.half, job.cosines, job.sines, job.half);
    scale_values(to, job.factor, job.size, to);
}

int64_t largest_index(const float* x, int64_t count) {
    int64_t best = 0;
    F32 most = splat(-INFINITY);
    sweep(count, [&](int64_t i, int n) { most = larger(most, n == kLane ? load(x + i) : inside(load_first(x + i, n), 0, n, -INFINITY)); });
    const float value = largest_of(most);
    while (best + 1 < count && !(x[best] >= value)) ++best;
    return best;
}

// --- plain rows ---

template <int kDtype>
inline F32 load_weight(const void* weight, int64_t index) {
    if (kDtype == LOWBIT_FP32) return load(static_cast<const float*>(weight) + index);
    const uint16_t* halves = static_cast<const uint16_t*>(weight) + index;
    return kDtype == LOWBIT_BF16 ? load_brain(halves) : load_half(halves);
}

constexpr int kDenseRows = 4, kDenseTokens = 4, kCacheLine = 64;
constexpr int64_t kDenseBlock = 32;  // tokens whose activations stay in the second-level cache while rows pass

// While rows pass for the first time, memory is asked for those that come after them: four streams out of a mapped file are more than
// the processor follows by itself from page to page (26 GB/s of 40 on two cores).
template <int kDtype, int kRows>
inline const uint8_t* rows_ahead(const DenseJob& job, int64_t row, int64_t token) {
    if (token > 0) return nullptr;
    constexpr int64_t kSize = kDtype == LOWBIT_FP32 ? 4 : 2;
    const bool inside = row + 2 * kRows <= job.row_end;
    return inside ? static_cast<const uint8_t*>(job.weight) + (row + kRows) * job.cols * kSize : job.next;
}

template <int kDtype, int kRows, int kTokens>
inline void dense_tile(const DenseJob& job, int64_t row, int64_t token) {
    F32 total[kRows][kTokens];
    for (int r = 0; r < kRows; ++r)
        for (int t = 0; t < kTokens; ++t) total[r][t] = splat(0.0f);
    const float* x = job.x + token * job.x_stride;
    const int64_t whole = job.cols / kLane * kLane;
    constexpr int64_t kSize = kDtype == LOWBIT_FP32 ? 4 : 2;
    const uint8_t* ahead = rows_ahead<kDtype, kRows>(job, row, token);
    for (int64_t k = 0; k < whole; k += kLane) {
        if (ahead && k * kSize % kCacheLine == 0)
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) __builtin_prefetch(ahead + (r * job.cols + k) * kSize, 0, 2);
        F32 w[kRows];
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) w[r] = load_weight<kDtype>(job.weight, (row + r) * job.cols + k);
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) {
            const F32 value = load(x + t * job.x_stride + k);
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) total[r][t] = multiply_add(w[r], value, total[r][t]);
        }
    }
    for (int r = 0; r < kRows; ++r)
        for (int t = 0; t < kTokens; ++t) {
            float sum = sum_of(total[r][t]);
            for (int64_t k = whole; k < job.cols; ++k)
                sum += load_number(job.weight, kDtype, (row + r) * job.cols + k) * x[t * job.x_stride + k];
            job.y[(token + t) * job.y_stride + row + r] = sum + (job.bias ? job.bias[row + r] : 0.0f);
        }
}

template <int kDtype, int kRows>
inline void dense_tokens(const DenseJob& job, int64_t row, int64_t begin, int64_t end) {
    int64_t token = begin;
    for (; token + kDenseTokens <= end; token += kDenseTokens) dense_tile<kDtype, kRows, kDenseTokens>(job, row, token);
    switch (end - token) {
        case 1: return dense_tile<kDtype, kRows, 1>(job, row, token);
        case 2: return dense_tile<kDtype, kRows, 2>(job, row, token);
        case 3: return dense_tile<kDtype, kRows, 3>(job, row, token);
        default: return;
    }
}

template <int kDtype>
void dense_rows(const DenseJob& job) {
    for (int64_t begin = 0; begin < job.tokens; begin += kDenseBlock) {
        const int64_t end = begin + kDenseBlock < job.tokens ? begin + kDenseBlock : job.tokens;
        int64_t row = job.row_begin;
        for (; row + kDenseRows <= job.row_end; row += kDenseRows) dense_tokens<kDtype, kDenseRows>(job, row, begin, end);
        for (; row < job.row_end; ++row) dense_tokens<kDtype, 1>(job, row, begin, end);
    }
}

void dense_product(const DenseJob& job) {
    switch (job.dtype) {
        case LOWBIT_FP32: return dense_rows<LOWBIT_FP32>(job);
        case LOWBIT_BF16: return dense_rows<LOWBIT_BF16>(job);
        default: return dense_rows<LOWBIT_FP16>(job);
    }
}

}  // namespace
}  // namespace lowbit
