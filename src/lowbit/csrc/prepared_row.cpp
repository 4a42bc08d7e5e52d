// Rows of a prepared weight are spread over a block of 16 rows (layout.h), so that a tied head and the embedding share one copy.
#include "prepared_row.h"

#include <algorithm>
#include <initializer_list>

#include "error.h"
#include "number.h"
#include "threads.h"

namespace lowbit {
namespace {

// The code at a position of a row: its bits come from one plane for each bit of `bits`, the widest first.
inline uint32_t code_at(const uint8_t* unit, int bits, int64_t inside, int64_t lane) {
    const int64_t step = inside / 4, byte = lane * 4 + inside % 4;
    uint32_t code = 0;
    int low = 0;
    for (int width : {8, 4, 2, 1}) {
        if (!(bits & width)) continue;
        const int64_t steps_per_vector = 8 / width;
        const uint8_t* plane = unit + low * kVector;
        const uint32_t value = plane[step / steps_per_vector * kVector + byte];
        code |= ((value >> (step % steps_per_vector * width)) & ((1u << width) - 1)) << low;
        low += width;
    }
    return code;
}

void read_prepared(const Header& header, int64_t row, float* to) {
    const uint8_t* block = block_at(header, row / kBlockRows);
    const uint8_t* units = block + header.codes_offset;
    const int64_t lane = row % kBlockRows, unit_bytes = static_cast<int64_t>(header.bits) * kVector;
    if (header.kind == LOWBIT_DENSE) {
        // [input][row], and two inputs side by side where numbers have 16 bits in bf16.
        for (int64_t k = 0; k < header.cols; ++k) {
            const bool pairs = header.scale_type == LOWBIT_BF16;
            const int64_t place = pairs ? (k / 2 * kBlockRows + lane) * 2 + k % 2 : k * kBlockRows + lane;
            to[k] = load_number(units, header.scale_type, place);
        }
        return;
    }
    const uint8_t* zeros = stores_zeros(header) ? block + header.zeros_offset : nullptr;
    for (int64_t group = 0; group < header.plan.groups; ++group) {
        const LaneScale scale = lane_scale(header, row, group);
        float zero = static_cast<float>(zeros ? zeros[group * kBlockRows + lane] : header.zero);
        if (header.scales.minima == kZeroMinima) zero *= header.zero_step;
        const int64_t end = std::min((group + 1) * header.plan.group, header.cols);
        for (int64_t k = group * header.plan.group; k < end; ++k) {
            const int64_t position = header.plan.straight ? k : header.plan.position_of(k);
            const uint32_t code = code_at(units + position / kUnit * unit_bytes, header.bits, position % kUnit, lane);
            const float value = header.table ? header.levels[code] : static_cast<float>(code) - zero;
            to[k] = scale.scale * value + scale.minimum;
        }
    }
}

}  // namespace

void read_row(const View& view, int64_t row, float* to) {
    if (view.header) return read_prepared(*view.header, row, to);
    if (view.tight) return read_tight_row(*view.tight, row, to);
    engine_isa().widen(view.data, view.dtype, row * view.cols, view.cols, to);
}

}  // namespace lowbit

extern "C" int lowbit_read_rows(const void* prepared, int64_t prepared_bytes, const int64_t* rows, int64_t count, float* to) try {
    const lowbit::Header* header = lowbit::check_prepared(prepared, prepared_bytes);
    if (!header) return LOWBIT_BAD_ARGUMENT;
    if (count < 0 || count > lowbit::kMostElements / header->cols || (count > 0 && (!rows || !to)))
        return lowbit::fail(LOWBIT_BAD_ARGUMENT, "%lld rows to read need numbers and room", static_cast<long long>(count));
    for (int64_t i = 0; i < count; ++i)
        if (rows[i] < 0 || rows[i] >= header->rows)
            return lowbit::fail(LOWBIT_BAD_ARGUMENT, "row %lld of a weight with %lld rows was asked for", static_cast<long long>(rows[i]),
                                static_cast<long long>(header->rows));
    lowbit::parallel_for(count, 16, [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i) lowbit::read_prepared(*header, rows[i], to + i * header->cols);
    });
    return LOWBIT_OK;
} catch (...) {
    return lowbit::caught();
}
