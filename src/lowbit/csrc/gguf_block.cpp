#include "gguf_block.h"

#include <cstring>
#include <type_traits>

#include "layout.h"
#include "number.h"
#include "repack.h"

namespace lowbit {
namespace {

// The type is known to the compiler in everything that is done to a block, so that its loops become vectors: chosen within them, q5_1 was
// laid out at 1.1 GB/s and is at 2.9.
template <class Work>
auto for_type(int block_type, const Work& work) {
    switch (block_type) {
        case LOWBIT_Q2_K: return work(std::integral_constant<int, LOWBIT_Q2_K>());
        case LOWBIT_Q3_K: return work(std::integral_constant<int, LOWBIT_Q3_K>());
        case LOWBIT_Q4_K: return work(std::integral_constant<int, LOWBIT_Q4_K>());
        case LOWBIT_Q5_K: return work(std::integral_constant<int, LOWBIT_Q5_K>());
        case LOWBIT_Q6_K: return work(std::integral_constant<int, LOWBIT_Q6_K>());
        case LOWBIT_Q4_1: return work(std::integral_constant<int, LOWBIT_Q4_1>());
        default: return work(std::integral_constant<int, LOWBIT_Q5_1>());
    }
}

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

// One bit of 8 consecutive codes in each of kBytes bytes, eight at a time: a product puts a byte, or eight bits of bytes, in their places.
template <int kBytes, int kLow>
struct Bits {
    static constexpr uint64_t kOnes = 0x0101010101010101;

    static void read(const uint8_t* bytes, uint8_t* codes) {
        for (int i = 0; i < kBytes; ++i) {
            const uint64_t apart = bytes[i] * kOnes & 0x8040201008040201, bits = (apart + 0x7f * kOnes) >> 7 & kOnes;
            uint64_t eight = 0;
            memcpy(&eight, codes + 8 * i, sizeof eight);
            eight |= bits << kLow;
            memcpy(codes + 8 * i, &eight, sizeof eight);
        }
    }
    static void write(uint8_t* bytes, const uint8_t* codes) {
        for (int i = 0; i < kBytes; ++i) {
            uint64_t eight = 0;
            memcpy(&eight, codes + 8 * i, sizeof eight);
            bytes[i] = static_cast<uint8_t>((eight >> kLow & kOnes) * 0x0102040810204080 >> 56);
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
template <int kType, class Direction, class From, class To>
__attribute__((always_inline)) inline void move_codes(From* bytes, To* codes) {
    if constexpr (kType == LOWBIT_Q2_K) {
        Direction::template move<Fields<64, 2, 32, 0>>(bytes + 16, codes);
    } else if constexpr (kType == LOWBIT_Q3_K) {
        Direction::template move<Fields<64, 2, 32, 0>>(bytes + 32, codes);
        Direction::template move<Fields<32, 1, 32, 2, true>>(bytes, codes);
    } else if constexpr (kType == LOWBIT_Q4_K) {
        Direction::template move<Fields<128, 4, 32, 0>>(bytes + 16, codes);
    } else if constexpr (kType == LOWBIT_Q5_K) {
        Direction::template move<Fields<128, 4, 32, 0>>(bytes + 48, codes);
        Direction::template move<Fields<32, 1, 32, 4, true>>(bytes + 16, codes);
    } else if constexpr (kType == LOWBIT_Q6_K) {
        Direction::template move<Fields<128, 4, 64, 0>>(bytes, codes);
        Direction::template move<Fields<64, 2, 32, 4, true>>(bytes + 128, codes);
    } else if constexpr (kType == LOWBIT_Q4_1) {
        Direction::template move<Fields<16, 4, 16, 0>>(bytes + 4, codes);
    } else {
        Direction::template move<Fields<16, 4, 16, 0>>(bytes + 8, codes);
        Direction::template move<Bits<4, 4>>(bytes + 4, codes);
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

// What one block holds besides its codes, as the prepared form keeps it: q2_k's two nibbles stay in one byte of `scales`.
struct BlockNumbers {
    uint8_t scales[kMostBlockGroups], minima[kMostBlockGroups];
    uint16_t factor, minimum_factor;  // fp16: d, and dmin or the minimum itself
};

template <int kType>
constexpr const BlockLayout& kLayout = kLayouts[kType - LOWBIT_Q2_K];

template <int kType>
inline void read_block(const uint8_t* from, uint8_t* codes, BlockNumbers* block) {
    constexpr Places places = kPlaces[kType - LOWBIT_Q2_K];
    move_codes<kType, Reading>(from, codes);
    memcpy(&block->factor, from + places.factor, kHalf);
    if constexpr (places.minimum >= 0) memcpy(&block->minimum_factor, from + places.minimum, kHalf);
    const uint8_t* scales = from + places.scales;
    if constexpr (kType == LOWBIT_Q2_K) {
        memcpy(block->scales, scales, kMostBlockGroups);
    } else if constexpr (kType == LOWBIT_Q3_K) {
        LowScales::read(scales, block->scales);
        HighScales::read(scales + kLowScaleBytes, block->scales);
    } else if constexpr (kType == LOWBIT_Q4_K || kType == LOWBIT_Q5_K) {
        read_six_bits(scales, block->scales, block->minima);
    } else if constexpr (kType == LOWBIT_Q6_K) {
        for (int i = 0; i < kMostBlockGroups; ++i) block->scales[i] = scales[i] ^ kSignBit;
    }
}

template <int kType>
inline void write_block(const uint8_t* codes, const BlockNumbers& block, uint8_t* to) {
    constexpr Places places = kPlaces[kType - LOWBIT_Q2_K];
    move_codes<kType, Writing>(to, codes);
    memcpy(to + places.factor, &block.factor, kHalf);
    if constexpr (places.minimum >= 0) memcpy(to + places.minimum, &block.minimum_factor, kHalf);
    uint8_t* scales = to + places.scales;
    if constexpr (kType == LOWBIT_Q2_K) {
        memcpy(scales, block.scales, kMostBlockGroups);
    } else if constexpr (kType == LOWBIT_Q3_K) {
        LowScales::write(scales, block.scales);
        HighScales::write(scales + kLowScaleBytes, block.scales);
    } else if constexpr (kType == LOWBIT_Q4_K || kType == LOWBIT_Q5_K) {
        write_six_bits(scales, block.scales, block.minima);
    } else if constexpr (kType == LOWBIT_Q6_K) {
        for (int i = 0; i < kMostBlockGroups; ++i) scales[i] = block.scales[i] ^ kSignBit;
    }
}

}  // namespace

const BlockLayout* block_layout(int block_type) {
    return block_type >= LOWBIT_Q2_K && block_type <= LOWBIT_Q5_1 ? &kLayouts[block_type - LOWBIT_Q2_K] : nullptr;
}

namespace {

// Where the numbers of the GGUF blocks of one row lie in the prepared block.
struct Lane {
    uint8_t *scales, *minima;  // of a block's first group, where the type has them; the next group is kBlockRows further
    uint8_t *factor, *minimum_factor;

    Lane(const Header& header, uint8_t* base, int64_t row) {
        const int64_t lane = row % kBlockRows;
        scales = base + lane;
        minima = base + header.minima_offset + lane;
        factor = base + header.factors_offset + lane * kHalf;
        minimum_factor = base + header.minimum_factors_offset + lane * kHalf;
    }
    // To the numbers of the next block.
    void step(int groups) {
        scales += groups * kBlockRows;
        minima += groups * kBlockRows;
        factor += kBlockRows * kHalf;
        minimum_factor += kBlockRows * kHalf;
    }
};

uint8_t* blocks_of_row(const RepackJob& job, const BlockLayout& layout, int64_t row) {
    const int64_t blocks = job.header->plan.positions() / layout.weights;
    return static_cast<uint8_t*>(job.codes) + row * blocks * layout.bytes;
}

}  // namespace

namespace {

// One row of blocks into its lane, or back.
template <int kType>
void row_to_lane(const RepackJob& job, int64_t row, uint8_t* base, uint8_t* bytes) {
    constexpr BlockLayout layout = kLayout<kType>;
    const int64_t blocks = job.header->plan.positions() / layout.weights;
    const uint8_t* from = blocks_of_row(job, layout, row);
    BlockNumbers block{};
    Lane lane(*job.header, base, row);
    for (int64_t b = 0; b < blocks; ++b, from += layout.bytes, bytes += layout.weights, lane.step(layout.groups)) {
        read_block<kType>(from, bytes, &block);
        memcpy(lane.factor, &block.factor, kHalf);
        if constexpr (layout.scales.minima != kNoMinima) memcpy(lane.minimum_factor, &block.minimum_factor, kHalf);
        for (int g = 0; g < layout.groups; ++g) {
            if constexpr (layout.scales.level == kFactorPerBlock) lane.scales[g * kBlockRows] = block.scales[g];
            if constexpr (layout.scales.minima == kByteMinima) lane.minima[g * kBlockRows] = block.minima[g];
        }
    }
}

template <int kType>
void lane_to_row(const RepackJob& job, int64_t row, uint8_t* base, const uint8_t* bytes) {
    constexpr BlockLayout layout = kLayout<kType>;
    const int64_t blocks = job.header->plan.positions() / layout.weights;
    uint8_t* to = blocks_of_row(job, layout, row);
    BlockNumbers block{};
    Lane lane(*job.header, base, row);
    for (int64_t b = 0; b < blocks; ++b, to += layout.bytes, bytes += layout.weights, lane.step(layout.groups)) {
        memcpy(&block.factor, lane.factor, kHalf);
        if constexpr (layout.scales.minima != kNoMinima) memcpy(&block.minimum_factor, lane.minimum_factor, kHalf);
        for (int g = 0; g < layout.groups; ++g) {
            if constexpr (layout.scales.level == kFactorPerBlock) block.scales[g] = lane.scales[g * kBlockRows];
            if constexpr (layout.scales.minima == kByteMinima) block.minima[g] = lane.minima[g * kBlockRows];
        }
        write_block<kType>(bytes, block, to);
    }
}

template <int kType>
void dequantize_rows_of(const DequantizeJob& job, int64_t begin, int64_t end) {
    constexpr BlockLayout layout = kLayout<kType>;
    constexpr int kLength = layout.weights / layout.groups;
    const int64_t blocks = divide_up(job.shape.cols, layout.weights);
    const uint8_t* data = reinterpret_cast<const uint8_t*>(job.codes);
    uint8_t codes[kMostBlockWeights];
    BlockNumbers block{};
    for (int64_t row = begin; row < end; ++row)
        for (int64_t b = 0; b < blocks; ++b) {
            read_block<kType>(data + (row * blocks + b) * layout.bytes, codes, &block);
            const float factor = from_fp16(block.factor), minimum_factor = from_fp16(block.minimum_factor);
            const int64_t first = b * layout.weights, left = job.shape.cols - first;
            for (int64_t i = 0; i < layout.weights && i < left; ++i) {
                const int64_t group = i / kLength;
                const LaneScale scale = scale_of_codes(layout.scales, block.scales[group], block.minima[group], factor, minimum_factor);
                const float value = scale.scale * static_cast<float>(codes[i] - layout.zero) + scale.minimum;
                store_number(job.weight, job.dtype, row * job.row_stride + first + i, value);
            }
        }
}

}  // namespace

void blocks_to_lanes(const RepackJob& job, int64_t row, uint8_t* base, uint8_t* bytes) {
    for_type(job.header->block_type, [&](auto type) { row_to_lane<type>(job, row, base, bytes); });
}

void lanes_to_blocks(const RepackJob& job, int64_t row, const uint8_t* base, const uint8_t* bytes) {
    for_type(job.header->block_type, [&](auto type) { lane_to_row<type>(job, row, const_cast<uint8_t*>(base), bytes); });
}

void dequantize_blocks(const DequantizeJob& job, int64_t begin, int64_t end) {
    for_type(job.format.block_type, [&](auto type) { dequantize_rows_of<type>(job, begin, end); });
}

}  // namespace lowbit
