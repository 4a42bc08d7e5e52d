// The product in fp32, for compute="fp32" and for dense weights: a panel of weights becomes fp32 with its scales applied, exactly the
// weights that from_codes gives, and is multiplied with fused products. For compute="bf16" and "fp16" both sides are rounded to that
// type first; sums stay in fp32.
#pragma once
#include "panel_lanes.h"
#include "widen_lanes.h"

namespace lowbit {
namespace {

struct FloatPanel {
    alignas(64) float weights[kPanelBlocks][kFloatStretch][kBlockRows];
};

template <int kBlocks, int kTokens>
inline void float_tile_product(const FloatPanel& panel, int64_t inputs, const float* x, float* sums) {
    Floats total[kBlocks][kTokens];
    LOWBIT_UNROLL
    for (int t = 0; t < kTokens; ++t)
    LOWBIT_UNROLL
        for (int b = 0; b < kBlocks; ++b) total[b][t] = load_floats(sums + (t * kPanelBlocks + b) * kBlockRows);
    for (int64_t k = 0; k < inputs; ++k) {
        Floats w[kBlocks];
    LOWBIT_UNROLL
        for (int b = 0; b < kBlocks; ++b) w[b] = load_floats(panel.weights[b][k]);
    LOWBIT_UNROLL
        for (int t = 0; t < kTokens; ++t) {
            const Floats value = splat_floats(x[k * kTokens + t]);
    LOWBIT_UNROLL
            for (int b = 0; b < kBlocks; ++b) total[b][t] = multiply_add(w[b], value, total[b][t]);
        }
    }
    LOWBIT_UNROLL
    for (int t = 0; t < kTokens; ++t)
    LOWBIT_UNROLL
        for (int b = 0; b < kBlocks; ++b) store_floats(sums + (t * kPanelBlocks + b) * kBlockRows, total[b][t]);
}

template <int kTokens>
void float_item(const ProductJob& job, const Item& item, FloatPanel& panel, float* sums) {
    const Header& header = *job.activations.header;
    const int64_t per_stretch = kFloatStretch / kUnit;
    for (int64_t first = 0; first < header.plan.units; first += per_stretch) {
        const int64_t units = header.plan.units - first < per_stretch ? header.plan.units - first : per_stretch;
        for (int b = 0; b < item.blocks; ++b) {
            widen(header, block_at(header, item.first_block + b), first, units, panel.weights[b]);
            round_numbers(panel.weights[b][0], units * kUnit * kBlockRows, job.activations.rounding);
        }
        for (int64_t tile = 0; tile < item.tiles; ++tile) {
            const float* x = reinterpret_cast<const float*>(job.activations.data + (item.first_tile + tile) * job.activations.tile_bytes);
            float* place = sums + tile * kTokens * kPanelBlocks * kBlockRows;
            x += first * kUnit * kTokens;
            if (first == 0) begin_sums(kTokens, place);
            if (item.blocks == kPanelBlocks) float_tile_product<kPanelBlocks, kTokens>(panel, units * kUnit, x, place);
            else float_tile_product<1, kTokens>(panel, units * kUnit, x, place);
            if (first + units == header.plan.units) store_sums(job, item, tile, place);
        }
    }
}

void float_items(const ProductJob& job, int64_t begin, int64_t end) {
    alignas(64) static thread_local FloatPanel panel;
    alignas(64) float sums[kMostTokens * kPanelBlocks * kBlockRows];
    for (int64_t index = begin; index < end; ++index) {
        const Item item = item_at(job, index);
        switch (job.activations.tile) {
            case 1: float_item<1>(job, item, panel, sums); break;
            case 2: float_item<2>(job, item, panel, sums); break;
            case 4: float_item<4>(job, item, panel, sums); break;
            default: float_item<kPanelTokens>(job, item, panel, sums);
        }
    }
    if (job.streams) settle_streams();
}

}  // namespace
}  // namespace lowbit
