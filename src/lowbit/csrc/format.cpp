#include "format.h"

#include "error.h"
#include "gguf_block.h"

namespace lowbit {

int check_dtype(int dtype) {
    if (dtype < LOWBIT_FP32 || dtype > LOWBIT_FP16)
        return fail(LOWBIT_BAD_ARGUMENT, "element type %d is not known; use 0 (fp32), 1 (bf16) or 2 (fp16)", dtype);
    return LOWBIT_OK;
}

int check_compute(int compute) {
    if (compute < LOWBIT_COMPUTE_INT8 || compute > LOWBIT_COMPUTE_INT8_GROUPS)
        return fail(LOWBIT_UNSUPPORTED, "compute %d is not known to the core; use 0 (int8), 4 (int8, a scale per group), 1 (fp32), 2 (bf16) or 3 (fp16)", compute);
    return LOWBIT_OK;
}

int check_format(const lowbit_format* format, Shape shape) {
    if (!format) return fail(LOWBIT_BAD_ARGUMENT, "no format was given");
    if (shape.rows <= 0 || shape.cols <= 0 || shape.rows > kMostElements / shape.cols)
        return fail(LOWBIT_BAD_ARGUMENT, "a weight of shape [%lld, %lld] cannot be stored; both sides must be positive",
                    static_cast<long long>(shape.rows), static_cast<long long>(shape.cols));
    if (format->kind == LOWBIT_DENSE) return check_dtype(format->scale_type);
    if (format->kind == LOWBIT_BLOCKS) {
        const BlockLayout* blocks = blocks_of(*format);
        if (!blocks || blocks->bits != format->bits)
            return fail(LOWBIT_UNSUPPORTED, "blocks of type %d with %d-bit codes are not known to the core", format->block_type, format->bits);
        return LOWBIT_OK;
    }
    if (format->kind != LOWBIT_INT && format->kind != LOWBIT_LEVELS)
        return fail(LOWBIT_UNSUPPORTED, "kind %d of number is not known to the core", format->kind);
    if (format->bits < 2 || format->bits > 8)
        return fail(LOWBIT_UNSUPPORTED, "%d bits per code; the core stores 2 to 8", format->bits);
    if (format->group_size < -1)
        return fail(LOWBIT_BAD_ARGUMENT, "group size %d; use a positive size, -1 for rows or 0 for the tensor", format->group_size);
    if (format->scale_type < LOWBIT_SCALE_FP32 || format->scale_type > LOWBIT_SCALE_E4M3)
        return fail(LOWBIT_BAD_ARGUMENT, "scale type %d is not known to the core", format->scale_type);
    if (format->scale_block < 0 || (format->scale_block > 0 && format->scale_type > LOWBIT_SCALE_FP16))
        return fail(LOWBIT_BAD_ARGUMENT, "scales of type %d cannot be quantised again in blocks of %d", format->scale_type, format->scale_block);
    if (format->kind == LOWBIT_INT && (format->symmetric < LOWBIT_ASYMMETRIC || format->symmetric > LOWBIT_FINE_ZEROS))
        return fail(LOWBIT_UNSUPPORTED, "zero points of kind %d are not known to the core", format->symmetric);
    if (has_fine_zeros(*format) && (format->bits > kMostFineBits || format->scale_type > LOWBIT_SCALE_FP16))
        return fail(LOWBIT_UNSUPPORTED, "fine zero points go with 2 to %d bits and scales that are plain numbers, not with %d bits and scales of type %d",
                    kMostFineBits, format->bits, format->scale_type);
    if (format->kind == LOWBIT_LEVELS && (!format->levels || format->level_count != (1 << format->bits)))
        return fail(LOWBIT_BAD_ARGUMENT, "a table of %d levels was given for %d-bit codes", format->level_count, format->bits);
    return LOWBIT_OK;
}

const BlockLayout* blocks_of(const lowbit_format& format) {
    return format.kind == LOWBIT_BLOCKS ? block_layout(format.block_type) : nullptr;
}

int64_t group_length(const lowbit_format& format, int64_t cols) {
    if (const BlockLayout* blocks = blocks_of(format)) return blocks->weights / blocks->groups;
    return format.group_size > 0 ? format.group_size : cols;
}
int64_t group_count(const lowbit_format& format, int64_t cols) { return divide_up(cols, group_length(format, cols)); }
int64_t code_words(const lowbit_format& format, int64_t cols) { return divide_up(cols * format.bits, 32); }
int scale_bytes(int scale_type) { return scale_type == LOWBIT_SCALE_FP32 ? 4 : scale_type <= LOWBIT_SCALE_FP16 ? 2 : 1; }
int dtype_bytes(int dtype) { return dtype == LOWBIT_FP32 ? 4 : 2; }

}  // namespace lowbit
