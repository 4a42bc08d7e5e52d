// Weights of one block of 16 rows as fp32 with their scales applied, [inputs][16], exactly those that from_codes gives: what the products in
// fp32 and in bf16 make their panels of.
#pragma once
#include "number_lanes.h"
#include "unpack_lanes.h"

namespace lowbit {
namespace {

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

}  // namespace
}  // namespace lowbit
