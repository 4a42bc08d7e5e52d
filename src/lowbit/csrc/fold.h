// Products of many tokens on tile hardware: the scales of the groups are folded into int8 weights, so that floats enter once per
// stretch of up to 256 inputs and not once per group.
//
//   w8[r][k] = round(w[r][k] / s[r]),  s[r] = max |w[r][.]| / 127 over the stretch;  x8 alike per token and stretch
//   y[t][r] = sum over stretches  s[r] sx[t] sum(w8 x8)
//
// A tile product takes 16 cycles and closing its 256 sums in fp32 takes more: with groups of 64 that alone would cost half the speed.
// What folding costs in quality is measured in docs/notes/cpu.md; products of few tokens stay exact per group.
#pragma once
#include "product.h"

namespace lowbit {

constexpr int64_t kFoldMost = 256;   // inputs that share a scale
constexpr int64_t kFoldStep = 64;    // inputs of one tile product

// How the positions of a row are cut into stretches.
struct Fold {
    int64_t length, count, steps;  // positions of a stretch, stretches, steps of the whole row

    int64_t steps_of(int64_t stretch) const {
        const int64_t first = stretch * (length / kFoldStep), left = steps - first;
        return left < length / kFoldStep ? left : length / kFoldStep;
    }
};

inline Fold fold_of(const Plan& plan) {
    const int64_t positions = plan.positions(), most = divide_up(positions, kFoldMost);
    const int64_t length = divide_up(divide_up(positions, most), kFoldStep) * kFoldStep;
    return {length, divide_up(positions, length), divide_up(positions, kFoldStep)};
}

// The functions of a processor with tiles; Activations and ProductJob mean what they mean in product.h, but for the layout of a tile:
//   bytes [steps][token_tile / 16][16][64] | scales [stretches][token_tile]
struct FoldedProducts {
    int token_tile, panel_blocks;
    int64_t token_block;  // tokens that share an expanded panel, a multiple of token_tile
    void (*quantize_tile)(const Activations& job, int64_t tile);
    void (*panel_items)(const ProductJob& job, int64_t begin, int64_t end);
};

inline int64_t folded_tile_bytes(const Plan& plan, int token_tile) {
    const Fold fold = fold_of(plan);
    return fold.steps * kFoldStep * token_tile + divide_up(fold.count * token_tile * 4, kVector) * kVector;
}

}  // namespace lowbit
