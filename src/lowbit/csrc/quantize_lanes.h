// Rounding groups of weights, sixteen groups at a time: lane l of every vector belongs to group l, so that sums over a group never
// cross lanes and groups of any length run at full width. Included by each instruction set's file and compiled with its flags.
//
//   plain     s = extreme / -2^(b-1)   or   (high - low) / (2^b - 1), z = round(-low / s)   or   |extreme| / max level
//   search    per candidate scale: q = clamp(round(w / s)), s' = sum(m w q) / sum(m q^2), keep the least sum(m (s' q - w)^2);
//             m is the importance of the input, or sqrt|w| where none is given
//   codes     q = clamp(round(w / s) + z), always against s as stored
//
// Operations and their order follow grid.py, so that the two agree bit for bit but for the order of sums.
#pragma once
#include <cstdlib>

#include "bits.h"
#include "first_choice_avx512.h"
#include "fit_lanes.h"
#include "transpose_avx512.h"

namespace lowbit {
namespace {

// The plain grid, or what a search finds beside it.
inline LaneGrid search_grid(const Lanes& lanes, const QuantizeJob& job, const LaneGrid& start) {
    F32 whole = {};
    for (int64_t i = 0; i < lanes.length; ++i) whole += lanes.mask[i] * (lanes.weights[i] * lanes.weights[i]);
    Best best = {splat(INFINITY), start.scales, start.zeros, whole};
    try_candidate(lanes, job, start, best);
    const Spread spread = spread_of(lanes, job);
#if defined(__AVX512VNNI__)
    if (lanes.pairs) {
        for (const I32 index : choose_few(lanes, job, spread, start).index)
            try_candidate(lanes, job, candidate_grid(job, spread, start, index), best);
        return {best.scales, best.zeros};
    }
#endif
    for (int i = 0; i < job.candidates.count; ++i) try_candidate(lanes, job, candidate_grid(job, spread, start, I32{} + i), best);
    return {best.scales, best.zeros};
}

inline void store_scale(const QuantizeJob& job, int64_t index, float scale) {
    uint8_t* bytes = static_cast<uint8_t*>(job.scales);
    switch (job.format.scale_type) {
        case LOWBIT_SCALE_E8M0: bytes[index] = static_cast<uint8_t>(nearbyintf(log2f(scale)) + 127.0f); break;
        case LOWBIT_SCALE_E4M3: bytes[index] = to_e4m3(scale / job.unit); break;
        default: store_number(job.scales, job.format.scale_type, index, scale);
    }
}

// Rows [begin, end) of a job, in steps of sixteen groups.
class RowQuantizer {
public:
    explicit RowQuantizer(const QuantizeJob& job, int64_t rows)
        : job_(job), length_(group_length(job.format, job.shape.cols)), groups_(group_count(job.format, job.shape.cols)) {
        const size_t vectors = static_cast<size_t>(length_) * sizeof(F32);
        lanes_.length = length_;
        lanes_.weights = static_cast<F32*>(aligned_alloc(64, vectors));
        lanes_.values = static_cast<F32*>(aligned_alloc(64, vectors));
        lanes_.mask = job.search.ratio_count ? static_cast<F32*>(aligned_alloc(64, vectors)) : nullptr;
        codes_ = static_cast<uint8_t*>(malloc(static_cast<size_t>(rows * job.shape.cols)));
        ready_ = lanes_.weights && lanes_.values && codes_ && (lanes_.mask || !job.search.ratio_count);
#if defined(__AVX512VNNI__)
        if (!chooses_first(lanes_, job)) return;
        lanes_.pairs = static_cast<__m512i*>(aligned_alloc(64, whole_bytes(length_)));
        ready_ = ready_ && lanes_.pairs;
#endif
    }
    ~RowQuantizer() {
        free(lanes_.weights);
        free(lanes_.values);
        free(lanes_.mask);
#if defined(__AVX512VNNI__)
        free(lanes_.pairs);
#endif
        free(codes_);
    }
    RowQuantizer(const RowQuantizer&) = delete;
    RowQuantizer& operator=(const RowQuantizer&) = delete;
    bool ready() const { return ready_; }

    void run(int64_t begin, int64_t end) {
        const int64_t total = (end - begin) * groups_;
        for (int64_t first = 0; first < total; first += kLanes) {
            const int count = static_cast<int>(total - first < kLanes ? total - first : kLanes);
            load_all(begin, first, count);
            check_numbers(begin, first, count);
            if (lanes_.mask && !job_.search.importance)
                for (int64_t i = 0; i < length_; ++i) lanes_.mask[i] = root_of_each(absolute(lanes_.weights[i]));
            LaneGrid grid = plain_grid(lanes_, job_);
            if (job_.search.ratio_count) grid = search_grid(lanes_, job_, grid);
            store(begin, first, count, grid);
        }
        const int64_t words = code_words(job_.format, job_.shape.cols);
        for (int64_t row = begin; row < end; ++row)
            write_codes(reinterpret_cast<uint32_t*>(job_.codes) + row * words, codes_ + (row - begin) * job_.shape.cols,
                        job_.shape.cols, job_.format.bits);
    }

private:
    int64_t width_of(int64_t group) const {
        const int64_t left = job_.shape.cols - group * length_;
        return left < length_ ? left : length_;
    }

#if defined(__AVX512F__)
    // Whether sixteen groups are there in full, and are taken in blocks of sixteen weights each.
    bool in_blocks(int count) const { return count == kLanes && length_ % kLanes == 0 && job_.shape.cols % length_ == 0; }

    // Where each of sixteen groups begins, in rows of so many numbers.
    void find_groups(int64_t (&places)[kLanes], int64_t row, int64_t first, int64_t stride) const {
        for (int lane = 0; lane < kLanes; ++lane)
            places[lane] = (row + (first + lane) / groups_) * stride + (first + lane) % groups_ * length_;
    }
#endif

    void load_all(int64_t begin, int64_t first, int count) {
#if defined(__AVX512F__)
        if (in_blocks(count) && !job_.search.importance) {
            int64_t places[kLanes];
            find_groups(places, begin, first, job_.row_stride);
            return gather_groups(job_.weight, job_.dtype, places, length_, lanes_.weights);
        }
#endif
        for (int lane = 0; lane < kLanes; ++lane) load(lane, lane < count ? begin : -1, first + lane);
    }

    // Copy group `flat` (counted from row `begin`; begin < 0: none) into a lane.
    void load(int lane, int64_t begin, int64_t flat) {
        float* target = reinterpret_cast<float*>(lanes_.weights) + lane;
        float* mask = lanes_.mask && job_.search.importance ? reinterpret_cast<float*>(lanes_.mask) + lane : nullptr;
        int64_t i = 0;
        if (begin >= 0) {
            const int64_t row = begin + flat / groups_, column = (flat % groups_) * length_;
            const int64_t width = width_of(flat % groups_), source = row * job_.row_stride + column;
            load_row(target, source, width);
            if (mask)
                for (int64_t k = 0; k < width; ++k) mask[k * kLanes] = job_.search.importance[column + k];
            i = width;
        }
        for (; i < length_; ++i) {
            target[i * kLanes] = 0.0f;
            if (mask) mask[i * kLanes] = 0.0f;
        }
    }

    void load_row(float* target, int64_t source, int64_t width) const {
        if (job_.dtype == LOWBIT_BF16) {
            const uint16_t* from = static_cast<const uint16_t*>(job_.weight) + source;
            for (int64_t k = 0; k < width; ++k) target[k * kLanes] = from_bf16(from[k]);
        } else if (job_.dtype == LOWBIT_FP16) {
            const uint16_t* from = static_cast<const uint16_t*>(job_.weight) + source;
            for (int64_t k = 0; k < width; ++k) target[k * kLanes] = from_fp16(from[k]);
        } else {
            const float* from = static_cast<const float*>(job_.weight) + source;
            for (int64_t k = 0; k < width; ++k) target[k * kLanes] = from[k];
        }
    }

    // Say where the first weight is that is no number.
    void check_numbers(int64_t begin, int64_t first, int count) const {
        F32 poison = {};  // 0 * w is NaN exactly for NaN and infinite w.
        for (int64_t i = 0; i < length_; ++i) poison += 0.0f * lanes_.weights[i];
        for (int lane = 0; lane < count; ++lane) {
            if (poison[lane] == poison[lane]) continue;
            const int64_t flat = first + lane, row = begin + flat / groups_;
            report_bad(reinterpret_cast<const float*>(lanes_.weights) + lane, row * job_.shape.cols + (flat % groups_) * length_);
        }
    }

    void report_bad(const float* target, int64_t position) const {
        int64_t k = 0;
        while (std::isfinite(target[k * kLanes])) ++k;
        int64_t known = job_.bad_weight.load();
        while ((known < 0 || position + k < known) && !job_.bad_weight.compare_exchange_weak(known, position + k)) {
        }
    }

    void store(int64_t begin, int64_t first, int count, const LaneGrid& grid) {
        const bool levels = job_.format.kind == LOWBIT_LEVELS;
        I32* places = reinterpret_cast<I32*>(lanes_.values);  // codes, or places of levels in rising order
        const bool floats = job_.float_type.steps > 0.0f;
        for (int64_t i = 0; i < length_; ++i) {
            const F32 ratio = lanes_.weights[i] / grid.scales;
            places[i] = floats   ? float_code(ratio, nearest_float(ratio, job_.float_type), job_.float_type)
                        : levels ? nearest_index(ratio, job_)
                                 : __builtin_convertvector(nearest_value(lanes_.weights[i], grid, job_) + grid.zeros, I32);
        }
        store_codes(first, count, levels && !floats);
        for (int lane = 0; lane < count; ++lane) {
            const int64_t index = begin * groups_ + first + lane;
            store_scale(job_, index, grid.scales[lane]);
            if (job_.zeros) job_.zeros[index] = static_cast<uint8_t>(grid.zeros[lane] / job_.zero_step);
        }
    }

    // A byte for each code; `ordered`: what lies there are places of levels in rising order.
    void store_codes(int64_t first, int count, bool ordered) {
#if defined(__AVX512F__)
        if (in_blocks(count) && !ordered) {
            int64_t places[kLanes];
            find_groups(places, 0, first, job_.shape.cols);
            return scatter_codes(reinterpret_cast<const I32*>(lanes_.values), places, length_, codes_);
        }
#endif
        for (int lane = 0; lane < count; ++lane) {
            const int64_t flat = first + lane, group = flat % groups_, width = width_of(group);
            uint8_t* codes = codes_ + (flat / groups_) * job_.shape.cols + group * length_;
            const int32_t* place = reinterpret_cast<const int32_t*>(lanes_.values) + lane;
            for (int64_t i = 0; i < width; ++i)
                codes[i] = ordered ? job_.level_codes[place[i * kLanes]] : static_cast<uint8_t>(place[i * kLanes]);
        }
    }

    const QuantizeJob& job_;
    const int64_t length_, groups_;
    Lanes lanes_{};
    uint8_t* codes_ = nullptr;
    bool ready_ = false;
};

void quantize_rows(const QuantizeJob& job, int64_t begin, int64_t end) {
    RowQuantizer quantizer(job, end - begin);
    if (!quantizer.ready()) {
        job.out_of_memory.store(true);
        return;
    }
    quantizer.run(begin, end);
}

// A doubly quantised scale.
inline float stepped_scale(const DequantizeJob& job, int64_t index) {
    const float code = static_cast<float>(static_cast<const uint8_t*>(job.scales)[index] - kStepMidpoint);
    return code * job.steps[index / job.format.scale_block] + job.scale_offset;
}

void dequantize_rows(const DequantizeJob& job, int64_t begin, int64_t end) {
    const lowbit_format& format = job.format;
    const int64_t cols = job.shape.cols, length = group_length(format, cols), groups = group_count(format, cols);
    const int64_t words = code_words(format, cols);
    constexpr int kStretch = 1024;  // codes at a time; a multiple of 32, so that every stretch begins on a word
    uint8_t codes[kStretch];
    float values[kStretch];
    const float step = zero_step(format);
    for (int64_t row = begin; row < end; ++row) {
        const uint32_t* stream = reinterpret_cast<const uint32_t*>(job.codes) + row * words;
        for (int64_t from = 0; from < cols; from += kStretch) {
            const int64_t count = cols - from < kStretch ? cols - from : kStretch;
            read_codes(stream + from * format.bits / 32, codes, count, format.bits);
            for (int64_t i = 0; i < count;) {
                const int64_t group = (from + i) / length, stop = (group + 1) * length - from;
                const int64_t end_of_group = stop < count ? stop : count;
                const int64_t index = format.group_size == 0 ? 0 : row * groups + group;
                const float scale = job.steps ? stepped_scale(job, index) : load_scale(job.scales, format.scale_type, index, job.unit);
                if (format.kind == LOWBIT_LEVELS) {
                    for (; i < end_of_group; ++i) values[i] = scale * format.levels[codes[i]];
                } else {
                    const float zero = job.zeros ? static_cast<float>(job.zeros[index]) * step : static_cast<float>(1 << (format.bits - 1));
                    for (; i < end_of_group; ++i) values[i] = scale * (static_cast<float>(codes[i]) - zero);
                }
            }
            for (int64_t i = 0; i < count; ++i) store_number(job.weight, job.dtype, row * job.row_stride + from + i, values[i]);
        }
    }
}

}  // namespace
}  // namespace lowbit
