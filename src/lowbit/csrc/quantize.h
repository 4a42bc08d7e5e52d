// One quantising job: what quantize.cpp checks and quantize_lanes.h computes, once per instruction set.
#pragma once
#include <atomic>
#include <cstdint>

#include "format.h"

namespace lowbit {

// A small floating point type whose values are all that a table of levels holds; `steps` 0: none.
struct FloatType {
    float steps;                         // values of a binade, 2^mantissa bits
    float least_normal, most;
    int32_t shift, exponent_bias, sign_bit;  // from the bits of an fp32 to its code
};

// What a search tries beside the plain grid, as grid_search.py lists it: candidate i has the scale  unit * factors[i],  where unit is
// what a group spans, and with zero points the nearest one of the ratio, moved by shifts[i] codes.
struct Candidates {
    int count;
    const float *factors, *ratios, *shifts;
};

struct QuantizeJob {
    lowbit_format format;
    const void* weight;
    int dtype;
    Shape shape;
    int64_t row_stride;
    lowbit_search search;
    Candidates candidates;
    int32_t* codes;
    void* scales;
    uint8_t* zeros;
    float zero_step, max_zero;  // what zeros count, and the largest, in codes
    bool fine_zeros;
    float unit;  // the global factor of E4M3 scales, else 1

    // Levels in rising order with the code of each, and the border below each level but the first.
    int level_count;
    float levels[kMostLevels];
    float borders[kMostLevels];
    uint8_t level_codes[kMostLevels];
    float max_level;
    FloatType float_type;

    // Flat position of a weight that is NaN or infinite, or -1; the smallest that any thread met.
    mutable std::atomic<int64_t> bad_weight{-1};
    mutable std::atomic<bool> out_of_memory{false};
};

struct DequantizeJob {
    lowbit_format format;
    Shape shape;
    const int32_t* codes;
    const void* scales;
    const uint8_t* zeros;
    float unit;
    void* weight;
    int dtype;
    int64_t row_stride;
    const float* steps;  // of doubly quantised scales, and what is added to them
    float scale_offset;
};

}  // namespace lowbit
