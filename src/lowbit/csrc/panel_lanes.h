// Many tokens: a panel of weights is expanded to one byte (or one fp32) per weight once, and then all tokens of a block pass over it.
//
// A panel is kPanelBlocks * 16 rows and a stretch of inputs that fits the nearest cache beside the activations of one register
// tile; sums of the whole row are kept per token in a small fp32 array. Zero points of up to 7 bits are folded into the bytes while
// expanding (u = code - z + 128), so that the inner loop is the same for symmetric and asymmetric weights.
#pragma once
#include "activation_lanes.h"
#include "segment_lanes.h"
#include "unpack_lanes.h"

namespace lowbit {
namespace {

constexpr int64_t kStretch = 1024;                // inputs of an integer panel: 32 KiB for 32 rows
constexpr int64_t kFloatStretch = 256;            // inputs of a float panel, as many bytes
constexpr int64_t kMostTokens = 258;              // tokens of a panel item
constexpr int kByteZero = 128;
constexpr int64_t kMostSegments = kStretch / 16;

struct Panel {
    alignas(64) uint8_t bytes[kPanelBlocks][kStretch * kBlockRows];
    alignas(64) float scales[kMostSegments][kPanelBlocks][kBlockRows];
    alignas(64) int32_t zeros[kMostSegments][kPanelBlocks][kBlockRows];
    alignas(64) float minima[kMostSegments][kPanelBlocks][kBlockRows];
};

struct Stretch {
    int64_t first_segment, segments;
};

// One block of rows, one stretch of inputs, as bytes with scales per segment.
template <int kBits, bool kTable>
void expand_block(const Header& header, const uint8_t* block, const ZeroPlan& zeros, Stretch stretch, int which, Panel& panel) {
    const Plan& plan = header.plan;
    ScaleReader<> scales(header, block);
    const Table table = load_table(header.bytes);
    const bool fold = has_whole_zeros(header) && !zeros.per_row;
    const int64_t first_unit = stretch.first_segment * plan.segment / kUnit;
    const int64_t units = divide_up(stretch.segments * plan.segment, kUnit);
    uint8_t* to = panel.bytes[which];
    const uint8_t* planes = block + header.codes_offset + first_unit * kBits * kVector;
    for (int64_t u = 0; u < units; ++u) {
        Bytes steps[kSteps];
        unpack_unit<kBits, kTable>(planes + u * kBits * kVector, table, steps);
    LOWBIT_UNROLL
        for (int s = 0; s < kSteps; ++s) store_bytes(to + (u * kSteps + s) * kVector, steps[s]);
    }
    const int64_t vectors = plan.segment / 4;
    for (int64_t s = 0; s < stretch.segments; ++s) {
        const int64_t group = (stretch.first_segment + s) / plan.split;
        scales.read(group);
        store_floats(panel.scales[s][which], scales.scales);
        if (kMayHaveMinima<kBits, kTable> && header.scales.minima) store_floats(panel.minima[s][which], scales.minima);
        const uint8_t* row_zeros = block + header.zeros_offset + group * kBlockRows;
        if (fold) {
            const Bytes offset = subtract_bytes(spread_bytes(row_zeros), splat_ints(static_cast<int32_t>(0x80808080u)));
            for (int64_t v = s * vectors; v < (s + 1) * vectors; ++v)
                store_bytes(to + v * kVector, subtract_bytes(load_bytes(to + v * kVector), offset));
        } else if (zeros.per_row) {
            store_bytes(panel.zeros[s][which], subtract_ints(widen_bytes(row_zeros), splat_ints(zeros.wide ? kWideBias : 0)));
        }
    }
    pair_vectors(to, units * kSteps);
}

void expand(const Header& header, const uint8_t* block, const ZeroPlan& zeros, Stretch stretch, int which, Panel& panel) {
    switch (header.bits + (header.table ? 16 : 0)) {
        case 2: return expand_block<2, false>(header, block, zeros, stretch, which, panel);
        case 3: return expand_block<3, false>(header, block, zeros, stretch, which, panel);
        case 4: return expand_block<4, false>(header, block, zeros, stretch, which, panel);
        case 5: return expand_block<5, false>(header, block, zeros, stretch, which, panel);
        case 6: return expand_block<6, false>(header, block, zeros, stretch, which, panel);
        case 7: return expand_block<7, false>(header, block, zeros, stretch, which, panel);
        case 8: return expand_block<8, false>(header, block, zeros, stretch, which, panel);
        case 16 + 3: return expand_block<3, true>(header, block, zeros, stretch, which, panel);
        case 16 + 4: return expand_block<4, true>(header, block, zeros, stretch, which, panel);
        case 16 + 6: return expand_block<6, true>(header, block, zeros, stretch, which, panel);
        default: return expand_block<8, true>(header, block, zeros, stretch, which, panel);
    }
}

// One register tile: kPanelTokens tokens x kBlocks blocks over a stretch, added to `sums` [tokens][blocks][16]. Only the integer sums
// live in registers; the float sums wait in the nearest cache, where one load and one store per segment cost less than the room.
template <int kBlocks, bool kWide, bool kRowZeros, bool kMinima>
void tile_product(const Panel& panel, const Plan& plan, Stretch stretch, const TileView& x, float* sums) {
    const int64_t vectors = plan.segment / 4;
    const uint8_t* weights = panel.bytes[0];
    const int32_t* inputs = x.bytes + stretch.first_segment * vectors * kPanelTokens;
    for (int64_t s = 0; s < stretch.segments; ++s) {
        Ints partial[kBlocks][kPanelTokens];
        const int64_t place = (stretch.first_segment + s) * kPanelTokens;
        LOWBIT_UNROLL
        for (int t = 0; t < kPanelTokens; ++t)
            LOWBIT_UNROLL
            for (int b = 0; b < kBlocks; ++b) {
                partial[b][t] = splat_ints(x.sums[place + t]);
                if (kRowZeros) partial[b][t] = multiply_ints(partial[b][t], load_bytes(panel.zeros[s][b]));
            }
        add_segment<kBlocks, kWide>(weights + s * vectors * kVector, kStretch * kBlockRows, inputs + s * vectors * kPanelTokens, vectors, partial);
        Floats scales[kBlocks], minima[kBlocks];
        LOWBIT_UNROLL
        for (int b = 0; b < kBlocks; ++b) scales[b] = load_floats(panel.scales[s][b]);
        if (kMinima)
            LOWBIT_UNROLL
            for (int b = 0; b < kBlocks; ++b) minima[b] = load_floats(panel.minima[s][b]);
        LOWBIT_UNROLL
        for (int t = 0; t < kPanelTokens; ++t) {
            const Floats sx = splat_floats(x.scales[place + t]);
            LOWBIT_UNROLL
            for (int b = 0; b < kBlocks; ++b) {
                float* sum = sums + (t * kPanelBlocks + b) * kBlockRows;
                Floats before = load_floats(sum);
                if (kMinima) before = multiply_add(minima[b], splat_floats(x.scaled_sums[place + t]), before);
                store_floats(sum, multiply_add(to_floats(partial[b][t]), multiply(scales[b], sx), before));
            }
        }
    }
}

// Which tokens and rows an item covers.
struct Item {
    int64_t first_tile, tiles, first_block;
    int blocks;
};

inline Item item_at(const ProductJob& job, int64_t index) {
    const Header& header = *job.activations.header;
    const int64_t panels = divide_up(header.blocks, kPanelBlocks), tile = job.activations.tile;
    const int64_t tiles = divide_up(job.activations.tokens, tile), per_item = job.token_block / tile;
    const int64_t first_tile = index / panels * per_item, first_block = index % panels * kPanelBlocks;
    const int64_t left = header.blocks - first_block;
    return {first_tile, tiles - first_tile < per_item ? tiles - first_tile : per_item, first_block,
            static_cast<int>(left < kPanelBlocks ? left : kPanelBlocks)};
}

inline void begin_sums(int64_t tokens, float* sums) {
    for (int64_t i = 0; i < tokens * kPanelBlocks; ++i) store_floats(sums + i * kBlockRows, splat_floats(0.0f));
}

inline void store_sums(const ProductJob& job, const Item& item, int64_t tile, const float* sums) {
    const int64_t tokens = job.activations.tile, first = (item.first_tile + tile) * tokens;
    for (int64_t i = 0; i < tokens && first + i < job.activations.tokens; ++i)
        for (int b = 0; b < item.blocks; ++b)
            store_outputs(job, first + i, item.first_block + b, load_floats(sums + (i * kPanelBlocks + b) * kBlockRows));
}

// The lines that the next tile's sums leave to. Without asking, stores that miss the caches wait for each other behind the products: on a
// machine whose third-level cache others fill, a prompt of SmolLM2 took 8% longer. A product called by itself finds them near.
inline void ask_for_outputs(const ProductJob& job, const Item& item, int64_t tile) {
    if (job.streams || !job.later || tile >= item.tiles) return;
    const int64_t tokens = job.activations.tile, first = (item.first_tile + tile) * tokens, left = job.activations.tokens - first;
    const int64_t number = dtype_bytes(job.y_dtype), row = job.y_stride * number, bytes = item.blocks * kBlockRows * number;
    const uint8_t* lines = static_cast<const uint8_t*>(job.y) + first * row + item.first_block * kBlockRows * number;
    for (int64_t i = 0; i < (left < tokens ? left : tokens); ++i)
        for (int64_t at = 0; at < bytes; at += kVector) fetch_to_write(lines + i * row + at);
}

// Sums begin right before the first products of their tokens and leave right behind the last ones: both at once for all of an item
// would wait for lines that the products of the next tile hide.
template <bool kWide, bool kRowZeros, bool kMinima>
void panel_item(const ProductJob& job, const Item& item, Panel& panel, float* sums) {
    const Header& header = *job.activations.header;
    const Plan& plan = header.plan;
    const int64_t per_stretch = kStretch / plan.segment / 2 * 2;  // an even number keeps halves of units together
    for (int64_t first = 0; first < plan.segments; first += per_stretch) {
        const Stretch stretch = {first, plan.segments - first < per_stretch ? plan.segments - first : per_stretch};
        for (int b = 0; b < item.blocks; ++b)
            expand(header, block_at(header, item.first_block + b), job.zeros, stretch, b, panel);
        for (int64_t tile = 0; tile < item.tiles; ++tile) {
            const TileView x = view_tile(job.activations, item.first_tile + tile);
            float* place = sums + tile * kPanelTokens * kPanelBlocks * kBlockRows;
            if (first == 0) begin_sums(kPanelTokens, place);
            if (first + stretch.segments == plan.segments) ask_for_outputs(job, item, tile + 1);
            if (item.blocks == kPanelBlocks) tile_product<kPanelBlocks, kWide, kRowZeros, kMinima>(panel, plan, stretch, x, place);
            else tile_product<1, kWide, kRowZeros, kMinima>(panel, plan, stretch, x, place);
            if (first + stretch.segments == plan.segments) store_sums(job, item, tile, place);
        }
    }
}

void panel_items(const ProductJob& job, int64_t begin, int64_t end) {
    alignas(64) static thread_local Panel panel;
    alignas(64) float sums[kMostTokens * kPanelBlocks * kBlockRows];
    for (int64_t index = begin; index < end; ++index) {
        const Item item = item_at(job, index);
        if (job.zeros.per_row) panel_item<true, true, false>(job, item, panel, sums);
        else if (job.zeros.wide) panel_item<true, false, false>(job, item, panel, sums);
        else if (job.activations.header->scales.minima) panel_item<false, false, true>(job, item, panel, sums);
        else panel_item<false, false, false>(job, item, panel, sums);
    }
    if (job.streams) settle_streams();
}

}  // namespace
}  // namespace lowbit
