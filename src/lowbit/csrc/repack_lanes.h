// Repacking blocks of 16 rows between the canonical bit streams and bit planes (layout.h draws both).
//
// 32 codes of a row are `bits` words of its stream, so a unit of 16 rows is `bits` vectors of one word per row. Code i of every row
// is then cut out of those vectors by the same shifts, 16 rows at a time, and laid into the planes; nothing depends on the data.
// Rows whose segments are padded, and GGUF's blocks, go through bytes, one code at a time.
#pragma once
#include <cstring>

#include "bits.h"
#include "repack.h"

namespace lowbit {
namespace {

typedef uint32_t U32 __attribute__((vector_size(64)));

// Where step s of a plane lies: the vector and the shift inside each byte.
struct Plane {
    int width;   // bits per code
    int first;   // first vector of the plane within the unit
    int low;     // lowest bit of the code that it holds
};

template <int kBits>
struct Planes {
    static constexpr int kCount = kBits == 8 ? 1 : (kBits >= 4) + ((kBits & 3) >= 2) + (kBits & 1);
    static constexpr Plane at(int index) {
        if (kBits == 8) return {8, 0, 0};
        int vector = 0, low = 0, seen = 0;
        for (int width = 4; width >= 1; width /= 2) {
            if (!(kBits & width)) continue;
            if (seen++ == index) return {width, vector, low};
            vector += width;
            low += width;
        }
        return {0, 0, 0};
    }
};

// words[w] holds word w of each row's 32 codes; planes[v] is the prepared unit.
template <int kBits>
inline void words_to_planes(const U32* words, U32* planes) {
    for (int v = 0; v < kBits; ++v) planes[v] = U32{};
    LOWBIT_UNROLL_REPACK
    for (int i = 0; i < kUnit; ++i) {
        const int word = i * kBits / 32, offset = i * kBits % 32, step = i / 4, byte = i % 4;
        U32 code = words[word] >> offset;
        if (offset + kBits > 32) code |= words[word + 1] << (32 - offset);
    LOWBIT_UNROLL_REPACK
        for (int p = 0; p < Planes<kBits>::kCount; ++p) {
            const Plane plane = Planes<kBits>::at(p);
            const int per_byte = 8 / plane.width;
            const int target = plane.first + step / per_byte, shift = byte * 8 + step % per_byte * plane.width;
            const U32 part = (code >> plane.low) & ((1u << plane.width) - 1);
            planes[target] |= part << shift;
        }
    }
}

template <int kBits>
inline void planes_to_words(const U32* planes, U32* words) {
    for (int w = 0; w < kBits; ++w) words[w] = U32{};
    LOWBIT_UNROLL_REPACK
    for (int i = 0; i < kUnit; ++i) {
        const int word = i * kBits / 32, offset = i * kBits % 32, step = i / 4, byte = i % 4;
        U32 code = {};
    LOWBIT_UNROLL_REPACK
        for (int p = 0; p < Planes<kBits>::kCount; ++p) {
            const Plane plane = Planes<kBits>::at(p);
            const int per_byte = 8 / plane.width;
            const int source = plane.first + step / per_byte, shift = byte * 8 + step % per_byte * plane.width;
            code |= ((planes[source] >> shift) & ((1u << plane.width) - 1)) << plane.low;
        }
        words[word] |= code << offset;
        if (offset + kBits > 32) words[word + 1] |= code >> (32 - offset);
    }
}

struct BlockRange {
    int64_t first_row;
    int rows;  // of 16, fewer in the last block
};

inline BlockRange rows_of(const Header& header, int64_t block) {
    const int64_t first = block * kBlockRows, left = header.rows - first;
    return {first, static_cast<int>(left < kBlockRows ? left : kBlockRows)};
}

// Straight rows: whole words move, and the tail of a row reads as zeros. A stretch of units is transposed at a time.
template <int kBits, bool kPrepare>
void repack_straight(const RepackJob& job, BlockRange range, uint8_t* planes) {
    const Header& header = *job.header;
    const int64_t words = divide_up(header.cols * kBits, 32);
    uint32_t* streams = static_cast<uint32_t*>(job.codes) + range.first_row * words;
    alignas(64) uint32_t lanes[kBits][kBlockRows];
    for (int64_t unit = 0; unit < header.plan.units; ++unit) {
        const int64_t begin = unit * kBits;
        const int count = static_cast<int>(begin + kBits <= words ? kBits : begin < words ? words - begin : 0);
        U32* vectors = reinterpret_cast<U32*>(planes + unit * kBits * kVector);
        U32 moved[kBits];
        if (kPrepare) {
            if (count < kBits || range.rows < kBlockRows) memset(lanes, 0, sizeof lanes);
            for (int r = 0; r < range.rows; ++r)
                for (int w = 0; w < count; ++w) lanes[w][r] = streams[r * words + begin + w];
            memcpy(moved, lanes, sizeof lanes);
            U32 out[kBits];
            words_to_planes<kBits>(moved, out);
            memcpy(vectors, out, sizeof out);
        } else {
            U32 in[kBits];
            memcpy(in, vectors, sizeof in);
            planes_to_words<kBits>(in, moved);
            memcpy(lanes, moved, sizeof lanes);
            for (int r = 0; r < range.rows; ++r)
                for (int w = 0; w < count; ++w) streams[r * words + begin + w] = lanes[w][r];
        }
    }
}

constexpr uint32_t in_each_byte(int mask) { return static_cast<uint32_t>(mask) * 0x01010101u; }

// One unit between codes as bytes, rows of `stride`, and bit planes.
template <int kBits>
inline void bytes_to_planes(const uint8_t* bytes, int64_t stride, uint8_t* planes) {
    U32 out[kBits] = {};
    for (int step = 0; step < kSteps; ++step) {
        alignas(64) uint32_t lanes[kBlockRows];
        for (int r = 0; r < kBlockRows; ++r) memcpy(&lanes[r], bytes + r * stride + 4 * step, 4);
        U32 codes;
        memcpy(&codes, lanes, sizeof codes);
        LOWBIT_UNROLL_REPACK
        for (int p = 0; p < Planes<kBits>::kCount; ++p) {
            const Plane plane = Planes<kBits>::at(p);
            const int per_byte = 8 / plane.width;
            const U32 part = (codes >> plane.low) & in_each_byte((1 << plane.width) - 1);
            out[plane.first + step / per_byte] |= part << (step % per_byte * plane.width);
        }
    }
    memcpy(planes, out, sizeof out);
}

template <int kBits>
inline void planes_to_bytes(const uint8_t* planes, uint8_t* bytes, int64_t stride) {
    U32 in[kBits];
    memcpy(in, planes, sizeof in);
    for (int step = 0; step < kSteps; ++step) {
        U32 codes = {};
        LOWBIT_UNROLL_REPACK
        for (int p = 0; p < Planes<kBits>::kCount; ++p) {
            const Plane plane = Planes<kBits>::at(p);
            const int per_byte = 8 / plane.width;
            const U32 part = in[plane.first + step / per_byte] >> (step % per_byte * plane.width);
            codes |= (part & in_each_byte((1 << plane.width) - 1)) << plane.low;
        }
        alignas(64) uint32_t lanes[kBlockRows];
        memcpy(lanes, &codes, sizeof lanes);
        for (int r = 0; r < kBlockRows; ++r) memcpy(bytes + r * stride + 4 * step, &lanes[r], 4);
    }
}

// Columns that lie side by side in both forms: first column, its position, and how many.
template <class Work>
inline void for_each_segment(const Header& header, const Work& work) {
    const Plan& plan = header.plan;
    for (int64_t s = 0; s < plan.segments; ++s) work(plan.column_of(s), s * plan.segment, plan.width_of(s, header.cols));
}

// One row of codes between its canonical form and bytes by position. `row` is room for its codes in order.
template <int kBits>
void row_to_bytes(const RepackJob& job, BlockRange range, int lane, uint8_t* base, uint8_t* row, uint8_t* bytes) {
    const Header& header = *job.header;
    if (header.kind == LOWBIT_BLOCKS) return blocks_to_lanes(job, range.first_row + lane, base, bytes);
    const int64_t words = divide_up(header.cols * kBits, 32);
    read_codes(static_cast<const uint32_t*>(job.codes) + (range.first_row + lane) * words, row, header.cols, kBits);
    for_each_segment(header, [&](int64_t column, int64_t position, int64_t width) { memcpy(bytes + position, row + column, static_cast<size_t>(width)); });
}

template <int kBits>
void bytes_to_row(const RepackJob& job, BlockRange range, int lane, const uint8_t* base, uint8_t* row, const uint8_t* bytes) {
    const Header& header = *job.header;
    if (header.kind == LOWBIT_BLOCKS) return lanes_to_blocks(job, range.first_row + lane, base, bytes);
    const int64_t words = divide_up(header.cols * kBits, 32);
    for_each_segment(header, [&](int64_t column, int64_t position, int64_t width) { memcpy(row + column, bytes + position, static_cast<size_t>(width)); });
    write_codes(static_cast<uint32_t*>(job.codes) + (range.first_row + lane) * words, row, header.cols, kBits);
}

// Rows code by code: `bytes` is room for 16 rows of positions and one of columns.
template <int kBits, bool kPrepare>
void repack_bytes(const RepackJob& job, BlockRange range, uint8_t* base, uint8_t* bytes) {
    const Header& header = *job.header;
    const int64_t positions = header.plan.positions();
    uint8_t *row = bytes + kBlockRows * positions, *planes = base + header.codes_offset;
    if (kPrepare) memset(bytes, 0, static_cast<size_t>(kBlockRows * positions));
    for (int r = 0; kPrepare && r < range.rows; ++r) row_to_bytes<kBits>(job, range, r, base, row, bytes + r * positions);
    for (int64_t unit = 0; unit < header.plan.units; ++unit) {
        if (kPrepare) bytes_to_planes<kBits>(bytes + unit * kUnit, positions, planes + unit * kBits * kVector);
        else planes_to_bytes<kBits>(planes + unit * kBits * kVector, bytes + unit * kUnit, positions);
    }
    for (int r = 0; !kPrepare && r < range.rows; ++r) bytes_to_row<kBits>(job, range, r, base, row, bytes + r * positions);
}

// Scales (or zeros) between [row][group] and [group][16].
template <class T, bool kPrepare>
void repack_lanes(const Header& header, BlockRange range, T* canonical, T* lanes) {
    const int64_t groups = header.plan.groups;
    const bool whole = header.group_size == 0;  // one scale for the tensor
    for (int64_t g = 0; g < groups; ++g)
        for (int r = 0; r < kBlockRows; ++r) {
            T* source = canonical + (whole ? 0 : (range.first_row + r) * groups + g);
            if (kPrepare) lanes[g * kBlockRows + r] = r < range.rows ? *source : T{};
            else if (r < range.rows) *source = lanes[g * kBlockRows + r];
        }
}

// Dense weights: [input][row], 16-bit numbers in pairs of inputs when they are bf16.
template <class T, int kPair, bool kPrepare>
void repack_dense(const RepackJob& job, BlockRange range, T* lanes) {
    const Header& header = *job.header;
    const int64_t positions = header.plan.positions();
    for (int64_t k = 0; k < positions; ++k)
        for (int r = 0; r < kBlockRows; ++r) {
            T* place = lanes + (k / kPair * kBlockRows + r) * kPair + k % kPair;
            const bool exists = r < range.rows && k < header.cols;
            T* source = static_cast<T*>(job.codes) + (range.first_row + r) * header.cols + k;
            if (kPrepare) *place = exists ? *source : T{};
            else if (exists) *source = *place;
        }
}

template <int kBits, bool kPrepare>
void repack_codes(const RepackJob& job, BlockRange range, uint8_t* base, uint8_t* bytes) {
    if (needs_bytes(*job.header)) repack_bytes<kBits, kPrepare>(job, range, base, bytes);
    else repack_straight<kBits, kPrepare>(job, range, base + job.header->codes_offset);
}

template <bool kPrepare>
void repack_scales(const RepackJob& job, BlockRange range, uint8_t* base) {
    const Header& header = *job.header;
    switch (header.scales.level == kStepTable ? 1 : scale_bytes(header.scale_type)) {
        case 4: repack_lanes<uint32_t, kPrepare>(header, range, static_cast<uint32_t*>(job.scales), reinterpret_cast<uint32_t*>(base)); break;
        case 2: repack_lanes<uint16_t, kPrepare>(header, range, static_cast<uint16_t*>(job.scales), reinterpret_cast<uint16_t*>(base)); break;
        default: repack_lanes<uint8_t, kPrepare>(header, range, static_cast<uint8_t*>(job.scales), base);
    }
    if (stores_zeros(header)) repack_lanes<uint8_t, kPrepare>(header, range, job.zeros, base + header.zeros_offset);
}

template <bool kPrepare>
void repack_block(const RepackJob& job, int64_t block, uint8_t* bytes) {
    const Header& header = *job.header;
    const BlockRange range = rows_of(header, block);
    uint8_t* base = job.prepared + kHeaderBytes + block * header.block_bytes;
    if (header.kind == LOWBIT_DENSE) {
        uint8_t* numbers = base + header.codes_offset;
        if (header.bits == 32) repack_dense<uint32_t, 1, kPrepare>(job, range, reinterpret_cast<uint32_t*>(numbers));
        else if (header.scale_type == LOWBIT_BF16) repack_dense<uint16_t, 2, kPrepare>(job, range, reinterpret_cast<uint16_t*>(numbers));
        else repack_dense<uint16_t, 1, kPrepare>(job, range, reinterpret_cast<uint16_t*>(numbers));
        return;
    }
    // The scales of GGUF's blocks come with the codes; lanes of rows that do not exist are zero.
    if (header.kind != LOWBIT_BLOCKS) repack_scales<kPrepare>(job, range, base);
    else if (kPrepare) memset(base, 0, static_cast<size_t>(header.codes_offset));
    switch (header.bits) {
        case 2: return repack_codes<2, kPrepare>(job, range, base, bytes);
        case 3: return repack_codes<3, kPrepare>(job, range, base, bytes);
        case 4: return repack_codes<4, kPrepare>(job, range, base, bytes);
        case 5: return repack_codes<5, kPrepare>(job, range, base, bytes);
        case 6: return repack_codes<6, kPrepare>(job, range, base, bytes);
        case 7: return repack_codes<7, kPrepare>(job, range, base, bytes);
        default: return repack_codes<8, kPrepare>(job, range, base, bytes);
    }
}

// `bytes` is room for 16 rows of positions and one of columns, used by layouts that go through bytes only.
void prepare_block(const RepackJob& job, int64_t block, uint8_t* bytes) { repack_block<true>(job, block, bytes); }
void restore_block(const RepackJob& job, int64_t block, uint8_t* bytes) { repack_block<false>(job, block, bytes); }

}  // namespace
}  // namespace lowbit
