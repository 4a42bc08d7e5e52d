#include "layout.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "error.h"
#include "gguf_block.h"
#include "number.h"

namespace lowbit {
namespace {

constexpr char kMagic[8] = {'l', 'o', 'w', 'b', 'i', 't', 'P', '1'};
constexpr int32_t kVersion = 3;
constexpr int64_t kShortSegment = 16;
constexpr int kByteMidpoint = 128;
constexpr float kByteMost = 127.0f;

int64_t round_up(int64_t n, int64_t step) { return divide_up(n, step) * step; }

// The multiplier that turns levels into bytes: a power of two where that is exact (the small floats), else the full byte range.
float byte_multiplier(const float* levels, int count, float most) {
    for (float multiplier = 1.0f; multiplier * most <= kByteMost; multiplier *= 2) {
        bool exact = true;
        for (int i = 0; i < count; ++i)
            exact = exact && (!std::isfinite(levels[i]) || levels[i] * multiplier == std::nearbyintf(levels[i] * multiplier));
        if (exact) return multiplier;
    }
    return kByteMost / most;
}

void fill_levels(const lowbit_format& format, Header* header) {
    float most = 0.0f;
    for (int i = 0; i < format.level_count; ++i)
        if (std::isfinite(format.levels[i])) most = std::max(most, std::fabs(format.levels[i]));
    const float multiplier = byte_multiplier(format.levels, format.level_count, most);
    header->byte_factor = 1.0f / multiplier;
    for (int i = 0; i < format.level_count; ++i) {
        header->levels[i] = format.levels[i];
        const float level = std::isfinite(format.levels[i]) ? format.levels[i] : 0.0f;
        header->bytes[i] = static_cast<uint8_t>(static_cast<int>(std::nearbyintf(level * multiplier)) + kByteMidpoint);
    }
}

// What scales and minima are made of.
void describe_scales(const lowbit_format& format, Header* header) {
    if (const BlockLayout* blocks = blocks_of(format)) {
        header->block_type = format.block_type;
        header->zero = blocks->zero;
        header->scales = blocks->scales;
        header->factor_groups = blocks->groups;
        header->group_size = blocks->weights / blocks->groups;
        header->scale_type = LOWBIT_SCALE_FP16;
    } else if (format.kind != LOWBIT_DENSE && format.scale_block > 0) {
        header->scale_block = format.scale_block;
        header->scales = {kStepTable, kNoMinima, kStepMidpoint};
        const int64_t scales = format.group_size == 0 ? 1 : header->rows * header->plan.groups;
        header->step_count = divide_up(scales, format.scale_block);
    }
    if (has_fine_zeros(format)) {
        header->zero = 0;
        header->scales.minima = kZeroMinima;
        header->zero_step = zero_step(format);
    }
}

// Every part of a block begins on a vector.
void place_parts(Header* header) {
    const int64_t groups = header->plan.groups, lanes = groups * kBlockRows;
    int64_t end = 0;
    const auto place = [&](int64_t bytes) {
        const int64_t begin = end;
        end += round_up(bytes, kVector);
        return begin;
    };
    const ScaleCodes& scales = header->scales;
    if (header->kind != LOWBIT_DENSE) place(scales.level == kOneLevel ? lanes * scale_bytes(header->scale_type) : lanes);
    header->zeros_offset = place(stores_zeros(*header) ? lanes : 0);
    header->minima_offset = place(scales.minima == kHalfMinima ? 2 * lanes : scales.minima == kByteMinima ? lanes : 0);
    if (scales.level == kFactorPerBlock) {
        const int64_t factors = 2 * lanes / header->factor_groups;
        header->factors_offset = place(factors);
        header->minimum_factors_offset = place(scales.minima ? factors : 0);
    } else {
        header->minimum_factors_offset = header->minima_offset;  // numbers by themselves
    }
    header->codes_offset = end;
    header->block_bytes = header->codes_offset + header->plan.units * header->bits * kVector;
    header->steps_offset = kHeaderBytes + header->blocks * header->block_bytes;
    header->total_bytes = header->steps_offset + round_up(header->step_count * static_cast<int64_t>(sizeof(float)), kVector);
}

}  // namespace

Plan make_plan(const lowbit_format& format, int64_t cols) {
    Plan plan{};
    plan.group = format.kind == LOWBIT_DENSE ? cols : group_length(format, cols);
    // GGUF's blocks are whole, and what lies behind the end of a row is kept.
    if (const BlockLayout* blocks = blocks_of(format)) cols = round_up(cols, blocks->weights);
    plan.groups = divide_up(cols, plan.group);
    const int64_t length = std::min(plan.group, cols);
    if (length <= kShortSegment) {
        plan.split = 1;
        plan.segment = kShortSegment;
        plan.filled = length;
    } else {
        // A few more segments than necessary may leave less padding.
        int64_t least = INT64_MAX;
        const int64_t fewest = divide_up(length, kLongestSegment);
        for (int64_t split = fewest; split <= fewest + 4; ++split) {
            const int64_t filled = divide_up(length, split), segment = round_up(filled, kUnit);
            if (split * segment >= least) continue;
            least = split * segment;
            plan.split = split;
            plan.filled = filled;
            plan.segment = segment;
        }
    }
    const int64_t tail = cols - (plan.groups - 1) * plan.group;
    plan.segments = (plan.groups - 1) * plan.split + divide_up(tail, plan.filled);
    plan.straight = plan.filled == plan.segment && (plan.groups == 1 || plan.group == plan.split * plan.segment);
    plan.units = format.kind == LOWBIT_DENSE ? divide_up(cols, kUnit) : divide_up(plan.segments * plan.segment, kUnit);
    return plan;
}

void make_header(const lowbit_format& format, Shape shape, Header* header) {
    memset(static_cast<void*>(header), 0, sizeof *header);
    memcpy(header->magic, kMagic, sizeof kMagic);
    header->version = kVersion;
    header->bits = format.kind == LOWBIT_DENSE ? dtype_bytes(format.scale_type) * 8 : format.bits;
    header->kind = format.kind;
    header->symmetric = format.symmetric;
    header->group_size = format.group_size;
    header->scale_type = format.scale_type;
    header->level_count = format.kind == LOWBIT_LEVELS ? format.level_count : 0;
    header->table = format.kind == LOWBIT_LEVELS;
    header->rows = shape.rows;
    header->cols = shape.cols;
    header->blocks = divide_up(shape.rows, kBlockRows);
    header->plan = make_plan(format, shape.cols);
    header->unit = header->byte_factor = 1.0f;
    header->zero = format.kind == LOWBIT_INT ? 1 << (format.bits - 1) : 0;
    describe_scales(format, header);
    place_parts(header);
    if (format.kind == LOWBIT_LEVELS) fill_levels(format, header);
}

LaneScale lane_scale(const Header& header, int64_t row, int64_t group) {
    const uint8_t* block = block_at(header, row / kBlockRows);
    const int64_t lane = row % kBlockRows, place = group * kBlockRows + lane;
    if (header.scales.level == kStepTable) {
        const float scaled = static_cast<float>(block[place] - header.scales.bias) * steps_of(header)[step_index(header, row, group)];
        return {scaled + header.scale_offset, 0.0f};
    }
    if (header.scales.level == kOneLevel) {
        const float minimum = header.scales.minima == kHalfMinima ? load_number(block + header.minima_offset, LOWBIT_FP16, place) : 0.0f;
        return {load_scale(block, header.scale_type, place, header.unit), minimum};
    }
    const int64_t factor = group / header.factor_groups * kBlockRows + lane;
    const bool minima = header.scales.minima != kNoMinima;
    const uint8_t minimum = header.scales.minima == kByteMinima ? block[header.minima_offset + place] : 0;
    return scale_of_codes(header.scales, block[place], minimum, load_number(block + header.factors_offset, LOWBIT_FP16, factor),
                          minima ? load_number(block + header.minimum_factors_offset, LOWBIT_FP16, factor) : 0.0f);
}

bool stores_zeros(const Header& header) { return header.kind == LOWBIT_INT && header.symmetric != LOWBIT_SYMMETRIC; }

// One after the other: 0.2 microseconds for a header.
uint64_t mix_words(const uint64_t* words, size_t count) {
    uint64_t seal = count * sizeof(uint64_t);
    for (size_t i = 0; i < count; ++i) {
        seal = (seal ^ words[i]) * 0x9E3779B97F4A7C15ull;
        seal ^= seal >> 32;
    }
    return seal;
}

uint64_t seal_of(const Header& header) {
    Header open;
    memcpy(static_cast<void*>(&open), &header, sizeof open);
    open.seal = 0;
    uint64_t words[sizeof open / sizeof(uint64_t)];
    memcpy(words, &open, sizeof words);
    return mix_words(words, sizeof words / sizeof words[0]);
}

const Header* check_prepared(const void* prepared, int64_t bytes) {
    if (!prepared || bytes < kHeaderBytes) {
        fail(LOWBIT_BAD_ARGUMENT, "a prepared weight of %lld bytes is too short to hold its header", static_cast<long long>(bytes));
        return nullptr;
    }
    const Header* header = static_cast<const Header*>(prepared);
    if (reinterpret_cast<uintptr_t>(prepared) % kVector) {
        fail(LOWBIT_BAD_ARGUMENT, "a prepared weight must lie on a 64-byte boundary");
        return nullptr;
    }
    if (memcmp(header->magic, kMagic, sizeof kMagic) || header->version != kVersion) {
        fail(LOWBIT_BAD_ARGUMENT, "the buffer does not hold a weight prepared by this version of the core; prepare it again");
        return nullptr;
    }
    if (header->seal != seal_of(*header)) {
        fail(LOWBIT_BAD_ARGUMENT, "the header of a prepared weight was written over; prepare the weight again");
        return nullptr;
    }
    if (header->total_bytes != bytes) {
        fail(LOWBIT_BAD_ARGUMENT, "a prepared weight [%lld, %lld] has %lld bytes, got %lld", static_cast<long long>(header->rows),
             static_cast<long long>(header->cols), static_cast<long long>(header->total_bytes), static_cast<long long>(bytes));
        return nullptr;
    }
    return header;
}

}  // namespace lowbit
