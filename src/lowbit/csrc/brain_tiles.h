// The tile products of brain_lanes.h: up to 32 tokens with two blocks of 16 rows.
#pragma once
#include "brains.h"
#include "tiles.h"

namespace lowbit {
namespace {

typedef TileSession BrainSession;
constexpr int kBrainPair = 2;  // blocks of 16 rows that meet a token tile together
constexpr bool kBrainsByDefault = true;
constexpr int64_t kSumRow = kBrainPair * kBlockRows * static_cast<int64_t>(sizeof(float));

template <int kHalves, int kBlocks, bool kFirst>
void multiply_brain_tiles(const uint8_t* x, const uint8_t* const* panel, int64_t steps, float* sums) {
    const auto place = [&](int half, int block) { return sums + (half * kTileRows * kBrainPair + block) * kBlockRows; };
    if (kFirst) {
        zero_tile<0>();
        if (kBlocks > 1) zero_tile<1>();
        if (kHalves > 1) zero_tile<2>();
        if (kHalves > 1 && kBlocks > 1) zero_tile<3>();
    } else {
        load_tile<0>(place(0, 0), kSumRow);
        if (kBlocks > 1) load_tile<1>(place(0, 1), kSumRow);
        if (kHalves > 1) load_tile<2>(place(1, 0), kSumRow);
        if (kHalves > 1 && kBlocks > 1) load_tile<3>(place(1, 1), kSumRow);
    }
    for (int64_t step = 0; step < steps; ++step, x += 2 * kBrainTile) {
        load_tile_once<4>(x);
        load_tile<6>(panel[0] + step * kBrainTile);
        if (kBlocks > 1) load_tile<7>(panel[1] + step * kBrainTile);
        if (kHalves > 1) load_tile_once<5>(x + kBrainTile);
        dot_brains<0, 4, 6>();
        if (kBlocks > 1) dot_brains<1, 4, 7>();
        if (kHalves > 1) dot_brains<2, 5, 6>();
        if (kHalves > 1 && kBlocks > 1) dot_brains<3, 5, 7>();
    }
    store_tile<0>(place(0, 0), kSumRow);
    if (kBlocks > 1) store_tile<1>(place(0, 1), kSumRow);
    if (kHalves > 1) store_tile<2>(place(1, 0), kSumRow);
    if (kHalves > 1 && kBlocks > 1) store_tile<3>(place(1, 1), kSumRow);
}

template <int kHalves, int kBlocks>
void multiply_brain_tiles(const uint8_t* x, const uint8_t* const* panel, int64_t steps, bool first, float* sums) {
    if (first) multiply_brain_tiles<kHalves, kBlocks, true>(x, panel, steps, sums);
    else multiply_brain_tiles<kHalves, kBlocks, false>(x, panel, steps, sums);
}

// A tile of activations with one or two blocks; `left`: tokens that there are. Sums [32 tokens][2 blocks][16], new ones where it is the first
// stretch.
inline void multiply_brains(const uint8_t* x, const uint8_t* const* panel, int blocks, int64_t steps, int64_t left, bool first, float* sums) {
    const bool half = left <= kTileRows;
    if (half && blocks == 1) multiply_brain_tiles<1, 1>(x, panel, steps, first, sums);
    else if (half) multiply_brain_tiles<1, 2>(x, panel, steps, first, sums);
    else if (blocks == 1) multiply_brain_tiles<2, 1>(x, panel, steps, first, sums);
    else multiply_brain_tiles<2, 2>(x, panel, steps, first, sums);
}

}  // namespace
}  // namespace lowbit
