// What the products with bf16 on both sides multiply (brains.h), and their items. A panel is two blocks of 16 rows over a stretch of
// inputs, as the instructions want it: [inputs / 2][16 rows][2]. Prepared bf16 lies like that; all else is brought into that order once
// for all tokens of an item.
//
// Items go stretch by stretch, so that the activations of one, and the sums, stay in the second-level cache while panels pass.
#pragma once
#include "brains.h"
#include "fold.h"
#include "widen_lanes.h"

#if defined(LOWBIT_PAIRS_OF_BRAINS)
#include "brain_pairs.h"
#else
#include "brain_tiles.h"
#endif

namespace lowbit {
namespace {

constexpr int kBrainBlocks = 16;         // most of an item
constexpr int64_t kBrainBlock = 512;     // tokens of an item
constexpr int64_t kBrainStretch = 512;   // inputs of a panel: 32 KiB
constexpr int64_t kTilesToAsk = 4;       // tiles of tokens beside which the next panel is asked for
constexpr int64_t kBrainSteps = kBrainStretch / kBrainStep;

struct BrainRoom {
    alignas(64) uint8_t panel[kBrainPair][kBrainSteps * kBrainTile];
    alignas(64) float wide[kBrainStretch][kBlockRows];
    alignas(64) uint16_t rows[kBlockRows][kBrainStretch];
    alignas(64) float sums[kBrainBlock * kBrainBlocks * kBlockRows];
};
static_assert(sizeof(BrainRoom) <= kBrainRoomBytes, "as brains.h says");

// Activations of one token, 32 inputs from a position on; 0 where a position stands for no input.
inline void round_inputs(const Activations& job, int64_t token, int64_t first, uint16_t* to) {
    const int64_t cols = job.header ? job.header->cols : job.cols, source = token * job.stride;
    const bool straight = !job.header || job.header->plan.straight || job.header->kind == LOWBIT_DENSE;
    if (straight && first + kBrainStep <= cols) {
        for (int64_t i = 0; i < kBrainStep; i += kBlockRows) floats_to_brains(to + i, load_numbers(job.x, job.dtype, source + first + i));
        return;
    }
    for (int64_t i = 0; i < kBrainStep; ++i) {
        int64_t column = first + i;
        if (!straight) {
            const Plan& plan = job.header->plan;
            const int64_t segment = column / plan.segment, inside = column % plan.segment;
            column = segment < plan.segments && inside < plan.width_of(segment, cols) ? plan.column_of(segment) + inside : cols;
        }
        to[i] = column < cols ? to_bf16(load_number(job.x, job.dtype, source + column)) : 0;
    }
}

void round_brain_tile(const Activations& job, int64_t tile) {
    uint8_t* to = job.data + tile * job.tile_bytes;
    const int64_t steps = brain_steps(job);
    for (int t = 0; t < kBrainTokens; ++t) {
        const int64_t token = tile * kBrainTokens + t;
        uint16_t* row = reinterpret_cast<uint16_t*>(to + t * kVector);
        for (int64_t step = 0; step < steps; ++step, row += kBrainTokens * kBrainStep) {
            if (token < job.tokens) round_inputs(job, token, step * kBrainStep, row);
            else memset(row, 0, kVector);
        }
    }
}

// One block of rows over some steps as a panel; where it lies.
const uint8_t* brain_panel(const ProductJob& job, int64_t block, int64_t first_step, int64_t steps, BrainRoom& room, int which) {
    uint8_t* panel = room.panel[which];
    if (const Header* header = job.activations.header) {
        const uint8_t* from = block_at(*header, block);
        if (holds_brains(*header)) return from + header->codes_offset + first_step * kBrainTile;
        widen(*header, from, first_step, steps, room.wide);
        for (int64_t k = 0; k < steps * kBrainStep; k += 2)
            store_bytes(panel + k / 2 * kVector, pair_brains(load_floats(room.wide[k]), load_floats(room.wide[k + 1])));
        return panel;
    }
    const PlainRows& plain = job.plain;
    const int64_t row = block * kBlockRows, first = first_step * kBrainStep, left = plain.cols - first;
    const int64_t count = steps * kBrainStep < left ? steps * kBrainStep : left;
    const uint16_t* rows[kBlockRows];
    for (int64_t r = 0; r < kBlockRows; ++r) {
        rows[r] = plain.data ? plain.data + (row + r) * plain.cols + first : room.rows[r];
        if (plain.data && row + r < plain.rows && count == steps * kBrainStep) continue;
        rows[r] = room.rows[r];
        const int64_t known = row + r < plain.rows ? count : 0;
        if (known > 0 && plain.data) memcpy(room.rows[r], plain.data + (row + r) * plain.cols + first, static_cast<size_t>(known) * sizeof(uint16_t));
        if (known > 0 && !plain.data) plain.read(plain.from, row + r, first, known, room.rows[r]);
        memset(room.rows[r] + known, 0, static_cast<size_t>(steps * kBrainStep - known) * sizeof(uint16_t));
    }
    for (int64_t step = 0; step < steps; ++step) {
        transpose_words(rows, panel + step * kBrainTile);
        for (const uint16_t*& from : rows) from += kBrainStep;
    }
    return panel;
}

// The memory that becomes a panel next, asked for a part at a time between products: a core has room for 16 questions.
struct ComingPanel {
    const uint8_t* ranges[kBrainPair * kBlockRows] = {};
    int64_t count = 0, lines = 0;  // ranges, and lines of each
    int64_t range = 0, line = 0;   // what comes next

    void add(const ProductJob& job, int64_t block, int64_t first_step, int64_t steps) {
        if (const Header* header = job.activations.header) {
            const int64_t unit = header->bits * kVector;
            ranges[count++] = block_at(*header, block) + header->codes_offset + first_step * unit;
            lines = steps * unit / kVector;
            return;
        }
        if (!job.plain.data) return;
        for (int64_t row = block * kBlockRows; row < (block + 1) * kBlockRows && row < job.plain.rows; ++row)
            ranges[count++] = reinterpret_cast<const uint8_t*>(job.plain.data + row * job.plain.cols + first_step * kBrainStep);
        lines = steps * kBrainStep * 2 / kVector;
    }

    LOWBIT_INLINE void ask(int64_t some) {
        for (; some > 0 && range < count; --some) {
            __builtin_prefetch(ranges[range] + line * kVector, 0, 2);
            if (++line == lines) line = 0, ++range;
        }
    }
};

struct BrainItem {
    int64_t first_tile, tiles, first_block;
    int blocks;
};

inline BrainItem brain_item_at(const ProductJob& job, int64_t index) {
    const int64_t blocks = divide_up(job.rows, kBlockRows), panels = divide_up(blocks, job.panel_blocks);
    const int64_t tiles = divide_up(job.activations.tokens, kBrainTokens), per_item = job.token_block / kBrainTokens;
    const int64_t first_tile = index / panels * per_item, first_block = index % panels * job.panel_blocks;
    const int64_t tiles_left = tiles - first_tile, blocks_left = blocks - first_block;
    return {first_tile, tiles_left < per_item ? tiles_left : per_item, first_block,
            static_cast<int>(blocks_left < job.panel_blocks ? blocks_left : job.panel_blocks)};
}

// Two blocks of the item from `block` on, or its first two in the next stretch.
ComingPanel coming_panel(const ProductJob& job, const BrainItem& item, int block, int64_t first, int64_t steps) {
    ComingPanel coming;
    if (block >= item.blocks) block = 0, first += kBrainSteps;
    if (first >= steps) return coming;
    for (int b = block; b < item.blocks && b < block + kBrainPair; ++b)
        coming.add(job, item.first_block + b, first, steps - first < kBrainSteps ? steps - first : kBrainSteps);
    return coming;
}

void store_brains(const ProductJob& job, int64_t tile, int64_t block, int blocks, const float* sums) {
    for (int i = 0; i < kBrainTokens; ++i) {
        const int64_t token = tile * kBrainTokens + i;
        if (token >= job.activations.tokens) return;
        for (int b = 0; b < blocks; ++b) store_outputs(job, token, block + b, load_floats(sums + (i * kBrainPair + b) * kBlockRows));
    }
}

void brain_item(const ProductJob& job, const BrainItem& item, BrainRoom& room) {
    const int64_t steps = brain_steps(job.activations);
    for (int64_t first = 0; first < steps; first += kBrainSteps) {
        const int64_t count = steps - first < kBrainSteps ? steps - first : kBrainSteps;
        for (int block = 0; block < item.blocks; block += kBrainPair) {
            const int blocks = item.blocks - block < kBrainPair ? 1 : kBrainPair;
            const uint8_t* panel[kBrainPair];
            for (int b = 0; b < blocks; ++b) panel[b] = brain_panel(job, item.first_block + block + b, first, count, room, b);
            ComingPanel coming = coming_panel(job, item, block + kBrainPair, first, steps);
            // All at once they would only stand in the way: 17 tokens took 1.44 ms with them and 1.10 without.
            const int64_t at_once = item.tiles < kTilesToAsk ? 0 : divide_up(coming.count * coming.lines, item.tiles);
            float* sums = room.sums + block * kBrainBlock * kBlockRows;
            for (int64_t tile = 0; tile < item.tiles; ++tile, sums += kBrainTokens * kBrainPair * kBlockRows) {
                const int64_t index = item.first_tile + tile, left = job.activations.tokens - index * kBrainTokens;
                const uint8_t* x = job.activations.data + index * job.activations.tile_bytes + first * 2 * kBrainTile;
                coming.ask(at_once);
                multiply_brains(x, panel, blocks, count, left, first == 0, sums);
                if (first + count == steps) store_brains(job, index, item.first_block + block, blocks, sums);
            }
        }
    }
}

void brain_items(const ProductJob& job, int64_t begin, int64_t end) {
    BrainRoom& room = *reinterpret_cast<BrainRoom*>(folded_room());
    const BrainSession session;
    for (int64_t index = begin; index < end; ++index) brain_item(job, brain_item_at(job, index), room);
    if (job.streams) settle_streams();
}

constexpr BrainProducts kBrainProducts = {kBrainBlocks, kBrainBlock, kBrainsByDefault, round_brain_tile, brain_items};

}  // namespace
}  // namespace lowbit
