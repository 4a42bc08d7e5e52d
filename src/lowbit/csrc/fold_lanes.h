// What the folded products multiply (fold.h): activations as tiles of bytes with a scale per token and stretch, weights as tiles of bytes
// with a scale per row and stretch, expanded from the codes and the scales of their groups.
//
// A code becomes a folded byte by two multiplications of 16 bits, round((byte - zero) * balance * factor / 2^15), the balance being the
// same for all rows and the factor for a row's whole group. Both kinds of tile are what the tile product reads, without any reordering.
#pragma once
#include <algorithm>
#include <cmath>

#include "fold.h"
#include "number_lanes.h"
#include "unpack_lanes.h"

namespace lowbit {
namespace {

constexpr int kTokenTile = 32;
constexpr int kTokensAhead = 4;  // whose numbers are asked for: products and attention left them beyond the caches
constexpr int64_t kMostGroups = kFoldMost / 16;
constexpr float kQ15 = 32768.0f;
constexpr float kTarget = 127.0f;   // the largest folded weight
// What the factor of a scale is counted in: 15 bits, less those of the balance, and the ones that are shifted out again.
template <int kRight>
constexpr float kFactorUnit = kQ15 / kBalanceOne * (1 << kRight);
constexpr float kNothing = 1e-30f;  // scales below are no scales
constexpr float kFarApart = 4.0f;   // scales of a row that are so many times others are looked into

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

// Asks for what gather_positions will read. Always inlined, as all that only prefetches.
LOWBIT_INLINE void ask_positions(const Activations& job, int64_t token, int64_t first, int64_t count) {
    if (token >= job.tokens) return;
    const int64_t size = dtype_bytes(job.dtype);
    const uint8_t* from = static_cast<const uint8_t*>(job.x) + (token * job.stride + first) * size;
    for (int64_t i = 0; i < count * size; i += kVector) __builtin_prefetch(from + i, 0, 2);
}

// One stretch of one token to rows of its tiles; a NaN or infinite input makes the scale NaN.
inline float quantize_stretch(const float* given, const float* inverse_balance, int64_t count, int8_t* to) {
    alignas(64) float values[kFoldMost];
    Ints most = splat_ints(0);
    for (int64_t i = 0; i < count; i += kBlockRows) {
        const Floats value = multiply(load_floats(given + i), load_floats(inverse_balance + i));
        store_floats(values + i, value);
        most = larger_magnitude(most, value);
    }
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

// The balance of one stretch: fourth roots of how far inputs reach, whole multiples of 1/128, so that both sides use the same number.
// An input that is no number somewhere stands aside, with a balance of 1.
void balance_folded(const Activations& job, int64_t stretch) {
    const Fold fold = fold_of(*job.header);
    const int64_t first = stretch * fold.length, count = fold.steps_of(stretch) * kFoldStep;
    const Balance balance = balance_of(job);
    alignas(64) float values[kFoldMost];
    alignas(64) float most[kFoldMost] = {};
    const bool balanced = !keeps_codes(*job.header);
    for (int64_t token = 0; balanced && token < job.tokens; token += balance_step(job.tokens)) {
        const float* numbers = gather_positions(job, token, first, count, values);
        for (int64_t i = 0; i < count; i += kBlockRows) store_bytes(most + i, larger_magnitude(load_bytes(most + i), load_floats(numbers + i)));
    }
    float largest = 0.0f;
    for (int64_t i = 0; i < count; ++i)
        if (std::isfinite(most[i]) && most[i] > largest) largest = most[i];
    const Floats share = splat_floats(largest > 0.0f ? 1.0f / largest : 0.0f);
    for (int64_t i = 0; i < count; i += kBlockRows)
        store_floats(most + i, square_root(square_root(multiply(load_floats(most + i), share))));
    for (int64_t i = 0; i < count; ++i) {
        // Not so of what is no number.
        const bool below = balanced && most[i] < 1.0f;
        const auto whole = static_cast<int16_t>(below ? most[i] * kBalanceOne + 0.5f : kBalanceOne);
        balance.factors[first + i] = whole > 1 ? whole : int16_t{1};
        balance.inverse[first + i] = static_cast<float>(kBalanceOne) / balance.factors[first + i];
    }
    for (int64_t run = first / kBalanceRun; run < (first + count) / kBalanceRun; ++run) {
        const int16_t* from = balance.factors + run * kBalanceRun;
        balance.most[run] = *std::max_element(from, from + kBalanceRun);
    }
}

void quantize_folded(const Activations& job, int64_t tile) {
    const Fold fold = fold_of(*job.header);
    const float* inverse_balance = balance_of(job).inverse;
    const FoldedView view = view_folded(job, fold, tile);
    const float factor = job.header->unit * job.header->byte_factor;
    alignas(64) float values[kFoldMost];
    // One stretch of all tokens before the next, so that lines are written one behind another in few places.
    for (int64_t stretch = 0; stretch < fold.count; ++stretch) {
        const int64_t first = stretch * fold.length, count = fold.steps_of(stretch) * kFoldStep;
        for (int t = 0; t < kTokenTile; ++t) {
            const int64_t token = tile * kTokenTile + t;
            const float* numbers = values;
            const int ahead = t + kTokensAhead;
            if (ahead < kTokenTile) ask_positions(job, token + kTokensAhead, first, count);
            else if (stretch + 1 < fold.count) ask_positions(job, token + kTokensAhead - kTokenTile, first + fold.length, fold.steps_of(stretch + 1) * kFoldStep);
            if (token < job.tokens) numbers = gather_positions(job, token, first, count, values);
            else memset(values, 0, sizeof values);
            const float scale = quantize_stretch(numbers, inverse_balance + first, count, view.bytes + first * kTokenTile + t * kFoldStep);
            view.scales[stretch * kTokenTile + t] = scale * factor;
        }
    }
}

// Where codes lie in a byte: at the bottom, so that times the balance they fit 16 bits; under minima as high as a sign lets them.
template <int kBits, bool kMinima>
constexpr int kFoldShift = kMinima ? 7 - kBits : 0;
// Wide codes times the balance leave the factor few places, so it has this many more and the result is shifted by as many.
template <int kBits, bool kTable>
constexpr int kFoldRight = kTable || kBits == 8 ? 5 : 0;

struct ByteRange {
    int low, high;
};

// What the codes of a weight become, once per call: w = scale * step * (byte - zero) + minimum.
struct FoldRange {
    alignas(64) uint8_t bytes[256];  // of the codes of a table, around 128, as far apart as 8 bits let them be
    float step;
    int shift, zero;
    ByteRange possible;
};

inline FoldRange fold_range(const Header& header) {
    FoldRange range{};
    if (!header.table) {
        range.shift = header.scales.minima ? 7 - header.bits : 0;
        range.step = 1.0f / static_cast<float>(1 << range.shift);
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
    float balance[kMostGroups];       // the largest of a group's inputs
};

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

// Scales may be far apart because a group of zeros has a scale of 1 by definition, which would leave its neighbours hardly a bit: groups
// of rows where they are have their codes looked at, and count for nothing if these are all zeros.
template <int kBits, bool kTable, int kUp>
__attribute__((noinline)) void leave_out_zeros(const Header& header, const uint8_t* block, const FoldRange& range, StretchFactors* factors) {
    for (int r = 0; r < kBlockRows; ++r) {
        float least = 1.0f / kNothing;
        for (int64_t g = 0; g < factors->count; ++g) {
            const float size = factors->sizes[g][r];
            least = size > kNothing && size < least ? size : least;
        }
        for (int64_t g = 0; g < factors->count; ++g)
            // Fine zeros of a group of zeros are none, so its codes are.
            if (factors->sizes[g][r] > kFarApart * least && factors->minima[g][r] == 0.0f &&
                all_zeros<kBits, kTable, kUp>(header, block, range, factors->first + g, r, factors->zeros[g][r]))
                factors->sizes[g][r] = factors->scales[g][r] = 0.0f;
    }
}

// How large the weights of each row and group can be, as far as scales tell.
template <int kBits, bool kTable, int kUp>
void find_sizes(const Header& header, const uint8_t* block, const FoldRange& range, StretchFactors* factors) {
    const Floats low = splat_floats(static_cast<float>(range.possible.low)), high = splat_floats(static_cast<float>(range.possible.high));
    Floats most = splat_floats(0.0f), least = splat_floats(1.0f / kNothing);
    for (int64_t g = 0; g < factors->count; ++g) {
        const Floats scales = load_floats(factors->scales[g]), minima = load_floats(factors->minima[g]);
        const Floats down = multiply(to_floats(load_bytes(factors->zeros[g])), splat_floats(-1.0f));
        const Floats lowest = multiply_add(scales, add(low, down), minima), highest = multiply_add(scales, add(high, down), minima);
        const Floats size = absolute_most(absolute_most(splat_floats(0.0f), lowest), highest);
        store_floats(factors->sizes[g], size);
        most = absolute_most(most, size);
        least = smaller(least, size);
    }
    const bool any_zeros = !header.scales.minima || header.scales.minima == kZeroMinima;
    if (any_zeros && most_of(multiply_add(least, splat_floats(-kFarApart), most)) > 0.0f)
        leave_out_zeros<kBits, kTable, kUp>(header, block, range, factors);
}

// The largest balanced weight of each row. A factor must fit 15 bits, which bounds from below what a group counts for; where that
// bound holds, folded weights are whole multiples of codes anyway, or under minima still have 7 bits.
template <bool kMinima, int kRight>
Floats find_most(const StretchFactors& factors) {
    constexpr float kLeast = kMinima ? 0.51f : kTarget * kFactorUnit<kRight> / (kQ15 - 1.0f);
    Floats most = splat_floats(0.0f);
    for (int64_t g = 0; g < factors.count; ++g) {
        const float balance = factors.balance[g];
        const Floats sizes = load_floats(factors.sizes[g]);
        most = absolute_most(most, multiply(sizes, splat_floats(kMinima && balance < kLeast ? kLeast : balance)));
        if (!kMinima) most = absolute_most(most, multiply(load_floats(factors.scales[g]), splat_floats(kLeast)));
    }
    return most;
}

// Finds the scales of the stretch and the factors that lead there.
template <int kBits, bool kTable, bool kMinima>
void find_factors(const Header& header, const uint8_t* block, const FoldRange& range, StretchFactors* factors, float* folded) {
    constexpr int kRight = kFoldRight<kBits, kTable>;
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
    find_sizes<kBits, kTable, kFoldShift<kBits, kMinima>>(header, block, range, factors);
    store_floats(most, find_most<kMinima, kRight>(*factors));
    for (int r = 0; r < kBlockRows; ++r) {
        inverse[r] = most[r] > kNothing ? kTarget / most[r] : 0.0f;
        folded[r] = most[r] > kNothing ? most[r] / kTarget : 0.0f;
    }
    for (int64_t g = 0; g < factors->count; ++g) {
        Ints offsets = load_bytes(factors->zeros[g]);
        if (kMinima) offsets = round_floats(multiply(multiply(load_floats(factors->minima[g]), load_floats(inverse)), splat_floats(kFoldMinimum)));
        const Floats factor = multiply(multiply(load_floats(factors->scales[g]), load_floats(inverse)), splat_floats(kMinima ? kMinimumUnit : kFactorUnit<kRight>));
        factors->rows[g] = spread_factors(round_floats(factor), offsets);
    }
}

// One block of rows, one stretch of inputs, as tiles of folded bytes.
template <int kBits, bool kTable, bool kMinima>
void fold_block(const Header& header, const uint8_t* block, const FoldRange& range, const Balance& balance, const Fold& fold, int64_t stretch, uint8_t* to, float* scales) {
    constexpr int kUp = kFoldShift<kBits, kMinima>, kRight = kFoldRight<kBits, kTable>, kHalf = kSteps / 2;
    const int64_t begin = stretch * fold.length, whole = begin + fold.steps_of(stretch) * kFoldStep;
    const int64_t positions = header.plan.positions(), end = whole < positions ? whole : positions, last_group = header.plan.groups - 1;
    StretchFactors factors;
    factors.positions = header.plan.split * header.plan.segment;
    const auto group_of = [&](int64_t position) { return position / factors.positions < last_group ? position / factors.positions : last_group; };
    factors.first = group_of(begin);
    factors.count = group_of(end - 1) - factors.first + 1;
    for (int64_t g = 0; g < factors.count; ++g) {
        const int64_t from = std::max((factors.first + g) * factors.positions, begin);
        const int64_t until = g == factors.count - 1 ? whole : (factors.first + g + 1) * factors.positions;
        const int16_t most = *std::max_element(balance.most + from / kBalanceRun, balance.most + until / kBalanceRun);
        factors.balance[g] = static_cast<float>(most) / kBalanceOne;
    }
    bool exact = false;
    if constexpr (kBits == 8 && !kTable && !kMinima) exact = keeps_codes(header);
    if (exact) {
        ScaleReader<> reader(header, block);
        reader.read(factors.first);
        store_floats(scales, reader.scales);
    } else {
        find_factors<kBits, kTable, kMinima>(header, block, range, &factors, scales);
    }
    const Bytes zero = splat_ints(static_cast<int32_t>(static_cast<uint32_t>(range.zero) * 0x01010101u));
    const Table table = load_table(range.bytes);
    const int16_t* inputs = balance.factors + begin;
    const uint8_t* planes = block + header.codes_offset + begin / kUnit * kBits * kVector;
    int64_t group = 0, left = (factors.first + 1) * factors.positions - begin;
    for (int64_t at = begin; at < end; at += kUnit, planes += kBits * kVector) {
        Bytes steps[kSteps];
        unpack_unit<kBits, kTable, kUp>(planes, table, steps);
        LOWBIT_UNROLL
        for (int half = 0; half < 2; ++half) {
            const RowFactors& rows = factors.rows[group];
            LOWBIT_UNROLL
            for (int s = half * kHalf; s < (half + 1) * kHalf; ++s, to += kVector, inputs += 4)
                store_bytes(to, exact ? subtract_bytes(steps[s], zero) : kMinima ? fold_minimum(steps[s], rows, inputs) : fold_bytes<kRight>(steps[s], rows, inputs));
            left -= kUnit / 2;
            if (left == 0 && group < factors.count - 1) ++group, left = factors.positions;
        }
    }
    if (end < whole) memset(to, 0, static_cast<size_t>((whole - end) * kBlockRows));
}

template <int kBits, bool kTable>
void fold_codes(const Header& header, const uint8_t* block, const FoldRange& range, const Balance& balance, const Fold& fold, int64_t stretch, uint8_t* to, float* scales) {
    if constexpr (kMayHaveMinima<kBits, kTable>)
        if (header.scales.minima) return fold_block<kBits, kTable, true>(header, block, range, balance, fold, stretch, to, scales);
    fold_block<kBits, kTable, false>(header, block, range, balance, fold, stretch, to, scales);
}

// The codes that fold_weights will read: where they begin in a block, and their lines.
struct Stretched {
    int64_t codes, lines;
};
inline Stretched codes_of(const Header& header, const Fold& fold, int64_t stretch) {
    const int64_t bits = header.bits * kBlockRows;
    return {header.codes_offset + stretch * fold.length * bits / 8, fold.steps_of(stretch) * kFoldStep * bits / 8 / kVector};
}

// Asks for the scales that it will read, of 16 bits as most are: others have fewer bytes or are few. Always inlined, as all that only
// prefetches.
LOWBIT_INLINE void fetch_scales(const Header& header, const uint8_t* block, const Fold& fold, int64_t stretch) {
    const int64_t group = header.plan.split * header.plan.segment, first = stretch * fold.length / group;
    const int64_t bytes = divide_up(fold.steps_of(stretch) * kFoldStep, group) * kBlockRows * 2;
    for (int64_t at = 0; at < bytes; at += kVector) __builtin_prefetch(block + first * kBlockRows * 2 + at, 0, 2);
}

void fold_weights(const Header& header, const uint8_t* block, const FoldRange& range, const Balance& balance, const Fold& fold, int64_t stretch, uint8_t* to, float* scales) {
    switch (header.bits + (header.table ? 16 : 0)) {
        case 2: return fold_codes<2, false>(header, block, range, balance, fold, stretch, to, scales);
        case 3: return fold_codes<3, false>(header, block, range, balance, fold, stretch, to, scales);
        case 4: return fold_codes<4, false>(header, block, range, balance, fold, stretch, to, scales);
        case 5: return fold_codes<5, false>(header, block, range, balance, fold, stretch, to, scales);
        case 6: return fold_codes<6, false>(header, block, range, balance, fold, stretch, to, scales);
        case 7: return fold_codes<7, false>(header, block, range, balance, fold, stretch, to, scales);
        case 8: return fold_codes<8, false>(header, block, range, balance, fold, stretch, to, scales);
        case 16 + 3: return fold_codes<3, true>(header, block, range, balance, fold, stretch, to, scales);
        case 16 + 4: return fold_codes<4, true>(header, block, range, balance, fold, stretch, to, scales);
        case 16 + 6: return fold_codes<6, true>(header, block, range, balance, fold, stretch, to, scales);
        default: return fold_codes<8, true>(header, block, range, balance, fold, stretch, to, scales);
    }
}

}  // namespace
}  // namespace lowbit
