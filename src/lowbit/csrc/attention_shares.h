// Scores of whole-numbered keys become shares: the online softmax of attention over int8 keys and values (attention_bytes.h has the
// formula), for the products of lanes and of tiles alike.
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

}  // namespace
}  // namespace lowbit
