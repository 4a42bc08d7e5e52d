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
#include <cmath>
#include <cstdlib>

#include "bits.h"
#include "number.h"
#include "quantize.h"

namespace lowbit {
namespace {

constexpr int kLanes = 16;
typedef float F32 __attribute__((vector_size(64)));
typedef int32_t I32 __attribute__((vector_size(64)));

// fp16 cannot hold a scale below this; groups that small are stored as zeros.
constexpr float kTinyScale = 6e-8f;

inline F32 splat(float value) { return F32{} + value; }
inline F32 select(I32 mask, F32 yes, F32 no) { return mask ? yes : no; }
inline F32 absolute(F32 x) { return (F32)((I32)x & 0x7fffffff); }
inline F32 clamp(F32 x, F32 low, F32 high) {
    x = select(x > low, x, low);
    return select(x < high, x, high);
}
// Round half to even: adding 1.5 * 2^23 leaves no fraction bits. Codes beyond 2^20 are clamped anyway.
inline F32 round_even(F32 x) {
    const F32 limit = splat(1048576.0f), magic = splat(12582912.0f);
    return (clamp(x, -limit, limit) + magic) - magic;
}

// The groups of one step, transposed: entry i of lane l is at [i * kLanes + l]; lanes and entries that do not exist hold zero.
struct Lanes {
    int64_t length;
    F32* weights;
    F32* mask;  // what an entry's error weighs: its input's importance, or sqrt|w|; nullptr without a search
    F32* values;
};

struct LaneGrid {
    F32 scales;
    F32 zeros;
};

inline F32 round_scales(F32 x, const QuantizeJob& job) {
    F32 out;
    for (int lane = 0; lane < kLanes; ++lane) {
        const float value = x[lane];
        float rounded = value;
        switch (job.format.scale_type) {
            case LOWBIT_SCALE_BF16: rounded = from_bf16(to_bf16(value)); break;
            case LOWBIT_SCALE_FP16: rounded = from_fp16(to_fp16(value)); break;
            case LOWBIT_SCALE_E8M0: {
                const float magnitude = fabsf(value) > 0x1p-127f ? fabsf(value) : 0x1p-127f;
                const float exponent = nearbyintf(log2f(magnitude));
                out[lane] = exp2f(exponent > 127.0f ? 127.0f : exponent < -127.0f ? -127.0f : exponent);
                continue;
            }
            case LOWBIT_SCALE_E4M3: {
                const float ratio = value / job.unit;
                out[lane] = from_e4m3(to_e4m3(ratio < 0x1p-9f ? 0x1p-9f : ratio > 448.0f ? 448.0f : ratio)) * job.unit;
                continue;
            }
            default: break;
        }
        out[lane] = fabsf(rounded) < kTinyScale ? 1.0f : rounded;
    }
    return out;
}

inline F32 round_scales_wide(F32 x, const QuantizeJob& job) {
#if defined(__AVX512F__)
    if (job.format.scale_type == LOWBIT_SCALE_FP16) {
        const F32 rounded = (F32)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)x, 0));
        return select(absolute(rounded) < kTinyScale, splat(1.0f), rounded);
    }
#endif
    return round_scales(x, job);
}

inline F32 gather(const float* table, I32 index) {
#if defined(__AVX512F__)
    return (F32)_mm512_i32gather_ps((__m512i)index, table, 4);
#else
    F32 out;
    for (int lane = 0; lane < kLanes; ++lane) out[lane] = table[index[lane]];
    return out;
#endif
}

constexpr int kFewLevels = 16;  // up to here comparing with every border beats a search through memory

// The place in rising order of the level nearest to each x; ties go to the lower level.
inline I32 nearest_index(F32 x, const QuantizeJob& job) {
    I32 index = {};
    if (job.level_count <= kFewLevels) {
        for (int i = 1; i < job.level_count; ++i) index -= x > job.borders[i];
        return index;
    }
    for (int step = kMostLevels / 2; step > 0; step /= 2) {
        const I32 probe = index + step;
        index = x > gather(job.borders, probe) ? probe : index;
    }
    return index;
}

// The value that the nearest code of each x stands for.
inline F32 nearest_level(F32 x, const QuantizeJob& job) {
    if (job.level_count > kFewLevels) return gather(job.levels, nearest_index(x, job));
    F32 value = splat(job.levels[0]);
    for (int i = 1; i < job.level_count; ++i) value = select(x > job.borders[i], splat(job.levels[i]), value);
    return value;
}

// What the nearest code of each weight stands for before the scale: code - zero, or a level.
inline F32 nearest_value(F32 w, const LaneGrid& grid, const QuantizeJob& job) {
    const F32 ratio = w / grid.scales;
    if (job.format.kind == LOWBIT_LEVELS) return nearest_level(ratio, job);
    const float max_code = static_cast<float>((1 << job.format.bits) - 1);
    return clamp(round_even(ratio), -grid.zeros, splat(max_code) - grid.zeros);
}

inline F32 signed_extreme(const Lanes& lanes) {
    F32 extreme = lanes.weights[0], largest = absolute(extreme);
    for (int64_t i = 1; i < lanes.length; ++i) {
        const F32 magnitude = absolute(lanes.weights[i]);
        extreme = select(magnitude > largest, lanes.weights[i], extreme);
        largest = select(magnitude > largest, magnitude, largest);
    }
    return extreme;
}

struct Range {
    F32 low, high;
};

inline Range zero_range(const Lanes& lanes) {
    Range range = {F32{}, F32{}};
    for (int64_t i = 0; i < lanes.length; ++i) {
        range.low = select(lanes.weights[i] < range.low, lanes.weights[i], range.low);
        range.high = select(lanes.weights[i] > range.high, lanes.weights[i], range.high);
    }
    return range;
}

inline F32 clamp_zero(F32 zeros, const QuantizeJob& job) {
    return clamp(zeros, F32{}, splat(static_cast<float>((1 << job.format.bits) - 1)));
}

inline LaneGrid plain_grid(const Lanes& lanes, const QuantizeJob& job) {
    const lowbit_format& format = job.format;
    const float midpoint = static_cast<float>(1 << (format.bits - 1));
    if (format.kind == LOWBIT_INT && !format.symmetric) {
        const Range range = zero_range(lanes);
        const F32 scales = round_scales((range.high - range.low) / splat(static_cast<float>((1 << format.bits) - 1)), job);
        return {scales, clamp_zero(round_even(-range.low / scales), job)};
    }
    const F32 extreme = signed_extreme(lanes);
    if (format.kind == LOWBIT_INT) return {round_scales(extreme / splat(-midpoint), job), splat(midpoint)};
    if (format.scale_type == LOWBIT_SCALE_E8M0) {
        F32 scales;
        for (int lane = 0; lane < kLanes; ++lane) {
            const float magnitude = fabsf(extreme[lane]) > 0x1p-127f ? fabsf(extreme[lane]) : 0x1p-127f;
            scales[lane] = exp2f(ceilf(log2f(magnitude / 7.25f)));
        }
        return {scales, F32{}};
    }
    return {round_scales(absolute(extreme) / splat(job.max_level), job), F32{}};
}

struct Best {
    F32 error, scales, zeros;
};

// Score one candidate and keep it where it is better.
inline void try_candidate(const Lanes& lanes, const QuantizeJob& job, LaneGrid candidate, Best& best) {
    candidate.scales = select(absolute(candidate.scales) < kTinyScale, splat(1.0f), candidate.scales);
    F32 product = {}, square = {}, error = {};
    for (int64_t i = 0; i < lanes.length; ++i) {
        const F32 w = lanes.weights[i], value = nearest_value(w, candidate, job);
        lanes.values[i] = value;
        const F32 weighted = lanes.mask ? lanes.mask[i] * value : value;
        product += weighted * w;
        square += weighted * value;
    }
    const F32 scales = round_scales_wide(select(square > 0.0f, product / square, candidate.scales), job);
    for (int64_t i = 0; i < lanes.length; ++i) {
        const F32 miss = scales * lanes.values[i] - lanes.weights[i];
        error += lanes.mask ? lanes.mask[i] * (miss * miss) : miss * miss;
    }
    const I32 better = error < best.error;
    best.error = select(better, error, best.error);
    best.scales = select(better, scales, best.scales);
    best.zeros = select(better, candidate.zeros, best.zeros);
}

inline void search_asymmetric(const Lanes& lanes, const QuantizeJob& job, Best& best) {
    const Range range = zero_range(lanes);
    const F32 width = range.high - range.low;
    const F32 usable_width = select(width > 1e-20f, width, splat(1e-20f));
    const double max_code = (1 << job.format.bits) - 1;
    for (int i = 0; i < job.search.ratio_count; ++i) {
        const double ratio = job.search.ratios[i];
        const F32 scales = usable_width * splat(static_cast<float>(ratio / max_code));
        const F32 middle = round_even(-range.low * splat(static_cast<float>(ratio)) / scales);
        for (int shift = -job.search.zero_steps; shift <= job.search.zero_steps; ++shift)
            try_candidate(lanes, job, {scales, clamp_zero(middle + static_cast<float>(shift), job)}, best);
    }
}

inline LaneGrid search_grid(const Lanes& lanes, const QuantizeJob& job, const LaneGrid& start) {
    Best best = {splat(INFINITY), start.scales, start.zeros};
    try_candidate(lanes, job, start, best);
    if (job.format.kind == LOWBIT_INT && !job.format.symmetric) {
        search_asymmetric(lanes, job, best);
        return {best.scales, best.zeros};
    }
    const F32 extreme = signed_extreme(lanes);
    const double midpoint = 1 << (job.format.bits - 1);
    for (int i = 0; i < job.search.ratio_count; ++i) {
        const double ratio = job.search.ratios[i];
        if (job.format.kind == LOWBIT_INT) {
            try_candidate(lanes, job, {extreme * splat(static_cast<float>(-ratio / midpoint)), start.zeros}, best);
            try_candidate(lanes, job, {extreme * splat(static_cast<float>(ratio / (midpoint - 1))), start.zeros}, best);
        } else {
            const F32 scales = absolute(extreme) * splat(static_cast<float>(ratio / static_cast<double>(job.max_level)));
            try_candidate(lanes, job, {scales, start.zeros}, best);
        }
    }
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
    }
    ~RowQuantizer() {
        free(lanes_.weights);
        free(lanes_.values);
        free(lanes_.mask);
        free(codes_);
    }
    RowQuantizer(const RowQuantizer&) = delete;
    RowQuantizer& operator=(const RowQuantizer&) = delete;
    bool ready() const { return ready_; }

    void run(int64_t begin, int64_t end) {
        const int64_t total = (end - begin) * groups_;
        for (int64_t first = 0; first < total; first += kLanes) {
            const int count = static_cast<int>(total - first < kLanes ? total - first : kLanes);
            for (int lane = 0; lane < kLanes; ++lane) load(lane, lane < count ? begin : -1, first + lane);
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

    // Copy group `flat` (counted from row `begin`; begin < 0: none) into a lane.
    void load(int lane, int64_t begin, int64_t flat) {
        float* target = reinterpret_cast<float*>(lanes_.weights) + lane;
        float* mask = lanes_.mask ? reinterpret_cast<float*>(lanes_.mask) + lane : nullptr;
        int64_t i = 0;
        if (begin >= 0) {
            const int64_t row = begin + flat / groups_, column = (flat % groups_) * length_;
            const int64_t width = width_of(flat % groups_), source = row * job_.row_stride + column;
            load_row(target, source, width);
            if (mask)
                for (int64_t k = 0; k < width; ++k)
                    mask[k * kLanes] = job_.search.importance ? job_.search.importance[column + k] : sqrtf(fabsf(target[k * kLanes]));
            report_bad(target, width, row * job_.shape.cols + column);
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

    void report_bad(const float* target, int64_t width, int64_t position) const {
        float poison = 0.0f;  // 0 * w is NaN exactly for NaN and infinite w.
        for (int64_t k = 0; k < width; ++k) poison += 0.0f * target[k * kLanes];
        if (poison == poison) return;
        int64_t k = 0;
        while (std::isfinite(target[k * kLanes])) ++k;
        int64_t known = job_.bad_weight.load();
        while ((known < 0 || position + k < known) && !job_.bad_weight.compare_exchange_weak(known, position + k)) {
        }
    }

    void store(int64_t begin, int64_t first, int count, const LaneGrid& grid) {
        const bool levels = job_.format.kind == LOWBIT_LEVELS;
        I32* places = reinterpret_cast<I32*>(lanes_.values);  // codes, or places of levels in rising order
        for (int64_t i = 0; i < length_; ++i)
            places[i] = levels ? nearest_index(lanes_.weights[i] / grid.scales, job_)
                               : __builtin_convertvector(nearest_value(lanes_.weights[i], grid, job_) + grid.zeros, I32);
        for (int lane = 0; lane < count; ++lane) {
            const int64_t flat = first + lane, group = flat % groups_, width = width_of(group);
            uint8_t* codes = codes_ + (flat / groups_) * job_.shape.cols + group * length_;
            const int32_t* place = reinterpret_cast<const int32_t*>(lanes_.values) + lane;
            for (int64_t i = 0; i < width; ++i)
                codes[i] = levels ? job_.level_codes[place[i * kLanes]] : static_cast<uint8_t>(place[i * kLanes]);
            const int64_t index = begin * groups_ + flat;
            store_scale(job_, index, grid.scales[lane]);
            if (job_.zeros) job_.zeros[index] = static_cast<uint8_t>(grid.zeros[lane]);
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
                    const int zero = job.zeros ? job.zeros[index] : 1 << (format.bits - 1);
                    for (; i < end_of_group; ++i) values[i] = scale * static_cast<float>(codes[i] - zero);
                }
            }
            for (int64_t i = 0; i < count; ++i) store_number(job.weight, job.dtype, row * job.row_stride + from + i, values[i]);
        }
    }
}

}  // namespace
}  // namespace lowbit
