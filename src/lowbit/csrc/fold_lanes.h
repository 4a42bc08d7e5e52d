// What the folded products multiply (fold.h): activations as tiles of bytes with a scale per token and stretch, weights as tiles of bytes
// with a scale per row and stretch, expanded from the codes and the scales of their groups.
//
// A code becomes a folded byte by one multiplication of 16 bits, round((byte - zero) * factor / 2^15), the factor being the same for a
// row's whole group. Both kinds of tile are what the tile product reads, without any reordering.
#pragma once
#include <cmath>

#include "fold.h"
#include "number_lanes.h"
#include "unpack_lanes.h"

namespace lowbit {
namespace {

constexpr int kTokenTile = 32;
constexpr int64_t kFoldAhead = 2 * kFoldMost;  // inputs expanded at a time, and so how far ahead the next turn's codes lie
constexpr int64_t kMostGroups = kFoldMost / 16;
constexpr float kQ15 = 32768.0f;
constexpr float kNothing = 1e-30f;  // scales below are no scales

// Numbers at positions [first, first + count) of one token, zero where a position stands for no input: where they lie, or in `values`.
inline const float* gather_positions(const Activations& job, int64_t token, int64_t first, int64_t count, float* values) {
    const Plan& plan = job.header->plan;
    const int64_t source = token * job.stride, cols = job.header->cols;
    if (plan.straight && job.dtype == LOWBIT_FP32 && first + count <= cols) return static_cast<const float*>(job.x) + source + first;
    int64_t i = 0;
    if (plan.straight) {
        for (; i + kBlockRows <= count && first + i + kBlockRows <= cols; i += kBlockRows)
            store_floats(values + i, load_numbers(job.x, job.dtype, source + first + i));
    }
    for (; i < count; ++i) {
        const int64_t segment = (first + i) / plan.segment, inside = (first + i) % plan.segment;
        const bool exists = segment < plan.segments && inside < plan.width_of(segment, cols);
        values[i] = exists ? load_number(job.x, job.dtype, source + plan.column_of(segment) + inside) : 0.0f;
    }
    return values;
}

// One stretch of one token to rows of its tiles; a NaN or infinite input makes the scale NaN.
inline float quantize_stretch(const float* values, int64_t count, int8_t* to) {
    Ints most = splat_ints(0);
    for (int64_t i = 0; i < count; i += kBlockRows) most = larger_magnitude(most, load_floats(values + i));
    const float largest = largest_magnitude(most);
    const bool numbers = std::isfinite(largest);
    const Floats inverse = splat_floats(largest > 0.0f && numbers ? 127.0f / largest : 0.0f);
    for (int64_t i = 0; i < count; i += kFoldStep) floats_to_line(to + i * kTokenTile, values + i, inverse);
    return numbers ? largest / 127.0f : NAN;
}

struct FoldedView {
    int8_t* bytes;
    float* scales;
};

inline FoldedView view_folded(const Activations& job, const Fold& fold, int64_t tile) {
    uint8_t* base = job.data + tile * job.tile_bytes;
    return {reinterpret_cast<int8_t*>(base), reinterpret_cast<float*>(base + fold.steps * kFoldStep * kTokenTile)};
}

void quantize_folded(const Activations& job, int64_t tile) {
    const Fold fold = fold_of(job.header->plan);
    const FoldedView view = view_folded(job, fold, tile);
    const float factor = job.header->unit * job.header->byte_factor;
    alignas(64) float values[kFoldMost];
    for (int t = 0; t < kTokenTile; ++t) {
        const int64_t token = tile * kTokenTile + t;
        for (int64_t stretch = 0; stretch < fold.count; ++stretch) {
            const int64_t first = stretch * fold.length, count = fold.steps_of(stretch) * kFoldStep;
            const float* numbers = values;
            if (token < job.tokens) numbers = gather_positions(job, token, first, count, values);
            else memset(values, 0, sizeof values);
            const float scale = quantize_stretch(numbers, count, view.bytes + first * kTokenTile + t * kFoldStep);
            view.scales[stretch * kTokenTile + t] = scale * factor;
        }
    }
}

// Where codes lie in a byte: at the top, or one bit lower under minima, which need room for a sign.
template <int kBits, bool kTable, bool kMinima>
constexpr int kFoldShift = kTable || kBits == 8 ? 0 : 8 - kBits - kMinima;

struct ByteRange {
    int low, high;
};

// What the codes of a weight become, once per call: w = scale * step * (byte - zero) + minimum.
struct FoldRange {
    alignas(64) uint8_t bytes[256];  // of the codes of a table, around 128, as far apart as 8 bits let them be
    float step, target;              // target: the largest folded weight
    int shift, zero;
    ByteRange possible;
};

inline FoldRange fold_range(const Header& header) {
    FoldRange range{};
    if (!header.table) {
        range.shift = header.bits == 8 ? 0 : 8 - header.bits - (header.scales.minima ? 1 : 0);
        range.step = 1.0f / static_cast<float>(1 << range.shift);
        range.target = 127.0f;
        range.zero = header.scales.minima ? 0 : header.zero << range.shift;
        range.possible = {0, ((1 << header.bits) - 1) << range.shift};
        return range;
    }
    int most = 1;
    for (int i = 0; i < header.level_count; ++i) {
        const int byte = header.bytes[i] - 128;
        most = byte > most ? byte : -byte > most ? -byte : most;
    }
    const int times = most < 127 ? 127 / most : 1;
    for (int i = 0; i < header.level_count; ++i) range.bytes[i] = static_cast<uint8_t>((header.bytes[i] - 128) * times + 128);
    range.step = 1.0f / static_cast<float>(times);
    range.target = static_cast<float>(most * times) * (kQ15 - 1.0f) / kQ15;  // a factor of 1 has no place in 15 bits
    range.zero = 128;
    range.possible = {128 - most * times, 128 + most * times};
    return range;
}

// The groups of one stretch of one block of rows, and how their codes become folded bytes.
struct StretchFactors {
    RowFactors rows[kMostGroups];
    alignas(64) float scales[kMostGroups][kBlockRows], minima[kMostGroups][kBlockRows], sizes[kMostGroups][kBlockRows];
    alignas(64) int32_t zeros[kMostGroups][kBlockRows];
    int64_t first, count, positions;  // groups, and positions of a group
};

inline float larger_size(float a, float b) {
    a = a < 0.0f ? -a : a;
    b = b < 0.0f ? -b : b;
    return a > b ? a : b;
}

// Whether all weights of one row in one group are zeros.
template <int kBits, bool kTable, int kUp>
__attribute__((noinline)) bool all_zeros(const Header& header, const uint8_t* block, const FoldRange& range, int64_t group, int row, int zero) {
    const Plan& plan = header.plan;
    const Table table = load_table(range.bytes);
    alignas(64) uint8_t bytes[kSteps][kVector];
    for (int64_t segment = group * plan.split; segment < (group + 1) * plan.split && segment < plan.segments; ++segment)
        for (int64_t i = 0; i < plan.width_of(segment, header.cols); ++i) {
            const int64_t position = segment * plan.segment + i, inside = position % kUnit;
            if (i == 0 || inside == 0) {
                Bytes steps[kSteps];
                unpack_unit<kBits, kTable, kUp>(block + header.codes_offset + position / kUnit * kBits * kVector, table, steps);
                for (int s = 0; s < kSteps; ++s) store_bytes(bytes[s], steps[s]);
            }
            if (bytes[inside / 4][row * 4 + inside % 4] != zero) return false;
        }
    return true;
}

// The largest weight of each row, as far as its scales tell. Where they are far apart the codes are looked at: a group of zeros has a
// scale of 1 by definition, which would leave its neighbours hardly a bit.
template <int kBits, bool kTable, int kUp>
void find_most(const Header& header, const uint8_t* block, const FoldRange& range, StretchFactors* factors, float* most) {
    constexpr float kFarApart = 2.0f;
    float least[kBlockRows];
    for (int r = 0; r < kBlockRows; ++r) most[r] = 0.0f, least[r] = 1.0f / kNothing;
    for (int64_t g = 0; g < factors->count; ++g)
        for (int r = 0; r < kBlockRows; ++r) {
            const float scale = factors->scales[g][r], minimum = factors->minima[g][r];
            const float size = larger_size(scale * static_cast<float>(range.possible.low - factors->zeros[g][r]) + minimum,
                                           scale * static_cast<float>(range.possible.high - factors->zeros[g][r]) + minimum);
            factors->sizes[g][r] = size;
            most[r] = size > most[r] ? size : most[r];
            least[r] = size > kNothing && size < least[r] ? size : least[r];
        }
    if (header.scales.minima && header.scales.minima != kZeroMinima) return;
    int far_apart = 0;
    for (int r = 0; r < kBlockRows; ++r) far_apart |= most[r] > kFarApart * least[r];
    for (int r = 0; far_apart && r < kBlockRows; ++r) {
        if (most[r] <= kFarApart * least[r]) continue;
        most[r] = 0.0f;
        for (int64_t g = 0; g < factors->count; ++g) {
            const bool stands_out = factors->sizes[g][r] > kFarApart * least[r];
            // Fine zeros of a group of zeros are none, so its codes are.
            if (stands_out && factors->minima[g][r] == 0.0f && all_zeros<kBits, kTable, kUp>(header, block, range, factors->first + g, r, factors->zeros[g][r]))
                factors->sizes[g][r] = factors->scales[g][r] = 0.0f;
            most[r] = factors->sizes[g][r] > most[r] ? factors->sizes[g][r] : most[r];
        }
    }
}

// Finds the scales of the stretch and the factors that lead there.
template <int kBits, bool kTable, bool kMinima>
void find_factors(const Header& header, const uint8_t* block, const FoldRange& range, StretchFactors* factors, float* folded) {
    constexpr float kMinimumUnit = kFoldMinimum * kQ15 / 256.0f;
    alignas(64) float most[kBlockRows], inverse[kBlockRows];
    ScaleReader<> reader(header, block);
    for (int64_t g = 0; g < factors->count; ++g) {
        reader.read(factors->first + g);
        store_floats(factors->scales[g], multiply(reader.scales, splat_floats(range.step)));
        store_floats(factors->minima[g], kMinima ? reader.minima : splat_floats(0.0f));
        const uint8_t* zeros = block + header.zeros_offset + (factors->first + g) * kBlockRows;
        store_bytes(factors->zeros[g], has_whole_zeros(header) ? multiply_ints(widen_bytes(zeros), splat_ints(1 << range.shift)) : splat_ints(range.zero));
    }
    find_most<kBits, kTable, kFoldShift<kBits, kTable, kMinima>>(header, block, range, factors, most);
    for (int r = 0; r < kBlockRows; ++r) {
        inverse[r] = most[r] > kNothing ? range.target / most[r] : 0.0f;
        folded[r] = most[r] > kNothing ? most[r] / range.target : 0.0f;
    }
    for (int64_t g = 0; g < factors->count; ++g) {
        Ints offsets = load_bytes(factors->zeros[g]);
        if (kMinima) offsets = round_floats(multiply(multiply(load_floats(factors->minima[g]), load_floats(inverse)), splat_floats(kFoldMinimum)));
        const Floats factor = multiply(multiply(load_floats(factors->scales[g]), load_floats(inverse)), splat_floats(kMinima ? kMinimumUnit : kQ15));
        factors->rows[g] = spread_factors(round_floats(factor), offsets);
    }
}

// One block of rows, one stretch of inputs, as tiles of folded bytes.
template <int kBits, bool kTable, bool kMinima>
void fold_block(const Header& header, const uint8_t* block, const FoldRange& range, const Fold& fold, int64_t stretch, uint8_t* to, float* scales) {
    constexpr int kUp = kFoldShift<kBits, kTable, kMinima>, kHalf = kSteps / 2;
    const int64_t begin = stretch * fold.length, whole = begin + fold.steps_of(stretch) * kFoldStep;
    const int64_t positions = header.plan.positions(), end = whole < positions ? whole : positions, last_group = header.plan.groups - 1;
    StretchFactors factors;
    factors.positions = header.plan.split * header.plan.segment;
    const auto group_of = [&](int64_t position) { return position / factors.positions < last_group ? position / factors.positions : last_group; };
    factors.first = group_of(begin);
    factors.count = group_of(end - 1) - factors.first + 1;
    // One scale for all of the stretch: the codes as they are, without another rounding.
    const bool exact = !kMinima && factors.count == 1 && !has_whole_zeros(header);
    if (exact) {
        ScaleReader<> reader(header, block);
        reader.read(factors.first);
        store_floats(scales, multiply(reader.scales, splat_floats(range.step)));
    } else {
        find_factors<kBits, kTable, kMinima>(header, block, range, &factors, scales);
    }
    const Table table = load_table(range.bytes);
    const Bytes zero = splat_ints(static_cast<int32_t>(static_cast<uint32_t>(range.zero) * 0x01010101u));
    const uint8_t* planes = block + header.codes_offset + begin / kUnit * kBits * kVector;
    const int64_t ahead = kFoldAhead * kBits * kBlockRows / 8;
    int64_t group = 0, left = (factors.first + 1) * factors.positions - begin;
    for (int64_t at = begin; at < end; at += kUnit, planes += kBits * kVector) {
        LOWBIT_UNROLL
        for (int v = 0; v < kBits; ++v) fetch(planes + ahead + v * kVector);
        Bytes steps[kSteps];
        unpack_unit<kBits, kTable, kUp>(planes, table, steps);
        LOWBIT_UNROLL
        for (int half = 0; half < 2; ++half) {
            const RowFactors& rows = factors.rows[group];
            LOWBIT_UNROLL
            for (int s = half * kHalf; s < (half + 1) * kHalf; ++s, to += kVector)
                store_bytes(to, exact ? subtract_bytes(steps[s], zero) : kMinima ? fold_minimum(steps[s], rows) : fold_bytes(steps[s], rows));
            left -= kUnit / 2;
            if (left == 0 && group < factors.count - 1) ++group, left = factors.positions;
        }
    }
    if (end < whole) memset(to, 0, static_cast<size_t>((whole - end) * kBlockRows));
}

template <int kBits, bool kTable>
void fold_codes(const Header& header, const uint8_t* block, const FoldRange& range, const Fold& fold, int64_t stretch, uint8_t* to, float* scales) {
    if constexpr (kMayHaveMinima<kBits, kTable>)
        if (header.scales.minima) return fold_block<kBits, kTable, true>(header, block, range, fold, stretch, to, scales);
    fold_block<kBits, kTable, false>(header, block, range, fold, stretch, to, scales);
}

void fold_weights(const Header& header, const uint8_t* block, const FoldRange& range, const Fold& fold, int64_t stretch, uint8_t* to, float* scales) {
    switch (header.bits + (header.table ? 16 : 0)) {
        case 2: return fold_codes<2, false>(header, block, range, fold, stretch, to, scales);
        case 3: return fold_codes<3, false>(header, block, range, fold, stretch, to, scales);
        case 4: return fold_codes<4, false>(header, block, range, fold, stretch, to, scales);
        case 5: return fold_codes<5, false>(header, block, range, fold, stretch, to, scales);
        case 6: return fold_codes<6, false>(header, block, range, fold, stretch, to, scales);
        case 7: return fold_codes<7, false>(header, block, range, fold, stretch, to, scales);
        case 8: return fold_codes<8, false>(header, block, range, fold, stretch, to, scales);
        case 16 + 3: return fold_codes<3, true>(header, block, range, fold, stretch, to, scales);
        case 16 + 4: return fold_codes<4, true>(header, block, range, fold, stretch, to, scales);
        case 16 + 6: return fold_codes<6, true>(header, block, range, fold, stretch, to, scales);
        default: return fold_codes<8, true>(header, block, range, fold, stretch, to, scales);
    }
}

}  // namespace
}  // namespace lowbit
