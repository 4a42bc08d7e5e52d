// y = x W^T at the border of the library: checks, activations made ready, then blocks or panels spread over the pool.
#include "product.h"

#include <algorithm>
#include <cstdlib>

#include "dispatch.h"
#include "error.h"
#include "threads.h"

namespace lowbit {
namespace {

// Up to here the weights stream past straight from their bit planes; beyond, expanding them once pays (measured, docs/notes/cpu.md).
constexpr int64_t kFewTokens = 16;
constexpr int kWidestTile = 8;
constexpr int64_t kTokensAtOnce = 1024;      // bounds the room for activations whatever the prompt
constexpr int64_t kActivationBytes = 512 << 10;  // of one token block: half of a 1 MiB second-level cache
constexpr int64_t kMostTokenBlock = 252;     // of the 256 of panel_lanes.h, and near a multiple of every tile
constexpr int64_t kPartBytes = 96 << 10;     // weights that a thread takes at a time when decoding

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

int tile_for(int64_t tokens) {
    for (int tile : {1, 2, 4})
        if (tokens <= tile) return tile;
    return kWidestTile;
}

int float_tile_for(int64_t tokens, int panel_tokens) {
    for (int tile : {1, 2, 4})
        if (tokens <= tile) return tile;
    return panel_tokens;
}

ZeroPlan plan_zeros(const Header& header, bool panel) {
    const bool rows = stores_zeros(header), fold = rows && panel && header.bits < 8;
    ZeroPlan plan{};
    plan.wide = header.table || header.bits == 8 || fold;
    plan.per_row = rows && !fold;
    plan.constant = header.table || fold ? 128 : 1 << (header.bits - 1);
    if (plan.wide) plan.constant -= isa().wide_bias;
    if (plan.per_row) plan.constant = 1;
    return plan;
}

int64_t tile_bytes(const Header& header, int tile, bool integer) {
    const Plan& plan = header.plan;
    const auto padded = [](int64_t bytes) { return divide_up(bytes, kVector) * kVector; };
    if (!integer) return padded(plan.positions() * tile * 4);
    return padded(plan.positions() * tile) + 2 * padded(plan.segments * tile * 4);
}

// Tokens that share an expanded panel: as many as keep the activations in the second-level cache.
int64_t token_block_for(const Header& header, int tile, int64_t bytes_per_number) {
    const int64_t fitting = kActivationBytes / (header.plan.positions() * bytes_per_number);
    return std::max<int64_t>(std::clamp<int64_t>(fitting, 48, kMostTokenBlock) / tile, 1) * tile;
}

// One stretch of tokens, at most kTokensAtOnce.
int multiply(ProductJob job, bool integer) {
    Activations& x = job.activations;
    const Header& header = *x.header;
    const Isa& set = isa();
    const bool few = integer && x.tokens <= kFewTokens;
    x.tile = few ? tile_for(x.tokens) : integer ? set.panel_tokens : float_tile_for(x.tokens, set.panel_tokens);
    job.zeros = plan_zeros(header, !few);
    x.zero_constant = job.zeros.constant;
    x.tile_bytes = tile_bytes(header, x.tile, integer);
    const int64_t tiles = divide_up(x.tokens, x.tile);
    x.data = room.get(tiles * x.tile_bytes);
    if (!x.data) return fail(LOWBIT_NO_MEMORY, "not enough memory for the activations of %lld tokens", static_cast<long long>(x.tokens));
    const auto make_ready = integer ? set.quantize_tile : set.widen_tile;
    parallel_for(tiles, 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t tile = begin; tile < end; ++tile) make_ready(x, tile);
    });
    if (few) {
        const int64_t grain = std::max<int64_t>(kPartBytes / header.block_bytes, 1);
        parallel_for(header.blocks, grain, [&](int64_t begin, int64_t end, int) { set.decode_rows(job, begin, end); });
        return LOWBIT_OK;
    }
    job.token_block = token_block_for(header, x.tile, integer ? 1 : 4);
    const int64_t items = divide_up(x.tokens, job.token_block) * divide_up(header.blocks, set.panel_blocks);
    const auto work = integer ? set.panel_items : set.float_items;
    parallel_for(items, 1, [&](int64_t begin, int64_t end, int) { work(job, begin, end); });
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
    const bool integer = compute == LOWBIT_COMPUTE_INT8 && header->kind != LOWBIT_DENSE;
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
        if (int status = multiply(job, integer)) return status;
    }
    return LOWBIT_OK;
}
