// Attention over int8 keys and values, both products in whole numbers (attention_lanes.h has the formula):
//
//   s_j = a b_j (Q . K_j)       Q: a query's bytes, a its scale; K_j, b_j those of a key
//   o  += c (P . V)             P_j = round(p_j b'_j / c): a tile's probabilities times its values' scales, in 14 bits
//
// Four channels of 16 keys lie side by side, and four keys of 16 channels, so that a lane is one score or one output and a broadcast
// of four bytes serves 16 of them. Keys are kept with 128 added: the product of the processors takes unsigned by signed bytes, and
// 128 times the sum of the query is taken off once. Probabilities are relative to the largest of their own tile: next to a key that
// takes nearly everything (the first token often does) the others of later tiles keep all their bits.
//
// Where no key takes nearly all of a tile, one byte for each is enough, and the product with the values half the work. What a row gets does
// not depend on the rows beside it: such bytes count as an upper plane over a lower one of zeros, whether those are multiplied or not.
//
// A query, key or value that holds a NaN or an infinity has no bytes; its scale is NaN, and so is all that looks at it.
#pragma once
#include "attention_shares.h"

namespace lowbit {
namespace {

// Four bytes of each row, again and again, times `right`: lanes of `right` are `step` bytes apart and successive fours `right_stride`.
struct ByteProduct {
    const uint8_t* left;
    int64_t left_stride, plane_stride;
    const uint8_t* right;
    int64_t right_stride, step, fours;
    const uint8_t* ahead;  // what is read next, fetched at the pace at which `right` is read; NULL when rows are many enough to hide it
    const uint8_t* lower;  // values only: by row, whether its lower plane holds anything
};

// With so few rows the memory is slower than the products: cold keys and values came at 14 GB/s to one core, fetched
// ahead at 20.
inline bool few_rows(const AttendJob& job) { return job.rows <= 16; }

// kRead: of the planes, how many are read; the others are zeros. `start` and `finish` are copies: what they hold stays in registers, while
// through references it was read again behind each store (2% of attention).
template <bool kKeys, int kPlanes, int kRead, int kBits, int kRows, int kVectors, class Start, class Finish>
inline void dot_planes(const ByteProduct& job, int64_t row, Start start, Finish finish) {
    I32 total[kRows][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) total[r][v] = splat_int(0);
    const uint8_t* rows = job.left + row * job.left_stride;
#pragma GCC unroll 2
    for (int plane = 0; plane < kPlanes; ++plane) {
        if (plane > 0)
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v) total[r][v] = shift_left<kBits>(total[r][v]);
        if (plane >= kRead) continue;
        for (int64_t i = 0; i < job.fours; ++i) {
            Quads right[kVectors];
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) right[v] = load_quads(job.right + i * job.right_stride + v * job.step);
            if (plane == 0 && row == 0 && job.ahead)
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v) __builtin_prefetch(job.ahead + (i * kVectors + v) * 4 * kLane);
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r) {
                const Quads left = splat_quad(rows + r * job.left_stride + plane * job.plane_stride + 4 * i);
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v)
                    total[r][v] = kKeys ? dot_quads(total[r][v], right[v], left) : dot_quads(total[r][v], left, right[v]);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
        const auto begin = start(row + r);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) finish(row + r, v, to_floats(total[r][v]), begin);
    }
}

template <bool kKeys, int kPlanes, int kBits, int kRows, int kVectors, class Start, class Finish>
inline void dot_tile(const ByteProduct& job, int64_t row, Start start, Finish finish) {
    if constexpr (!kKeys)
        if (!any_of(job.lower + row, kRows)) return dot_planes<kKeys, kPlanes, 1, kBits, kRows, kVectors>(job, row, start, finish);
    dot_planes<kKeys, kPlanes, kPlanes, kBits, kRows, kVectors>(job, row, start, finish);
}

template <bool kKeys, int kPlanes, int kBits, int kVectors, class Start, class Finish>
inline void dot_rows(const ByteProduct& job, int64_t rows, Start start, Finish finish) {
    int64_t r = 0;
    for (; r + kRowTile <= rows; r += kRowTile) dot_tile<kKeys, kPlanes, kBits, kRowTile, kVectors>(job, r, start, finish);
    switch (rows - r) {
        case 1: return dot_tile<kKeys, kPlanes, kBits, 1, kVectors>(job, r, start, finish);
        case 2: return dot_tile<kKeys, kPlanes, kBits, 2, kVectors>(job, r, start, finish);
        case 3: return dot_tile<kKeys, kPlanes, kBits, 3, kVectors>(job, r, start, finish);
        case 4: return dot_tile<kKeys, kPlanes, kBits, 4, kVectors>(job, r, start, finish);
        case 5: return dot_tile<kKeys, kPlanes, kBits, 5, kVectors>(job, r, start, finish);
        default: return;
    }
}

// One query as bytes in planes of kQueryBits, its scale, and what a sum of products with keys moved by 128 has too much.
inline void round_query(const AttendJob& job, const ByteRoom& room, int64_t r) {
    const float* query = job.queries + r * job.head_dim;
    const auto part = [&](int i) { return i + kLane <= job.head_dim ? load(query + i) : load_first(query + i, job.head_dim - i); };
    F32 most = splat(0.0f);
    for (int i = 0; i < job.padded; i += kLane) {
        const F32 x = part(i);
        most = larger(most, larger(x, splat(0.0f) - x));
    }
    const float largest = largest_of(most), inverse = largest > kLeast ? kQueryMost / largest : 0.0f;
    F32 sum = splat(0.0f);
    int8_t* to = reinterpret_cast<int8_t*>(room.queries + r * kQueryPlanes * job.padded);
    for (int i = 0; i < job.padded; i += kLane) {
        const F32 x = round_near(part(i) * splat(inverse));
        sum = sum + x;
        if (kQueryPlanes == 1) {
            store_bytes(to + i, x);
            continue;
        }
        const F32 high = round_near(x * splat(1.0f / (1 << kQueryBits)));
        store_bytes(to + i, high);
        store_bytes(to + job.padded + i, x - high * splat(1 << kQueryBits));
    }
    const float whole = sum_of(sum);
    const bool finite = whole - whole == 0.0f;
    room.query_scales[r] = finite ? largest / kQueryMost : NAN;
    room.starts[r] = finite ? -128 * static_cast<int32_t>(whole) : 0;
}

inline void score_bytes(const AttendJob& job, const ByteRoom& room, int64_t first, int64_t blocks) {
    const int64_t block = static_cast<int64_t>(job.padded) * kKeyBlock;
    ByteProduct product{room.queries, kQueryPlanes * job.padded, job.padded, static_cast<const uint8_t*>(job.keys) + first * job.padded,
                        4 * kKeyBlock, block, (job.head_dim + 3) / 4, nullptr, nullptr};
    if (few_rows(job)) product.ahead = static_cast<const uint8_t*>(job.values) + first * job.padded;
    float* scores = job.scores;
    const auto start = [starts = room.starts](int64_t r) { return static_cast<float>(starts[r]); };
    const auto finish = [&] {
        return [to = scores](int64_t r, int v, F32 total, float begin) { store(to + r * kKeyTile + v * kLane, total + splat(begin)); };
    };
    int64_t b = 0;
    for (; b + kVectorTile <= blocks; b += kVectorTile, product.right += kVectorTile * block, scores += kVectorTile * kKeyBlock) {
        dot_rows<true, kQueryPlanes, kQueryBits, kVectorTile>(product, job.rows, start, finish());
        if (product.ahead) product.ahead += kVectorTile * block;
    }
    for (; b < blocks; ++b, product.right += block, scores += kKeyBlock)
        dot_rows<true, kQueryPlanes, kQueryBits, 1>(product, job.rows, start, finish());
}

inline void add_bytes(const AttendJob& job, const ByteRoom& room, int64_t first, int64_t count) {
    ByteProduct product{room.shares, 2 * kKeyTile, kKeyTile, static_cast<const uint8_t*>(job.values) + first * job.padded, 4 * job.padded,
                        4 * kLane, (count + 3) / 4, nullptr, room.lower};
    if (few_rows(job)) product.ahead = static_cast<const uint8_t*>(job.keys) + (first + kKeyTile) * job.padded;
    float* out = job.out;
    const auto start = [weights = room.weights, row_of = room.row_of](int64_t place) { return weights[row_of[place]]; };
    const auto finish = [&] {
        return [first = out, padded = int64_t{job.padded}, row_of = room.row_of](int64_t place, int v, F32 total, float weight) {
            float* to = first + row_of[place] * padded + v * kLane;
            store(to, multiply_add(total, splat(weight), load(to)));
        };
    };
    int v = 0;
    for (; v + kVectorTile * kLane <= job.padded; v += kVectorTile * kLane, product.right += 4 * kVectorTile * kLane, out += kVectorTile * kLane) {
        dot_rows<false, 2, kShareBits, kVectorTile>(product, job.rows, start, finish());
        if (product.ahead) product.ahead += product.fours * kVectorTile * 4 * kLane;
    }
    for (; v < job.padded; v += kLane, product.right += 4 * kLane, out += kLane) dot_rows<false, 2, kShareBits, 1>(product, job.rows, start, finish());
}

inline void attend_bytes(const AttendJob& job) {
    const ByteRoom room(job.room, job.rows, job.padded);
    for (int64_t r = 0; r < job.rows; ++r) round_query(job, room, r);
    for (int64_t first = job.key_begin / kKeyBlock * kKeyBlock; first < job.key_end; first += kKeyTile) {
        const KeyTile keys = key_tile_at(job, first);
        score_bytes(job, room, first, keys.blocks);
        soften_bytes(job, room, {0, job.rows, true}, keys, [](int64_t) { return [](const float* p) { return load(p); }; });
        add_bytes(job, room, first, keys.count);
    }
}

}  // namespace
}  // namespace lowbit
