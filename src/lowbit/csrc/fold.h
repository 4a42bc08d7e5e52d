// Products of many tokens on tile hardware: the scales of the groups are folded into int8 weights, so that floats enter once per
// stretch of up to 1,024 inputs and not once per group.
//
//   f[k] = (max |x[.][k]| / max |x|)^(1/4)            the balance of an input, over some 64 tokens of the call, at least 1/128
//   w8[r][k] = round(w[r][k] f[k] / s[r]),  s[r] = max |w[r][.] f| / 127 over the stretch
//   x8[t][k] = round(x[t][k] / f[k] / sx[t])          alike per token and stretch
//   y[t][r] = sum over stretches  s[r] sx[t] sum(w8 x8)
//
// A tile product takes 16 cycles and closing its 256 sums in fp32 takes more: with groups of 64 that alone would cost half the speed.
// The balance takes from inputs that stand out what weights of few bits have room for in a byte; without it a stretch of 256 loses
// more than one of 1,024 with it (docs/notes/cpu.md has the KL of both). Products of few tokens stay exact per group.
#pragma once
#include "product.h"

namespace lowbit {

constexpr int64_t kFoldMost = 1024;   // inputs that share a scale
constexpr int64_t kFoldFine = 512;    // the same with weights of 7 bits and more, which have no places to spare
constexpr int64_t kFoldWhole = 256;   // the same with weights that keep their codes
constexpr int64_t kFoldStep = 64;    // inputs of one tile product
constexpr int kBalanceOne = 128;     // a balance of 1
constexpr int64_t kBalanceRun = 16;  // inputs whose largest balance is kept beside them

// Bytes with one scale a row stay as they are: another rounding, which a balance would need, costs them more than it gives.
inline bool keeps_codes(const Header& header) {
    return header.bits == 8 && !header.table && header.plan.groups == 1 && !has_whole_zeros(header) && !header.scales.minima;
}

// How the positions of a row are cut into stretches.
struct Fold {
    int64_t length, count, steps;  // positions of a stretch, stretches, steps of the whole row

    int64_t steps_of(int64_t stretch) const {
        const int64_t first = stretch * (length / kFoldStep), left = steps - first;
        return left < length / kFoldStep ? left : length / kFoldStep;
    }
};

inline Fold fold_of(const Header& header) {
    const int64_t longest = keeps_codes(header) ? kFoldWhole : header.bits > 6 ? kFoldFine : kFoldMost;
    const int64_t positions = header.plan.positions(), most = divide_up(positions, longest);
    const int64_t length = divide_up(divide_up(positions, most), kFoldStep) * kFoldStep;
    return {length, divide_up(positions, length), divide_up(positions, kFoldStep)};
}

// The functions of a processor with tiles; Activations and ProductJob mean what they mean in product.h, but for the layout of a tile:
//   bytes [steps][token_tile / 16][16][64] | scales [stretches][token_tile]
// Behind all tiles lies the balance, made for all stretches before the first tile is:
//   1 / f [positions] fp32 | kBalanceOne f [positions] int16 | the largest of these [positions / kBalanceRun] int16
struct FoldedProducts {
    int token_tile, panel_blocks;  // panel_blocks: most of an item
    int64_t token_block;           // tokens that share an expanded panel, a multiple of token_tile
    void (*balance)(const Activations& job, int64_t stretch);
    void (*quantize_tile)(const Activations& job, int64_t tile);
    void (*panel_items)(const ProductJob& job, int64_t begin, int64_t end);
};

inline int64_t folded_tile_bytes(const Header& header, int token_tile) {
    const Fold fold = fold_of(header);
    return fold.steps * kFoldStep * token_tile + divide_up(fold.count * token_tile * 4, kVector) * kVector;
}

// How far inputs reach is asked of every so manieth token: whatever the balance, products are right, and all tokens of a prompt would be
// read from beyond the second-level cache once more.
constexpr int64_t kBalanceTokens = 64;
inline int64_t balance_step(int64_t tokens) { return 1 + tokens / kBalanceTokens; }

struct Balance {
    float* inverse;
    int16_t *factors, *most;
};

inline int64_t balance_bytes(const Header& header) {
    const int64_t positions = fold_of(header).steps * kFoldStep;
    return divide_up(positions * 6 + positions / kBalanceRun * 2, kVector) * kVector;
}

inline Balance balance_of(const Activations& job) {
    const int64_t positions = fold_of(*job.header).steps * kFoldStep;
    uint8_t* base = job.data + divide_up(job.tokens, job.tile) * job.tile_bytes;
    int16_t* factors = reinterpret_cast<int16_t*>(base + positions * 4);
    return {reinterpret_cast<float*>(base), factors, factors + positions};
}

// Room of one thread for a panel of weights and the sums of an item, whatever set of instructions works in it.
constexpr int64_t kFoldedRoomBytes = (int64_t{512} * 16 * kBlockRows + 2 * kFoldMost * kBlockRows / 4 + 1024 + 256) * 4;
uint8_t* folded_room();

}  // namespace lowbit
