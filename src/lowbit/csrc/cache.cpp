#include "cache.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "engine_isa.h"
#include "error.h"
#include "format.h"
#include "machine_limits.h"
#include "threads.h"

namespace lowbit {
namespace {

// Tokens before a window that are kept when it moves: so many can be taken back (wrong guesses, a cancelled chunk of a few tokens).
constexpr int64_t kSlack = 64;
// Places beyond the window at least, so that it does not move at every token of an engine with small chunks.
constexpr int64_t kLeastSteps = 256;

int number_bytes(int type) { return type == LOWBIT_CACHE_FP32 ? 4 : type == LOWBIT_CACHE_FP16 ? 2 : 1; }
int padded_width(int head_dim) { return static_cast<int>(divide_up(head_dim, 16) * 16); }
// Bytes of a key go through the processor by fours of channels, so they are padded.
int key_width(int head_dim, int type) { return type == LOWBIT_CACHE_INT8 ? padded_width(head_dim) : head_dim; }
int64_t whole_blocks(int64_t count) { return divide_up(count, kKeyBlock) * kKeyBlock; }
int64_t whole_tiles(int64_t count) { return divide_up(count, kKeyTile) * kKeyTile; }

// The first position that is kept of `length` tokens in a layer.
int64_t first_kept(int64_t window, int64_t length) {
    return window ? std::max<int64_t>(length - (window - 1) - kSlack, 0) / kKeyBlock * kKeyBlock : 0;
}

int64_t places_of(const lowbit_layer& layer, const lowbit_engine_options& options, int64_t context) {
    const int64_t whole = whole_tiles(context);
    if (!layer.window) return whole;
    return std::min(whole, whole_tiles(layer.window + kSlack + kKeyBlock + std::max<int64_t>(options.chunk, kLeastSteps)));
}

int64_t bytes_for(const lowbit_model& model, const lowbit_engine_options& options, int64_t context) {
    int64_t places = 0;
    for (int32_t i = 0; i < model.layer_count; ++i) places += places_of(model.layers[i], options, context);
    const int64_t scales = options.cache_type == LOWBIT_CACHE_INT8 ? 2 * 4 : 0;
    const int64_t row = int64_t{key_width(model.head_dim, options.cache_type) + padded_width(model.head_dim)} * number_bytes(options.cache_type) + scales;
    return places * options.slots * model.kv_heads * row;
}

// The longest context whose cache has at most `bytes`.
int64_t fitting_context(const lowbit_model& model, const lowbit_engine_options& options, int64_t bytes) {
    int64_t fits = 0, fails = divide_up(options.context, kKeyTile);
    while (fails - fits > 1) {
        const int64_t middle = (fits + fails) / 2;
        (bytes_for(model, options, middle * kKeyTile) <= bytes ? fits : fails) = middle;
    }
    return fits * kKeyTile;
}

int refuse_size(const lowbit_model& model, const lowbit_engine_options& options, int64_t bytes, int64_t available) {
    const int64_t context = fitting_context(model, options, available);
    const long long asked = static_cast<long long>(options.context), takes = static_cast<long long>(bytes >> 20), free = static_cast<long long>(available >> 20);
    if (context == 0) return fail(LOWBIT_NO_MEMORY, "a cache of %lld tokens in %d slots takes %lld MB and %lld MB are free; ask for fewer slots", asked, options.slots, takes, free);
    return fail(LOWBIT_NO_MEMORY, "a cache of %lld tokens in %d slots takes %lld MB and %lld MB are free; a context of %lld would fit", asked,
                options.slots, takes, free, static_cast<long long>(context));
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

int64_t cache_bytes(const lowbit_model& model, const lowbit_engine_options& options) { return bytes_for(model, options, options.context); }

int Cache::make(const lowbit_model& model, const lowbit_engine_options& options) {
    const int64_t bytes = cache_bytes(model, options), available = available_bytes();
    if (available >= 0 && bytes > available) return refuse_size(model, options, bytes, available);
    type_ = options.cache_type;
    key_width_ = key_width(model.head_dim, type_);
    padded_ = padded_width(model.head_dim);
    slots_ = options.slots;
    heads_ = model.kv_heads;
    width_ = number_bytes(type_);
    int64_t rows = 0;
    for (int32_t i = 0; i < model.layer_count; ++i) {
        layers_.push_back({model.layers[i].window, places_of(model.layers[i], options, options.context), rows});
        rows += layers_.back().places * slots_ * heads_;
    }
    kept_.resize(layers_.size() * static_cast<size_t>(slots_));
    const bool scaled = type_ == LOWBIT_CACHE_INT8;
    if (!keys_.map(rows * key_width_ * width_) || !values_.map(rows * padded_ * width_) || (scaled && !scales_.map(rows * 2 * 4)))
        return fail(LOWBIT_NO_MEMORY, "the system gives no memory for a cache of %lld MB", static_cast<long long>(bytes >> 20));
    return LOWBIT_OK;
}

HeadCache Cache::at(int64_t layer, int64_t slot, int64_t head, int64_t place) const {
    const Layer& rows = layers_[static_cast<size_t>(layer)];
    const int64_t row = rows.first_row + (slot * heads_ + head) * rows.places;
    HeadCache out{};
    // As integers, because a pointer may not stand before its array, even where nobody follows it.
    const auto address = [](void* base, int64_t bytes) { return reinterpret_cast<void*>(reinterpret_cast<intptr_t>(base) + bytes); };
    out.keys = address(keys_.as<void>(), (row + place) * key_width_ * width_);
    out.values = address(values_.as<void>(), (row + place) * padded_ * width_);
    if (type_ == LOWBIT_CACHE_INT8) {
        out.key_scales = static_cast<float*>(address(scales_.as<void>(), (2 * row + place) * 4));
        out.value_scales = static_cast<float*>(address(scales_.as<void>(), (2 * row + rows.places + place) * 4));
    }
    return out;
}

HeadCache Cache::head(int64_t layer, int64_t slot, int64_t head) const { return at(layer, slot, head, -kept(layer, slot).offset); }

// --- what is kept ---

void Cache::make_room(int64_t slot, int64_t length, int64_t count) {
    for (int64_t layer = 0; layer < static_cast<int64_t>(layers_.size()); ++layer) {
        const Layer& rows = layers_[static_cast<size_t>(layer)];
        Kept& now = kept(layer, slot);
        if (length + count - now.offset <= rows.places) continue;
        const int64_t first = std::max(first_kept(rows.window, length), now.offset), shift = first - now.offset;
        parallel_for(heads_, 1, [&](int64_t begin, int64_t end, int) {
            for (int64_t head = begin; head < end; ++head) copy_places(at(layer, slot, head, shift), at(layer, slot, head, 0), length - first);
        });
        now = {first, std::max(first, now.begin)};
    }
}

int64_t Cache::shortest(int64_t slot) const {
    int64_t most = 0;
    for (size_t layer = 0; layer < layers_.size(); ++layer) {
        const int64_t begin = kept(static_cast<int64_t>(layer), slot).begin;
        if (begin > 0) most = std::max(most, begin + layers_[layer].window - 1);
    }
    return most;
}

void Cache::clear(int64_t slot) {
    for (size_t layer = 0; layer < layers_.size(); ++layer) kept(static_cast<int64_t>(layer), slot) = {};
}

void Cache::copy_places(const HeadCache& from, const HeadCache& to, int64_t count) const {
    memmove(to.keys, from.keys, static_cast<size_t>(whole_blocks(count) * key_width_ * width_));
    memmove(to.values, from.values, static_cast<size_t>(whole_blocks(count) * padded_ * width_));
    if (!to.key_scales) return;
    memmove(to.key_scales, from.key_scales, static_cast<size_t>(count) * sizeof(float));
    memmove(to.value_scales, from.value_scales, static_cast<size_t>(count) * sizeof(float));
}

void Cache::copy(int64_t from, int64_t to, int64_t begin, int64_t end) {
    const int64_t layers = static_cast<int64_t>(layers_.size());
    std::vector<int64_t> places(layers_.size());
    for (int64_t layer = 0; layer < layers; ++layer) {
        const Kept& source = kept(layer, from);
        Kept& target = kept(layer, to);
        const bool alike = source.offset == target.offset && target.begin <= source.begin && source.begin <= begin;
        places[static_cast<size_t>(layer)] = alike ? (begin - source.offset) / kKeyBlock * kKeyBlock : source.begin - source.offset;
        target = source;
    }
    parallel_for(layers * heads_, 1, [&](int64_t first, int64_t last, int) {
        for (int64_t item = first; item < last; ++item) {
            const int64_t layer = item / heads_, head = item % heads_, place = places[static_cast<size_t>(layer)];
            copy_places(at(layer, from, head, place), at(layer, to, head, place), end - kept(layer, from).offset - place);
        }
    });
}

// --- as bytes ---

int64_t Cache::stretch_bytes(int64_t count) const {
    const int64_t scales = type_ == LOWBIT_CACHE_INT8 ? 2 * 4 * count : 0;
    return heads_ * (whole_blocks(count) * (key_width_ + padded_) * width_ + scales);
}

Cache::Stretch Cache::stretch(int64_t layer, int64_t slot, int64_t length) const {
    const int64_t first = std::max(first_kept(layers_[static_cast<size_t>(layer)].window, length), kept(layer, slot).begin);
    return {first, static_cast<int64_t>(sizeof(Head)) + stretch_bytes(length - first)};
}

int64_t Cache::saved_bytes(int64_t slot, int64_t length) const {
    int64_t bytes = 0;
    for (size_t layer = 0; layer < layers_.size(); ++layer) bytes += stretch(static_cast<int64_t>(layer), slot, length).bytes;
    return bytes;
}

// One head of a layer out to bytes, or in from them, whichever is given.
void Cache::copy_bytes(const HeadCache& head, int64_t count, uint8_t* to, const uint8_t* from) const {
    struct Part {
        void* data;
        int64_t bytes;
    };
    const int64_t scales = head.key_scales ? count * 4 : 0;
    const Part parts[] = {{head.keys, whole_blocks(count) * key_width_ * width_},
                          {head.values, whole_blocks(count) * padded_ * width_},
                          {head.key_scales, scales},
                          {head.value_scales, scales}};
    int64_t at = 0;
    for (const Part& part : parts) {
        if (part.bytes && to) memcpy(to + at, part.data, static_cast<size_t>(part.bytes));
        if (part.bytes && from) memcpy(part.data, from + at, static_cast<size_t>(part.bytes));
        at += part.bytes;
    }
}

void Cache::save(int64_t slot, int64_t length, uint8_t* to) const {
    for (int64_t layer = 0; layer < static_cast<int64_t>(layers_.size()); ++layer) {
        const Stretch out = stretch(layer, slot, length);
        const Head head{out.first, length};
        memcpy(to, &head, sizeof head);
        const int64_t count = length - out.first, bytes = stretch_bytes(count) / heads_;
        for (int64_t h = 0; h < heads_; ++h)
            copy_bytes(at(layer, slot, h, out.first - kept(layer, slot).offset), count, to + sizeof head + h * bytes, nullptr);
        to += out.bytes;
    }
}

int Cache::restore(int64_t slot, int64_t length, const uint8_t* from, int64_t bytes) {
    const auto refuse = [] { return fail(LOWBIT_BAD_ARGUMENT, "the saved cache is damaged, or that of another model: its parts have other sizes"); };
    clear(slot);
    for (int64_t layer = 0; layer < static_cast<int64_t>(layers_.size()); ++layer) {
        const Layer& rows = layers_[static_cast<size_t>(layer)];
        Head head;
        if (bytes < static_cast<int64_t>(sizeof head)) return refuse();
        memcpy(&head, from, sizeof head);
        const int64_t first = head.first;
        const bool sensible = first == 0 || (rows.window && first > 0 && first % kKeyBlock == 0 && first <= length - rows.window + 1);
        if (!sensible || head.length != length || length - first > rows.places) return refuse();
        const int64_t count = length - first;
        from += sizeof head;
        bytes -= static_cast<int64_t>(sizeof head) + stretch_bytes(count);
        if (bytes < 0) return refuse();
        kept(layer, slot) = {first, first};
        const int64_t size = stretch_bytes(count) / heads_;
        for (int64_t h = 0; h < heads_; ++h, from += size) copy_bytes(at(layer, slot, h, 0), count, nullptr, from);
    }
    return bytes == 0 ? LOWBIT_OK : refuse();
}

}  // namespace lowbit
