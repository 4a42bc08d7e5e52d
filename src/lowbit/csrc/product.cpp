// y = x W^T at the border of the library: checks, activations made ready, then blocks or panels spread over the pool.
#include "product_plan.h"

#include <algorithm>
#include <cstdlib>

#include "error.h"
#include "threads.h"

namespace lowbit {
namespace {

constexpr int64_t kTokensAtOnce = 1024;    // bounds the room for activations whatever the prompt
constexpr int64_t kPartBytes = 16 << 10;  // weights that a thread takes at a time when decoding, out of its own stretch of them
constexpr int64_t kAloneBytes = 96 << 10;  // of weights that one thread reads before another would be awake

// Room that lives as long as its thread, so that a token costs no allocation.
class Room {
public:
    ~Room() { free(data_); }
    uint8_t* get(int64_t bytes) {
        if (bytes > size_) {
            free(data_);
            size_ = divide_up(bytes, 4096) * 4096;
            data_ = static_cast<uint8_t*>(aligned_alloc(64, static_cast<size_t>(size_)));
            if (!data_) size_ = 0;
        }
        return data_;
    }

private:
    uint8_t* data_ = nullptr;
    int64_t size_ = 0;
};

thread_local Room room, parts_room;

// Rows of x for one weight, within a call that may have many.
struct Part {
    const Header* header;
    int64_t first, tokens;  // rows of x and of y
    Form form;
    ProductJob job;
    int64_t first_stretch, first_tile, first_item;
};

// What all parts of a call share.
struct Call {
    const char* x;
    int x_dtype;
    int64_t x_stride;
    const float* bias;
    char* y;
    int y_dtype;
    int64_t y_stride;
    int compute;
};

// The part that an item or a tile belongs to.
template <class First>
int64_t part_at(const Part* parts, int64_t count, int64_t index, First first) {
    return std::partition_point(parts, parts + count, [&](const Part& part) { return first(part) <= index; }) - parts - 1;
}

// Products with several weights as jobs of the pool: all activations are made ready, then all items are shared out.
int multiply(const Call& call, Part* parts, int64_t count) {
    int64_t stretches = 0, tiles = 0, items = 0, bytes = 0, grain = 1, read = 0;
    for (int64_t i = 0; i < count; ++i) {
        Part& part = parts[i];
        part.form = plan_form(*part.header, part.tokens, call.compute);
        part.first_stretch = stretches;
        part.first_tile = tiles;
        part.first_item = items;
        part.form.activations.x = call.x + part.first * call.x_stride * dtype_bytes(call.x_dtype);
        part.form.activations.dtype = call.x_dtype;
        part.form.activations.stride = call.x_stride;
        stretches += part.form.stretches();
        tiles += part.form.tiles();
        items += part.form.items(*part.header);
        bytes += part.form.bytes();
        if (!part.form.few) continue;
        grain = std::max<int64_t>(kPartBytes / part.header->block_bytes, 1);
        read += part.header->total_bytes;
    }
    uint8_t* data = room.get(bytes);
    if (!data) return fail(LOWBIT_NO_MEMORY, "not enough memory for the activations of %lld products", static_cast<long long>(count));
    for (int64_t i = 0; i < count; ++i) {
        Part& part = parts[i];
        part.form.activations.data = data;
        data += part.form.bytes();
        part.job = part.form.job(*part.header);
        part.job.bias = call.bias;
        part.job.y = call.y + part.first * call.y_stride * dtype_bytes(call.y_dtype);
        part.job.y_dtype = call.y_dtype;
        part.job.y_stride = call.y_stride;
    }
    if (stretches > 0)
        parallel_for(stretches, 1, [&](int64_t begin, int64_t end, int) {
            for (int64_t stretch = begin; stretch < end; ++stretch) {
                const Part& part = parts[part_at(parts, count, stretch, [](const Part& p) { return p.first_stretch; })];
                part.form.balance(stretch - part.first_stretch);
            }
        });
    parallel_for(tiles, 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t tile = begin; tile < end; ++tile) {
            const Part& part = parts[part_at(parts, count, tile, [](const Part& p) { return p.first_tile; })];
            part.form.make_ready(tile - part.first_tile);
        }
    });
    parallel_for(items, grain, [&](int64_t begin, int64_t end, int) {
        for (int64_t i = part_at(parts, count, begin, [](const Part& p) { return p.first_item; }); begin < end; ++i) {
            const Part& part = parts[i];
            const int64_t stop = i + 1 < count ? std::min(end, parts[i + 1].first_item) : end;
            part.form.run(part.job, begin - part.first_item, stop - part.first_item);
            begin = stop;
        }
    }, read > 0 && read <= kAloneBytes ? 1 : thread_count(), read > 0 ? Sharing::kStretches : Sharing::kInTurn);
    return LOWBIT_OK;
}
}  // namespace
}  // namespace lowbit

using namespace lowbit;

namespace {

int check_call(const Header& header, const Call& call, int64_t tokens) {
    if (int status = check_dtype(call.x_dtype)) return status;
    if (int status = check_dtype(call.y_dtype)) return status;
    if (tokens < 0 || tokens > kMostElements / std::max(header.rows, header.cols) ||
        (tokens > 1 && (call.x_stride < header.cols || call.y_stride < header.rows || std::max(call.x_stride, call.y_stride) > kMostElements / tokens)))
        return fail(LOWBIT_BAD_ARGUMENT, "%lld rows of x with stride %lld and of y with stride %lld do not fit a weight [%lld, %lld]",
                    static_cast<long long>(tokens), static_cast<long long>(call.x_stride), static_cast<long long>(call.y_stride),
                    static_cast<long long>(header.rows), static_cast<long long>(header.cols));
    if (int status = check_compute(call.compute)) return status;
    if (tokens > 0 && (!call.x || !call.y)) return fail(LOWBIT_BAD_ARGUMENT, "a buffer was not given");
    return LOWBIT_OK;
}

}  // namespace

extern "C" int lowbit_run(const void* prepared, int64_t prepared_bytes, const void* x, int x_dtype, int64_t tokens, int64_t x_stride,
                          const float* bias, void* y, int y_dtype, int64_t y_stride, int compute) try {
    const Header* header = check_prepared(prepared, prepared_bytes);
    if (!header) return LOWBIT_BAD_ARGUMENT;
    const Call call = {static_cast<const char*>(x), x_dtype, x_stride, bias, static_cast<char*>(y), y_dtype, y_stride, compute};
    if (int status = check_call(*header, call, tokens)) return status;
    for (int64_t first = 0; first < tokens; first += kTokensAtOnce) {
        Part part{};
        part.header = header;
        part.first = first;
        part.tokens = std::min(tokens - first, kTokensAtOnce);
        if (int status = multiply(call, &part, 1)) return status;
    }
    return LOWBIT_OK;
} catch (...) {
    return caught();
}

extern "C" int lowbit_run_experts(const void* prepared, int64_t expert_bytes, int64_t experts, const int64_t* begins, const void* x,
                                  int x_dtype, int64_t rows, int64_t x_stride, void* y, int y_dtype, int64_t y_stride, int compute) try {
    const Header* header = check_prepared(prepared, expert_bytes);
    if (!header) return LOWBIT_BAD_ARGUMENT;
    const Call call = {static_cast<const char*>(x), x_dtype, x_stride, nullptr, static_cast<char*>(y), y_dtype, y_stride, compute};
    if (int status = check_call(*header, call, rows)) return status;
    if (experts < 1 || experts > kMostElements / expert_bytes || !begins)
        return fail(LOWBIT_BAD_ARGUMENT, "%lld experts of %lld bytes, or experts without their rows, cannot be multiplied", static_cast<long long>(experts),
                    static_cast<long long>(expert_bytes));
    for (int64_t e = 0; e < experts; ++e)
        if (begins[e] < 0 || begins[e + 1] < begins[e] || begins[e + 1] > rows)
            return fail(LOWBIT_BAD_ARGUMENT, "expert %lld has the rows %lld to %lld of %lld", static_cast<long long>(e),
                        static_cast<long long>(begins[e]), static_cast<long long>(begins[e + 1]), static_cast<long long>(rows));
    // A stretch of rows meets every expert at most once.
    Part* parts = reinterpret_cast<Part*>(parts_room.get(std::min(experts, kTokensAtOnce) * static_cast<int64_t>(sizeof(Part))));
    if (!parts) return fail(LOWBIT_NO_MEMORY, "not enough memory for %lld experts", static_cast<long long>(experts));
    for (int64_t first = begins[0]; first < begins[experts]; first += kTokensAtOnce) {
        const int64_t end = std::min(first + kTokensAtOnce, begins[experts]);
        int64_t count = 0;
        for (int64_t e = 0; e < experts; ++e) {
            const int64_t from = std::max(begins[e], first), to = std::min(begins[e + 1], end);
            if (from >= to) continue;
            Part& part = parts[count++] = Part{};
            part.header = check_prepared(static_cast<const uint8_t*>(prepared) + e * expert_bytes, expert_bytes);
            if (!part.header) return LOWBIT_BAD_ARGUMENT;
            if (part.header->rows != header->rows || part.header->cols != header->cols)
                return fail(LOWBIT_BAD_ARGUMENT, "expert %lld is [%lld, %lld] and the first [%lld, %lld]", static_cast<long long>(e),
                            static_cast<long long>(part.header->rows), static_cast<long long>(part.header->cols), static_cast<long long>(header->rows),
                            static_cast<long long>(header->cols));
            part.first = from;
            part.tokens = to - from;
        }
        if (int status = multiply(call, parts, count)) return status;
    }
    return LOWBIT_OK;
} catch (...) {
    return caught();
}
