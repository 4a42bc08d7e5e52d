// Keys and values of every layer, slot and key head.
//
//   keys    [layer][slot][head][places / 16][head_dim][16]    values  [layer][slot][head][places][padded head_dim]
//   int8 has a scale beside each key and value: [layer][slot][head][places], and lies in fours (attention_bytes.h):
//   keys    [layer][slot][head][places / 16][padded head_dim / 4][16][4]    values  [layer][slot][head][places / 4][padded head_dim][4]
//
// A layer that sees everything has a place for every position. One with a sliding window keeps the window, what a step adds to it and
// a little more: where the places run out, the window moves to the front, and position p then lies at place p - offset. Pointers are
// handed out moved back by the offset, so that who reads a cache counts in positions and never sees it. With a window of 4096 and
// chunks of 512 a token pays for moving 8 tokens and is spared nothing else.
//
// The memory is mapped and not touched: the system hands out pages as a sequence grows.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

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
    // By position: keys + p * head_dim numbers is where position p lies (p a multiple of 16), and so on.
    HeadCache head(int64_t layer, int64_t slot, int64_t head) const;
    int type() const { return type_; }
    int padded() const { return padded_; }

    // Make places for `count` tokens after the first `length` of a slot.
    void make_room(int64_t slot, int64_t length, int64_t count);
    // The fewest tokens (but for none) that a slot can be cut to: fewer, and a window would miss keys that were let go.
    int64_t shortest(int64_t slot) const;
    void clear(int64_t slot);
    // Positions [begin, end) of one slot into another, whose first `begin` tokens are the same already.
    void copy(int64_t from, int64_t to, int64_t begin, int64_t end);
    // The first `length` tokens of a slot as bytes, layer by layer: a Head, then per head keys, values, scales.
    int64_t saved_bytes(int64_t slot, int64_t length) const;
    void save(int64_t slot, int64_t length, uint8_t* to) const;
    int restore(int64_t slot, int64_t length, const uint8_t* from, int64_t bytes);

private:
    struct Layer {
        int64_t window, places, first_row;  // first_row: rows of all layers before, in places of one head
    };
    struct Kept {
        int64_t offset = 0, begin = 0;  // the position at place 0, and the first one that is there
    };
    struct Head {
        int64_t first, length;  // positions [first, length) follow
    };
    struct Stretch {
        int64_t first, bytes;  // what `save` writes of a layer
    };
    HeadCache at(int64_t layer, int64_t slot, int64_t head, int64_t place) const;
    Kept& kept(int64_t layer, int64_t slot) { return kept_[static_cast<size_t>(layer * slots_ + slot)]; }
    const Kept& kept(int64_t layer, int64_t slot) const { return kept_[static_cast<size_t>(layer * slots_ + slot)]; }
    // Copy places [begin, end); keys move in whole blocks.
    void copy_places(const HeadCache& from, const HeadCache& to, int64_t count) const;
    int64_t stretch_bytes(int64_t count) const;
    Stretch stretch(int64_t layer, int64_t slot, int64_t length) const;
    void copy_bytes(const HeadCache& head, int64_t count, uint8_t* to, const uint8_t* from) const;

    int type_ = 0, padded_ = 0, key_width_ = 0;
    int64_t slots_ = 0, heads_ = 0, width_ = 0;
    std::vector<Layer> layers_;
    std::vector<Kept> kept_;
    Pages keys_, values_, scales_;
};

int64_t cache_bytes(const lowbit_model& model, const lowbit_engine_options& options);

}  // namespace lowbit
