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
#include "byte_lanes.h"
#include "engine_isa.h"

namespace lowbit {
namespace {

constexpr int kQueryMost = kQueryPlanes == 1 ? 127 : (63 << kQueryBits) + 31;
constexpr int kShareBits = 7, kTileBlocks = kKeyTile / kKeyBlock;
constexpr float kShareMost = 16383.0f;  // two planes of 7 bits
// One byte a share is enough where a row's bytes of a tile add up to so much: rounding 128 of them is then wrong by at most about
// 0.29 sqrt(128) / 512 = 0.6% of their sum. So predictions are as far from those of an fp32 cache as with two planes; with one byte
// everywhere they were twice as far (docs/notes/cpu_engine.md).
constexpr float kByteSum = 512.0f;
constexpr float kLeast = 0x1p-110f;  // vectors without larger numbers count as zeros, whose scale has an inverse

// The room of an item, by row of queries. Bytes come first, so that they lie as the room does: at whole lines.
struct ByteRoom {
    uint8_t *queries, *shares;      // [rows][planes][padded], [rows][2][kKeyTile]: the upper plane first
    uint8_t* last_values;           // [kValueStep / 4][padded][4]
    float *query_scales, *peaks, *weights;  // of a tile of keys: its largest score, and what its sums of values are worth
    int32_t* starts;                // what the sums of a row's scores begin at
    int32_t* row_of;                // whose shares lie in a place
    uint8_t* lower;                 // whether the shares in a place have a lower plane, or that is zeros

    ByteRoom(uint8_t* room, int64_t rows, int64_t padded) {
        queries = room;
        shares = queries + rows * kQueryPlanes * padded;
        last_values = shares + rows * 2 * kKeyTile;
        query_scales = reinterpret_cast<float*>(last_values + kValueStep * padded);
        peaks = query_scales + rows;
        weights = peaks + rows;
        starts = reinterpret_cast<int32_t*>(weights + rows);
        row_of = starts + rows;
        lower = reinterpret_cast<uint8_t*>(row_of + rows);
    }
};

inline bool any_of(const uint8_t* flags, int64_t count) {
    uint8_t any = 0;
    for (int64_t i = 0; i < count; ++i) any |= flags[i];
    return any != 0;
}

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

// What a probability is multiplied with to become a whole number, for each key of a tile, and the value of 1 in those numbers.
inline float plan_shares(const AttendJob& job, int64_t first, int64_t count, float* factors) {
    F32 most = splat(0.0f), poison = splat(0.0f);
    for (int64_t i = 0; i < count; i += kLane) {
        F32 scale = load(job.value_scales + first + i);
        if (i + kLane > count) scale = inside(scale, 0, static_cast<int>(count - i), 0.0f);
        most = larger(most, scale);
        poison = multiply_add(scale, splat(0.0f), poison);
    }
    const float largest = largest_of(most) + sum_of(poison);
    for (int64_t i = 0; i < count; i += kLane) {
        const F32 factor = load(job.value_scales + first + i) * splat(largest > 0.0f ? kShareMost / largest : 0.0f);
        store(factors + i, i + kLane <= count ? factor : inside(factor, 0, static_cast<int>(count - i), 0.0f));
    }
    return largest / kShareMost;
}

// What a tile of keys has the same for all rows.
struct KeyTile {
    int64_t first, count, blocks;
    bool plain;                           // every row sees every key, and scores are neither capped nor moved
    float unit;                           // the probability that one share stands for
    alignas(64) float factors[kKeyTile];  // what a probability is multiplied with to become a share
    alignas(64) float narrow[kKeyTile];   // the same where a share is one byte
};

inline bool all_see_all(const AttendJob& job, int64_t first, int64_t end) {
    if (first < job.key_begin || end > job.key_end) return false;
    for (int64_t r = 0; r < job.rows; ++r)
        if (job.positions[r] + 1 < end || (job.window && first <= job.positions[r] - job.window)) return false;
    return true;
}

inline KeyTile key_tile_at(const AttendJob& job, int64_t first) {
    KeyTile keys;
    keys.first = first;
    keys.count = job.key_end - first < kKeyTile ? job.key_end - first : kKeyTile;
    keys.blocks = (keys.count + kKeyBlock - 1) / kKeyBlock;
    keys.plain = !job.soft_cap && !job.slopes && all_see_all(job, first, first + keys.blocks * kKeyBlock);
    keys.unit = plan_shares(job, first, keys.count, keys.factors);
    for (int64_t i = 0; i < keys.blocks * kKeyBlock; i += kLane) store(keys.narrow + i, load(keys.factors + i) * splat(kShareByte / kShareMost));
    return keys;
}

// The softmax of a tile goes over sixteen rows four times: the largest score of each, what these change (once, because an exponential takes
// as long for one number as for 16), probabilities with their sums, and the shares. So no row waits for what its own maximum sets
// off, and what goes across lanes (each_largest, each_sum) is done for all of them together.

// The scores of one row, as `read` takes them, and the largest of them by lane. Of a plain tile they lack the scale of the query, which is one
// factor later on.
template <int kBlocks, class Read>
inline F32 scale_scores(const AttendJob& job, const ByteRoom& room, int64_t r, const KeyTile& keys, const Read& read) {
    if (!keys.plain) return mask_scores(job, r, keys.first, keys.blocks, room.query_scales[r], read);
    float* scores = job.scores + r * kKeyTile;
    F32 most = splat(kMasked);
    const int64_t blocks = kBlocks ? kBlocks : keys.blocks;
#pragma GCC unroll 8
    for (int64_t b = 0; b < blocks; ++b) {
        const F32 s = read(scores + b * kKeyBlock) * load(job.key_scales + keys.first + b * kKeyBlock);
        store(scores + b * kKeyBlock, s);
        most = larger(most, s);
    }
    return most;
}

// What up to sixteen rows have so far, seen from new largest scores; the weights of the tile's probabilities beside it.
inline void meet_peaks(const AttendJob& job, const ByteRoom& room, int64_t r, int count, F32 peaks) {
    alignas(64) float shrinks[kLane];
    const F32 before = load_first(job.most + r, count), most = larger(before, peaks);
    const F32 shrink = power_of_two((before - most) * splat(kLog2E));
    store_first(room.peaks + r, peaks, count);
    store_first(room.weights + r, power_of_two((peaks - most) * splat(kLog2E)), count);
    store_first(job.total + r, load_first(job.total + r, count) * shrink, count);
    store_first(job.most + r, most, count);
    store(shrinks, shrink);
    for (int i = 0; i < count; ++i)
        if (shrinks[i] != 1.0f) scale_row(job.out + (r + i) * job.padded, job.padded, shrinks[i]);
}

// Where the shares of rows go: each to its own place, or rows without a lower plane to the front and the others to the back, so that
// few blocks of rows have some of both.
struct Places {
    int64_t front, back;
    bool sorted;
    int64_t take(int64_t r, bool lower) { return !sorted ? r : lower ? --back : front++; }
};

// Probabilities of one row where its scores were, and by lane what they and the shares add up to. kBlocks: of all tiles but the last, whose
// number is not known here.
template <int kBlocks>
inline void find_probabilities(const AttendJob& job, const ByteRoom& room, int64_t r, const KeyTile& keys, float* totals, float* sums) {
    float* scores = job.scores + r * kKeyTile;
    const F32 scale = splat((keys.plain ? room.query_scales[r] : 1.0f) * kLog2E), lowered = splat(-room.peaks[r] * kLog2E);
    F32 total = splat(0.0f), sum = splat(0.0f);
    const int64_t blocks = kBlocks ? kBlocks : keys.blocks;
#pragma GCC unroll 8
    for (int64_t b = 0; b < blocks; ++b) {
        const F32 p = power_for_shares(multiply_add(load(scores + b * kKeyBlock), scale, lowered));
        store(scores + b * kKeyBlock, p);
        total = total + p;
        sum = multiply_add(p, load(keys.factors + b * kKeyBlock), sum);
    }
    store(totals, total);
    store(sums, sum);
}

// Shares of one row, probabilities times their factors, as bytes. Four vectors at a time pack better than one.
template <int kBlocks, class Store>
inline void store_shares(const float* p, const float* factors, int64_t blocks, Store store) {
    const auto share = [&](int64_t b) { return load(p + b * kKeyBlock) * load(factors + b * kKeyBlock); };
#pragma GCC unroll 2
    for (int64_t b = 0; b < kBlocks; b += 4) {
        const F32 shares[4] = {share(b), share(b + 1), share(b + 2), share(b + 3)};
        store(b * kKeyBlock, shares);
    }
    for (int64_t b = kBlocks; b < blocks; ++b) store(b * kKeyBlock, share(b));
}

template <int kBlocks>
inline void share_row(const AttendJob& job, const ByteRoom& room, int64_t r, const KeyTile& keys, bool lower, Places& places) {
    const float* p = job.scores + r * kKeyTile;
    const int64_t place = places.take(r, lower), blocks = kBlocks ? kBlocks : keys.blocks;
    uint8_t *high = room.shares + place * 2 * kKeyTile, *low = high + kKeyTile;
    room.row_of[place] = static_cast<int32_t>(r);
    room.lower[place] = lower;
    if (lower) {
        store_shares<kBlocks>(p, keys.factors, blocks, [=](int64_t key, const auto& x) { store_planes(high + key, low + key, x); });
        room.weights[r] *= keys.unit;
    } else {
        store_shares<kBlocks>(p, keys.narrow, blocks, [=](int64_t key, const auto& x) { store_plane(high + key, x); });
        memset(low, 0, static_cast<size_t>(blocks * kKeyBlock));
        room.weights[r] *= keys.unit * (kShareMost / (kShareByte * (1 << kShareBits)));
    }
}

template <int kBlocks, class ReadOf>
inline void soften_rows(const AttendJob& job, const ByteRoom& room, int64_t first, int count, Places& places, const KeyTile& keys, const ReadOf& read_of) {
    alignas(64) float totals[kLane][kLane], sums[kLane][kLane];
    for (int i = 0; i < count; ++i) store(totals[i], scale_scores<kBlocks>(job, room, first + i, keys, read_of(first + i)));
    const F32 peaks = each_largest(totals, count);
    meet_peaks(job, room, first, count, keys.plain ? peaks * load_first(room.query_scales + first, count) : peaks);
    for (int i = 0; i < count; ++i) find_probabilities<kBlocks>(job, room, first + i, keys, totals[i], sums[i]);
    float* total = job.total + first;
    store_first(total, multiply_add(load_first(room.weights + first, count), each_sum(totals, count), load_first(total, count)), count);
    store(sums[0], each_sum(sums, count));
    for (int i = 0; i < count; ++i)
        share_row<kBlocks>(job, room, first + i, keys, !(sums[0][i] >= kByteSum * (kShareMost / kShareByte)), places);
}

template <int kBlocks, class ReadOf>
inline void soften_blocks(const AttendJob& job, const ByteRoom& room, Places& places, const KeyTile& keys, const ReadOf& read_of) {
    const int64_t begin = places.front, end = places.back;
    for (int64_t r = begin; r < end; r += kLane)
        soften_rows<kBlocks>(job, room, r, static_cast<int>(end - r < kLane ? end - r : kLane), places, keys, read_of);
}

// Rows from places.front to places.back. With the number of a whole tile's blocks as a constant its loops vanish.
template <class ReadOf>
inline void soften_bytes(const AttendJob& job, const ByteRoom& room, Places places, const KeyTile& keys, const ReadOf& read_of) {
    if (keys.blocks == kTileBlocks) soften_blocks<kTileBlocks>(job, room, places, keys, read_of);
    else soften_blocks<0>(job, room, places, keys, read_of);
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

// What a byte of these numbers is worth, the largest being 127, and how many bytes a 1 is.
struct ByteScale {
    float scale, inverse;
};

inline ByteScale byte_scale(const float* x, int count) {
    F32 most = splat(0.0f), poison = splat(0.0f);
    for (int i = 0; i < count; i += kLane) {
        const F32 value = i + kLane <= count ? load(x + i) : load_first(x + i, count - i);
        most = larger(most, larger(value, splat(0.0f) - value));
        poison = multiply_add(value, splat(0.0f), poison);
    }
    const float largest = largest_of(most);
    if (sum_of(poison) != 0.0f) return {NAN, 0.0f};
    return {largest / 127.0f, largest > kLeast ? 127.0f / largest : 0.0f};
}

// Bytes of a key or value, sixteen at a time, zero beyond its end and where it is none.
template <class Put>
inline void round_head(const float* x, int head_dim, int padded, float inverse, Put put) {
    for (int i = 0; i < padded; i += kLane) {
        alignas(64) int8_t bytes[kLane] = {};
        if (inverse > 0.0f && i < head_dim)
            store_bytes(bytes, (i + kLane <= head_dim ? load(x + i) : load_first(x + i, head_dim - i)) * splat(inverse));
        put(i, bytes);
    }
}

// At [channel / 4][16 keys][channel % 4], with 128 added.
inline float store_key_bytes(const float* key, int head_dim, int padded, uint8_t* keys, int64_t position) {
    const ByteScale by = byte_scale(key, head_dim);
    uint8_t* to = keys + position / kKeyBlock * kKeyBlock * padded + position % kKeyBlock * 4;
    round_head(key, head_dim, padded, by.inverse, [&](int i, const int8_t* bytes) {
        for (int four = 0; four < kLane; four += 4) {
            uint32_t word;
            memcpy(&word, bytes + four, sizeof word);
            word ^= 0x80808080u;
            memcpy(to + (i + four) * kKeyBlock, &word, sizeof word);
        }
    });
    return by.scale;
}

// At [channel][key % 4].
inline float store_value_bytes(const float* value, int head_dim, int padded, uint8_t* values, int64_t position) {
    const ByteScale by = byte_scale(value, head_dim);
    uint8_t* to = values + position / 4 * 4 * padded + position % 4;
    round_head(value, head_dim, padded, by.inverse, [&](int i, const int8_t* bytes) {
        for (int k = 0; k < kLane; ++k) to[4 * (i + k)] = static_cast<uint8_t>(bytes[k]);
    });
    return by.scale;
}

}  // namespace
}  // namespace lowbit
