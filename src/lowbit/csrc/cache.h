// Keys and values of every layer, slot and key head.
//
//   keys    [layer][slot][head][context / 16][head_dim][16]    values  [layer][slot][head][context][padded head_dim]
//   int8 has a scale beside each key and value: [layer][slot][head][context], and lies in fours (attention_bytes.h):
//   keys    [layer][slot][head][context / 16][padded head_dim / 4][16][4]    values  [layer][slot][head][context / 4][padded head_dim][4]
//
// The memory is mapped and not touched: the system hands out pages as a sequence grows.
#pragma once
#include <cstddef>
#include <cstdint>

#include "engine_api.h"

namespace lowbit {

// Zeroed pages, given out when first touched.
class Pages {
public:
    Pages() = default;
    Pages(const Pages&) = delete;
    Pages& operator=(const Pages&) = delete;
    ~Pages();
    bool map(int64_t bytes);
    template <class T>
    T* as() const {
        return static_cast<T*>(data_);
    }

private:
    void* data_ = nullptr;
    size_t bytes_ = 0;
};

struct HeadCache {
    void *keys, *values;
    float *key_scales, *value_scales;  // NULL but for int8
};

class Cache {
public:
    // LOWBIT_OK, or an error with its sentence when it would not fit the memory at hand.
    int make(const lowbit_model& model, const lowbit_engine_options& options);
    HeadCache head(int64_t layer, int64_t slot, int64_t head) const;
    int type() const { return type_; }
    int padded() const { return padded_; }

private:
    int type_ = 0, padded_ = 0, key_width_ = 0;
    int64_t context_ = 0, slots_ = 0, heads_ = 0, width_ = 0;
    Pages keys_, values_, scales_;
};

int64_t cache_bytes(const lowbit_model& model, const lowbit_engine_options& options);

}  // namespace lowbit
