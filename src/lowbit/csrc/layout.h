// The prepared form of a weight: one buffer, read front to back by the products.
//
//   header | block 0 | block 1 | ...        a block holds 16 rows of the weight (outputs), the lanes of one 512-bit vector
//   block  = scales [groups][16] | zeros [groups][16] (asymmetric) | minima, factors (below) | codes [units][bits][64 bytes]
//   unit   = 32 consecutive inputs of the 16 rows = 8 steps of 4 inputs; as 8-bit codes a step is 64 bytes, where row r owns bytes
//            4r..4r+3, so that one dot-product instruction adds 4 inputs to each of 16 outputs and no sum ever crosses lanes
//
// The codes of a unit lie as bit planes, each a whole number of 64-byte vectors, and are put together by shifts and masks:
//   8 bits: 8 vectors, one per step        4-bit plane: 4 vectors, low nibble = step 2v, high nibble = step 2v + 1
//   2-bit plane: 2 vectors, bits 2i..2i+1 of each byte = step 4v + i        1-bit plane: 1 vector, bit i = step i
//   3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2, 7 = 4 + 2 + 1 (low bits first)
//
// w = scale * (code - zero) + minimum. Fine zeros count a fraction of a code, and make a minimum, -scale * zero * step. A scale may be a number by itself or a code of one byte under a second level:
//   GGUF's blocks       scale = (code - bias) * factor           factors fp16 [GGUF blocks of a row][16], so too for the minima
//   double quantising   scale = (code - bias) * step + offset    steps fp32, one for `scale_block` scales counted over the tensor,
//                                                                behind the last block
//
// Activations are quantised in segments: a group, or a part of a long one (at most 128 inputs), padded with zeros to a multiple of
// 32 (or to exactly 16). Where segments are padded, position in the buffer and column of the weight differ; Plan knows the mapping.
// Dense weights have no segments; their unit is 32 inputs x 16 rows of plain numbers, [input][row], bf16 in pairs of inputs.
#pragma once
#include <cstddef>
#include <cstdint>

#include "format.h"

namespace lowbit {

constexpr int kBlockRows = 16;
constexpr int kUnit = 32;       // inputs of a unit
constexpr int kSteps = 8;       // steps of a unit
constexpr int kVector = 64;     // bytes
constexpr int kLongestSegment = 128;
constexpr int64_t kHeaderBytes = 2048;

// How the inputs of a row are laid out.
struct Plan {
    int64_t group;      // inputs per group
    int64_t groups;     // groups per row
    int64_t split;      // segments per group
    int64_t segment;    // padded inputs per segment
    int64_t filled;     // inputs per segment before padding
    int64_t segments;   // segments per row; the last group may have fewer
    int64_t units;      // units per row
    int64_t straight;   // 1 when position equals column everywhere

    int64_t positions() const { return units * kUnit; }
    int64_t position_of(int64_t column) const {
        const int64_t inside = column % group;
        return (column / group * split + inside / filled) * segment + inside % filled;
    }
    // First column and number of columns of a segment.
    int64_t column_of(int64_t index) const { return index / split * group + index % split * filled; }
    int64_t width_of(int64_t index, int64_t cols) const {
        const int64_t begin = column_of(index), group_end = (index / split + 1) * group;
        int64_t end = begin + filled < group_end ? begin + filled : group_end;
        end = end < cols ? end : cols;
        return end > begin ? end - begin : 0;
    }
};

enum Level { kOneLevel = 0, kFactorPerBlock = 1, kStepTable = 2 };
// Nothing; fp16 [groups][16]; bytes [groups][16] under factors of their own; the upper nibble of the scale's byte, likewise; or what
// follows from the scale and the fine zeros.
enum Minima { kNoMinima = 0, kHalfMinima = 1, kByteMinima = 2, kNibbleMinima = 3, kZeroMinima = 4 };

// How a scale and a minimum follow from what is stored.
struct ScaleCodes {
    int32_t level, minima;
    int32_t bias;
};

struct LaneScale {
    float scale, minimum;
};

// From the codes of one group; each product is rounded by itself, as GGUF's own reader does it.
inline LaneScale scale_of_codes(const ScaleCodes& codes, uint8_t scale, uint8_t minimum, float factor, float minimum_factor) {
    if (codes.level == kOneLevel) return {factor, minimum_factor};
    if (codes.minima == kNibbleMinima) minimum = scale >> 4, scale &= 15;
    return {static_cast<float>(scale - codes.bias) * factor, -(minimum_factor * static_cast<float>(minimum))};
}

struct Header {
    char magic[8];
    uint64_t seal;          // of everything else here, so that a header that was written over is not believed
    int32_t version;
    int32_t bits, kind, symmetric, group_size, scale_type, level_count;
    int32_t table;          // 1 when codes go through `bytes` before the integer product
    int32_t zero;           // of codes without zeros of their own: the one that means 0
    int32_t block_type;     // LOWBIT_BLOCKS: which
    int32_t scale_block;    // kStepTable: scales that share a step
    float scale_offset;     // kStepTable
    float zero_step;        // kZeroMinima: what a zero counts, in codes
    ScaleCodes scales;
    int64_t factor_groups;  // kFactorPerBlock: groups that share a factor
    int64_t rows, cols, blocks, block_bytes, zeros_offset, codes_offset, total_bytes;
    int64_t minima_offset, factors_offset, minimum_factors_offset;  // within a block
    int64_t steps_offset, step_count;                               // within the buffer
    Plan plan;
    float unit;             // global factor of the scales
    float byte_factor;      // what one unit of `bytes` is worth
    uint8_t bytes[256];     // integer levels, offset by 128
    float levels[256];
};
static_assert(sizeof(Header) <= kHeaderBytes, "the header has its fixed place");

Plan make_plan(const lowbit_format& format, int64_t cols);
// Fill everything but the unit. The format was checked.
void make_header(const lowbit_format& format, Shape shape, Header* header);
// A header that belongs to this buffer, or nullptr with a sentence.
const Header* check_prepared(const void* prepared, int64_t bytes);
// Whether each group has a byte for its zero, and whether that counts whole codes: then it is subtracted from them as integers.
bool stores_zeros(const Header& header);
inline bool has_whole_zeros(const Header& header) { return stores_zeros(header) && header.scales.minima != kZeroMinima; }
uint64_t mix_words(const uint64_t* words, size_t count);
uint64_t seal_of(const Header& header);
// The scale and the minimum of one row's group, but for fine zeros; without the tensor's factor for the minimum, which has none.
LaneScale lane_scale(const Header& header, int64_t row, int64_t group);
// Where the step of a row's group lies in the table.
inline int64_t step_index(const Header& header, int64_t row, int64_t group) {
    return header.group_size == 0 ? 0 : (row * header.plan.groups + group) / header.scale_block;
}

inline const uint8_t* block_at(const Header& header, int64_t block) {
    return reinterpret_cast<const uint8_t*>(&header) + kHeaderBytes + block * header.block_bytes;
}
inline const float* steps_of(const Header& header) {
    return reinterpret_cast<const float*>(reinterpret_cast<const uint8_t*>(&header) + header.steps_offset);
}

}  // namespace lowbit
