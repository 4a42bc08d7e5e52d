// prepare and restore at the border of the library.
#include "repack.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <vector>

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

// A weight on its way, and how many of its blocks are not done yet.
struct Weight {
    Header header;
    RepackJob job;
    int64_t first;  // block, counted over all weights
    std::atomic<int64_t> left;
};

using OneBlock = void (*)(const RepackJob&, int64_t, uint8_t*);

// Blocks [begin, end) of one weight; false when memory is short.
bool repack_blocks(const RepackJob& job, int64_t begin, int64_t end, OneBlock one_block) {
    const int64_t room = needs_bytes(*job.header) ? kBlockRows * job.header->plan.positions() + job.header->cols : 0;
    uint8_t* bytes = room ? static_cast<uint8_t*>(malloc(static_cast<size_t>(room))) : nullptr;
    if (room && !bytes) return false;
    for (int64_t block = begin; block < end; ++block) one_block(job, block, bytes);
    free(bytes);
    return true;
}

constexpr int64_t kBlocksAtOnce = 4;

int refuse_memory() { return fail(LOWBIT_NO_MEMORY, "not enough memory to lay out weights"); }

// Pages that lie wholly inside; they are clean copies of a file, which the system reads again if somebody looks.
void give_back(const void* data, int64_t bytes) {
    const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)), begin = reinterpret_cast<uintptr_t>(data);
    const uintptr_t first = (begin + page - 1) / page * page, last = (begin + static_cast<uintptr_t>(bytes)) / page * page;
    if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
}

// Check one weight and write its header.
int begin_weight(const lowbit_prepare_job& asked, Weight* weight) {
    const Shape shape = {asked.rows, asked.cols};
    if (int status = check_format(asked.format, shape)) return status;
    Header& header = weight->header;
    make_header(*asked.format, shape, &header);
    if (reinterpret_cast<uintptr_t>(asked.prepared) % kVector) return fail(LOWBIT_BAD_ARGUMENT, "a prepared weight must lie on a 64-byte boundary");
    if (asked.prepared_bytes != header.total_bytes || !asked.prepared)
        return fail(LOWBIT_BAD_ARGUMENT, "the prepared form of a weight [%lld, %lld] takes %lld bytes, got %lld", static_cast<long long>(asked.rows),
                    static_cast<long long>(asked.cols), static_cast<long long>(header.total_bytes), static_cast<long long>(asked.prepared_bytes));
    if (int status = check_buffers(header, asked.codes, asked.scales, asked.zeros, asked.scale_scales, asked.scale_offset)) return status;
    if (has_unit(header)) header.unit = *asked.scale_scales;
    uint8_t* prepared = static_cast<uint8_t*>(asked.prepared);
    if (header.scales.level == kStepTable) {
        header.scale_offset = *asked.scale_offset;
        memcpy(prepared + header.steps_offset, asked.scale_scales, static_cast<size_t>(header.step_count) * sizeof(float));
    }
    header.seal = seal_of(header);
    memset(prepared, 0, kHeaderBytes);
    memcpy(prepared, &header, sizeof header);
    weight->job = {&header, prepared, const_cast<void*>(asked.codes), const_cast<void*>(asked.scales), const_cast<uint8_t*>(asked.zeros)};
    weight->left = header.blocks;
    return LOWBIT_OK;
}

int prepare_all(const lowbit_prepare_job* jobs, int64_t count) {
    std::vector<Weight> weights(static_cast<size_t>(count));
    int64_t blocks = 0;
    for (int64_t i = 0; i < count; ++i) {
        Weight& weight = weights[static_cast<size_t>(i)];
        if (int status = begin_weight(jobs[i], &weight)) return status;
        weight.first = blocks;
        blocks += weight.header.blocks;
    }
    std::atomic<bool> out_of_memory{false};
    parallel_for(blocks, kBlocksAtOnce, [&](int64_t begin, int64_t end, int) {
        const auto after = std::upper_bound(weights.begin(), weights.end(), begin, [](int64_t block, const Weight& weight) { return block < weight.first; });
        for (size_t i = static_cast<size_t>(after - weights.begin()) - 1; begin < end; ++i) {
            Weight& weight = weights[i];
            const int64_t stop = std::min(end, weight.first + weight.header.blocks);
            if (!repack_blocks(weight.job, begin - weight.first, stop - weight.first, isa().prepare_block)) out_of_memory.store(true);
            if ((weight.left -= stop - begin) == 0) {
                give_back(jobs[i].codes, jobs[i].mapped_codes);
                give_back(jobs[i].scales, jobs[i].mapped_scales);
            }
            begin = stop;
        }
    });
    return out_of_memory.load() ? refuse_memory() : LOWBIT_OK;
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
    const lowbit_prepare_job job = {format, rows, cols, codes, scales, zeros, scale_scales, scale_offset, prepared, prepared_bytes, 0, 0};
    return prepare_all(&job, 1);
} catch (...) {
    return caught();
}

extern "C" int lowbit_prepare_all(const lowbit_prepare_job* jobs, int64_t count) try {
    if (count < 0 || (count > 0 && !jobs)) return fail(LOWBIT_BAD_ARGUMENT, "%lld weights were to be prepared and none was given", static_cast<long long>(count));
    for (int64_t i = 0; i < count; ++i)
        if (jobs[i].mapped_codes < 0 || jobs[i].mapped_scales < 0) return fail(LOWBIT_BAD_ARGUMENT, "a mapped file has no negative bytes");
    return prepare_all(jobs, count);
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
    std::atomic<bool> out_of_memory{false};
    parallel_for(header->blocks, kBlocksAtOnce, [&](int64_t begin, int64_t end, int) {
        if (!repack_blocks(job, begin, end, isa().restore_block)) out_of_memory.store(true);
    });
    return out_of_memory.load() ? refuse_memory() : LOWBIT_OK;
} catch (...) {
    return caught();
}
