// What a format's fields mean, checked once at the border of the library.
#pragma once
#include <cstdint>

#include "lowbit.h"

namespace lowbit {

constexpr int kMostLevels = 256;
constexpr int kStepMidpoint = 128;  // the code of a doubly quantised scale that means the mean scale
constexpr int kZeroCounts = 256;    // what fine zeros divide the codes into
constexpr int kMostFineBits = 5;
constexpr int64_t kMostElements = int64_t{1} << 40;

struct Shape {
    int64_t rows;
    int64_t cols;
};

inline int64_t divide_up(int64_t n, int64_t step) { return (n + step - 1) / step; }

// GGUF's blocks: their layout, or nullptr.
struct BlockLayout;
const BlockLayout* blocks_of(const lowbit_format& format);

// 0 when the format and the shape make sense together; else an error code with its sentence.
int check_format(const lowbit_format* format, Shape shape);
int check_dtype(int dtype);
int check_compute(int compute);

inline bool stores_zeros(const lowbit_format& format) { return format.kind == LOWBIT_INT && format.symmetric != LOWBIT_SYMMETRIC; }
inline bool has_fine_zeros(const lowbit_format& format) { return format.kind == LOWBIT_INT && format.symmetric == LOWBIT_FINE_ZEROS; }
// What one count of a zero point is worth in codes; exact, as are zero points of any kind as floats.
inline float zero_step(const lowbit_format& format) {
    return has_fine_zeros(format) ? static_cast<float>(1 << format.bits) / static_cast<float>(kZeroCounts) : 1.0f;
}
int64_t group_length(const lowbit_format& format, int64_t cols);  // weights that share a scale along a row
int64_t group_count(const lowbit_format& format, int64_t cols);   // scales of a row
int64_t code_words(const lowbit_format& format, int64_t cols);    // 32-bit words of a row
int scale_bytes(int scale_type);
int dtype_bytes(int dtype);

}  // namespace lowbit
