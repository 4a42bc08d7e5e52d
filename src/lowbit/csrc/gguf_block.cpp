#include "gguf_block.h"

#include <cstring>

#include "layout.h"
#include "number.h"
#include "repack.h"

namespace lowbit {
namespace {

// A plane of codes: fields kWidth bits wide at bit kLow of the codes. kRun consecutive codes take one field of kRun consecutive bytes,
// the next run takes their next field. kMore adds to codes that hold other bits already.
template <int kBytes, int kWidth, int kRun, int kLow, bool kMore = false>
struct Fields {
    static constexpr int kPerByte = 8 / kWidth, kMask = (1 << kWidth) - 1;
    static int code_at(int run, int field, int i) { return (run * kPerByte + field) * kRun + i; }

    static void read(const uint8_t* bytes, uint8_t* codes) {
        for (int run = 0; run < kBytes / kRun; ++run)
            for (int field = 0; field < kPerByte; ++field)
                for (int i = 0; i < kRun; ++i) {
                    uint8_t& code = codes[code_at(run, field, i)];
                    const int bits = (bytes[run * kRun + i] >> (field * kWidth) & kMask) << kLow;
                    code = static_cast<uint8_t>(kMore ? code | bits : bits);
                }
    }
    static void write(uint8_t* bytes, const uint8_t* codes) {
        for (int run = 0; run < kBytes / kRun; ++run)
            for (int i = 0; i < kRun; ++i) {
                int byte = 0;
                for (int field = 0; field < kPerByte; ++field) byte |= (codes[code_at(run, field, i)] >> kLow & kMask) << (field * kWidth);
                bytes[run * kRun + i] = static_cast<uint8_t>(byte);
            }
    }
};

struct Reading {
    template <class Place>
    static void move(const uint8_t* bytes, uint8_t* codes) { Place::read(bytes, codes); }
};
struct Writing {
    template <class Place>
    static void move(uint8_t* bytes, const uint8_t* codes) { Place::write(bytes, codes); }
};

// Where the codes of each type stand.
template <class Direction, class From, class To>
void move_codes(int block_type, From* bytes, To* codes) {
    switch (block_type) {
        case LOWBIT_Q2_K: return Direction::template move<Fields<64, 2, 32, 0>>(bytes + 16, codes);
        case LOWBIT_Q3_K:
            Direction::template move<Fields<64, 2, 32, 0>>(bytes + 32, codes);
            return Direction::template move<Fields<32, 1, 32, 2, true>>(bytes, codes);
        case LOWBIT_Q4_K: return Direction::template move<Fields<128, 4, 32, 0>>(bytes + 16, codes);
        case LOWBIT_Q5_K:
            Direction::template move<Fields<128, 4, 32, 0>>(bytes + 48, codes);
            return Direction::template move<Fields<32, 1, 32, 4, true>>(bytes + 16, codes);
        case LOWBIT_Q6_K:
            Direction::template move<Fields<128, 4, 64, 0>>(bytes, codes);
            return Direction::template move<Fields<64, 2, 32, 4, true>>(bytes + 128, codes);
        case LOWBIT_Q4_1: return Direction::template move<Fields<16, 4, 16, 0>>(bytes + 4, codes);
        default:
            // The fifth bits are one 32-bit word: a run of one byte, bit after bit.
            Direction::template move<Fields<16, 4, 16, 0>>(bytes + 8, codes);
            return Direction::template move<Fields<4, 1, 1, 4, true>>(bytes + 4, codes);
    }
}

constexpr int kHalf = 2;

// First byte of each number, -1: none.
struct Places {
    int factor, minimum, scales;
};

constexpr BlockLayout kLayouts[] = {
    {2, 256, 16, 84, 0, {kFactorPerBlock, kNibbleMinima, 0}},  {3, 256, 16, 110, 4, {kFactorPerBlock, kNoMinima, 32}},
    {4, 256, 8, 144, 0, {kFactorPerBlock, kByteMinima, 0}},    {5, 256, 8, 176, 0, {kFactorPerBlock, kByteMinima, 0}},
    {6, 256, 16, 210, 32, {kFactorPerBlock, kNoMinima, 128}},  {4, 32, 1, 20, 0, {kOneLevel, kHalfMinima, 0}},
    {5, 32, 1, 24, 0, {kOneLevel, kHalfMinima, 0}},
};

constexpr Places kPlaces[] = {{80, 82, 0}, {108, -1, 96}, {0, 2, 4}, {0, 2, 4}, {208, -1, 192}, {0, 2, -1}, {0, 2, -1}};

// Eight scales and eight minima of six bits: the first four of each in the low bits of bytes 0..7; of the others four bits in bytes
// 8..11 (scales low, minima high) and the top two above the first four.
void read_six_bits(const uint8_t* from, uint8_t* scales, uint8_t* minima) {
    for (int i = 0; i < 4; ++i) {
        scales[i] = from[i] & 63;
        minima[i] = from[4 + i] & 63;
        scales[4 + i] = static_cast<uint8_t>((from[8 + i] & 15) | from[i] >> 6 << 4);
        minima[4 + i] = static_cast<uint8_t>(from[8 + i] >> 4 | from[4 + i] >> 6 << 4);
    }
}

void write_six_bits(uint8_t* to, const uint8_t* scales, const uint8_t* minima) {
    for (int i = 0; i < 4; ++i) {
        to[i] = static_cast<uint8_t>(scales[i] | scales[4 + i] >> 4 << 6);
        to[4 + i] = static_cast<uint8_t>(minima[i] | minima[4 + i] >> 4 << 6);
        to[8 + i] = static_cast<uint8_t>((scales[4 + i] & 15) | (minima[4 + i] & 15) << 4);
    }
}

typedef Fields<8, 4, 8, 0> LowScales;  // of q3_k
typedef Fields<4, 2, 4, 4, true> HighScales;
constexpr int kLowScaleBytes = 8;
constexpr uint8_t kSignBit = 0x80;

}  // namespace

const BlockLayout* block_layout(int block_type) {
    return block_type >= LOWBIT_Q2_K && block_type <= LOWBIT_Q5_1 ? &kLayouts[block_type - LOWBIT_Q2_K] : nullptr;
}

void read_block(int block_type, const uint8_t* from, uint8_t* codes, BlockNumbers* block) {
    const Places& places = kPlaces[block_type - LOWBIT_Q2_K];
    move_codes<Reading>(block_type, from, codes);
    memcpy(&block->factor, from + places.factor, kHalf);
    if (places.minimum >= 0) memcpy(&block->minimum_factor, from + places.minimum, kHalf);
    const uint8_t* scales = from + places.scales;
    switch (block_type) {
        case LOWBIT_Q2_K: memcpy(block->scales, scales, kMostBlockGroups); break;
        case LOWBIT_Q3_K:
            LowScales::read(scales, block->scales);
            HighScales::read(scales + kLowScaleBytes, block->scales);
            break;
        case LOWBIT_Q4_K:
        case LOWBIT_Q5_K: read_six_bits(scales, block->scales, block->minima); break;
        case LOWBIT_Q6_K:
            for (int i = 0; i < kMostBlockGroups; ++i) block->scales[i] = scales[i] ^ kSignBit;
            break;
        default: break;
    }
}

void write_block(int block_type, const uint8_t* codes, const BlockNumbers& block, uint8_t* to) {
    const Places& places = kPlaces[block_type - LOWBIT_Q2_K];
    move_codes<Writing>(block_type, to, codes);
    memcpy(to + places.factor, &block.factor, kHalf);
    if (places.minimum >= 0) memcpy(to + places.minimum, &block.minimum_factor, kHalf);
    uint8_t* scales = to + places.scales;
    switch (block_type) {
        case LOWBIT_Q2_K: memcpy(scales, block.scales, kMostBlockGroups); break;
        case LOWBIT_Q3_K:
            LowScales::write(scales, block.scales);
            HighScales::write(scales + kLowScaleBytes, block.scales);
            break;
        case LOWBIT_Q4_K:
        case LOWBIT_Q5_K: write_six_bits(scales, block.scales, block.minima); break;
        case LOWBIT_Q6_K:
            for (int i = 0; i < kMostBlockGroups; ++i) scales[i] = block.scales[i] ^ kSignBit;
            break;
        default: break;
    }
}

namespace {

// Where the numbers of one GGUF block of one row lie in the prepared block.
struct Lane {
    uint8_t *scales, *minima;  // of its first group, nullptr: none; the next group is kBlockRows further
    uint8_t *factor, *minimum_factor;
};

Lane lane_at(const Header& header, uint8_t* base, int64_t block, int groups, int64_t row) {
    const int64_t lane = row % kBlockRows, codes = block * groups * kBlockRows + lane, halves = (block * kBlockRows + lane) * kHalf;
    const bool factors = header.scales.level == kFactorPerBlock;
    return {factors ? base + codes : nullptr, header.scales.minima == kByteMinima ? base + header.minima_offset + codes : nullptr,
            base + header.factors_offset + halves, header.scales.minima ? base + header.minimum_factors_offset + halves : nullptr};
}

uint8_t* blocks_of_row(const RepackJob& job, const BlockLayout& layout, int64_t row) {
    const int64_t blocks = job.header->plan.positions() / layout.weights;
    return static_cast<uint8_t*>(job.codes) + row * blocks * layout.bytes;
}

}  // namespace

void blocks_to_lanes(const RepackJob& job, int64_t row, uint8_t* base, uint8_t* bytes) {
    const int type = job.header->block_type;
    const BlockLayout& layout = *block_layout(type);
    const int64_t blocks = job.header->plan.positions() / layout.weights;
    const uint8_t* from = blocks_of_row(job, layout, row);
    BlockNumbers block{};
    for (int64_t b = 0; b < blocks; ++b, from += layout.bytes, bytes += layout.weights) {
        read_block(type, from, bytes, &block);
        const Lane lane = lane_at(*job.header, base, b, layout.groups, row);
        memcpy(lane.factor, &block.factor, kHalf);
        if (lane.minimum_factor) memcpy(lane.minimum_factor, &block.minimum_factor, kHalf);
        for (int g = 0; g < layout.groups; ++g) {
            if (lane.scales) lane.scales[g * kBlockRows] = block.scales[g];
            if (lane.minima) lane.minima[g * kBlockRows] = block.minima[g];
        }
    }
}

void lanes_to_blocks(const RepackJob& job, int64_t row, const uint8_t* base, const uint8_t* bytes) {
    const int type = job.header->block_type;
    const BlockLayout& layout = *block_layout(type);
    const int64_t blocks = job.header->plan.positions() / layout.weights;
    uint8_t* to = blocks_of_row(job, layout, row);
    BlockNumbers block{};
    for (int64_t b = 0; b < blocks; ++b, to += layout.bytes, bytes += layout.weights) {
        const Lane lane = lane_at(*job.header, const_cast<uint8_t*>(base), b, layout.groups, row);
        memcpy(&block.factor, lane.factor, kHalf);
        if (lane.minimum_factor) memcpy(&block.minimum_factor, lane.minimum_factor, kHalf);
        for (int g = 0; g < layout.groups; ++g) {
            if (lane.scales) block.scales[g] = lane.scales[g * kBlockRows];
            if (lane.minima) block.minima[g] = lane.minima[g * kBlockRows];
        }
        write_block(type, bytes, block, to);
    }
}

void dequantize_blocks(const DequantizeJob& job, int64_t begin, int64_t end) {
    const int type = job.format.block_type;
    const BlockLayout& layout = *block_layout(type);
    const int64_t blocks = divide_up(job.shape.cols, layout.weights);
    const int length = layout.weights / layout.groups;
    const uint8_t* data = reinterpret_cast<const uint8_t*>(job.codes);
    uint8_t codes[kMostBlockWeights];
    BlockNumbers block{};
    for (int64_t row = begin; row < end; ++row)
        for (int64_t b = 0; b < blocks; ++b) {
            read_block(type, data + (row * blocks + b) * layout.bytes, codes, &block);
            const float factor = from_fp16(block.factor), minimum_factor = from_fp16(block.minimum_factor);
            const int64_t first = b * layout.weights, left = job.shape.cols - first;
            for (int64_t i = 0; i < layout.weights && i < left; ++i) {
                const int64_t group = i / length;
                const LaneScale scale = scale_of_codes(layout.scales, block.scales[group], block.minima[group], factor, minimum_factor);
                const float value = scale.scale * static_cast<float>(codes[i] - layout.zero) + scale.minimum;
                store_number(job.weight, job.dtype, row * job.row_stride + first + i, value);
            }
        }
}

}  // namespace lowbit
