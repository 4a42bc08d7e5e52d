// Quantising and its inverse at the border of the library: checks, then rows spread over the pool.
#include "quantize.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <vector>

#include "bits.h"
#include "dispatch.h"
#include "error.h"
#include "gguf_block.h"
#include "number.h"
#include "threads.h"

namespace lowbit {
namespace {

// Rows that one call takes: enough groups to fill the lanes several times, few enough to share out evenly.
int64_t rows_per_part(const lowbit_format& format, Shape shape) {
    const int64_t groups = group_count(format, shape.cols);
    return std::clamp<int64_t>(divide_up(64, groups), 1, 64);
}

int sort_levels(QuantizeJob& job) {
    const lowbit_format& format = job.format;
    int order[kMostLevels];
    job.level_count = 0;
    job.max_level = 0.0f;
    for (int code = 0; code < format.level_count; ++code) {
        if (!std::isfinite(format.levels[code])) continue;
        order[job.level_count++] = code;
        job.max_level = std::max(job.max_level, std::fabs(format.levels[code]));
    }
    if (job.level_count < 2 || job.max_level == 0.0f)
        return fail(LOWBIT_BAD_ARGUMENT, "the table of levels holds fewer than two different numbers");
    std::stable_sort(order, order + job.level_count, [&](int a, int b) { return format.levels[a] < format.levels[b]; });
    for (int i = 0; i < kMostLevels; ++i) {
        job.levels[i] = format.levels[order[std::min(i, job.level_count - 1)]];
        job.level_codes[i] = static_cast<uint8_t>(order[std::min(i, job.level_count - 1)]);
        job.borders[i] = i == 0 ? -INFINITY : i < job.level_count ? (job.levels[i - 1] + job.levels[i]) / 2 : INFINITY;
    }
    return LOWBIT_OK;
}

// Whether the levels are those of a type with this many mantissa bits, in the order of its bit patterns.
bool is_float_type(const lowbit_format& format, int mantissa) {
    const int half = format.level_count / 2, fractions = 1 << mantissa;
    const float least = format.levels[1];
    for (int code = 0; code < half; ++code) {
        const int exponent = code / fractions, fraction = code % fractions;
        const float value = exponent == 0 ? least * static_cast<float>(fraction) : std::ldexp(least * static_cast<float>(fractions + fraction), exponent - 1);
        const float level = format.levels[code];
        // Patterns that are no numbers come last.
        if (std::isfinite(level) ? level != value || format.levels[half + code] != -value : std::isfinite(format.levels[(code + 1) % half]) && code + 1 < half)
            return false;
    }
    return true;
}

// Rounding by exponent instead of a search through 256 levels; the zero type where a table is no float's.
FloatType find_float_type(const QuantizeJob& job) {
    const lowbit_format& format = job.format;
    for (int mantissa = 1; mantissa <= format.bits - 3; ++mantissa) {
        if (!is_float_type(format, mantissa)) continue;
        const float least_normal = format.levels[1 << mantissa];
        const int exponent = std::ilogb(least_normal);
        return {static_cast<float>(1 << mantissa), least_normal, job.max_level, 23 - mantissa, (exponent + 126) << mantissa,
                1 << (format.bits - 1)};
    }
    return {};
}

float largest_weight(const QuantizeJob& job) {
    std::atomic<uint32_t> largest{0};  // positive floats order like their bit patterns
    parallel_for(job.shape.rows, 16, [&](int64_t begin, int64_t end, int) {
        float most = 0.0f;
        for (int64_t row = begin; row < end; ++row)
            for (int64_t i = 0; i < job.shape.cols; ++i) {
                const float magnitude = std::fabs(load_number(job.weight, job.dtype, row * job.row_stride + i));
                most = magnitude > most ? magnitude : most;
            }
        uint32_t known = largest.load();
        while (bits_of(most) > known && !largest.compare_exchange_weak(known, bits_of(most))) {
        }
    });
    return float_of(largest.load());
}

// The memory of a job's candidates.
struct CandidateTable {
    std::vector<float> factors, ratios, shifts;

    void add(double factor, double ratio, float shift) {
        factors.push_back(static_cast<float>(factor));
        ratios.push_back(static_cast<float>(ratio));
        shifts.push_back(shift);
    }
    Candidates all() const { return {static_cast<int>(factors.size()), factors.data(), ratios.data(), shifts.data()}; }
};

constexpr float kFineMove = 0.25f;  // of a fine zero point at a time, in codes

CandidateTable list_candidates(const QuantizeJob& job) {
    const lowbit_format& format = job.format;
    const double midpoint = 1 << (format.bits - 1), max_code = (1 << format.bits) - 1;
    CandidateTable table;
    for (int i = 0; i < job.search.ratio_count; ++i) {
        const double ratio = job.search.ratios[i];
        if (format.kind != LOWBIT_INT) {
            table.add(ratio / static_cast<double>(job.max_level), ratio, 0.0f);
        } else if (!job.zeros) {
            table.add(-ratio / midpoint, ratio, 0.0f);
            table.add(ratio / (midpoint - 1), ratio, 0.0f);
        } else {
            for (int shift = -job.search.zero_steps; shift <= job.search.zero_steps; ++shift)
                table.add(ratio / max_code, ratio, static_cast<float>(shift) * (job.fine_zeros ? kFineMove : 1.0f));
        }
    }
    return table;
}

int check_search(const lowbit_search& search) {
    if (search.ratio_count < 0 || search.zero_steps < 0 || (search.ratio_count > 0 && !search.ratios))
        return fail(LOWBIT_BAD_ARGUMENT, "a search of %d ratios and %d zero steps makes no sense", search.ratio_count, search.zero_steps);
    return LOWBIT_OK;
}

int finish(const QuantizeJob& job) {
    if (job.out_of_memory.load()) return fail(LOWBIT_NO_MEMORY, "not enough memory to quantise rows of %lld weights", static_cast<long long>(job.shape.cols));
    const int64_t bad = job.bad_weight.load();
    if (bad < 0) return LOWBIT_OK;
    return fail(LOWBIT_BAD_WEIGHT, "the weight in row %lld, column %lld is NaN or infinite", static_cast<long long>(bad / job.shape.cols),
                static_cast<long long>(bad % job.shape.cols));
}

int check_plain(const lowbit_format* format, Shape shape, int dtype, int64_t row_stride) {
    if (int status = check_format(format, shape)) return status;
    if (int status = check_dtype(dtype)) return status;
    if (format->kind == LOWBIT_DENSE) return fail(LOWBIT_UNSUPPORTED, "a dense weight has no codes");
    if (row_stride < shape.cols || row_stride > kMostElements / shape.rows)
        return fail(LOWBIT_BAD_ARGUMENT, "rows of %lld weights cannot lie %lld apart", static_cast<long long>(shape.cols), static_cast<long long>(row_stride));
    return LOWBIT_OK;
}

}  // namespace
}  // namespace lowbit

using namespace lowbit;

extern "C" int lowbit_quantize(const lowbit_format* format, const void* weight, int dtype, int64_t rows, int64_t cols, int64_t row_stride,
                               const lowbit_search* search, int32_t* codes, void* scales, uint8_t* zeros, float* scale_scales) try {
    const Shape shape = {rows, cols};
    if (int status = check_plain(format, shape, dtype, row_stride)) return status;
    if (format->kind == LOWBIT_BLOCKS || format->scale_block > 0)
        return fail(LOWBIT_UNSUPPORTED, "scales under a second level are fitted by the reference, not by the core");
    if (format->group_size == 0) return fail(LOWBIT_UNSUPPORTED, "one scale for a whole tensor is fitted by the reference, not by the core");
    const lowbit_search none = {nullptr, 0, 0, nullptr};
    if (int status = check_search(search ? *search : none)) return status;
    if (!weight || !codes || !scales || (stores_zeros(*format) && !zeros) || (format->scale_type == LOWBIT_SCALE_E4M3 && !scale_scales))
        return fail(LOWBIT_BAD_ARGUMENT, "a buffer that this format needs was not given");
    QuantizeJob job{};
    job.format = *format;
    job.weight = weight;
    job.dtype = dtype;
    job.shape = shape;
    job.row_stride = row_stride;
    job.search = search ? *search : none;
    job.codes = codes;
    job.scales = scales;
    job.zeros = stores_zeros(*format) ? zeros : nullptr;
    job.fine_zeros = has_fine_zeros(*format);
    job.zero_step = zero_step(*format);
    job.max_zero = static_cast<float>(job.fine_zeros ? kZeroCounts - 1 : (1 << format->bits) - 1) * job.zero_step;
    job.unit = 1.0f;
    if (format->kind == LOWBIT_LEVELS) {
        if (int status = sort_levels(job)) return status;
        job.float_type = find_float_type(job);
    }
    if (format->scale_type == LOWBIT_SCALE_E4M3) {
        const float max_level = format->kind == LOWBIT_LEVELS ? job.max_level : static_cast<float>(1 << (format->bits - 1));
        job.unit = std::max(largest_weight(job), 1e-30f) / (448.0f * max_level);
        *scale_scales = job.unit;
    }
    const CandidateTable table = list_candidates(job);
    job.candidates = table.all();
    parallel_for(rows, rows_per_part(*format, shape), [&](int64_t begin, int64_t end, int) {
        for (int64_t row = begin; row < end; row += rows_per_part(*format, shape))
            isa().quantize_rows(job, row, std::min(end, row + rows_per_part(*format, shape)));
    });
    return finish(job);
} catch (...) {
    return caught();
}

namespace {

struct Stored {
    const int32_t* codes;
    const void* scales;
    const uint8_t* zeros;
    const float *scale_scales, *scale_offset;
};

// A job that writes rows to `weight`, or a sentence.
int plan_dequantize(const lowbit_format* format, Shape shape, const Stored& stored, int dtype, int64_t row_stride, DequantizeJob* job) {
    if (int status = check_plain(format, shape, dtype, row_stride)) return status;
    const bool blocks = format->kind == LOWBIT_BLOCKS, steps = !blocks && format->scale_block > 0;
    const bool unit = !blocks && format->scale_type == LOWBIT_SCALE_E4M3;
    if (!stored.codes || (!blocks && !stored.scales) || (stores_zeros(*format) && !stored.zeros) ||
        ((unit || steps) && !stored.scale_scales) || (steps && !stored.scale_offset))
        return fail(LOWBIT_BAD_ARGUMENT, "a buffer that this format needs was not given");
    *job = {*format, shape, stored.codes, stored.scales, stores_zeros(*format) ? stored.zeros : nullptr, unit ? *stored.scale_scales : 1.0f,
            nullptr, dtype, row_stride, steps ? stored.scale_scales : nullptr, steps ? *stored.scale_offset : 0.0f};
    return LOWBIT_OK;
}

void dequantize(const DequantizeJob& job, int64_t begin, int64_t end) {
    (job.format.kind == LOWBIT_BLOCKS ? dequantize_blocks : isa().dequantize_rows)(job, begin, end);
}

}  // namespace

extern "C" int lowbit_dequantize(const lowbit_format* format, int64_t rows, int64_t cols, const int32_t* codes, const void* scales,
                                 const uint8_t* zeros, const float* scale_scales, void* weight, int dtype, int64_t row_stride,
                                 const float* scale_offset) try {
    DequantizeJob job{};
    if (int status = plan_dequantize(format, {rows, cols}, {codes, scales, zeros, scale_scales, scale_offset}, dtype, row_stride, &job))
        return status;
    if (!weight) return fail(LOWBIT_BAD_ARGUMENT, "a buffer was not given");
    job.weight = weight;
    parallel_for(rows, 8, [&](int64_t begin, int64_t end, int) { dequantize(job, begin, end); });
    return LOWBIT_OK;
} catch (...) {
    return caught();
}

// How far a packed weight is from the weight it was made of: sums[0] = sum (w - w^)^2, sums[1] = sum w^2. Each thread unpacks a row
// at a time into a buffer of its own, so that nothing of the size of the weight is written.
extern "C" int lowbit_distance(const lowbit_format* format, int64_t rows, int64_t cols, const int32_t* codes, const void* scales,
                               const uint8_t* zeros, const float* scale_scales, const void* weight, int dtype, int64_t row_stride,
                               double* sums, const float* scale_offset) try {
    DequantizeJob plan{};
    if (int status = plan_dequantize(format, {rows, cols}, {codes, scales, zeros, scale_scales, scale_offset}, dtype, row_stride, &plan))
        return status;
    if (!weight || !sums) return fail(LOWBIT_BAD_ARGUMENT, "a buffer was not given");
    // A stride of 0 lets every row be written to the same place.
    plan.dtype = LOWBIT_FP32;
    plan.row_stride = 0;
    const int threads = thread_count();
    std::vector<float> restored(static_cast<size_t>(threads) * cols), original(static_cast<size_t>(threads) * cols);
    std::vector<double> errors(rows), norms(rows);
    parallel_for(rows, 8, [&](int64_t begin, int64_t end, int thread) {
        float* back = restored.data() + static_cast<int64_t>(thread) * cols;
        float* given = original.data() + static_cast<int64_t>(thread) * cols;
        for (int64_t row = begin; row < end; ++row) {
            DequantizeJob job = plan;
            job.weight = back;
            dequantize(job, row, row + 1);
            for (int64_t i = 0; i < cols; ++i) given[i] = load_number(weight, dtype, row * row_stride + i);
            float error[8] = {}, norm[8] = {};
            int64_t i = 0;
            for (; i + 8 <= cols; i += 8)
                for (int k = 0; k < 8; ++k) {
                    const float off = given[i + k] - back[i + k];
                    error[k] += off * off;
                    norm[k] += given[i + k] * given[i + k];
                }
            for (; i < cols; ++i) {
                error[0] += (given[i] - back[i]) * (given[i] - back[i]);
                norm[0] += given[i] * given[i];
            }
            for (int k = 1; k < 8; ++k) error[0] += error[k], norm[0] += norm[k];
            errors[row] = error[0];
            norms[row] = norm[0];
        }
    }, threads);
    sums[0] = sums[1] = 0.0;
    for (int64_t row = 0; row < rows; ++row) sums[0] += errors[row], sums[1] += norms[row];
    return LOWBIT_OK;
} catch (...) {
    return caught();
}

namespace lowbit {
namespace {
int check_stream(int bits, int64_t rows, int64_t cols, const void* from, const void* to) {
    if (bits < 1 || bits > 8) return fail(LOWBIT_UNSUPPORTED, "%d bits per code; the core packs 1 to 8", bits);
    if (rows < 0 || cols < 0 || (rows > 0 && cols > kMostElements / rows))
        return fail(LOWBIT_BAD_ARGUMENT, "codes of shape [%lld, %lld] cannot be packed", static_cast<long long>(rows), static_cast<long long>(cols));
    if (rows * cols > 0 && (!from || !to)) return fail(LOWBIT_BAD_ARGUMENT, "a buffer was not given");
    return LOWBIT_OK;
}
}  // namespace
}  // namespace lowbit

extern "C" int lowbit_pack(int bits, int64_t rows, int64_t cols, const uint8_t* values, int32_t* codes) try {
    if (int status = check_stream(bits, rows, cols, values, codes)) return status;
    const int64_t words = divide_up(cols * bits, 32);
    parallel_for(rows, 16, [&](int64_t begin, int64_t end, int) {
        for (int64_t row = begin; row < end; ++row)
            write_codes(reinterpret_cast<uint32_t*>(codes) + row * words, values + row * cols, cols, bits);
    });
    return LOWBIT_OK;
} catch (...) {
    return caught();
}

extern "C" int lowbit_unpack(int bits, int64_t rows, int64_t cols, const int32_t* codes, uint8_t* values) try {
    if (int status = check_stream(bits, rows, cols, codes, values)) return status;
    const int64_t words = divide_up(cols * bits, 32);
    parallel_for(rows, 16, [&](int64_t begin, int64_t end, int) {
        for (int64_t row = begin; row < end; ++row)
            read_codes(reinterpret_cast<const uint32_t*>(codes) + row * words, values + row * cols, cols, bits);
    });
    return LOWBIT_OK;
} catch (...) {
    return caught();
}
