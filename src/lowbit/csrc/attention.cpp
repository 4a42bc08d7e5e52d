// Attention of a step: heads normed and rotated, keys and values stored, queries over the cache, partial results merged.
//
// When every sequence has one token, an item is (token, key head, split of its keys): it rotates its own queries, the last split stores
// the newest key and value, and the consumer merges the splits, so that there is one barrier. With more tokens keys and values are stored
// first, because a query needs keys that another thread would be storing; an item, which rotates its own queries, is then (tile of
// tokens, key head).
#include <cmath>
#include <cstring>

#include "step.h"

namespace lowbit {

// The row of all query or key heads of a token where a norm spans them; NULL where heads are read one by one.
const float* Step::source_of_heads(Member& me, int64_t layer, int64_t token, bool keys) {
    if (model_.qk_norm != LOWBIT_WIDTH_NORM) return nullptr;
    const std::vector<int64_t>& places = keys ? plans_.k_places : plans_.q_places;
    const int64_t size = model_.head_dim;
    const float* qkv = work_.qkv.get() + token * plans_.qkv_size;
    float* row = me.room.row.get();
    for (size_t h = 0; h < places.size(); ++h)
        for (int64_t i = 0; i < size; ++i) {
            const float value = qkv[places[h] + i];
            row[static_cast<int64_t>(h) * size + i] = model_.clip > 0.0f ? std::clamp(value, -model_.clip, model_.clip) : value;
        }
    norm(plans_.layers[static_cast<size_t>(layer)].vectors[keys ? LOWBIT_K_NORM : LOWBIT_Q_NORM], row, static_cast<int64_t>(places.size()) * size, row);
    return row;
}

namespace {
inline void turn_pair(float& a, float& b, float cosine, float sine) {
    const float first = a;
    a = first * cosine - b * sine;
    b = b * cosine + first * sine;
}
}  // namespace

void Step::rotate(int64_t layer, int64_t token, float* head) const {
    const int32_t index = plans_.layers[static_cast<size_t>(layer)].rope;
    if (index < 0) return;
    const lowbit_rope& rope = plans_.ropes[static_cast<size_t>(index)];
    const int half = rope.rotary_dim / 2;
    const float* cosines = work_.turns.get() + (index * engine_.options.chunk + token) * turn_stride_;
    const float* sines = cosines + half;
    if (rope.pairing == LOWBIT_NEIGHBOURS) {
        for (int i = 0; i < half; ++i) turn_pair(head[2 * i], head[2 * i + 1], cosines[i], sines[i]);
        return;
    }
    isa_.turn(head, head + half, cosines, sines, half);
}

namespace {
void clip_head(float* head, int64_t count, float clip) {
    if (clip > 0.0f)
        for (int64_t i = 0; i < count; ++i) head[i] = std::clamp(head[i], -clip, clip);
}

// The norm of one head among several with a weight each.
lowbit_vector at_head(const lowbit_vector& vector, int64_t place) {
    return {vector.weight ? vector.weight + place : nullptr, vector.bias ? vector.bias + place : nullptr};
}
}  // namespace

// One head of a token as the products left it, clipped.
void Step::read_head(const Member& me, int64_t token, int64_t place, float* to) const {
    isa_.widen(work_.qkv.get(), me.qkv_type, token * plans_.qkv_size + place, model_.head_dim, to);
    clip_head(to, model_.head_dim, model_.clip);
}

// One behind another in `to`, or where they lie if that is NULL, as fp32 then.
void Step::turn_queries(Member& me, int64_t layer, int64_t token, int64_t head_begin, int64_t head_end, float* to) {
    const int64_t size = model_.head_dim;
    const lowbit_vector& vector = plans_.layers[static_cast<size_t>(layer)].vectors[LOWBIT_Q_NORM];
    const float* whole = source_of_heads(me, layer, token, false);
    for (int64_t h = head_begin; h < head_end; ++h) {
        const int64_t place = plans_.q_places[static_cast<size_t>(h)];
        float* out = to ? to + (h - head_begin) * size : work_.qkv.get() + token * plans_.qkv_size + place;
        if (whole) memcpy(out, whole + h * size, static_cast<size_t>(size) * sizeof(float));
        else read_head(me, token, place, out);
        if (model_.qk_norm == LOWBIT_HEAD_NORM) norm(vector, out, size, out);
        if (model_.qk_norm == LOWBIT_HEADS_NORM) norm(at_head(vector, h * size), out, size, out);
        rotate(layer, token, out);
        isa_.scale(out, model_.attention_scale, size, out);
    }
}

void Step::store_heads(Member& me, int64_t layer, int64_t token, int64_t head_begin, int64_t head_end) {
    const int64_t size = model_.head_dim, position = positions_[static_cast<size_t>(token)];
    const lowbit_vector& vector = plans_.layers[static_cast<size_t>(layer)].vectors[LOWBIT_K_NORM];
    const float* whole = source_of_heads(me, layer, token, true);
    float* head = me.room.branch.get();
    const int type = engine_.cache.type(), padded = engine_.cache.padded();
    for (int64_t h = head_begin; h < head_end; ++h) {
        const HeadCache cache = engine_.cache.head(layer, slots_[static_cast<size_t>(token)], h);
        if (whole) memcpy(head, whole + h * size, static_cast<size_t>(size) * sizeof(float));
        else read_head(me, token, plans_.k_places[static_cast<size_t>(h)], head);
        if (model_.qk_norm == LOWBIT_HEAD_NORM) norm(vector, head, size, head);
        if (model_.qk_norm == LOWBIT_HEADS_NORM) norm(at_head(vector, h * size), head, size, head);
        rotate(layer, token, head);
        const float key_scale = isa_.store_key(type, head, model_.head_dim, padded, cache.keys, position);
        read_head(me, token, plans_.v_places[static_cast<size_t>(h)], head);
        const float value_scale = isa_.store_value(type, head, model_.head_dim, padded, cache.values, position);
        if (cache.key_scales) {
            cache.key_scales[position] = key_scale;
            cache.value_scales[position] = value_scale;
        }
    }
}

void Step::prepare_heads(Member& me, int64_t layer, int64_t token) {
    store_heads(me, layer, token, 0, model_.kv_heads);
    if (turns_whole_rows()) turn_queries(me, layer, token, 0, model_.heads, nullptr);
}

namespace {
AttendJob start_job(const lowbit_model& model, const Cache& cache, const HeadCache& head, int64_t window) {
    AttendJob job{};
    job.head_dim = model.head_dim;
    job.padded = cache.padded();
    job.cache_type = cache.type();
    job.keys = head.keys;
    job.values = head.values;
    job.key_scales = head.key_scales;
    job.value_scales = head.value_scales;
    job.window = window;
    job.soft_cap = model.attention_soft_cap;
    return job;
}
}  // namespace

void Step::attend_one(Member& me, int64_t layer, int64_t item) {
    const int64_t split = item % splits_, pair = item / splits_, head = pair % model_.kv_heads, token = pair / model_.kv_heads;
    const int64_t position = positions_[static_cast<size_t>(token)], window = plans_.layers[static_cast<size_t>(layer)].window;
    const int64_t begin = window ? std::max<int64_t>(position - window + 1, 0) : 0, length = position + 1 - begin;
    const auto border = [&](int64_t s) {
        if (s == splits_) return position + 1;
        return std::max(begin, (begin + length * s / splits_) / kKeyBlock * kKeyBlock);
    };
    if (split == splits_ - 1) store_heads(me, layer, token, head, head + 1);
    AttendJob job = start_job(model_, engine_.cache, engine_.cache.head(layer, slots_[static_cast<size_t>(token)], head), window);
    const int64_t group = plans_.group, first_row = item * group;
    turn_queries(me, layer, token, head * group, (head + 1) * group, me.room.queries.get());
    for (int64_t r = 0; r < group; ++r) me.room.positions[r] = position;
    job.queries = me.room.queries.get();
    job.rows = group;
    job.positions = me.room.positions.get();
    job.slopes = model_.alibi ? model_.alibi + head * group : nullptr;
    job.key_begin = border(split);
    job.key_end = border(split + 1);
    job.scores = me.room.scores.get();
    job.room = me.room.bytes.get();
    job.out = splits_ > 1 ? work_.split_out.get() + first_row * job.padded : me.room.out.get();
    job.most = splits_ > 1 ? work_.split_most.get() + first_row : me.room.most.get();
    job.total = splits_ > 1 ? work_.split_total.get() + first_row : me.room.total.get();
    isa_.attend(job);
    if (splits_ > 1) return;
    for (int64_t r = 0; r < group; ++r)
        finish_head(layer, head * group + r, job.out + r * job.padded, job.most[r], job.total[r],
                    work_.attention.get() + token * plans_.q_size + (head * group + r) * model_.head_dim);
}

// The queries of one token that share a key head, turned: only where a norm spans all heads of a token were they turned before.
void Step::gather_queries(Member& me, int64_t layer, int64_t token, int64_t head, float* to) {
    const int64_t group = plans_.group, size = model_.head_dim;
    if (!turns_whole_rows()) return turn_queries(me, layer, token, head * group, (head + 1) * group, to);
    const float* qkv = work_.qkv.get() + token * plans_.qkv_size;
    for (int64_t h = 0; h < group; ++h)
        memcpy(to + h * size, qkv + plans_.q_places[static_cast<size_t>(head * group + h)], static_cast<size_t>(size) * sizeof(float));
}

void Step::attend_tile(Member& me, int64_t layer, const Tile& tile, int64_t head) {
    const int64_t group = plans_.group, size = model_.head_dim;
    const int64_t window = plans_.layers[static_cast<size_t>(layer)].window;
    AttendJob job = start_job(model_, engine_.cache, engine_.cache.head(layer, tile.slot, head), window);
    job.rows = tile.count * group;
    for (int64_t t = 0; t < tile.count; ++t) gather_queries(me, layer, tile.first + t, head, me.room.queries.get() + t * group * size);
    for (int64_t r = 0; r < job.rows; ++r) {
        me.room.positions[r] = tile.position + r / group;
        if (model_.alibi) me.room.slopes[r] = model_.alibi[head * group + r % group];
    }
    job.queries = me.room.queries.get();
    job.positions = me.room.positions.get();
    job.slopes = model_.alibi ? me.room.slopes.get() : nullptr;
    job.key_begin = window ? std::max<int64_t>(tile.position - window + 1, 0) : 0;
    job.key_end = tile.position + tile.count;
    job.scores = me.room.scores.get();
    job.room = me.room.bytes.get();
    job.out = me.room.out.get();
    job.most = me.room.most.get();
    job.total = me.room.total.get();
    isa_.attend(job);
    for (int64_t r = 0; r < job.rows; ++r) {
        const int64_t token = tile.first + r / group, query = head * group + r % group;
        finish_head(layer, query, job.out + r * job.padded, job.most[r], job.total[r], work_.attention.get() + token * plans_.q_size + query * size);
    }
}

void Step::finish_head(int64_t layer, int64_t head, const float* out, float most, float total, float* to) const {
    const float* sinks = plans_.layers[static_cast<size_t>(layer)].vectors[LOWBIT_SINKS].weight;
    if (sinks) total += std::exp(sinks[head] - most);
    const float share = 1.0f / total;
    isa_.scale(out, share, model_.head_dim, to);
}

void Step::merge_splits(const Member& me, int64_t layer, int64_t token, float* to) const {
    const int64_t group = plans_.group, padded = engine_.cache.padded(), size = model_.head_dim;
    float* sum = me.room.branch.get();
    for (int64_t h = 0; h < model_.heads; ++h) {
        const int64_t first = (token * model_.kv_heads + h / group) * splits_ * group + h % group;
        float most = work_.split_most[first], total = 0.0f;
        for (int64_t s = 1; s < splits_; ++s) most = std::max(most, work_.split_most[first + s * group]);
        std::fill(sum, sum + padded, 0.0f);
        for (int64_t s = 0; s < splits_; ++s) {
            const int64_t row = first + s * group;
            const float weight = std::exp(work_.split_most[row] - most);
            total += weight * work_.split_total[row];
            isa_.add_scaled(sum, work_.split_out.get() + row * padded, weight, size);
        }
        finish_head(layer, h, sum, most, total, to + h * size);
    }
}

}  // namespace lowbit
