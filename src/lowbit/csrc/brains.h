// Products of many tokens with bf16 on both sides and sums in fp32, where a processor multiplies bf16: on tiles, or in pairs (AVX-512).
//
// Activations are rounded to bf16 once; weights that are not bf16 are rounded too, block by block. What is rounded is what other
// processors round under compute="bf16" (float_lanes.h), but products and sums of numbers below 2^-126 count as 0.
#pragma once
#include "product.h"

namespace lowbit {

constexpr int kBrainTokens = 32;       // tokens of a tile of activations
constexpr int64_t kBrainStep = 32;     // inputs of one tile product, or of 16 products of pairs
constexpr int64_t kBrainTile = 1024;   // bytes: 16 tokens or 16 rows over a step

// Activations lie as [steps][kBrainTokens / 16][16 tokens][32]; Activations and ProductJob mean what they mean in product.h.
struct BrainProducts {
    int panel_blocks;     // most of an item
    int64_t token_block;  // tokens that share a panel, a multiple of kBrainTokens
    bool by_default;      // whether weights in bf16 are multiplied like this when nothing else was asked for
    void (*round_tile)(const Activations& job, int64_t tile);
    void (*panel_items)(const ProductJob& job, int64_t begin, int64_t end);
};

// Prepared weights that are bf16 already, and lie as a panel does.
inline bool holds_brains(const Header& header) { return header.kind == LOWBIT_DENSE && header.scale_type == LOWBIT_BF16; }

// Room of one thread for a panel and the sums of an item.
constexpr int64_t kBrainRoomBytes = int64_t{512} * 16 * kBlockRows * 4 + (80 << 10);

inline int64_t brain_steps(const Activations& x) { return x.header ? x.header->plan.units : divide_up(x.cols, kBrainStep); }

}  // namespace lowbit
