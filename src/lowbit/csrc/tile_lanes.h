// Many tokens on tile registers: fold.h has the formula, tiles.h the instructions.
//
// An item is a block of tokens and 64 outputs. For every 512 inputs the weights are expanded once to folded bytes, 32 KiB, and then all
// token tiles pass over them. The sums of a stretch are stored as integers and closed in fp32 between the products of the next one,
// because a processor cannot look 200 instructions ahead to do that by itself.
//
// One token tile meets two weight tiles at a time. Two by two would need fewer loads, but holds eight tiles where this holds four, and
// a core that shares its tile registers with another hyperthread then has none left to rename: 1,450 against 1,990 GOP/s there, and
// 3,700 against 4,100 where it has them for itself (docs/notes/cpu.md).
#pragma once
#include "fold_lanes.h"
#include "tiles.h"

namespace lowbit {
namespace {

constexpr int kFoldedBlocks = 4;                   // of 16 rows in an item
constexpr int64_t kFoldedTokens = 512;             // of an item: the more, the less expanding weighs
constexpr int64_t kFoldedInputs = kFoldAhead;      // expanded at a time
static_assert(kTokenTile == 2 * kTileRows, "a pair of tiles");

struct FoldedPanel {
    alignas(64) uint8_t bytes[kFoldedBlocks][kFoldedInputs * kBlockRows];
    alignas(64) float scales[kFoldedInputs / kFoldMost][kFoldedBlocks][kBlockRows];
    alignas(64) int32_t partial[2][2][kTileRows][kBlockRows];
    alignas(64) float nowhere[kTileRows][2][kBlockRows];  // sums of what precedes the first product
};

// Integer sums of a stretch on their way into the float sums: 32 rows of 16.
struct Closing {
    const int32_t* partial;      // [block][16][16]
    const float* scales;         // [block][16]
    const float* token_scales;
    float* sums;                 // [token][block][16]
    bool first;                  // nothing to add to yet
};
constexpr int kClosingRows = 2 * kTileRows;

// Rows [from, from + kCount); always with a `from` that the compiler knows, or finding addresses costs more than the arithmetic.
template <int kCount, bool kFirst>
LOWBIT_INLINE void close_rows(const Closing& closing, int from) {
    const int block = from / kTileRows, token = from % kTileRows;
    const Floats scales = load_floats(closing.scales + block * kBlockRows);
    LOWBIT_UNROLL_CLOSING
    for (int i = 0; i < kCount; ++i) {
        float* sum = closing.sums + ((token + i) * 2 + block) * kBlockRows;
        const Floats factor = multiply(scales, splat_floats(closing.token_scales[token + i]));
        const Floats whole = to_floats(load_bytes(closing.partial + (from + i) * kBlockRows));
        store_floats(sum, kFirst ? multiply(whole, factor) : multiply_add(whole, factor, load_floats(sum)));
    }
}
template <int kCount>
LOWBIT_INLINE void close_rows(const Closing& closing, int from) {
    if (closing.first) close_rows<kCount, true>(closing, from);
    else close_rows<kCount, false>(closing, from);
}

// 16 tokens x 32 rows over kCount steps of 64 inputs, while the stretch before is closed.
template <int kCount>
void stretch_product(const int8_t* x, const uint8_t* w, const Closing closing, int32_t* partial) {
    constexpr int kShare = kCount == 4 ? 4 : kCount == 1 ? 16 : 8;
    constexpr int64_t kBlockStep = kFoldedInputs * kBlockRows;
    zero_tile<0>();
    zero_tile<1>();
    LOWBIT_UNROLL
    for (int step = 0; step < kCount; ++step) {
        const auto share = [&](int which) __attribute__((always_inline)) {
            const int from = (step * 2 + which) * kShare;
            if (from < kClosingRows) close_rows<kShare>(closing, from);
        };
        load_tile<2>(x + step * 2 * kTileBytes);
        load_tile<3>(w + step * kTileBytes);
        dot_bytes<0, 2, 3>();
        share(0);
        load_tile<3>(w + kBlockStep + step * kTileBytes);
        dot_bytes<1, 2, 3>();
        share(1);
    }
    store_tile<0>(partial);
    store_tile<1>(partial + kTileRows * kBlockRows);
}

inline void run_stretch(int64_t steps, const int8_t* x, const uint8_t* w, const Closing& closing, int32_t* partial) {
    switch (steps) {
        case 1: return stretch_product<1>(x, w, closing, partial);
        case 2: return stretch_product<2>(x, w, closing, partial);
        case 3: return stretch_product<3>(x, w, closing, partial);
        default: return stretch_product<4>(x, w, closing, partial);
    }
}

struct FoldedItem {
    int64_t first_tile, tiles, first_block;
    int blocks;
};

inline FoldedItem folded_item_at(const ProductJob& job, int64_t index) {
    const int64_t blocks = job.activations.header->blocks, panels = divide_up(blocks, kFoldedBlocks);
    const int64_t tiles = divide_up(job.activations.tokens, kTokenTile), per_item = job.token_block / kTokenTile;
    const int64_t first_tile = index / panels * per_item, first_block = index % panels * kFoldedBlocks;
    const int64_t tiles_left = tiles - first_tile, blocks_left = blocks - first_block;
    return {first_tile, tiles_left < per_item ? tiles_left : per_item, first_block,
            static_cast<int>(blocks_left < kFoldedBlocks ? blocks_left : kFoldedBlocks)};
}

// Float sums of 16 tokens and two blocks.
inline float* sums_at(float* sums, int64_t tile, int b, int half) {
    return sums + ((tile * kFoldedBlocks + b) * 2 + half * 2) * kTileRows * kBlockRows;
}

// Writes the sums of one pair of token tiles.
void store_folded(const ProductJob& job, const FoldedItem& item, int64_t tile, float* sums) {
    for (int i = 0; i < kTokenTile; ++i) {
        const int64_t token = (item.first_tile + tile) * kTokenTile + i;
        if (token >= job.activations.tokens) return;
        for (int b = 0; b < item.blocks; ++b) {
            const float* sum = sums_at(sums, tile, b / 2 * 2, i / kTileRows) + (i % kTileRows * 2 + b % 2) * kBlockRows;
            store_outputs(job, token, item.first_block + b, load_floats(sum));
        }
    }
}

// Asks the second-level cache for the lines that 16 tokens of two blocks will be written to, while there are products to wait behind.
LOWBIT_INLINE void fetch_outputs(const ProductJob& job, const FoldedItem& item, int64_t tile, int b, int half) {
    const int64_t token = (item.first_tile + tile) * kTokenTile + half * kTileRows;
    const int64_t number = job.y_dtype == LOWBIT_FP32 ? 4 : 2, row = job.y_stride * number;
    const uint8_t* to = static_cast<const uint8_t*>(job.y) + token * row + (item.first_block + b) * kBlockRows * number;
    for (int t = 0; t < kTileRows && token + t < job.activations.tokens; ++t, to += row)
        for (int64_t i = 0; i < 2 * kBlockRows * number; i += kVector) __builtin_prefetch(to + i, 1, 2);
}

// Stretches [first, first + count) of all tokens; the panel holds their weights. Outputs are written a tile behind the last products:
// whole columns at the end, thousands of bytes apart, would fall into few sets of the caches and wait for memory one by one.
void folded_stretches(const ProductJob& job, const FoldedItem& item, const Fold& fold, int64_t first, int64_t count, FoldedPanel& panel, float* sums) {
    Closing closing = {panel.partial[1][0][0], panel.scales[0][0], panel.nowhere[0][0], panel.nowhere[0][0], true};
    const bool last = first + count == fold.count;
    int which = 0;
    const auto multiply_half = [&](int64_t tile, const FoldedView& x, int64_t f, int b, int half) {
        if (first + f == fold.count - 1) fetch_outputs(job, item, tile, b, half);
        int32_t* partial = panel.partial[which][0][0];
        which = 1 - which;
        run_stretch(fold.steps_of(first + f), x.bytes + (first + f) * fold.length * kTokenTile + half * kTileBytes,
                    panel.bytes[b] + f * fold.length * kBlockRows, closing, partial);
        const float* token_scales = x.scales + (first + f) * kTokenTile + half * kTileRows;
        closing = {partial, panel.scales[f][b], token_scales, sums_at(sums, tile, b, half), first + f == 0};
    };
    for (int64_t tile = 0; tile < item.tiles; ++tile) {
        const FoldedView x = view_folded(job.activations, fold, item.first_tile + tile);
        for (int64_t f = 0; f < count; ++f)
            for (int b = 0; b < item.blocks; b += 2) {
                multiply_half(tile, x, f, b, 0);
                multiply_half(tile, x, f, b, 1);
            }
        if (last && tile > 0) store_folded(job, item, tile - 1, sums);
    }
    LOWBIT_UNROLL
    for (int from = 0; from < kClosingRows; from += kTileRows) close_rows<kTileRows>(closing, from);
    if (last) store_folded(job, item, item.tiles - 1, sums);
}

void folded_item(const ProductJob& job, const FoldedItem& item, const FoldRange& range, FoldedPanel& panel, float* sums) {
    const Header& header = *job.activations.header;
    const Fold fold = fold_of(header.plan);
    const int64_t at_once = kFoldedInputs / fold.length;
    for (int64_t first = 0; first < fold.count; first += at_once) {
        const int64_t count = fold.count - first < at_once ? fold.count - first : at_once;
        for (int b = 0; b < item.blocks; ++b)
            for (int64_t f = 0; f < count; ++f)
                fold_weights(header, block_at(header, item.first_block + b), range, fold, first + f,
                             panel.bytes[b] + f * fold.length * kBlockRows, panel.scales[f][b]);
        folded_stretches(job, item, fold, first, count, panel, sums);
    }
}

void folded_items(const ProductJob& job, int64_t begin, int64_t end) {
    alignas(64) static thread_local FoldedPanel panel;
    alignas(64) static thread_local float sums[kFoldedTokens * kFoldedBlocks * kBlockRows];
    const FoldRange range = fold_range(*job.activations.header);
    const TileSession session;
    for (int64_t index = begin; index < end; ++index) folded_item(job, folded_item_at(job, index), range, panel, sums);
}

constexpr FoldedProducts kFoldedProducts = {kTokenTile, kFoldedBlocks, kFoldedTokens, quantize_folded, folded_items};

}  // namespace
}  // namespace lowbit
