// Attention of many rows over int8 keys and values on tile registers: attention_bytes.h has the formula, tiles.h the instructions.
//
// The cache needs no other form. 16 keys lie as [channel / 4][16][4]: 64 channels of them are a right tile, and so are the values of 64
// keys, [key / 4][channel][4], for 16 channels. Queries are left tiles for the one, each plane of 16 rows' shares for the other. Only the two
// products differ from the lanes, and sums of whole numbers are the same in any order: so is every bit of the result.
//
// Rows go by sixteens, and the last sixteen end with the last row: rows they have in common with those before are scored twice and
// added once. One row more costs a tile of products, which is less than a row of the lanes (70 ns, predicted, against 117).
//
// A right tile serves two left ones or the other way round, with four tiles held: the form that ran best for the products
// (tile_lanes.h). What lanes do with sums of tiles comes behind the tile products that follow, for a processor cannot look so far ahead itself.
#pragma once
#include "attention_lanes.h"
#include "tiles.h"

namespace lowbit {
namespace {

static_assert(kQueryPlanes == 1, "a row of queries is a row of a tile");
static_assert(kKeyBlock * 4 == kTileRow && kLane * 4 == kTileRow && kValueStep == kTileRow, "blocks of the cache are tiles");

constexpr int kValueTiles = 4;                                     // of 16 channels: 64, a row of a tile
using TileSums = int32_t[2][kValueTiles][kTileRows][kLane];        // of the high and the low plane of shares

inline bool fits_tiles(const AttendJob& job) {
    return job.cache_type == LOWBIT_CACHE_INT8 && job.rows >= kTileRows && job.padded % kTileRow == 0;
}

// Whole-numbered scores of 16 rows, written as such where the scores will be.
inline void score_tiles(const AttendJob& job, const ByteRoom& room, int64_t row, const KeyTile& keys) {
    constexpr int64_t kStride = kKeyTile * sizeof(float);
    const uint8_t* queries = room.queries + row * job.padded;
    const int64_t block = int64_t{kKeyBlock} * job.padded;
    const uint8_t* from = static_cast<const uint8_t*>(job.keys) + keys.first * job.padded;
    float* to = job.scores + row * kKeyTile;
    int64_t b = 0;
    for (; b + 2 <= keys.blocks; b += 2, from += 2 * block, to += 2 * kKeyBlock) {
        zero_tile<0>();
        zero_tile<1>();
        for (int64_t channel = 0; channel < job.padded; channel += kTileRow) {
            load_tile<2>(queries + channel, job.padded);
            load_tile<3>(from + channel * kKeyBlock);
            dot_signed_unsigned<0, 2, 3>();
            load_tile<3>(from + block + channel * kKeyBlock);
            dot_signed_unsigned<1, 2, 3>();
        }
        store_tile<0>(to, kStride);
        store_tile<1>(to + kKeyBlock, kStride);
    }
    if (b == keys.blocks) return;
    zero_tile<0>();
    for (int64_t channel = 0; channel < job.padded; channel += kTileRow) {
        load_tile<2>(queries + channel, job.padded);
        load_tile<3>(from + channel * kKeyBlock);
        dot_signed_unsigned<0, 2, 3>();
    }
    store_tile<0>(to, kStride);
}

// Values of a tile of keys, 64 at a time. The last of them are copied: behind them may be nothing, or what another thread writes.
struct ValueSteps {
    const uint8_t *whole, *last;
    int64_t count, whole_count, stride;  // stride: from step to step

    ValueSteps(const AttendJob& job, const ByteRoom& room, const KeyTile& keys) {
        stride = int64_t{kValueStep} * job.padded;
        whole = static_cast<const uint8_t*>(job.values) + keys.first * job.padded;
        last = room.last_values;
        whole_count = keys.count / kValueStep;
        const int64_t left = (keys.count - whole_count * kValueStep + 3) / 4 * 4;
        count = whole_count + (left > 0);
        memcpy(room.last_values, whole + whole_count * stride, static_cast<size_t>(left * job.padded));
    }
    const uint8_t* at(int64_t step) const { return step < whole_count ? whole + step * stride : last; }
};

inline void share_rows(const AttendJob& job, const ByteRoom& room, int64_t begin, int64_t end, const KeyTile& keys, const ValueSteps& steps) {
    soften_bytes(job, room, {begin, end, false}, keys, [&](int64_t r) {
        const F32 start = splat(static_cast<float>(room.starts[r]));
        return [start](const float* p) { return to_floats(load_ints(p)) + start; };
    });
    for (int64_t r = begin; r < end; ++r) {
        uint8_t* shares = room.shares + r * 2 * kKeyTile;
        for (int64_t key = keys.blocks * kKeyBlock; key < steps.count * kValueStep; key += kLane)
            store_planes(shares + key, shares + kKeyTile + key, splat(0.0f));
    }
}

// Sums of 16 rows from `row` over 64 channels that wait to be added to what these rows have; the first `fresh` of them have theirs already.
struct Waiting {
    int64_t row, fresh, channel;
    bool lower;
};

template <int kTile>
inline void multiply_value(const AttendJob& job, const uint8_t* values) {
    load_tile<7>(values + 4 * kLane * kTile, 4 * job.padded);
    dot_unsigned_signed<kTile, 6, 7>();
}

// One plane of their shares times 64 channels: four sums at once, so that none waits for itself.
inline void multiply_plane(const AttendJob& job, const uint8_t* shares, int64_t channel, const ValueSteps& steps, int32_t (*sums)[kTileRows][kLane]) {
    zero_tile<0>();
    zero_tile<1>();
    zero_tile<2>();
    zero_tile<3>();
    for (int64_t step = 0; step < steps.count; ++step) {
        const uint8_t* values = steps.at(step) + 4 * channel;
        load_tile<6>(shares + step * kValueStep, 2 * kKeyTile);
        multiply_value<0>(job, values);
        multiply_value<1>(job, values);
        multiply_value<2>(job, values);
        multiply_value<3>(job, values);
    }
    store_tile<0>(sums[0]);
    store_tile<1>(sums[1]);
    store_tile<2>(sums[2]);
    store_tile<3>(sums[3]);
}

inline void multiply_values(const AttendJob& job, const ByteRoom& room, const Waiting& rows, const ValueSteps& steps, TileSums& sums) {
    const uint8_t* shares = room.shares + rows.row * 2 * kKeyTile;
    multiply_plane(job, shares, rows.channel, steps, sums[0]);
    if (rows.lower) multiply_plane(job, shares + kKeyTile, rows.channel, steps, sums[1]);
}

inline void join_planes(const AttendJob& job, const ByteRoom& room, const Waiting& rows, const TileSums& sums) {
    for (int64_t i = rows.fresh; i < kTileRows; ++i) {
        float* to = job.out + (rows.row + i) * job.padded + rows.channel;
        const F32 weight = splat(room.weights[rows.row + i]);
#pragma GCC unroll 4
        for (int tile = 0; tile < kValueTiles; ++tile, to += kLane) {
            I32 total = shift_left<kShareBits>(load_ints(sums[0][tile][i]));
            if (rows.lower) total = total + load_ints(sums[1][tile][i]);
            store(to, multiply_add(to_floats(total), weight, load(to)));
        }
    }
}

inline void attend_tiles(const AttendJob& job) {
    const TileSession session;
    const ByteRoom room(job.room, job.rows, job.padded);
    const auto sixteen_at = [&](int64_t row) { return row + kTileRows <= job.rows ? row : job.rows - kTileRows; };
    begin_rows(job);
    for (int64_t r = 0; r < job.rows; ++r) round_query(job, room, r);
    // Shares are multiplied when those of the next rows are there, and sums added behind the products that follow: a tile cannot be loaded
    // from what has just been stored, and lanes need not wait for tiles.
    alignas(64) TileSums sums[2];
    for (int64_t first = job.key_begin / kKeyBlock * kKeyBlock; first < job.key_end; first += kKeyTile) {
        const KeyTile keys = key_tile_at(job, first);
        const ValueSteps steps(job, room, keys);
        Waiting multiplied{};
        int64_t products = 0;
        const auto multiply_rows = [&](int64_t done) {
            const int64_t row = sixteen_at(done);
            const bool lower = any_of(room.lower + row, kTileRows);
            for (int64_t channel = 0; channel < job.padded; channel += kTileRow, ++products) {
                const Waiting rows = {row, done - row, channel, lower};
                multiply_values(job, room, rows, steps, sums[products % 2]);
                if (products > 0) join_planes(job, room, multiplied, sums[(products + 1) % 2]);
                multiplied = rows;
            }
        };
        score_tiles(job, room, 0, keys);
        for (int64_t done = 0; done < job.rows; done += kTileRows) {
            if (done + kTileRows < job.rows) score_tiles(job, room, sixteen_at(done + kTileRows), keys);
            share_rows(job, room, done, sixteen_at(done) + kTileRows, keys, steps);
            if (done > 0) multiply_rows(done - kTileRows);
        }
        multiply_rows((job.rows - 1) / kTileRows * kTileRows);
        join_planes(job, room, multiplied, sums[(products + 1) % 2]);
    }
}

// `lanes` takes what has too few rows or another cache.
inline void attend_with(const EngineIsa& lanes, const AttendJob& job) {
    if (fits_tiles(job)) attend_tiles(job);
    else lanes.attend(job);
}

}  // namespace
}  // namespace lowbit
