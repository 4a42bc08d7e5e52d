// Scales and minima of 16 rows at a time, whatever they are stored as: numbers by themselves, or codes under a second level
// (layout.h). Every product reads them through here, so that a kernel knows only  w = scale * (code - zero) + minimum.
#pragma once
#include "layout.h"

namespace lowbit {
namespace {

// GGUF's types with minima have 2, 4 or 5 bits, weights with fine zeros these and 3.
template <int kBits, bool kTable>
constexpr bool kMayHaveMinima = !kTable && kBits <= kMostFineBits;

// Scales of 16 rows that are numbers by themselves, without the tensor's factor.
LOWBIT_INLINE Floats scales_at(const uint8_t* block, int scale_type, int64_t group) {
    switch (scale_type) {
        case LOWBIT_SCALE_FP16: return halves_to_floats(block + group * kBlockRows * 2);
        case LOWBIT_SCALE_BF16: return brains_to_floats(block + group * kBlockRows * 2);
        case LOWBIT_SCALE_FP32: return load_floats(reinterpret_cast<const float*>(block) + group * kBlockRows);
        case LOWBIT_SCALE_E8M0: return exponents_to_floats(block + group * kBlockRows);
        default: return e4m3_to_floats(block + group * kBlockRows);
    }
}

// Whether scales are numbers by themselves and there are no minima: the case that needs no second look in an inner loop.
inline bool is_plain(const Header& header) { return header.scales.level == kOneLevel && header.scales.minima == kNoMinima; }

// Reads groups in rising order. kPlain: only formats for which is_plain() holds.
template <bool kPlain = false>
class ScaleReader {
public:
    ScaleReader(const Header& header, const uint8_t* block) : header_(header), block_(block) {}

    Floats scales = splat_floats(0.0f), minima = splat_floats(0.0f);

    LOWBIT_INLINE void read(int64_t group) {
        if (!kPlain && header_.scales.level != kOneLevel) return read_codes(group);
        scales = scales_at(block_, header_.scale_type, group);
        if (kPlain) return;
        if (header_.scales.minima == kZeroMinima) read_zeros(group);
        else if (header_.scales.minima) minima = halves_to_floats(block_ + header_.minima_offset + group * kBlockRows * 2);
    }

private:
    LOWBIT_INLINE void read_zeros(int64_t group) {
        const Floats zeros = to_floats(widen_bytes(block_ + header_.zeros_offset + group * kBlockRows));
        minima = multiply(scales, multiply(zeros, splat_floats(-header_.zero_step)));
    }

    LOWBIT_INLINE void read_codes(int64_t group) {
        if (group >= held_) hold(group);
        Ints codes = widen_bytes(block_ + group * kBlockRows);
        if (header_.scales.minima == kNibbleMinima) {
            minima = multiply(to_floats(part<4, 15>(codes)), minimum_factors_);
            codes = part<0, 15>(codes);
        } else if (header_.scales.minima == kByteMinima) {
            minima = multiply(to_floats(widen_bytes(block_ + header_.minima_offset + group * kBlockRows)), minimum_factors_);
        }
        scales = multiply(to_floats(subtract_ints(codes, splat_ints(header_.scales.bias))), factors_);
        if (header_.scales.level != kStepTable) return;
        scales = add(scales, splat_floats(header_.scale_offset));
        if (header_.scales.minima == kZeroMinima) read_zeros(group);
    }

    // The second level from `group` on, until it changes for one of the rows.
    LOWBIT_INLINE void hold(int64_t group) {
        if (header_.scales.level == kStepTable) return hold_steps(group);
        const int64_t index = group / header_.factor_groups;
        held_ = (index + 1) * header_.factor_groups;
        factors_ = halves_to_floats(block_ + header_.factors_offset + index * kBlockRows * 2);
        if (header_.scales.minima)
            minimum_factors_ = multiply(halves_to_floats(block_ + header_.minimum_factors_offset + index * kBlockRows * 2), splat_floats(-1.0f));
    }

    __attribute__((noinline)) void hold_steps(int64_t group) {
        alignas(64) float steps[kBlockRows] = {};
        const float* table = steps_of(header_);
        const int64_t first_row = (block_ - block_at(header_, 0)) / header_.block_bytes * kBlockRows;
        held_ = header_.plan.groups;
        for (int64_t lane = 0, row = first_row; lane < kBlockRows && row < header_.rows; ++lane, ++row) {
            const int64_t index = step_index(header_, row, group);
            steps[lane] = table[index];
            const int64_t change = header_.group_size == 0 ? held_ : (index + 1) * header_.scale_block - row * header_.plan.groups;
            held_ = change < held_ ? change : held_;
        }
        factors_ = load_floats(steps);
    }

    const Header& header_;
    const uint8_t* block_;
    int64_t held_ = 0;  // the second level in hand is good for groups below
    Floats factors_ = splat_floats(0.0f), minimum_factors_ = splat_floats(0.0f);
};

}  // namespace
}  // namespace lowbit
