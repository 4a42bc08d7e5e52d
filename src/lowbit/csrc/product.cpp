// y = x W^T at the border of the library: checks, activations made ready, then blocks or panels spread over the pool.
#include "product_plan.h"

#include <algorithm>
#include <cstdlib>

#include "error.h"
#include "threads.h"

namespace lowbit {
namespace {

constexpr int64_t kTokensAtOnce = 1024;    // bounds the room for activations whatever the prompt
constexpr int64_t kPartBytes = 96 << 10;  // weights that a thread takes at a time when decoding

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

thread_local Room room;

// One stretch of tokens, at most kTokensAtOnce: `job` says where they come from and go to.
int multiply(const ProductJob& given, int compute) {
    const Header& header = *given.activations.header;
    Form form = plan_form(header, given.activations.tokens, compute);
    Activations& x = form.activations;
    x.x = given.activations.x;
    x.dtype = given.activations.dtype;
    x.stride = given.activations.stride;
    x.data = room.get(form.bytes());
    if (!x.data) return fail(LOWBIT_NO_MEMORY, "not enough memory for the activations of %lld tokens", static_cast<long long>(x.tokens));
    parallel_for(form.tiles(), 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t tile = begin; tile < end; ++tile) form.make_ready(tile);
    });
    ProductJob job = form.job(header);
    job.bias = given.bias;
    job.y = given.y;
    job.y_dtype = given.y_dtype;
    job.y_stride = given.y_stride;
    const int64_t grain = form.few ? std::max<int64_t>(kPartBytes / header.block_bytes, 1) : 1;
    parallel_for(form.items(header), grain, [&](int64_t begin, int64_t end, int) { form.run(job, begin, end); });
    return LOWBIT_OK;
}

}  // namespace
}  // namespace lowbit

using namespace lowbit;

extern "C" int lowbit_run(const void* prepared, int64_t prepared_bytes, const void* x, int x_dtype, int64_t tokens, int64_t x_stride,
                          const float* bias, void* y, int y_dtype, int64_t y_stride, int compute) {
    const Header* header = check_prepared(prepared, prepared_bytes);
    if (!header) return LOWBIT_BAD_ARGUMENT;
    if (int status = check_dtype(x_dtype)) return status;
    if (int status = check_dtype(y_dtype)) return status;
    if (tokens < 0 || tokens > kMostElements / std::max(header->rows, header->cols) || (tokens > 1 && (x_stride < header->cols || y_stride < header->rows)))
        return fail(LOWBIT_BAD_ARGUMENT, "%lld rows of x with stride %lld and of y with stride %lld do not fit a weight [%lld, %lld]",
                    static_cast<long long>(tokens), static_cast<long long>(x_stride), static_cast<long long>(y_stride),
                    static_cast<long long>(header->rows), static_cast<long long>(header->cols));
    if (compute != LOWBIT_COMPUTE_INT8 && compute != LOWBIT_COMPUTE_FP32)
        return fail(LOWBIT_UNSUPPORTED, "compute %d is not known to the core; use 0 (int8) or 1 (fp32)", compute);
    if (tokens > 0 && (!x || !y)) return fail(LOWBIT_BAD_ARGUMENT, "a buffer was not given");
    for (int64_t first = 0; first < tokens; first += kTokensAtOnce) {
        ProductJob job{};
        job.activations.header = header;
        job.activations.x = static_cast<const char*>(x) + first * x_stride * dtype_bytes(x_dtype);
        job.activations.dtype = x_dtype;
        job.activations.stride = x_stride;
        job.activations.tokens = std::min(tokens - first, kTokensAtOnce);
        job.bias = bias;
        job.y = static_cast<char*>(y) + first * y_stride * dtype_bytes(y_dtype);
        job.y_dtype = y_dtype;
        job.y_stride = y_stride;
        if (int status = multiply(job, compute)) return status;
    }
    return LOWBIT_OK;
}
