// Rows of a prepared weight are spread over a block of 16 rows (layout.h), so that a tied head and the embedding share one copy.
#include "prepared_row.h"

#include <algorithm>
#include <cstring>
#include <initializer_list>

#include "error.h"
#include "number.h"
#include "threads.h"

namespace lowbit {
namespace {

// The codes that a row has in a unit. Four inputs lie side by side in each plane, so they are put together four at a time: code by code a
// row of 576 took 1.6 microseconds more.
inline void read_unit(const uint8_t* unit, int bits, int64_t lane, uint8_t* to) {
    uint32_t steps[kSteps] = {};
    int low = 0;
    for (int width : {8, 4, 2, 1}) {  // a plane for each bit of `bits`, the widest first
        if (!(bits & width)) continue;
        const int steps_per_vector = 8 / width;
        const uint32_t mask = ((1u << width) - 1) * 0x01010101u;
        const uint8_t* plane = unit + low * kVector + lane * 4;
        for (int step = 0; step < kSteps; ++step) {
            uint32_t four;
            memcpy(&four, plane + step / steps_per_vector * kVector, sizeof four);
            steps[step] |= ((four >> (step % steps_per_vector * width)) & mask) << low;
        }
        low += width;
    }
    memcpy(to, steps, sizeof steps);
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
        int64_t count = 0;
        for (int64_t k = group * header.plan.group; k < end; k += count) {
            const int64_t position = header.plan.position_of(k), inside = position % kUnit;
            count = std::min({end - k, kUnit - inside, header.plan.filled - k % header.plan.group % header.plan.filled});
            uint8_t codes[kUnit];
            read_unit(units + position / kUnit * unit_bytes, header.bits, lane, codes);
            for (int64_t i = 0; i < count; ++i) {
                const uint8_t code = codes[inside + i];
                const float value = header.table ? header.levels[code] : static_cast<float>(code) - zero;
                to[k + i] = scale.scale * value + scale.minimum;
            }
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
