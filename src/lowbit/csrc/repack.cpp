// prepare and restore at the border of the library.
#include "repack.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "dispatch.h"
#include "error.h"
#include "threads.h"

namespace lowbit {
namespace {

bool has_unit(const Header& header) {
    return header.kind != LOWBIT_DENSE && header.kind != LOWBIT_BLOCKS && header.scale_type == LOWBIT_SCALE_E4M3;
}

int check_buffers(const Header& header, const void* codes, const void* scales, const void* zeros, const void* scale_scales,
                  const void* scale_offset) {
    const bool scaled = header.kind != LOWBIT_DENSE && header.kind != LOWBIT_BLOCKS, steps = header.scales.level == kStepTable;
    if (!codes || (scaled && !scales) || (stores_zeros(header) && !zeros) || ((steps || has_unit(header)) && !scale_scales) ||
        (steps && !scale_offset))
        return fail(LOWBIT_BAD_ARGUMENT, "a buffer that this format needs was not given");
    return LOWBIT_OK;
}

int repack(const RepackJob& job, void (*one_block)(const RepackJob&, int64_t, uint8_t*)) {
    const int64_t room = needs_bytes(*job.header) ? kBlockRows * job.header->plan.positions() + job.header->cols : 0;
    std::atomic<bool> out_of_memory{false};
    parallel_for(job.header->blocks, 4, [&](int64_t begin, int64_t end, int) {
        uint8_t* bytes = room ? static_cast<uint8_t*>(malloc(static_cast<size_t>(room))) : nullptr;
        if (room && !bytes) {
            out_of_memory.store(true);
            return;
        }
        for (int64_t block = begin; block < end; ++block) one_block(job, block, bytes);
        free(bytes);
    });
    return out_of_memory.load() ? fail(LOWBIT_NO_MEMORY, "not enough memory to lay out rows of %lld weights", static_cast<long long>(job.header->cols)) : LOWBIT_OK;
}

}  // namespace
}  // namespace lowbit

using namespace lowbit;

extern "C" int64_t lowbit_prepared_bytes(const lowbit_format* format, int64_t rows, int64_t cols) {
    if (check_format(format, {rows, cols})) return -1;
    Header header;
    make_header(*format, {rows, cols}, &header);
    return header.total_bytes;
}

extern "C" int lowbit_prepare(const lowbit_format* format, int64_t rows, int64_t cols, const void* codes, const void* scales,
                              const uint8_t* zeros, const float* scale_scales, void* prepared, int64_t prepared_bytes,
                              const float* scale_offset) try {
    if (int status = check_format(format, {rows, cols})) return status;
    Header header;
    make_header(*format, {rows, cols}, &header);
    if (reinterpret_cast<uintptr_t>(prepared) % kVector) return fail(LOWBIT_BAD_ARGUMENT, "a prepared weight must lie on a 64-byte boundary");
    if (prepared_bytes != header.total_bytes || !prepared)
        return fail(LOWBIT_BAD_ARGUMENT, "the prepared form of a weight [%lld, %lld] takes %lld bytes, got %lld", static_cast<long long>(rows),
                    static_cast<long long>(cols), static_cast<long long>(header.total_bytes), static_cast<long long>(prepared_bytes));
    if (int status = check_buffers(header, codes, scales, zeros, scale_scales, scale_offset)) return status;
    if (has_unit(header)) header.unit = *scale_scales;
    if (header.scales.level == kStepTable) {
        header.scale_offset = *scale_offset;
        memcpy(static_cast<uint8_t*>(prepared) + header.steps_offset, scale_scales, static_cast<size_t>(header.step_count) * sizeof(float));
    }
    header.seal = seal_of(header);
    memset(prepared, 0, kHeaderBytes);
    memcpy(prepared, &header, sizeof header);
    const RepackJob job = {&header, static_cast<uint8_t*>(prepared), const_cast<void*>(codes), const_cast<void*>(scales), const_cast<uint8_t*>(zeros)};
    return repack(job, isa().prepare_block);
} catch (...) {
    return caught();
}

extern "C" int lowbit_restore(const void* prepared, int64_t prepared_bytes, void* codes, void* scales, uint8_t* zeros, float* scale_scales,
                              float* scale_offset) try {
    const Header* header = check_prepared(prepared, prepared_bytes);
    if (!header) return LOWBIT_BAD_ARGUMENT;
    if (int status = check_buffers(*header, codes, scales, zeros, scale_scales, scale_offset)) return status;
    if (has_unit(*header)) *scale_scales = header->unit;
    if (header->scales.level == kStepTable) {
        *scale_offset = header->scale_offset;
        memcpy(scale_scales, steps_of(*header), static_cast<size_t>(header->step_count) * sizeof(float));
    }
    const RepackJob job = {header, static_cast<uint8_t*>(const_cast<void*>(prepared)), codes, scales, zeros};
    return repack(job, isa().restore_block);
} catch (...) {
    return caught();
}
