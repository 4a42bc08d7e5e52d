// Sixteen numbers of any element type at a time, from activations and to outputs.
#pragma once
#include "product.h"

namespace lowbit {
namespace {

inline Floats load_numbers(const void* from, int dtype, int64_t index) {
    if (dtype == LOWBIT_FP32) return load_floats(static_cast<const float*>(from) + index);
    const uint16_t* halves = static_cast<const uint16_t*>(from) + index;
    return dtype == LOWBIT_BF16 ? brains_to_floats(halves) : halves_to_floats(halves);
}

inline void store_numbers(void* to, int dtype, int64_t index, Floats value) {
    if (dtype == LOWBIT_FP32) return store_floats(static_cast<float*>(to) + index, value);
    uint16_t* halves = static_cast<uint16_t*>(to) + index;
    if (dtype == LOWBIT_BF16) floats_to_brains(halves, value);
    else floats_to_halves(halves, value);
}

// Numbers as a narrower type would hold them.
inline void round_numbers(float* values, int64_t count, int dtype) {
    alignas(64) uint16_t narrow[kBlockRows];
    for (int64_t i = 0; dtype != LOWBIT_FP32 && i < count; i += kBlockRows) {
        store_numbers(narrow, dtype, 0, load_floats(values + i));
        store_floats(values + i, load_numbers(narrow, dtype, 0));
    }
}

// Add the bias and write up to 16 outputs of one token.
inline void store_outputs(const ProductJob& job, int64_t token, int64_t block, Floats sums) {
    const int64_t first = block * kBlockRows, rows = job.rows;
    const int64_t index = token * job.y_stride + first;
    if (first + kBlockRows <= rows) {
        if (job.bias) sums = add(sums, load_floats(job.bias + first));
        if (job.streams && job.y_dtype == LOWBIT_FP32) return stream_floats(static_cast<float*>(job.y) + index, sums);
        return store_numbers(job.y, job.y_dtype, index, sums);
    }
    alignas(64) float values[kBlockRows];
    store_floats(values, sums);
    for (int64_t r = 0; first + r < rows; ++r)
        store_number(job.y, job.y_dtype, index + r, values[r] + (job.bias ? job.bias[first + r] : 0.0f));
}

}  // namespace
}  // namespace lowbit
