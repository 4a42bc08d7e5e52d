// The product in fp32, for compute="fp32" and for dense weights: a panel of weights becomes fp32 with its scales applied, exactly the
// weights that from_codes gives, and is multiplied with fused products. For compute="bf16" and "fp16" both sides are rounded to that
// type first; sums stay in fp32.
#pragma once
#include "panel_lanes.h"

namespace lowbit {
namespace {

struct FloatPanel {
    alignas(64) float weights[kPanelBlocks][kFloatStretch][kBlockRows];
};

template <int kBits, bool kTable, int kInput>
inline void widen_step(const Header& header, Bytes codes, Floats scales, Ints zeros, Floats minima, float* to) {
    const Ints code = byte_of<kInput>(codes);
    const Floats value = kTable ? look_up_floats<kBits>(header.levels, code) : to_floats(subtract_ints(code, zeros));
    Floats weight = multiply(scales, value);
    if (kMayHaveMinima<kBits, kTable>) weight = add(weight, minima);
    store_floats(to + kInput * kBlockRows, weight);
}

template <int kBits, bool kTable>
void widen_block(const Header& header, const uint8_t* block, int64_t first_unit, int64_t units, float (*to)[kBlockRows]) {
    const Plan& plan = header.plan;
    ScaleReader<> reader(header, block);
    const Table table{};
    const bool has_zeros = has_whole_zeros(header);
    const Floats unit = splat_floats(header.unit);
    for (int64_t u = 0; u < units; ++u) {
        Bytes steps[kSteps];
        unpack_unit<kBits, false>(block + header.codes_offset + (first_unit + u) * kBits * kVector, table, steps);
        Floats scales = splat_floats(0.0f);
        Ints zeros = splat_ints(header.zero);
    LOWBIT_UNROLL
        for (int s = 0; s < kSteps; ++s) {
            if (s % (kSteps / 2) == 0) {  // a segment begins at most every half unit
                const int64_t segment = ((first_unit + u) * kUnit + s * 4) / plan.segment;
                const int64_t group = segment < plan.segments ? segment / plan.split : plan.groups - 1;
                reader.read(group);
                scales = multiply(reader.scales, unit);
                if (has_zeros) zeros = widen_bytes(block + header.zeros_offset + group * kBlockRows);
            }
            float* place = to[u * kUnit + s * 4];
            widen_step<kBits, kTable, 0>(header, steps[s], scales, zeros, reader.minima, place);
            widen_step<kBits, kTable, 1>(header, steps[s], scales, zeros, reader.minima, place);
            widen_step<kBits, kTable, 2>(header, steps[s], scales, zeros, reader.minima, place);
            widen_step<kBits, kTable, 3>(header, steps[s], scales, zeros, reader.minima, place);
        }
    }
}

void widen_dense(const Header& header, const uint8_t* block, int64_t first_unit, int64_t units, float (*to)[kBlockRows]) {
    const uint8_t* from = block + header.codes_offset + first_unit * header.bits * kVector;
    const int64_t inputs = units * kUnit;
    if (header.bits == 32) {
        for (int64_t k = 0; k < inputs; ++k) store_floats(to[k], load_floats(reinterpret_cast<const float*>(from) + k * kBlockRows));
    } else if (header.scale_type == LOWBIT_FP16) {
        for (int64_t k = 0; k < inputs; ++k) store_floats(to[k], halves_to_floats(from + k * kBlockRows * 2));
    } else {
        for (int64_t k = 0; k < inputs; k += 2) {
            const Bytes pair = load_bytes(from + k * kBlockRows * 2);
            store_floats(to[k], even_brains(pair));
            store_floats(to[k + 1], odd_brains(pair));
        }
    }
}

void widen(const Header& header, const uint8_t* block, int64_t first, int64_t units, float (*to)[kBlockRows]) {
    if (header.kind == LOWBIT_DENSE) return widen_dense(header, block, first, units, to);
    switch (header.bits + (header.table ? 16 : 0)) {
        case 2: return widen_block<2, false>(header, block, first, units, to);
        case 3: return widen_block<3, false>(header, block, first, units, to);
        case 4: return widen_block<4, false>(header, block, first, units, to);
        case 5: return widen_block<5, false>(header, block, first, units, to);
        case 6: return widen_block<6, false>(header, block, first, units, to);
        case 7: return widen_block<7, false>(header, block, first, units, to);
        case 8: return widen_block<8, false>(header, block, first, units, to);
        case 16 + 3: return widen_block<3, true>(header, block, first, units, to);
        case 16 + 4: return widen_block<4, true>(header, block, first, units, to);
        case 16 + 6: return widen_block<6, true>(header, block, first, units, to);
        default: return widen_block<8, true>(header, block, first, units, to);
    }
}

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
    for (int64_t i = 0; i < item.tiles * kTokens * kPanelBlocks; ++i) store_floats(sums + i * kBlockRows, splat_floats(0.0f));
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
            if (item.blocks == kPanelBlocks) float_tile_product<kPanelBlocks, kTokens>(panel, units * kUnit, x, place);
            else float_tile_product<1, kTokens>(panel, units * kUnit, x, place);
        }
    }
    store_item(job, item, sums);
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
}

}  // namespace
}  // namespace lowbit
