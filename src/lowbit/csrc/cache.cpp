#include "cache.h"

#include <sys/mman.h>

#include <cstdio>

#include "engine_isa.h"
#include "error.h"
#include "format.h"

namespace lowbit {
namespace {

int number_bytes(int type) { return type == LOWBIT_CACHE_FP32 ? 4 : type == LOWBIT_CACHE_FP16 ? 2 : 1; }
int padded_width(int head_dim) { return static_cast<int>(divide_up(head_dim, 16) * 16); }
// Bytes of a key go through the processor by fours of channels, so they are padded.
int key_width(int head_dim, int type) { return type == LOWBIT_CACHE_INT8 ? padded_width(head_dim) : head_dim; }
int64_t padded_context(int64_t context) { return divide_up(context, kKeyTile) * kKeyTile; }

int64_t bytes_per_token(const lowbit_model& model, const lowbit_engine_options& options) {
    const int64_t heads = static_cast<int64_t>(model.layer_count) * model.kv_heads;
    const int64_t scales = options.cache_type == LOWBIT_CACHE_INT8 ? 2 * 4 : 0;
    return heads * ((key_width(model.head_dim, options.cache_type) + padded_width(model.head_dim)) * number_bytes(options.cache_type) + scales);
}

// Memory that the system can give without swapping, or -1 where it does not say.
int64_t available_bytes() {
    FILE* file = fopen("/proc/meminfo", "r");
    if (!file) return -1;
    char line[256];
    long long kilobytes = -1;
    while (kilobytes < 0 && fgets(line, sizeof line, file)) {
        long long value = 0;
        if (sscanf(line, "MemAvailable: %lld", &value) == 1) kilobytes = value;
    }
    fclose(file);
    return kilobytes < 0 ? -1 : kilobytes * 1024;
}

}  // namespace

Pages::~Pages() {
    if (data_) munmap(data_, bytes_);
}

bool Pages::map(int64_t bytes) {
    bytes_ = static_cast<size_t>(bytes);
    void* data = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data == MAP_FAILED) return false;
    data_ = data;
    return true;
}

int64_t cache_bytes(const lowbit_model& model, const lowbit_engine_options& options) {
    return bytes_per_token(model, options) * padded_context(options.context) * options.slots;
}

int Cache::make(const lowbit_model& model, const lowbit_engine_options& options) {
    const int64_t bytes = cache_bytes(model, options), available = available_bytes();
    if (available >= 0 && bytes > available)
        return fail(LOWBIT_NO_MEMORY, "a cache of %lld tokens in %d slots takes %lld MB and %lld MB are free; a context of %lld would fit",
                    static_cast<long long>(options.context), options.slots, static_cast<long long>(bytes >> 20),
                    static_cast<long long>(available >> 20),
                    static_cast<long long>(available / (bytes_per_token(model, options) * options.slots) / kKeyTile * kKeyTile));
    type_ = options.cache_type;
    key_width_ = key_width(model.head_dim, type_);
    padded_ = padded_width(model.head_dim);
    context_ = padded_context(options.context);
    slots_ = options.slots;
    heads_ = model.kv_heads;
    width_ = number_bytes(type_);
    const int64_t rows = static_cast<int64_t>(model.layer_count) * slots_ * heads_ * context_;
    const bool scaled = type_ == LOWBIT_CACHE_INT8;
    if (!keys_.map(rows * key_width_ * width_) || !values_.map(rows * padded_ * width_) || (scaled && !scales_.map(rows * 2 * 4)))
        return fail(LOWBIT_NO_MEMORY, "the system gives no memory for a cache of %lld MB", static_cast<long long>(bytes >> 20));
    return LOWBIT_OK;
}

HeadCache Cache::head(int64_t layer, int64_t slot, int64_t head) const {
    const int64_t row = ((layer * slots_ + slot) * heads_ + head) * context_;
    HeadCache out{};
    out.keys = keys_.as<uint8_t>() + row * key_width_ * width_;
    out.values = values_.as<uint8_t>() + row * padded_ * width_;
    if (type_ == LOWBIT_CACHE_INT8) {
        out.key_scales = scales_.as<float>() + 2 * row;
        out.value_scales = out.key_scales + context_;
    }
    return out;
}

}  // namespace lowbit
